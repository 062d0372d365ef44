//! Every format that the types allow, and which of them the kernels promise to read.
//!
//! The lists are made by `match`es without a wildcard. So a new variant does not compile until it
//! has a place here, and then it is tested with the others.

use lathe_tensor::{
    Block, Element, FloatType, Format, GgmlType, ScaleType, ScaledFormat, ZeroPoint,
};

use crate::pack::layout::{PanelLayout, Scales};
use crate::pack::layout_of;

fn elements() -> impl Iterator<Item = Element> {
    std::iter::successors(Some(Element::Int(2)), |element| match element {
        Element::Int(8) => Some(Element::F8E4M3),
        Element::Int(bits) => Some(Element::Int(bits + 1)),
        Element::F8E4M3 => Some(Element::F8E5M2),
        Element::F8E5M2 => Some(Element::F6E2M3),
        Element::F6E2M3 => Some(Element::F6E3M2),
        Element::F6E3M2 => Some(Element::F4E2M1),
        Element::F4E2M1 => None,
    })
}

fn blocks() -> impl Iterator<Item = Block> {
    std::iter::successors(Some(Block::Tensor), |block| match block {
        Block::Tensor => Some(Block::Channel),
        Block::Channel => Some(Block::Group(16)),
        Block::Group(256) => Some(Block::Tile(5, 32)),
        Block::Group(n) => Some(Block::Group(2 * n)),
        Block::Tile(_, 128) => None,
        Block::Tile(..) => Some(Block::Tile(128, 128)),
    })
}

fn scale_types() -> impl Iterator<Item = ScaleType> {
    std::iter::successors(Some(ScaleType::F32), |scale| match scale {
        ScaleType::F32 => Some(ScaleType::F16),
        ScaleType::F16 => Some(ScaleType::BF16),
        ScaleType::BF16 => Some(ScaleType::E8M0),
        ScaleType::E8M0 => Some(ScaleType::E4M3Global),
        ScaleType::E4M3Global => None,
    })
}

fn zero_points() -> impl Iterator<Item = ZeroPoint> {
    std::iter::successors(Some(ZeroPoint::None), |zero| match zero {
        ZeroPoint::None => Some(ZeroPoint::Int),
        ZeroPoint::Int => None,
    })
}

fn floats() -> impl Iterator<Item = FloatType> {
    std::iter::successors(Some(FloatType::F32), |kind| match kind {
        FloatType::F32 => Some(FloatType::F16),
        FloatType::F16 => Some(FloatType::BF16),
        FloatType::BF16 => None,
    })
}

/// Every format, with a choice of block sizes.
pub(crate) fn all() -> Vec<Format> {
    let mut all: Vec<Format> = floats().map(Format::Float).collect();
    all.extend(GgmlType::ALL.map(Format::Ggml));
    for element in elements() {
        for block in blocks() {
            for scale in scale_types() {
                let format = |zero| Format::Scaled(ScaledFormat { element, block, scale, zero });
                all.extend(zero_points().map(format));
            }
        }
    }
    all
}

/// Whether the kernels promise to read a format without converting it.
pub(crate) fn is_promised(format: Format) -> bool {
    let Format::Scaled(ScaledFormat { element, block, scale, zero }) = format else { return true };
    let float_scale = matches!(scale, ScaleType::F32 | ScaleType::F16 | ScaleType::BF16);
    let long = !matches!(block, Block::Group(16));
    let mx = scale == ScaleType::E8M0 && matches!(block, Block::Group(32) | Block::Tile(_, 32));
    match element {
        Element::Int(4 | 8) => float_scale && long,
        Element::Int(_) => false,
        Element::F8E4M3 | Element::F8E5M2 | Element::F6E2M3 | Element::F6E3M2 => {
            zero == ZeroPoint::None && (float_scale && long || mx)
        }
        Element::F4E2M1 => {
            let nv = scale == ScaleType::E4M3Global && block == Block::Group(16);
            zero == ZeroPoint::None && (mx || nv)
        }
    }
}

/// The formats that kernels read without converting them.
pub(crate) fn promised() -> Vec<Format> {
    all().into_iter().filter(|format| is_promised(*format)).collect()
}

/// One format for each layout of panels.
pub(crate) fn layouts() -> Vec<Format> {
    one_of_each(|layout| layout)
}

/// One format for each kernel. The size of a group and the type of its scales are arguments of a
/// kernel and do not choose it.
pub(crate) fn kernels() -> Vec<Format> {
    one_of_each(|layout| match layout {
        PanelLayout::Coded(codes, Scales::Group { zeros, .. }) => {
            PanelLayout::Coded(codes, Scales::Group { segments: 2, kind: ScaleType::F32, zeros })
        }
        layout => layout,
    })
}

fn one_of_each(class: impl Fn(PanelLayout) -> PanelLayout) -> Vec<Format> {
    let mut seen = Vec::new();
    let mut formats = promised();
    formats.retain(|format| {
        let class = class(layout_of(*format, 512).expect("a promised format has a layout"));
        let new = !seen.contains(&class);
        if new {
            seen.push(class);
        }
        new
    });
    formats
}

//! What a group of a compressed-tensors configuration says of weights: the parts that they lie in,
//! and what a code means.

use lathe_tensor::{Block, Element, ZeroPoint};
use serde_json::Value;

use super::naming::Naming;
use crate::config::Config;
use crate::spec::SpecError;

pub(super) static NAMING: Naming = Naming {
    whole: "weight",
    codes: &["weight_packed"],
    beside: &[
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_global_scale",
        "weight_g_idx",
        "input_scale",
        "input_zero_point",
        "input_global_scale",
    ],
};

/// How one module's weight lies in the files: compressed-tensors' `format`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Encoding {
    /// Integers in words of 32 bits.
    PackQuantized,
    /// Integers of eight bits, one a byte.
    IntQuantized,
    /// fp8 e4m3.
    FloatQuantized,
    /// fp8 e4m3 or integers of eight bits: whatever the scheme says.
    NaiveQuantized,
    /// fp4 in groups of 32 with powers of two.
    Mxfp4,
    /// fp6 e2m3 in groups of 32 with powers of two.
    Mxfp6,
    /// fp8 e4m3 in groups of 32 with powers of two.
    Mxfp8,
    /// fp4 in groups of 16 with e4m3 scales and one `f32` a matrix.
    Nvfp4,
}

impl Encoding {
    const ALL: [Encoding; 8] = [
        Encoding::PackQuantized,
        Encoding::IntQuantized,
        Encoding::FloatQuantized,
        Encoding::NaiveQuantized,
        Encoding::Mxfp4,
        Encoding::Mxfp6,
        Encoding::Mxfp8,
        Encoding::Nvfp4,
    ];

    /// The name in a configuration.
    pub const fn name(self) -> &'static str {
        match self {
            Encoding::PackQuantized => "pack-quantized",
            Encoding::IntQuantized => "int-quantized",
            Encoding::FloatQuantized => "float-quantized",
            Encoding::NaiveQuantized => "naive-quantized",
            Encoding::Mxfp4 => "mxfp4-pack-quantized",
            Encoding::Mxfp6 => "mxfp6-pack-quantized",
            Encoding::Mxfp8 => "mxfp8-quantized",
            Encoding::Nvfp4 => "nvfp4-pack-quantized",
        }
    }
}

/// The full name of what belongs to weight `name` under `ending`, such as `weight_scale`.
pub(crate) fn part_of(name: &str, ending: &str) -> String {
    NAMING.part(name, ending)
}

/// The top `format` of a configuration whose groups have formats of their own.
pub(crate) const MIXED: &str = "mixed-precision";

/// What a group says of its weights. The type of scales that are plain floats is the file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// How they lie.
    pub encoding: Encoding,
    /// What a code means.
    pub element: Element,
    /// What shares a scale.
    pub block: Block,
    /// Whether codes are shifted.
    pub zero: ZeroPoint,
    /// Whether columns have groups in the order of their activations, which `weight_g_idx` gives.
    pub ordered: bool,
}

pub(super) fn refuse<T>(what: impl std::fmt::Display) -> Result<T, SpecError> {
    Err(SpecError::feature(format!("compressed-tensors {what}")))
}

impl Scheme {
    /// What `group` says, in a configuration whose own format is `top`.
    ///
    /// # Errors
    /// If it asks for something that is not supported, which the error names.
    pub(super) fn of_group(group: &Config<'_>, top: &str) -> Result<Self, SpecError> {
        if group.get("output_activations").is_some() {
            return refuse("output_activations");
        }
        let Some(weights) = group.object("weights")? else {
            return refuse("group without weights");
        };
        let name = match group.text("format")? {
            Some(own) => own,
            None if top == MIXED => return refuse("group without a format in a mixed one"),
            None => top,
        };
        let Some(encoding) = Encoding::ALL.into_iter().find(|it| it.name() == name) else {
            return refuse(format!("format `{name}`"));
        };
        let kind = weights.text("type")?.unwrap_or("int");
        let bits = weights.size("num_bits")?.unwrap_or(8);
        let symmetric = weights.flag("symmetric")?.unwrap_or(true);
        let zero = if symmetric { ZeroPoint::None } else { ZeroPoint::Int };
        let block = block_of(&weights)?;
        let element = match (encoding, kind, bits) {
            (Encoding::PackQuantized, "int", 4 | 8) => Element::Int(bits as u8),
            // Fewer bits lie in a byte all the same.
            (Encoding::IntQuantized | Encoding::NaiveQuantized, "int", 2..=8) => Element::Int(8),
            (Encoding::FloatQuantized | Encoding::NaiveQuantized, "float", 8) => Element::F8E4M3,
            (Encoding::Mxfp8, "float", 8) => Element::F8E4M3,
            (Encoding::Mxfp6, "float", 6) => Element::F6E2M3,
            (Encoding::Mxfp4 | Encoding::Nvfp4, "float", 4) => Element::F4E2M1,
            _ => return refuse(format!("{name} weights of type `{kind}` of {bits} bits")),
        };
        let block_fits = match encoding {
            Encoding::PackQuantized => matches!(block, Block::Group(_) | Block::Channel),
            Encoding::Mxfp4 | Encoding::Mxfp6 | Encoding::Mxfp8 => block == Block::Group(32),
            Encoding::Nvfp4 => block == Block::Group(16),
            _ => true,
        };
        if !block_fits {
            let strategy = weights.text("strategy")?.unwrap_or("(none given)");
            return refuse(format!("{name} weights with strategy `{strategy}` ({block:?})"));
        }
        if !symmetric && !matches!(element, Element::Int(_)) {
            return refuse(format!("{name} weights with zero points"));
        }
        let ordered = match weights.get("actorder") {
            None | Some(Value::Bool(false)) => false,
            Some(Value::String(order)) if matches!(order.as_str(), "weight" | "static") => false,
            Some(Value::Bool(true)) => true,
            Some(Value::String(order)) if matches!(order.as_str(), "group" | "dynamic") => true,
            Some(other) => return refuse(format!("actorder {other}")),
        };
        Ok(Scheme { encoding, element, block, zero, ordered })
    }
}

/// What shares a scale, by `strategy`, `group_size` and `block_structure`.
fn block_of(weights: &Config<'_>) -> Result<Block, SpecError> {
    let size = weights.get("group_size").and_then(Value::as_i64);
    let structure = match weights.get("block_structure") {
        // Older files write "128x128".
        Some(Value::String(text)) => text
            .split_once('x')
            .and_then(|(rows, columns)| Some(vec![rows.parse().ok()?, columns.parse().ok()?])),
        _ => weights.sizes("block_structure")?,
    };
    match (weights.text("strategy")?, size, structure.as_deref()) {
        (Some("group" | "tensor_group") | None, Some(size @ 1..=65536), _) => {
            Ok(Block::Group(size as u32))
        }
        (Some("channel"), ..) | (None, Some(-1), _) => Ok(Block::Channel),
        (Some("tensor"), ..) | (None, None, _) => Ok(Block::Tensor),
        (Some("block"), _, Some(&[rows @ 1..=65536, columns @ 1..=65536])) => {
            Ok(Block::Tile(rows as u32, columns as u32))
        }
        (strategy, size, structure) => {
            let strategy = strategy.unwrap_or("(none given)");
            refuse(format!("strategy `{strategy}` with group size {size:?}, block {structure:?}"))
        }
    }
}

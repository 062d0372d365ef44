//! Formats whose codes and scales lie in planes of their own, placed in chunks.
//!
//! A group's scale keeps the checkpoint's type. Scales that more than 256 positions share (a
//! channel, a tensor, tiles of 128 x 128) are repeated: every 256 positions, or at the group's end.
//! fp6 codes become the e4m3 codes of the same numbers: of all 64 both have each.

use std::ops::Range;

use lathe_program::BackendError;
use lathe_tensor::{Block, Element, ScaleType, ScaledFormat, Tensor, ZeroPoint, codec};

use super::PANEL;
use super::layout::{Codes, Layout, SEGMENT, Scales};
use super::place::{place_codes, place_lane, plane};

/// Segments that share a stored scale, at most.
const GROUP_SEGMENTS_MAX: usize = 8;

/// The layout of a format, or why there is none.
pub(crate) fn layout(format: &ScaledFormat, columns: usize) -> Result<Layout, BackendError> {
    let refuse = |what: &str| {
        let name = lathe_tensor::Format::Scaled(*format);
        Err(BackendError::Unsupported { backend: "cpu", feature: format!("{what} ({name})") })
    };
    let codes = match format.element {
        Element::Int(4) => Codes::Signed4,
        Element::Int(8) => Codes::Signed8,
        Element::F4E2M1 => Codes::E2m1,
        Element::F8E4M3 | Element::F6E2M3 | Element::F6E3M2 => Codes::F8E4m3,
        Element::F8E5M2 => Codes::F8E5m2,
        _ => return refuse("weights of these elements"),
    };
    let group = match format.block {
        Block::Group(n) | Block::Tile(_, n) => n as usize,
        Block::Tensor | Block::Channel => {
            columns.max(1).next_multiple_of(SEGMENT * GROUP_SEGMENTS_MAX)
        }
    };
    let fp4 = codes == Codes::E2m1;
    let scales = match (format.scale, group) {
        (kind @ ScaleType::E8M0, 32) if codes.is_float() => {
            Scales::Group { segments: 1, kind, zeros: false }
        }
        (ScaleType::E8M0, 32) if fp4 => Scales::E8m0,
        (ScaleType::E4M3Global, 16) if fp4 => Scales::E4m3,
        (kind @ (ScaleType::F32 | ScaleType::F16 | ScaleType::BF16), n)
            if n % SEGMENT == 0 && !fp4 =>
        {
            let segments = common(n / SEGMENT, GROUP_SEGMENTS_MAX);
            Scales::Group { segments, kind, zeros: format.zero == ZeroPoint::Int }
        }
        _ => return refuse("scales in groups of this size and type"),
    };
    let shifted = format.zero == ZeroPoint::Int;
    if shifted && (codes.is_float() || !matches!(scales, Scales::Group { .. })) {
        return refuse("zero points beside elements and scales of these types");
    }
    Ok(Layout::Coded(codes, scales))
}

/// The largest divisor of `n` that is a power of two up to `most`.
fn common(n: usize, most: usize) -> usize {
    (1 << n.trailing_zeros()).min(most)
}

/// Writes a panel from rows `rows` (at most sixteen) of `tensor`.
pub(crate) fn place_panel(
    tensor: &Tensor,
    format: &ScaledFormat,
    layout: Layout,
    rows: Range<usize>,
    out: &mut [u8],
) {
    let Layout::Coded(codes, scales) = layout else { return };
    let Some(grid) = format.grid(&tensor.shape) else { return };
    if codes.is_float() {
        return place_float_panel(tensor, format, layout, rows, out);
    }
    let (bits, columns) = (format.element.bits(), tensor.columns());
    let row_bytes = (columns * bits).div_ceil(8);
    let segment_bytes = layout.segment_bytes();
    let chunk_len = layout.chunk_segments() * SEGMENT;
    for (index, chunk) in out.chunks_exact_mut(layout.chunk_bytes()).enumerate() {
        let (segments, tail) = chunk.split_at_mut(layout.chunk_segments() * segment_bytes);
        for (s, segment) in segments.chunks_exact_mut(segment_bytes).enumerate() {
            let first = index * chunk_len + s * SEGMENT;
            let mut words = [[0u32; PANEL]; 8];
            for (lane, row) in rows.clone().enumerate() {
                let source = &tensor.codes[row * row_bytes..][..row_bytes];
                for (words, word) in words.iter_mut().zip(segment_words(source, codes, bits, first))
                {
                    words[lane] = word;
                }
            }
            place_codes(codes, &words, segment);
        }
        for (lane, row) in rows.clone().enumerate() {
            let block = |column: usize| grid.row_start(row) + column / grid.block_columns;
            place_scales(tensor, scales, index * chunk_len, &block, lane, tail);
        }
    }
}

/// [`place_panel`] of floats of eight bits or less.
fn place_float_panel(
    tensor: &Tensor,
    format: &ScaledFormat,
    layout: Layout,
    rows: Range<usize>,
    out: &mut [u8],
) {
    let Layout::Coded(codes, scales) = layout else { return };
    let Some(grid) = format.grid(&tensor.shape) else { return };
    let (bits, columns) = (format.element.bits(), tensor.columns());
    let recoded: Option<[u8; 64]> = (bits == 6).then(|| {
        let number = |code: usize| codec::element::to_f32(format.element, code as u8);
        std::array::from_fn(|code| codec::element::from_f32(Element::F8E4M3, number(code)))
    });
    let row_bytes = (columns * bits).div_ceil(8);
    let chunk_len = layout.chunk_segments() * SEGMENT;
    for (index, chunk) in out.chunks_exact_mut(layout.chunk_bytes()).enumerate() {
        let (positions, tail) = chunk.split_at_mut(chunk_len * PANEL);
        let first = index * chunk_len;
        let count = columns.saturating_sub(first).min(chunk_len);
        for (lane, row) in rows.clone().enumerate() {
            let source = &tensor.codes[row * row_bytes..][..row_bytes];
            for k in 0..count {
                positions[k * PANEL + lane] = match &recoded {
                    Some(recoded) => {
                        recoded[usize::from(codec::scaled::unpack(source, first + k, bits))]
                    }
                    None => source[first + k],
                };
            }
            let block = |column: usize| grid.row_start(row) + column / grid.block_columns;
            place_scales(tensor, scales, first, &block, lane, tail);
            // Kernels read the codes of NaN as numbers: a NaN for a scale gives the same sum.
            let mut written = positions.iter().skip(lane).step_by(PANEL);
            if codes == Codes::F8E4m3 && written.any(|code| code & 0x7f == 0x7f) {
                place_nan(scales, lane, tail);
            }
        }
    }
}

/// Makes the scale of a chunk's lane a NaN (or the infinity that E8M0's NaN is decoded to).
fn place_nan(scales: Scales, lane: usize, tail: &mut [u8]) {
    let Scales::Group { kind, .. } = scales else { return };
    match kind {
        ScaleType::F32 => place_lane(f32::NAN.to_le_bytes(), lane, tail),
        ScaleType::F16 => place_lane(half::f16::NAN.to_le_bytes(), lane, tail),
        ScaleType::BF16 => place_lane(half::bf16::NAN.to_le_bytes(), lane, tail),
        ScaleType::E8M0 | ScaleType::E4M3Global => place_lane([0xff], lane, tail),
    }
}

/// The unsigned codes (or table indexes) of positions `first..first + 32`; zero past the end.
fn segment_words(source: &[u8], codes: Codes, bits: usize, first: usize) -> [u32; 8] {
    let from = (first * bits / 8).min(source.len());
    let rest = &source[from..];
    let mut bytes = [0u8; SEGMENT];
    let count = rest.len().min(SEGMENT * bits / 8);
    bytes[..count].copy_from_slice(&rest[..count]);
    let word = |at: usize| u32::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
    match codes {
        Codes::Signed8 => std::array::from_fn(|j| word(4 * j) ^ 0x8080_8080),
        // Nibbles lie low first along the row; bytes 2j and 2j + 1 hold codes 4j..4j + 4.
        _ => std::array::from_fn(|j| {
            let (a, b) = (u32::from(bytes[2 * j]), u32::from(bytes[2 * j + 1]));
            let spread = a & 15 | (a >> 4) << 8 | (b & 15) << 16 | (b >> 4) << 24;
            if codes == Codes::Signed4 { spread ^ 0x0808_0808 } else { spread }
        }),
    }
}

/// Places the scales of the chunk that begins at column `first`; past the end they stay zero.
fn place_scales(
    tensor: &Tensor,
    scales: Scales,
    first: usize,
    block: &dyn Fn(usize) -> usize,
    lane: usize,
    tail: &mut [u8],
) {
    let columns = tensor.columns();
    if first >= columns {
        return;
    }
    let bytes = &tensor.scales;
    match scales {
        Scales::E8m0 => place_lane([bytes[block(first)]], lane, tail),
        Scales::E4m3 => {
            place_lane([bytes[block(first)]], lane, tail);
            if first + 16 < columns {
                place_lane([bytes[block(first + 16)]], lane, plane(tail, 1));
            }
        }
        Scales::Group { kind, zeros, .. } => {
            let index = block(first);
            match kind.bytes() {
                1 => place_lane([bytes[index]], lane, tail),
                2 => place_lane([bytes[2 * index], bytes[2 * index + 1]], lane, tail),
                _ => {
                    let at = 4 * index;
                    let value = [bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]];
                    place_lane(value, lane, tail);
                }
            }
            if zeros {
                place_lane([tensor.zeros[index]], lane, plane(tail, kind.bytes()));
            }
        }
        _ => {}
    }
}

//! Places formats whose codes and scales lie in planes of their own.
//!
//! A group's scale keeps the checkpoint's type. Scales that more than 256 positions share (a
//! channel, a tensor, tiles of 128 x 128) are repeated every 256 positions, or at the end of the
//! group. fp6 codes become e4m3 codes. Both formats have all 64 numbers of fp6.

use std::ops::Range;

use lathe_program::BackendError;
use lathe_tensor::{Block, Element, Format, ScaleType, ScaledFormat, Tensor, ZeroPoint, codec};

use super::PANEL;
use super::layout::{Codes, PanelLayout, Scales};
use super::place::{place_lane, place_nibbles, plane};
use super::words::{LOW4, ONES, RowPointers, Words, load8, prefetch};
use crate::isa::SEGMENT;

/// The most segments that share a stored scale.
const GROUP_SEGMENTS_MAX: usize = 8;

/// The layout of a format, or why there is none.
pub(crate) fn layout(format: &ScaledFormat, columns: usize) -> Result<PanelLayout, BackendError> {
    let refuse = |what: &str| {
        let name = Format::Scaled(*format);
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
    Ok(PanelLayout::Coded(codes, scales))
}

/// The largest power of two that divides `n` and is at most `most`.
fn common(n: usize, most: usize) -> usize {
    (1 << n.trailing_zeros()).min(most)
}

/// Writes a panel from rows `rows` (at most sixteen) of `tensor`.
///
/// # Safety
/// The machine has `W`'s features.
#[inline(always)]
pub(crate) unsafe fn place_panel<W: Words>(
    tensor: &Tensor,
    layout: PanelLayout,
    rows: Range<usize>,
    out: &mut [u8],
) {
    let (Format::Scaled(format), PanelLayout::Coded(codes, scales)) = (tensor.format, layout)
    else {
        return;
    };
    let Some(grid) = format.grid(&tensor.shape) else { return };
    if codes.is_float() {
        return place_float_panel(tensor, &format, layout, rows, out);
    }
    let (bits, columns) = (format.element.bits(), tensor.columns());
    let row_bytes = (columns * bits).div_ceil(8);
    let zeros = vec![0; row_bytes];
    let mut pointers = [zeros.as_ptr(); PANEL];
    for (pointer, row) in pointers.iter_mut().zip(rows.clone()) {
        *pointer = tensor.codes[row * row_bytes..][..row_bytes].as_ptr();
    }
    let next = tensor.codes[rows.end * row_bytes..].as_ptr();
    let (whole, bytes) = (columns / SEGMENT, SEGMENT * bits / 8);
    let (chunk_segments, segment_bytes) = (layout.chunk_segments(), layout.segment_bytes());
    for (index, chunk) in out.chunks_exact_mut(layout.chunk_bytes()).enumerate() {
        let (segments, tail) = chunk.split_at_mut(chunk_segments * segment_bytes);
        for (s, segment) in segments.chunks_exact_mut(segment_bytes).enumerate() {
            let number = index * chunk_segments + s;
            let at = number * bytes;
            prefetch(next.wrapping_add(at * PANEL), bytes * PANEL);
            // SAFETY: whole segments lie within the rows, the others in a copy of what is left.
            unsafe {
                if number < whole {
                    place_segment::<W>(codes, &pointers, at, segment.as_mut_ptr());
                } else {
                    let padded = padded(&pointers, row_bytes, at);
                    let rows = std::array::from_fn(|lane| padded[lane].as_ptr());
                    place_segment::<W>(codes, &rows, 0, segment.as_mut_ptr());
                }
            }
        }
        for (lane, row) in rows.clone().enumerate() {
            let block = |column: usize| grid.row_start(row) + column / grid.block_columns;
            place_scales(tensor, scales, index * chunk_segments * SEGMENT, &block, lane, tail);
        }
    }
}

/// The rest of each row from byte `at` on, padded with zeros.
///
/// # Safety
/// Rows have `row_bytes` bytes.
unsafe fn padded(rows: &RowPointers, row_bytes: usize, at: usize) -> [[u8; SEGMENT]; PANEL] {
    let mut all = [[0; SEGMENT]; PANEL];
    let count = row_bytes.saturating_sub(at).min(SEGMENT);
    for (padded, row) in all.iter_mut().zip(rows) {
        for (i, byte) in padded[..count].iter_mut().enumerate() {
            // SAFETY: within the row.
            *byte = unsafe { *row.add(at + i) };
        }
    }
    all
}

/// Writes a segment from the 32 codes at byte `at` of each row.
///
/// # Safety
/// Rows have them, `out` has room for a segment, the machine has `W`'s features.
#[inline(always)]
unsafe fn place_segment<W: Words>(codes: Codes, rows: &RowPointers, at: usize, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        if codes == Codes::Signed8 {
            let words = load8::<W>(rows, at);
            for j in 0..8 {
                words[j].xor(W::splat(0x8080_8080)).store(out.add(64 * j));
            }
            return;
        }
        // The low nibble comes first along the row, so each half of a word has four codes.
        let words = W::load4(rows, at);
        let zero = W::splat(if codes == Codes::Signed4 { 8 * ONES } else { 0 });
        let mut spread = [zero; 8];
        for j in 0..8 {
            let half = words[j / 2].right(16 * (j as u32 % 2)).and(W::splat(0xffff));
            let bytes = half.or(half.left(8)).and(W::splat(0x00ff_00ff));
            spread[j] = bytes.or(bytes.left(4)).and(W::splat(LOW4)).xor(zero);
        }
        place_nibbles(&spread, out);
    }
}

/// [`place_panel`] of floats of eight bits or less.
fn place_float_panel(
    tensor: &Tensor,
    format: &ScaledFormat,
    layout: PanelLayout,
    rows: Range<usize>,
    out: &mut [u8],
) {
    let PanelLayout::Coded(codes, scales) = layout else { return };
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
            // Kernels read the codes of NaN as numbers. A NaN as the scale makes the sum a NaN.
            let mut written = positions.iter().skip(lane).step_by(PANEL);
            if codes == Codes::F8E4m3 && written.any(|code| code & 0x7f == 0x7f) {
                place_nan(scales, lane, tail);
            }
        }
    }
}

/// Makes the scale of a chunk's lane a NaN. E8M0's NaN is decoded to an infinity, which serves too.
fn place_nan(scales: Scales, lane: usize, tail: &mut [u8]) {
    let Scales::Group { kind, .. } = scales else { return };
    match kind {
        ScaleType::F32 => place_lane(f32::NAN.to_le_bytes(), lane, tail),
        ScaleType::F16 => place_lane(half::f16::NAN.to_le_bytes(), lane, tail),
        ScaleType::BF16 => place_lane(half::bf16::NAN.to_le_bytes(), lane, tail),
        ScaleType::E8M0 | ScaleType::E4M3Global => place_lane([0xff], lane, tail),
    }
}

/// Places the scales of the chunk that begins at column `first`. Scales past the end stay zero.
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

//! A block: up to sixteen rows of activations that kernels multiply together.

use crate::isa::SEGMENT;

/// Rows in a block: the rows of an AMX tile, and what AVX-512's registers hold.
pub(crate) const BLOCK: usize = 16;
/// Bytes of a row's segment of codes: the high bytes and then the low bytes, or words.
pub(crate) const CODE_BYTES: usize = 2 * SEGMENT;
/// Bytes of a tile of weights: a segment of a panel.
pub(crate) const TILE_BYTES: usize = 1024;

/// The planes of one block, from one of its rows on. Segments are `stride` rows apart.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BlockView {
    /// Rows from one segment to the next.
    pub(crate) stride: usize,
    /// The operand's segments.
    pub(crate) x: *const u8,
    /// Codes: `[segments][stride]` scales.
    pub(crate) scales: *const f32,
    /// Codes: `[segments][stride]` scale x sum of codes.
    pub(crate) sums: *const f32,
    /// Codes: `[segments][parts][stride]` `-zero * sum of codes`.
    pub(crate) offsets: *const i32,
}

impl BlockView {
    /// The view `segments` further along k. A row's segment of the operand has `BYTES` bytes, and
    /// the matrix has `parts` scales a segment.
    #[inline(always)]
    pub(crate) fn after<const BYTES: usize>(self, segments: usize, parts: usize) -> BlockView {
        let rows = segments * self.stride;
        BlockView {
            stride: self.stride,
            x: self.x.wrapping_add(BYTES * rows),
            scales: self.scales.wrapping_add(rows),
            sums: self.sums.wrapping_add(rows),
            offsets: self.offsets.wrapping_add(parts * rows),
        }
    }
}

/// The number of rows that a block of `rows` is padded to. Kernels exist for these numbers only.
pub(crate) fn padded_rows(rows: usize) -> usize {
    match rows {
        0..=2 => rows,
        3..=4 => 4,
        5..=6 => 6,
        7..=8 => 8,
        9..=12 => 12,
        _ => 16,
    }
}

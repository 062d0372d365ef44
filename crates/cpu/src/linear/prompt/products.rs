//! What multiplies tiles of `bf16` pairs.

use super::super::block::BLOCK;
use crate::pack::PANEL;

/// Floats of a tile of sums.
pub(super) const SUMS: usize = BLOCK * PANEL;

/// What multiplies blocks of sixteen rows by panels of sixteen outputs.
pub(super) trait Products {
    /// Before the first product of a run of them.
    ///
    /// # Safety
    /// The instructions are available; [`Products::release`] follows on this thread.
    unsafe fn configure();

    /// After the last.
    ///
    /// # Safety
    /// As [`Products::configure`].
    unsafe fn release();

    /// One block and one or two panels: sums are `[panels][16][16]`.
    ///
    /// # Safety
    /// Configured; `sums` has so many tiles and the operands all segments.
    unsafe fn one_block(run: &TileOperands, sums: *mut f32, panels: usize);

    /// Two blocks of sixteen slots and two panels: sums are `[blocks][panels][16][16]`.
    ///
    /// # Safety
    /// As [`Products::one_block`].
    unsafe fn two_by_two(run: &TileOperands, sums: *mut f32);
}

/// The operands of one run of products.
pub(super) struct TileOperands {
    /// The first segment of each block of rows.
    pub(super) rows: [*const u8; 2],
    /// Bytes from a block's segment to the next.
    pub(super) rows_step: usize,
    /// The first segment of each panel.
    pub(super) weights: [*const u8; 2],
    pub(super) segments: usize,
    /// Whether the sums start from zero.
    pub(super) fresh: bool,
}

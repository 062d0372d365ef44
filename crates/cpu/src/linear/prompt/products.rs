//! The instructions that multiply tiles of `bf16` pairs, behind one trait.

use super::super::block::BLOCK;
use crate::pack::PANEL;

/// Floats of a tile of sums.
pub(super) const SUMS: usize = BLOCK * PANEL;

/// Multiplies blocks of sixteen rows by panels of sixteen outputs.
pub(super) trait Products {
    /// Must be called before the first product.
    ///
    /// # Safety
    /// The instructions are available; [`Products::release`] follows on this thread.
    unsafe fn configure();

    /// Must be called after the last product.
    ///
    /// # Safety
    /// As [`Products::configure`].
    unsafe fn release();

    /// Multiplies one block by one or two panels. The sums are `[panels][16][16]`.
    ///
    /// # Safety
    /// Configured; `sums` has so many tiles and the operands all segments.
    unsafe fn one_block(run: &TileOperands, sums: *mut f32, panels: usize);

    /// Multiplies two blocks of sixteen slots by two panels. The sums are
    /// `[blocks][panels][16][16]`.
    ///
    /// # Safety
    /// As [`Products::one_block`].
    unsafe fn two_by_two(run: &TileOperands, sums: *mut f32);
}

/// The operands of one run of products.
pub(super) struct TileOperands {
    /// The first segment of each block of rows.
    pub(super) rows: [*const u8; 2],
    /// Bytes from a segment of a block to its next segment.
    pub(super) rows_step: usize,
    /// The first segment of each panel.
    pub(super) weights: [*const u8; 2],
    pub(super) segments: usize,
    /// Whether the sums start from zero.
    pub(super) fresh: bool,
}

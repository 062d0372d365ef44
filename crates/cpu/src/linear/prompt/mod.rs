//! Products of rows in the prefill form: `bf16` activations times `bf16` weights.
//!
//! A packed panel of `bf16` weights is a run of tiles as it lies in memory: a segment is 16 pairs
//! of positions x 16 lanes, 1 KB. Codes of other formats are decoded to such tiles ([`weights`])
//! once for a pass of rows. AMX multiplies the tiles ([`tiles`]), or AVX-512's dots of pairs do
//! ([`dots`]).
//!
//! A program with routers may send a token to another expert because of a small error. With AMX its
//! rows are multiplied in two parts: the nearest `bf16`, and what that leaves. With dots two parts
//! would cost as much as `f32`, so there such a program's rows have no prefill form.
//!
//! Cost with AMX: two blocks of rows and two panels load four tiles for four products of 16 cycles.
//! Activations and weights should lie in the second-level cache. From the third-level cache
//! products run at half that speed. So a pass has as many rows as fit the second-level cache with
//! all of k, or with a slice of 64 segments (256 rows). Sums stay in registers for all of k or for
//! a slice. docs/performance-notes.md has the measurements.
//!
//! Invariant (batch invariance): the terms of a row's sum are added in the order of the segments,
//! whatever rows lie beside it in the tile. Tiles always have sixteen rows. Rows past the end of
//! the block are computed from whatever lies there, and thrown away.

mod dots;
mod products;
mod tiles;
pub(crate) mod weights;

use std::arch::x86_64::*;
use std::ops::Range;

use super::activations::{Activations, TILE_PANELS, TILE_ROWS, TILE_SEGMENTS, TileScratch};
use super::block::{BLOCK, TILE_BYTES};
use super::matrix::Matrix;
use super::output::Output;
use super::table::{Prompt, TileInstructions, ToTilesFn};
use crate::pack::PANEL;
use dots::Dots;
use products::{Products, SUMS, TileOperands};
use tiles::TileProducts;

/// The number of blocks of rows in a pass, if there are `blocks` in all. The passes are as long as
/// the cache allows and about equally long.
pub(super) fn pass_blocks(segments: usize, parts: usize, blocks: usize) -> usize {
    let most = TILE_ROWS * TILE_SEGMENTS / (BLOCK * slice_segments(segments) * parts);
    let passes = blocks.div_ceil(most.max(2)).max(1);
    blocks.div_ceil(passes).next_multiple_of(2)
}

/// The number of segments in a slice of k, if there are `segments` in all. Slices are whole chunks
/// of every format.
fn slice_segments(segments: usize) -> usize {
    let slices = segments.div_ceil(TILE_SEGMENTS).max(1);
    segments.div_ceil(slices).next_multiple_of(8)
}

/// Multiplies one pass of rows in the prefill form (the slots of `blocks`, see [`pass_blocks`]) by
/// `panels`, as `prompt` says.
///
/// # Safety
/// The products' instructions are available, the activations serve the matrix, `out` is
/// `[rows, out]`, and nobody else touches `scratch` and the elements of these rows and panels.
pub(super) unsafe fn multiply(
    prompt: Prompt,
    matrix: &Matrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
    scratch: TileScratch,
) {
    if panels.is_empty() || blocks.is_empty() {
        return;
    }
    let slice = slice_segments(matrix.packed.segments());
    let to_tiles = prompt.to_tiles;
    let job = Job { matrix, to_tiles, activations, blocks, out, scratch, slice };
    // SAFETY: as the caller promises.
    unsafe {
        match prompt.products {
            TileInstructions::Amx => multiply_by::<TileProducts>(&job, panels),
            TileInstructions::Dots => multiply_by::<Dots>(&job, panels),
        }
    }
}

/// Multiplies a job's blocks by `panels`.
///
/// # Safety
/// As [`multiply`].
unsafe fn multiply_by<P: Products>(job: &Job<'_>, panels: Range<usize>) {
    let at_once = if job.slice < job.matrix.segments() { TILE_PANELS } else { 2 };
    // SAFETY: as the caller promises.
    unsafe {
        P::configure();
        for first in panels.clone().step_by(at_once) {
            job.panels::<P>(first..panels.end.min(first + at_once));
        }
        P::release();
    }
}

struct Job<'a> {
    matrix: &'a Matrix,
    to_tiles: Option<ToTilesFn>,
    activations: &'a Activations,
    /// The blocks of one pass.
    blocks: Range<usize>,
    out: &'a Output<'a>,
    /// Sums are `[pairs of panels][pairs of blocks][2 blocks][2 panels][16][16]`.
    scratch: TileScratch,
    /// Segments of a slice.
    slice: usize,
}

impl Job<'_> {
    /// The sums of a pair of blocks and a pair of panels. Both are counted from the first of those
    /// that are multiplied at once.
    fn sums(&self, block: usize, panel: usize) -> *mut f32 {
        if self.slice >= self.matrix.segments() {
            // These sums are written to `out` at once, so one place is enough.
            return self.scratch.sums;
        }
        let pairs = self.blocks.len().div_ceil(2);
        self.scratch.sums.wrapping_add((panel / 2 * pairs + block / 2) * 4 * SUMS)
    }

    /// Multiplies the blocks by `panels`, one slice of k after another.
    ///
    /// # Safety
    /// As [`multiply`], with products configured; the scratch has the sums of so many
    /// panels.
    unsafe fn panels<P: Products>(&self, panels: Range<usize>) {
        let total = self.matrix.segments();
        for first in (0..total).step_by(self.slice) {
            let segments = first..total.min(first + self.slice);
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                // SAFETY: as the caller promises.
                unsafe {
                    let weights = self.weights(pair.clone(), segments.clone());
                    self.blocks::<P>(weights, pair, panels.start, segments.clone());
                }
            }
        }
    }

    /// The tiles of `segments` of up to two panels: where they lie in memory, or decoded to the
    /// scratch.
    ///
    /// # Safety
    /// As [`multiply`].
    unsafe fn weights(&self, panels: Range<usize>, segments: Range<usize>) -> [*const u8; 2] {
        let Some(to_tiles) = self.to_tiles else {
            return [panels.start, panels.end - 1]
                .map(|panel| self.matrix.packed.segment(panel, segments.start));
        };
        let places =
            [0, 1].map(|i| self.scratch.weights.wrapping_add(i * TILE_SEGMENTS * TILE_BYTES));
        for (panel, place) in panels.zip(places) {
            let packed = self.matrix.packed.segment(panel, segments.start);
            // SAFETY: as the caller promises; a place has room for a slice.
            unsafe { to_tiles(packed, segments.len(), &self.matrix.packed.constants, place) };
        }
        places.map(<*mut u8>::cast_const)
    }

    /// Adds the products of `segments` of one or two panels to all blocks, two at a time.
    ///
    /// # Safety
    /// As [`multiply`]; `weights` has the tiles of the segments of each of `pair`; the
    /// panels at once begin with `first_panel`.
    unsafe fn blocks<P: Products>(
        &self,
        weights: [*const u8; 2],
        pair: Range<usize>,
        first_panel: usize,
        segments: Range<usize>,
    ) {
        let parts = self.activations.tile_parts();
        let (panels, panel) = (pair.len(), pair.start - first_panel);
        let slots = self.activations.tiled_rows();
        let whole = |block: usize| block < self.blocks.end && (block + 1) * BLOCK <= slots;
        for block in self.blocks.clone().step_by(2) {
            let last = self.blocks.end - 1;
            let sums = self.sums(block - self.blocks.start, panel);
            for part in 0..parts {
                let [first, second] = [block, last.min(block + 1)]
                    .map(|block| self.activations.tile(part, block, segments.start));
                let run = TileOperands {
                    rows: [first.0, second.0],
                    rows_step: first.1,
                    weights,
                    segments: segments.len(),
                    fresh: segments.start == 0 && part == 0,
                };
                // SAFETY: as the caller promises.
                unsafe {
                    if whole(block) && whole(block + 1) && panels == 2 {
                        P::two_by_two(&run, sums);
                    } else {
                        P::one_block(&run, sums, panels);
                        if block < last {
                            let second =
                                TileOperands { rows: [second.0; 2], rows_step: second.1, ..run };
                            P::one_block(&second, sums.add(2 * SUMS), panels);
                        }
                    }
                }
            }
            // The sums are written at once, so that the lines of `out` arrive while the next blocks
            // are multiplied.
            if segments.end == self.matrix.segments() {
                let blocks = block..(block + 2).min(self.blocks.end);
                // SAFETY: as the caller promises.
                unsafe { self.store(blocks, pair.clone(), sums) };
            }
        }
    }

    /// Writes the sums of two blocks and two panels to `out` with the bias, or adds them to it.
    ///
    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn store(&self, blocks: Range<usize>, panels: Range<usize>, sums: *const f32) {
        let width = self.matrix.rows();
        let slots = blocks.start * BLOCK..(blocks.end * BLOCK).min(self.activations.tiled_rows());
        for slot in slots {
            let row = self.activations.tiled_row_of(slot);
            let tile = (slot / BLOCK - blocks.start) * 2;
            for panel in panels.clone() {
                let from = panel * PANEL;
                let lanes = (width - from).min(PANEL);
                let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
                // SAFETY: the row's elements of these panels are this worker's, and the mask
                // keeps to the lanes that exist.
                unsafe {
                    let at = (tile + panel - panels.start) * SUMS + slot % BLOCK * PANEL;
                    let to = self.out.pointer.add(row * width + from);
                    let mut sum = _mm512_loadu_ps(sums.add(at));
                    if let Some(bias) = self.out.bias {
                        let bias = _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(from));
                        sum = _mm512_add_ps(sum, bias);
                    }
                    if let Some(scale) = self.out.accumulate {
                        let scaled = _mm512_mul_ps(sum, _mm512_set1_ps(scale));
                        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), scaled);
                    }
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
            }
        }
    }
}

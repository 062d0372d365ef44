//! Reads the cache: codes of a range of positions become floats in attention's tiles.

use std::ops::Range;

use lathe_program::{BlockTable, KvLayerShape};

use super::store::KvStore;
use super::with_store;
use super::{KvCache, LayerPlace};
use crate::lanes::product::DecodedMatrix;
use crate::lanes::{Kernel, LANES, Lanes};

/// Positions in a tile of attention.
pub(crate) const TILE: usize = 64;

/// Neighbouring positions within one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PageRun {
    /// The page.
    pub page: u32,
    /// The slot of the first position in the page.
    pub slot: usize,
    /// The first position.
    pub position: usize,
    /// The number of positions.
    pub count: usize,
}

/// Cuts `positions` at the borders of pages. `table` must hold all of them.
pub(crate) fn page_runs(
    table: &BlockTable,
    block_tokens: usize,
    positions: Range<usize>,
) -> impl Iterator<Item = PageRun> {
    let mut position = positions.start;
    std::iter::from_fn(move || {
        if position >= positions.end {
            return None;
        }
        let slot = position % block_tokens;
        let count = (block_tokens - slot).min(positions.end - position);
        let page = table.blocks[position / block_tokens - table.first as usize];
        let run = PageRun { page, slot, position, count };
        position += count;
        Some(run)
    })
}

/// Memory for the floats of a tile.
#[derive(Clone, Copy)]
pub(crate) struct TileBuffers {
    /// `[key_dim, 64]`: a column for each position.
    pub keys: *mut f32,
    /// `[64, value_stride]`: a row for each position.
    pub values: *mut f32,
    /// Floats of a row of `values`.
    pub value_stride: usize,
    /// `[64]`: the factor of a position's scores, if [`KvCache::scales_apart`].
    pub key_scales: *mut f32,
    /// `[64]`: the factor of the weight of a position's value, likewise.
    pub value_scales: *mut f32,
}

/// Loads some positions of one aligned tile.
pub(crate) struct LoadTile<'a> {
    /// The cache to read.
    pub cache: &'a KvCache,
    /// The layer.
    pub layer: &'a LayerPlace,
    /// The key head. 0 for latents.
    pub head: usize,
    /// The sequence's block table for the layer. It holds the positions.
    pub table: &'a BlockTable,
    /// The positions. Nobody writes them meanwhile.
    pub positions: Range<usize>,
    /// The destination, with room for a tile. Nobody else uses it.
    pub to: TileBuffers,
}

impl Kernel for LoadTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (cache, to) = (self.cache, self.to);
        for run in page_runs(self.table, cache.block_tokens, self.positions) {
            // SAFETY: buffers have room for a tile, and the pages hold the run.
            unsafe {
                with_store!(cache.format, S => match self.layer.shape {
                    KvLayerShape::Heads { .. } => {
                        cache.load_head::<L, S>(self.layer, self.head, run, to)
                    }
                    KvLayerShape::Latent { .. } => cache.load_latent::<L, S>(self.layer, run, to),
                });
            }
        }
    }
}

/// Loads only the scales of some positions of one aligned tile.
pub(crate) struct LoadScales<'a>(pub LoadTile<'a>);

impl Kernel for LoadScales<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let LoadTile { cache, layer, head, table, positions, to } = self.0;
        for run in page_runs(table, cache.block_tokens, positions) {
            // SAFETY: the buffers have room for a tile.
            unsafe { with_store!(cache.format, S => cache.load_scales::<S>(layer, head, run, to)) };
        }
    }
}

impl KvCache {
    /// Whether positions have their own scales, which attention applies to scores and weights. The
    /// two scales of a latent are applied when its tile is made, and int4's scales are part of its
    /// codes.
    pub(crate) fn scales_apart(&self, layer: &LayerPlace) -> bool {
        let heads = matches!(layer.shape, KvLayerShape::Heads { .. });
        heads && with_store!(self.format, S => S::SCALES_APART)
    }

    /// The keys of a head, `[key_dim, slots]`, from the first slot of a run on.
    pub(crate) fn keys<S: KvStore>(
        &self,
        layer: &LayerPlace,
        head: usize,
        run: PageRun,
    ) -> S::Columns {
        let [keys, _] = self.planes::<S>(layer, run.page, head);
        S::columns(keys, run.slot)
    }

    /// The values of a head, `[slots, value_dim]`, from the first slot of a run on.
    pub(crate) fn values<S: KvStore>(
        &self,
        layer: &LayerPlace,
        head: usize,
        run: PageRun,
    ) -> S::Rows {
        let [_, values] = self.planes::<S>(layer, run.page, head);
        S::rows(values, run.slot)
    }

    #[inline(always)]
    unsafe fn load_head<L: Lanes, S: KvStore>(
        &self,
        layer: &LayerPlace,
        head: usize,
        run: PageRun,
        to: TileBuffers,
    ) {
        let (key_dim, value_dim) = layer.dims();
        let column = run.position % TILE;
        // Whole vectors are read where page and tile have room for them. Positions after the run
        // are masked.
        let round = run.count.next_multiple_of(LANES);
        let fits = run.slot + round <= self.block_tokens && column + round <= TILE;
        let count = if fits { round } else { run.count };
        let (keys, values) = (self.keys::<S>(layer, head, run), self.values::<S>(layer, head, run));
        // SAFETY: the vectors lie within the page; columns and rows within the tile.
        unsafe {
            decode::<L, _>(keys, key_dim, count, to.keys.add(column), TILE, |_| 1.0);
            let rows = to.values.add(column * to.value_stride);
            decode::<L, _>(values, run.count, value_dim, rows, to.value_stride, |_| 1.0);
            if S::SCALES_APART {
                self.load_scales::<S>(layer, head, run, to);
            }
        }
    }

    /// Copies the run's scales to their places in a tile's.
    #[inline(always)]
    unsafe fn load_scales<S: KvStore>(
        &self,
        layer: &LayerPlace,
        head: usize,
        run: PageRun,
        to: TileBuffers,
    ) {
        let [keys, values] = self.planes::<S>(layer, run.page, head);
        for i in 0..run.count {
            let column = run.position % TILE + i;
            // SAFETY: the run's positions are of one tile and its slots of one page.
            unsafe {
                *to.key_scales.add(column) = S::scale(keys, run.slot + i);
                *to.value_scales.add(column) = S::scale(values, run.slot + i);
            }
        }
    }

    /// Latents are stored in rows. The tile needs them in columns too, with the rotary keys under
    /// them.
    #[inline(always)]
    unsafe fn load_latent<L: Lanes, S: KvStore>(
        &self,
        layer: &LayerPlace,
        run: PageRun,
        to: TileBuffers,
    ) {
        let (rank, rope_dim) = layer.dims();
        let column = run.position % TILE;
        let [latents, ropes] = self.planes::<S>(layer, run.page, 0);
        // SAFETY: as in `load_head`; the keys are the latent's columns and then the rotary key's.
        unsafe {
            let rows = to.values.add(column * to.value_stride);
            let scale = |i: usize| S::scale(latents, run.slot + i);
            let all = S::rows(latents, run.slot);
            decode::<L, _>(all, run.count, rank, rows, to.value_stride, scale);
            let rope_rows = S::rows(ropes, run.slot);
            for i in 0..run.count {
                for e in 0..rank {
                    *to.keys.add(e * TILE + column + i) = *rows.add(i * to.value_stride + e);
                }
                let scale = S::scale(ropes, run.slot + i);
                for e in 0..rope_dim {
                    let x = rope_rows.one(i, e) * scale;
                    *to.keys.add((rank + e) * TILE + column + i) = x;
                }
            }
        }
    }
}

/// Decodes `[rows, columns]` to floats `[rows, stride]`, times `scale` of the row.
///
/// # Safety
/// The matrix has these rows and columns, and `to` room for them.
#[inline(always)]
unsafe fn decode<L: Lanes, M: DecodedMatrix>(
    matrix: M,
    rows: usize,
    columns: usize,
    to: *mut f32,
    stride: usize,
    scale: impl Fn(usize) -> f32,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let whole = columns / LANES * LANES;
        for column in (0..whole).step_by(LANES) {
            for first in (0..rows).step_by(M::GROUP) {
                let group = matrix.group::<L>(first, column);
                for row in first..rows.min(first.saturating_add(M::GROUP)) {
                    let x = matrix.lanes(group, row, column).mul(L::splat(scale(row)));
                    x.store(to.add(row * stride + column));
                }
            }
        }
        for row in 0..rows {
            for column in whole..columns {
                *to.add(row * stride + column) = matrix.one(row, column) * scale(row);
            }
        }
    }
}

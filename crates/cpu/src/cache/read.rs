//! Reading the cache: codes of a stretch of positions become floats in attention's tiles.

use std::ops::Range;

use lathe_program::{BlockTable, KvLayerShape};

use super::code::{Code, with_code};
use super::{KvCache, LayerPlace};
use crate::lanes::{Kernel, LANES, Lanes};

/// Positions in a tile of attention.
pub const TILE: usize = 64;

/// Neighbouring positions within one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The page.
    pub page: u32,
    /// Place of the first position in the page.
    pub slot: usize,
    /// The first position.
    pub position: usize,
    /// How many.
    pub count: usize,
}

/// Cuts `positions` at page boundaries; all of them must be held by `table`.
pub fn runs(
    table: &BlockTable,
    block_tokens: usize,
    positions: Range<usize>,
) -> impl Iterator<Item = Run> {
    let mut position = positions.start;
    std::iter::from_fn(move || {
        if position >= positions.end {
            return None;
        }
        let slot = position % block_tokens;
        let count = (block_tokens - slot).min(positions.end - position);
        let page = table.blocks[position / block_tokens - table.first as usize];
        let run = Run { page, slot, position, count };
        position += count;
        Some(run)
    })
}

/// Where a tile's floats go.
#[derive(Clone, Copy)]
pub struct TileBuffers {
    /// `[key_dim, 64]`: a column for each position.
    pub keys: *mut f32,
    /// `[64, value_stride]`: a row for each position.
    pub values: *mut f32,
    /// Floats of a row of `values`.
    pub value_stride: usize,
    /// `[64]`: what the scores of a position are multiplied by, if [`KvCache::scales_apart`].
    pub key_scales: *mut f32,
    /// `[64]`: what the weight of a position's value is multiplied by, likewise.
    pub value_scales: *mut f32,
}

/// Loads some positions of one aligned tile.
pub struct LoadTile<'a> {
    /// Where from.
    pub cache: &'a KvCache,
    /// The layer.
    pub layer: &'a LayerPlace,
    /// The key head; 0 for latents.
    pub head: usize,
    /// The sequence's table for the layer; it holds the positions.
    pub table: &'a BlockTable,
    /// Which positions; nobody writes them meanwhile.
    pub positions: Range<usize>,
    /// Where to: room for a tile, and nobody else's.
    pub to: TileBuffers,
}

impl Kernel for LoadTile<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (cache, to) = (self.cache, self.to);
        for run in runs(self.table, cache.block_tokens, self.positions) {
            // SAFETY: buffers have room for a tile.
            unsafe {
                with_code!(cache.format, C => match self.layer.shape {
                    KvLayerShape::Heads { .. } => cache.load_head::<L, C>(self.layer, self.head, run, to),
                    KvLayerShape::Latent { .. } => cache.load_latent::<L, C>(self.layer, run, to),
                });
            }
        }
    }
}

/// Loads the scales of some positions of one aligned tile, and no codes.
pub struct LoadScales<'a>(pub LoadTile<'a>);

impl Kernel for LoadScales<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let LoadTile { cache, layer, head, table, positions, to } = self.0;
        for run in runs(table, cache.block_tokens, positions) {
            with_code!(cache.format, C => {
                let keys = cache.keys::<C>(layer, head, run);
                let values = cache.values::<C>(layer, head, run);
                // SAFETY: the buffers have room for a tile.
                unsafe {
                    keys.copy_scales::<C>(to.key_scales);
                    values.copy_scales::<C>(to.value_scales);
                }
            });
        }
    }
}

impl KvCache {
    /// Whether positions have scales of their own that attention applies to scores and weights.
    /// (A latent's two scales are multiplied into its tile.)
    pub fn scales_apart(&self, layer: &LayerPlace) -> bool {
        let heads = matches!(layer.shape, KvLayerShape::Heads { .. });
        heads && with_code!(self.format, C => C::SCALED)
    }

    /// The keys of a head: a run's place in `[key_dim, block_tokens]`.
    pub fn keys<C: Code>(&self, layer: &LayerPlace, head: usize, run: Run) -> Vectors {
        let places = self.places::<C>(layer);
        let head = self.region(layer, run.page).wrapping_add(head * places.bytes);
        let codes = head.wrapping_add(run.slot * C::BYTES);
        Vectors { codes, scales: head.wrapping_add(places.key_scales), run }
    }

    /// The values of a head: a run's place in `[block_tokens, value_dim]`.
    pub fn values<C: Code>(&self, layer: &LayerPlace, head: usize, run: Run) -> Vectors {
        let places = self.places::<C>(layer);
        let head = self.region(layer, run.page).wrapping_add(head * places.bytes);
        let (_, value_dim) = layer.dims();
        let codes = head.wrapping_add(places.values + run.slot * value_dim * C::BYTES);
        Vectors { codes, scales: head.wrapping_add(places.value_scales), run }
    }

    fn places<C: Code>(&self, layer: &LayerPlace) -> HeadPlaces {
        let (key_dim, value_dim) = layer.dims();
        HeadPlaces::of::<C>(self.block_tokens, key_dim, value_dim)
    }

    #[inline(always)]
    unsafe fn load_head<L: Lanes, C: Code>(
        &self,
        layer: &LayerPlace,
        head: usize,
        run: Run,
        to: TileBuffers,
    ) {
        let (key_dim, value_dim) = layer.dims();
        let column = run.position % TILE;
        let (keys, values) = (self.keys::<C>(layer, head, run), self.values::<C>(layer, head, run));
        // SAFETY: the vectors lie within the region; columns and rows within the tile.
        unsafe {
            keys.transposed::<L, C>(self.block_tokens, key_dim, column, to.keys);
            let rows = to.values.add(column * to.value_stride);
            values.rows::<L, C>(value_dim, rows, to.value_stride, |_| 1.0);
            if C::SCALED {
                keys.copy_scales::<C>(to.key_scales);
                values.copy_scales::<C>(to.value_scales);
            }
        }
    }

    #[inline(always)]
    unsafe fn load_latent<L: Lanes, C: Code>(&self, layer: &LayerPlace, run: Run, to: TileBuffers) {
        let (rank, rope_dim) = layer.dims();
        let column = run.position % TILE;
        // As a head's values, which latents lie like: `[block_tokens, dims]`.
        let places = self.places::<C>(layer);
        let region = self.region(layer, run.page);
        let latents = Vectors {
            codes: region.wrapping_add(run.slot * rank * C::BYTES),
            scales: region.wrapping_add(places.key_scales),
            run,
        };
        let ropes = self.values::<C>(layer, 0, run);
        // SAFETY: as in `load_head`; the keys are the latent's columns and then the rotary key's.
        unsafe {
            let rows = to.values.add(column * to.value_stride);
            latents.rows::<L, C>(rank, rows, to.value_stride, |i| latents.scale::<C>(i));
            for i in 0..run.count {
                for e in 0..rank {
                    *to.keys.add(e * TILE + column + i) = *rows.add(i * to.value_stride + e);
                }
            }
            ropes.columns_of_rows::<C>(rope_dim, to.keys.add(rank * TILE + column));
        }
    }
}

/// Byte offsets within a head's part of a region: key codes, value codes, key scales, value
/// scales. A latent is a head whose key is the latent and whose value is the rotary key.
#[derive(Clone, Copy)]
pub(super) struct HeadPlaces {
    pub(super) values: usize,
    pub(super) key_scales: usize,
    pub(super) value_scales: usize,
    pub(super) bytes: usize,
}

impl HeadPlaces {
    #[inline(always)]
    pub(super) fn of<C: Code>(tokens: usize, key_dim: usize, value_dim: usize) -> Self {
        let scales = if C::SCALED { tokens * size_of::<f32>() } else { 0 };
        let values = tokens * key_dim * C::BYTES;
        let key_scales = values + tokens * value_dim * C::BYTES;
        let value_scales = key_scales + scales;
        Self { values, key_scales, value_scales, bytes: value_scales + scales }
    }
}

/// The codes and scales of one kind of vector, at a run's first slot.
#[derive(Debug, Clone, Copy)]
pub struct Vectors {
    /// The first code.
    pub codes: *const u8,
    /// The page's scales, from its first slot on.
    scales: *const u8,
    run: Run,
}

impl Vectors {
    /// Codes `[dims, tokens]` to floats `[dims, TILE]` from `column` on, without scales.
    #[inline(always)]
    unsafe fn transposed<L: Lanes, C: Code>(
        &self,
        tokens: usize,
        dims: usize,
        column: usize,
        to: *mut f32,
    ) {
        // Whole vectors where page and tile have room for them: what lies after the run is masked.
        let round = self.run.count.next_multiple_of(LANES);
        let fits = self.run.slot + round <= tokens && column + round <= TILE;
        let count = if fits { round } else { self.run.count };
        // SAFETY: `slot + count <= tokens` and `column + count <= TILE`.
        unsafe {
            for d in 0..dims {
                let line = self.codes.add(d * tokens * C::BYTES);
                let out = to.add(d * TILE + column);
                let mut i = 0;
                while i + LANES <= count {
                    C::lanes::<L>(line.add(i * C::BYTES)).store(out.add(i));
                    i += LANES;
                }
                while i < count {
                    *out.add(i) = C::one(line.add(i * C::BYTES));
                    i += 1;
                }
            }
        }
    }

    /// Codes `[tokens, dims]` to floats `[count, stride]`, times `scale` of the row.
    #[inline(always)]
    unsafe fn rows<L: Lanes, C: Code>(
        &self,
        dims: usize,
        to: *mut f32,
        stride: usize,
        scale: impl Fn(usize) -> f32,
    ) {
        // SAFETY: the run's slots lie within the page and its rows within the tile.
        unsafe {
            for i in 0..self.run.count {
                let line = self.codes.add(i * dims * C::BYTES);
                let out = to.add(i * stride);
                let scale = scale(i);
                let mut d = 0;
                while d + LANES <= dims {
                    C::lanes::<L>(line.add(d * C::BYTES)).mul(L::splat(scale)).store(out.add(d));
                    d += LANES;
                }
                while d < dims {
                    *out.add(d) = C::one(line.add(d * C::BYTES)) * scale;
                    d += 1;
                }
            }
        }
    }

    /// Codes `[tokens, dims]` to floats `[dims, TILE]`, scales multiplied in.
    #[inline(always)]
    unsafe fn columns_of_rows<C: Code>(&self, dims: usize, to: *mut f32) {
        // SAFETY: as in `rows`.
        unsafe {
            for i in 0..self.run.count {
                let line = self.codes.add(i * dims * C::BYTES);
                let scale = self.scale::<C>(i);
                for d in 0..dims {
                    *to.add(d * TILE + i) = C::one(line.add(d * C::BYTES)) * scale;
                }
            }
        }
    }

    /// Copies the run's scales to their places in a tile's.
    #[inline(always)]
    unsafe fn copy_scales<C: Code>(&self, to: *mut f32) {
        for i in 0..self.run.count {
            // SAFETY: the run's positions are of one tile.
            unsafe { *to.add(self.run.position % TILE + i) = self.scale::<C>(i) };
        }
    }

    #[inline(always)]
    unsafe fn scale<C: Code>(&self, i: usize) -> f32 {
        if !C::SCALED {
            return 1.0;
        }
        // SAFETY: there is a scale for each slot of a scaled code.
        unsafe { self.scales.cast::<f32>().add(self.run.slot + i).read_unaligned() }
    }
}

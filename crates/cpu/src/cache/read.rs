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
            let region = cache.region(self.layer, run.page);
            // SAFETY: the region is the layer's; buffers have room for a tile.
            unsafe {
                with_code!(cache.format, C => match self.layer.shape {
                    KvLayerShape::Heads { key_dim, value_dim, .. } => {
                        cache.load_head::<L, C>(region, self.head, key_dim, value_dim, run, to);
                    }
                    KvLayerShape::Latent { rank, rope_dim } => {
                        cache.load_latent::<L, C>(region, rank, rope_dim, run, to);
                    }
                });
            }
        }
    }
}

impl KvCache {
    #[inline(always)]
    unsafe fn load_head<L: Lanes, C: Code>(
        &self,
        region: *const u8,
        head: usize,
        key_dim: usize,
        value_dim: usize,
        run: Run,
        to: TileBuffers,
    ) {
        let tokens = self.block_tokens;
        let places = HeadPlaces::of::<C>(tokens, key_dim, value_dim);
        let column = run.position % TILE;
        // SAFETY: the places lie within the region; columns and rows within the tile.
        unsafe {
            let head = region.add(head * places.bytes);
            let keys = Vectors::new::<C>(head, places.key_scales, run);
            keys.transposed::<L, C>(tokens, key_dim, column, to.keys);
            let values = Vectors::new::<C>(
                head.add(places.values),
                places.value_scales - places.values,
                run,
            );
            values.rows::<L, C>(
                value_dim,
                to.values.add(column * to.value_stride),
                to.value_stride,
            );
        }
    }

    #[inline(always)]
    unsafe fn load_latent<L: Lanes, C: Code>(
        &self,
        region: *const u8,
        rank: usize,
        rope_dim: usize,
        run: Run,
        to: TileBuffers,
    ) {
        let places = HeadPlaces::of::<C>(self.block_tokens, rank, rope_dim);
        let column = run.position % TILE;
        // SAFETY: as in `load_head`; the keys are the latent's columns and then the rotary key's.
        unsafe {
            let latents = Vectors::new::<C>(region, places.key_scales, run);
            let rows = to.values.add(column * to.value_stride);
            latents.rows::<L, C>(rank, rows, to.value_stride);
            for i in 0..run.count {
                for e in 0..rank {
                    *to.keys.add(e * TILE + column + i) = *rows.add(i * to.value_stride + e);
                }
            }
            let ropes = Vectors::new::<C>(
                region.add(places.values),
                places.value_scales - places.values,
                run,
            );
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

/// The codes and scales of one kind of vector, from a run's first slot on.
struct Vectors {
    codes: *const u8,
    scales: *const f32,
    run: Run,
}

impl Vectors {
    #[inline(always)]
    unsafe fn new<C: Code>(codes: *const u8, scales: usize, run: Run) -> Self {
        // SAFETY: the caller gives offsets within the region.
        let scales = unsafe { codes.add(scales).cast::<f32>().add(run.slot) };
        Self { codes, scales, run }
    }

    /// Codes `[dims, tokens]` to floats `[dims, TILE]` from `column` on.
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
        // SAFETY: `slot + count <= tokens` and `column + count <= TILE`; scales exist for all slots.
        unsafe {
            for d in 0..dims {
                let line = self.codes.add((d * tokens + self.run.slot) * C::BYTES);
                let out = to.add(d * TILE + column);
                let mut i = 0;
                while i + LANES <= count {
                    let mut x = C::lanes::<L>(line.add(i * C::BYTES));
                    if C::SCALED {
                        x = x.mul(L::load(self.scales.add(i)));
                    }
                    x.store(out.add(i));
                    i += LANES;
                }
                while i < count {
                    *out.add(i) = C::one(line.add(i * C::BYTES)) * self.scale::<C>(i);
                    i += 1;
                }
            }
        }
    }

    /// Codes `[tokens, dims]` to floats `[count, stride]`.
    #[inline(always)]
    unsafe fn rows<L: Lanes, C: Code>(&self, dims: usize, to: *mut f32, stride: usize) {
        // SAFETY: the run's slots lie within the page and its rows within the tile.
        unsafe {
            for i in 0..self.run.count {
                let line = self.codes.add((self.run.slot + i) * dims * C::BYTES);
                let out = to.add(i * stride);
                let scale = self.scale::<C>(i);
                let mut d = 0;
                while d + LANES <= dims {
                    let mut x = C::lanes::<L>(line.add(d * C::BYTES));
                    if C::SCALED {
                        x = x.mul(L::splat(scale));
                    }
                    x.store(out.add(d));
                    d += LANES;
                }
                while d < dims {
                    *out.add(d) = C::one(line.add(d * C::BYTES)) * scale;
                    d += 1;
                }
            }
        }
    }

    /// Codes `[tokens, dims]` to floats `[dims, TILE]`.
    #[inline(always)]
    unsafe fn columns_of_rows<C: Code>(&self, dims: usize, to: *mut f32) {
        // SAFETY: as in `rows`.
        unsafe {
            for i in 0..self.run.count {
                let line = self.codes.add((self.run.slot + i) * dims * C::BYTES);
                let scale = self.scale::<C>(i);
                for d in 0..dims {
                    *to.add(d * TILE + i) = C::one(line.add(d * C::BYTES)) * scale;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn scale<C: Code>(&self, i: usize) -> f32 {
        // SAFETY: there is a scale for each slot of a scaled code.
        if C::SCALED { unsafe { self.scales.add(i).read_unaligned() } } else { 1.0 }
    }
}

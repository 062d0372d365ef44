//! Writing the cache: rows' keys and values become codes at their positions.

use std::ops::Range;

use lathe_program::{KvLayerShape, Step};

use super::code::{Code, with_code};
use super::read::HeadPlaces;
use super::{KvCache, LayerPlace};
use crate::lanes::{Kernel, LANES, Lanes};
use crate::rows::Rows;

/// Stores rows of a step in the cache.
pub struct Write<'a> {
    /// Where to.
    pub cache: &'a KvCache,
    /// The layer.
    pub layer: &'a LayerPlace,
    /// The step.
    pub step: &'a Step,
    /// The sequence of each row of the step.
    pub sequence_of: &'a [u32],
    /// Keys of all heads, or latents.
    pub first: Rows,
    /// Values of all heads, or rotary keys.
    pub second: Rows,
    /// Which rows; nobody else writes their slots, and nobody reads the cache meanwhile.
    pub rows: Range<usize>,
}

impl Kernel for Write<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        for row in self.rows.clone() {
            let sequence = &self.step.sequences[self.sequence_of[row] as usize];
            let slot = sequence.cached as usize + row - sequence.first_row as usize;
            let tokens = self.cache.block_tokens;
            let (page, slot) = sequence.tables[self.layer.group].locate(slot, tokens);
            let region = self.cache.region(self.layer, page as u32);
            // SAFETY: the region has room for `tokens` slots of the layer's shape, and the rows
            // hold as many elements as the layer stores.
            unsafe {
                let (first, second) = (self.first.row(row), self.second.row(row));
                with_code!(self.cache.format, C => match self.layer.shape {
                    KvLayerShape::Heads { kv_heads, key_dim, value_dim } => {
                        let shape = (kv_heads, key_dim, value_dim);
                        store_heads::<L, C>(region, tokens, slot, shape, first, second);
                    }
                    KvLayerShape::Latent { rank, rope_dim } => {
                        let places = HeadPlaces::of::<C>(tokens, rank, rope_dim);
                        let latent = region.add(slot * rank * C::BYTES);
                        put::<L, C>(first, rank, latent, region.add(places.key_scales), slot);
                        let rope = region.add(places.values + slot * rope_dim * C::BYTES);
                        put::<L, C>(second, rope_dim, rope, region.add(places.value_scales), slot);
                    }
                });
            }
        }
    }
}

/// Keys go down a column of `[key_dim, tokens]`, values along a row of `[tokens, value_dim]`.
#[inline(always)]
unsafe fn store_heads<L: Lanes, C: Code>(
    region: *mut u8,
    tokens: usize,
    slot: usize,
    (kv_heads, key_dim, value_dim): (usize, usize, usize),
    keys: *const f32,
    values: *const f32,
) {
    let places = HeadPlaces::of::<C>(tokens, key_dim, value_dim);
    for head in 0..kv_heads {
        // SAFETY: the caller gives a region for these heads and rows that hold them.
        unsafe {
            let base = region.add(head * places.bytes);
            let key = keys.add(head * key_dim);
            let inverse = put_scale::<L, C>(key, key_dim, base.add(places.key_scales), slot);
            let mut codes = [0u8; LANES * size_of::<f32>()];
            for i in (0..key_dim).step_by(LANES) {
                let x = L::load_first(key.add(i), key_dim - i);
                C::put_lanes(x, inverse, codes.as_mut_ptr());
                for (d, code) in (i..key_dim.min(i + LANES)).zip(codes.chunks_exact(C::BYTES)) {
                    let to = base.add((d * tokens + slot) * C::BYTES);
                    std::ptr::copy_nonoverlapping(code.as_ptr(), to, C::BYTES);
                }
            }
            let row = base.add(places.values + slot * value_dim * C::BYTES);
            put::<L, C>(
                values.add(head * value_dim),
                value_dim,
                row,
                base.add(places.value_scales),
                slot,
            );
        }
    }
}

/// Stores a vector of `n` as neighbouring codes, and its scale.
#[inline(always)]
unsafe fn put<L: Lanes, C: Code>(
    vector: *const f32,
    n: usize,
    to: *mut u8,
    scales: *mut u8,
    slot: usize,
) {
    // SAFETY: the caller gives `n` floats, and places for the codes and the scale.
    unsafe {
        let inverse = put_scale::<L, C>(vector, n, scales, slot);
        let whole = n / LANES * LANES;
        for i in (0..whole).step_by(LANES) {
            C::put_lanes(L::load(vector.add(i)), inverse, to.add(i * C::BYTES));
        }
        for i in whole..n {
            C::put(*vector.add(i), inverse, to.add(i * C::BYTES));
        }
    }
}

/// Stores the scale of a vector of `n`, if its code has one; what to multiply the vector by.
#[inline(always)]
unsafe fn put_scale<L: Lanes, C: Code>(
    vector: *const f32,
    n: usize,
    scales: *mut u8,
    slot: usize,
) -> f32 {
    if !C::SCALED {
        return 1.0;
    }
    let mut most = L::splat(0.0);
    // SAFETY: the caller gives `n` floats, and a place for each slot's scale.
    unsafe {
        for i in (0..n).step_by(LANES) {
            let x = L::load_first(vector.add(i), n - i);
            most = most.max(x).max(L::splat(0.0).sub(x));
        }
        let scale = C::scale(most.largest());
        scales.cast::<f32>().add(slot).write_unaligned(scale);
        if scale > 0.0 { 1.0 / scale } else { 0.0 }
    }
}

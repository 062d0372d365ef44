//! The int4 cache: codes of half a byte, and for each 32 elements of a vector a scale and a zero in
//! `f16`. Keys, latents and rotary keys are multiplied by a Hadamard matrix before they are stored
//! and stay so. Attention multiplies its queries by the same matrix (`q . k = Hq . Hk`), and the
//! matrices that multiply latents are rotated when they are loaded.
//!
//! The numbers are those of `lathe_program::kv_codec` to the bit. A code times a scale has at most
//! 15 bits, so `zero + code * scale` rounds once, fused or not. The layout is made for sixteen
//! lanes:
//! - in columns, a byte holds elements `2i` (low half) and `2i + 1` of one position, `[dims / 2,
//!   tokens]` bytes, then scales `[groups, tokens]`, then zeros; two positions never share a byte,
//!   so that workers may write neighbours;
//! - in rows, each whole 16 elements take 8 bytes, the first 8 elements in the low halves and the
//!   others in the high ones; what is left is in pairs. Scales are `[tokens, groups]`, then zeros.

use std::mem::MaybeUninit;

use half::f16;
use lathe_program::INT4_GROUP;
use lathe_program::kv_codec::{Int4Range, KvVector, hadamard};

use super::code::ELEMENTS_MAX;
use super::store::{KvStore, Plane};
use crate::lanes::product::DecodedMatrix;
use crate::lanes::{LANES, Lanes};

/// Half-byte codes.
pub(crate) struct Int4;

/// Codes in columns, from a slot on.
#[derive(Clone, Copy)]
pub(crate) struct Columns {
    codes: *const u8,
    scales: *const u16,
    zeros: *const u16,
    tokens: usize,
}

/// Codes in rows, from a slot on.
#[derive(Clone, Copy)]
pub(crate) struct Rows {
    codes: *const u8,
    scales: *const u16,
    zeros: *const u16,
    dims: usize,
}

/// The number of a code, with its scale and zero as halves at `scale` and `zero`.
#[inline(always)]
unsafe fn number(code: u8, scale: *const u16, zero: *const u16) -> f32 {
    // SAFETY: the caller vouches for both halves.
    let [scale, zero] =
        unsafe { [scale, zero].map(|at| f16::from_bits(at.read_unaligned()).to_f32()) };
    zero + f32::from(code) * scale
}

impl DecodedMatrix for Columns {
    const GROUP: usize = INT4_GROUP;
    const LANES_BYTES: usize = LANES;
    type Group<L: Lanes> = (L, L);

    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, row: usize, column: usize) -> (L, L) {
        let at = row / INT4_GROUP * self.tokens + column;
        // SAFETY: the caller keeps within the matrix.
        unsafe { (L::load_f16(self.scales.add(at)), L::load_f16(self.zeros.add(at))) }
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(&self, (scale, zero): (L, L), row: usize, column: usize) -> L {
        // SAFETY: the caller keeps within the matrix.
        unsafe { L::load_half_bytes(self.line(row, column), row % 2 == 1).fma(scale, zero) }
    }
    #[inline(always)]
    unsafe fn one(&self, row: usize, column: usize) -> f32 {
        let at = row / INT4_GROUP * self.tokens + column;
        // SAFETY: the caller keeps within the matrix.
        unsafe {
            let code = self.line(row, column).read() >> (row % 2 * 4) & 15;
            number(code, self.scales.add(at), self.zeros.add(at))
        }
    }
    #[inline(always)]
    fn line(&self, row: usize, column: usize) -> *const u8 {
        self.codes.wrapping_add(row / 2 * self.tokens + column)
    }
}

impl DecodedMatrix for Rows {
    // Each row is a vector with its own scales.
    const GROUP: usize = 1;
    const LANES_BYTES: usize = LANES / 2;
    type Group<L: Lanes> = (L, L);

    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, row: usize, column: usize) -> (L, L) {
        let at = row * self.dims.div_ceil(INT4_GROUP) + column / INT4_GROUP;
        // SAFETY: the caller keeps within the matrix.
        unsafe { (L::splat_f16(self.scales.add(at)), L::splat_f16(self.zeros.add(at))) }
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(&self, (scale, zero): (L, L), row: usize, column: usize) -> L {
        // SAFETY: the caller keeps within the matrix.
        unsafe { L::load_u4(self.line(row, column)).fma(scale, zero) }
    }
    #[inline(always)]
    unsafe fn one(&self, row: usize, column: usize) -> f32 {
        let at = row * self.dims.div_ceil(INT4_GROUP) + column / INT4_GROUP;
        let (byte, shift) = place_in_row(column, self.dims);
        // SAFETY: the caller keeps within the matrix.
        unsafe {
            let code = self.line(row, 0).add(byte).read() >> shift & 15;
            number(code, self.scales.add(at), self.zeros.add(at))
        }
    }
    #[inline(always)]
    fn line(&self, row: usize, column: usize) -> *const u8 {
        self.codes.wrapping_add(row * self.dims.div_ceil(2) + column / 2)
    }
}

/// The byte of an element within a row, and how far its half is shifted within the byte: 0 or 4
/// bits.
#[inline(always)]
fn place_in_row(element: usize, dims: usize) -> (usize, usize) {
    let whole = dims / LANES * LANES;
    if element < whole {
        let (lanes, lane) = (element / LANES, element % LANES);
        return (lanes * LANES / 2 + lane % 8, lane / 8 * 4);
    }
    (element / 2, (element - whole) % 2 * 4)
}

impl KvStore for Int4 {
    type Columns = Columns;
    type Rows = Rows;
    const SCALES_APART: bool = false;
    const CODE_UNIT: usize = 1;
    const SCALE_UNIT: usize = size_of::<u16>();
    const SCALE_PLANES: usize = 2;

    #[inline(always)]
    fn code_bytes(dims: usize) -> usize {
        dims.div_ceil(2)
    }
    #[inline(always)]
    fn scale_bytes(dims: usize) -> usize {
        2 * size_of::<u16>() * dims.div_ceil(INT4_GROUP)
    }
    #[inline(always)]
    fn columns(plane: Plane, slot: usize) -> Columns {
        let (scales, zeros) = halves(plane);
        Columns {
            codes: plane.codes.wrapping_add(slot),
            scales: scales.wrapping_add(slot),
            zeros: zeros.wrapping_add(slot),
            tokens: plane.tokens,
        }
    }
    #[inline(always)]
    fn rows(plane: Plane, slot: usize) -> Rows {
        let (scales, zeros) = halves(plane);
        let first = slot * plane.dims.div_ceil(INT4_GROUP);
        Rows {
            codes: plane.codes.wrapping_add(slot * plane.dims.div_ceil(2)),
            scales: scales.wrapping_add(first),
            zeros: zeros.wrapping_add(first),
            dims: plane.dims,
        }
    }
    #[inline(always)]
    unsafe fn scale(_: Plane, _: usize) -> f32 {
        1.0
    }

    #[inline(always)]
    unsafe fn put_column<L: Lanes>(plane: Plane, slot: usize, kind: KvVector, vector: *const f32) {
        let Plane { codes, tokens, dims, .. } = plane;
        let place = |group: usize| group * tokens + slot;
        // SAFETY: the caller gives a slot and a vector of the plane.
        unsafe {
            encode(plane, kind, vector, place, |found| {
                for (pair, both) in found.chunks(2).enumerate() {
                    let high = both.get(1).map_or(0, |code| code << 4);
                    codes.add(pair * tokens + slot).write(both[0] | high);
                }
                debug_assert_eq!(found.len(), dims);
            });
        }
    }

    #[inline(always)]
    unsafe fn put_row<L: Lanes>(plane: Plane, slot: usize, kind: KvVector, vector: *const f32) {
        let dims = plane.dims;
        let to = plane.codes.wrapping_add(slot * dims.div_ceil(2));
        let place = |group: usize| slot * dims.div_ceil(INT4_GROUP) + group;
        // SAFETY: the caller gives a slot and a vector of the plane.
        unsafe {
            encode(plane, kind, vector, place, |found| {
                let (whole, rest) = found.split_at(dims / LANES * LANES);
                for (i, lanes) in whole.chunks_exact(LANES).enumerate() {
                    for j in 0..8 {
                        to.add(i * 8 + j).write(lanes[j] | lanes[j + 8] << 4);
                    }
                }
                for (i, both) in rest.chunks(2).enumerate() {
                    let high = both.get(1).map_or(0, |code| code << 4);
                    to.add(whole.len() / 2 + i).write(both[0] | high);
                }
            });
        }
    }
}

/// The scales of all slots, and their zeros.
#[inline(always)]
fn halves(plane: Plane) -> (*mut u16, *mut u16) {
    let scales = plane.scales.cast::<u16>();
    (scales, scales.wrapping_add(plane.tokens * plane.dims.div_ceil(INT4_GROUP)))
}

/// Stores the scales and zeros of a vector: those of group `g` at `place(g)`. Passes the codes on.
#[inline(always)]
unsafe fn encode(
    plane: Plane,
    kind: KvVector,
    vector: *const f32,
    place: impl Fn(usize) -> usize,
    put: impl FnOnce(&[u8]),
) {
    let dims = plane.dims;
    assert!(dims <= ELEMENTS_MAX, "longer vectors were refused when the cache was made");
    let mut floats = [const { MaybeUninit::<f32>::uninit() }; ELEMENTS_MAX];
    let mut codes = [const { MaybeUninit::<u8>::uninit() }; ELEMENTS_MAX];
    let (scales, zeros) = halves(plane);
    // SAFETY: the caller gives a vector of `dims` floats, which fit; codes are handed out once
    // they are all written; the plane has a scale and a zero at each group's place.
    unsafe {
        let floats = floats.as_mut_ptr().cast::<f32>();
        let codes = codes.as_mut_ptr().cast::<u8>();
        std::ptr::copy_nonoverlapping(vector, floats, dims);
        let values = std::slice::from_raw_parts_mut(floats, dims);
        if kind == KvVector::Key {
            hadamard(values);
        }
        for (g, group) in values.chunks(INT4_GROUP).enumerate() {
            let range = Int4Range::of(group);
            scales.add(place(g)).write_unaligned(range.scale.to_bits());
            zeros.add(place(g)).write_unaligned(range.zero.to_bits());
            for (i, value) in group.iter().enumerate() {
                codes.add(g * INT4_GROUP + i).write(range.code(*value));
            }
        }
        put(std::slice::from_raw_parts(codes, dims));
    }
}

#[cfg(test)]
mod tests {
    use lathe_program::KvFormat;
    use lathe_program::kv_codec::{decode, encode};

    use super::*;
    use crate::lanes::{Kernel, Width, dispatch};

    /// Stores vectors with the scalar codec and with these kernels, and compares all numbers that
    /// are read back.
    struct Compare {
        dims: usize,
        kind: KvVector,
    }

    const TOKENS: usize = 16;

    impl Kernel for Compare {
        type Output = ();
        fn run<L: Lanes>(self) {
            let Self { dims, kind } = self;
            let mut codes = vec![0u8; TOKENS * Int4::code_bytes(dims)];
            let mut scales = vec![0u8; TOKENS * Int4::scale_bytes(dims)];
            assert_eq!(
                codes.len() + scales.len(),
                TOKENS * KvFormat::Int4.vector_bytes(dims),
                "bytes of the format"
            );
            let plane = Plane {
                codes: codes.as_mut_ptr(),
                scales: scales.as_mut_ptr(),
                tokens: TOKENS,
                dims,
            };
            let vector = |slot: usize| -> Vec<f32> {
                (0..dims).map(|i| ((i * 7 + slot * 31) as f32 * 0.61).sin() * 3.0 + 0.3).collect()
            };
            for columns in [true, false] {
                for slot in 0..TOKENS {
                    // SAFETY: the plane has the slot, and the vector its elements.
                    unsafe {
                        match columns {
                            true => Int4::put_column::<L>(plane, slot, kind, vector(slot).as_ptr()),
                            false => Int4::put_row::<L>(plane, slot, kind, vector(slot).as_ptr()),
                        }
                    }
                }
                for slot in 0..TOKENS {
                    let mut bytes = vec![0; KvFormat::Int4.vector_bytes(dims)];
                    encode(KvFormat::Int4, kind, &vector(slot), &mut bytes);
                    // Numbers stay rotated, so the codec decodes without turning them back.
                    let mut expected = vec![0.0; dims];
                    decode(KvFormat::Int4, KvVector::Value, &bytes, &mut expected);
                    for (element, expected) in expected.iter().enumerate() {
                        let found = match columns {
                            true => read::<L>(Int4::columns(plane, 0), element, slot, TOKENS),
                            false => read::<L>(Int4::rows(plane, slot), 0, element, dims),
                        };
                        assert_eq!(found.map(f32::to_bits), [expected.to_bits(); 2]);
                    }
                }
            }
        }
    }

    /// Reads a number by itself, and checks that its lanes hold the same if there are 16 columns.
    fn read<L: Lanes>(
        m: impl DecodedMatrix,
        row: usize,
        column: usize,
        columns: usize,
    ) -> [f32; 2] {
        let first = column / LANES * LANES;
        // SAFETY: row and columns are within the matrix.
        unsafe {
            let one = m.one(row, column);
            if first + LANES > columns {
                return [one; 2];
            }
            [one, m.lanes(m.group::<L>(row, first), row, first).to_array()[column - first]]
        }
    }

    #[test]
    fn codes_are_those_of_the_scalar_codec() {
        for width in Width::available() {
            for dims in [1, 2, 7, 16, 31, 32, 40, 64, 72, 96, 128] {
                for kind in [KvVector::Key, KvVector::Value] {
                    dispatch(width, Compare { dims, kind });
                }
            }
        }
    }
}

//! How a page holds the vectors of a head: the places of codes and scales, and the matrices that
//! read them where they lie. This file stores codes of whole bytes. int4 has a file of its own.

use std::marker::PhantomData;

use lathe_program::kv_codec::KvVector;

use super::code::Code;
use crate::lanes::product::DecodedMatrix;
use crate::lanes::{LANES, Lanes};

/// One vector of `dims` elements for each of `tokens` slots of a page: the keys or the values of
/// one head, or the latents, or the rotary keys.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Plane {
    /// Codes of all slots.
    pub codes: *mut u8,
    /// Scales of all slots, if the codes have scales.
    pub scales: *mut u8,
    /// Slots.
    pub tokens: usize,
    /// Elements of a vector.
    pub dims: usize,
}

/// A way to store vectors. In *columns* (keys of heads) a plane is `[dims, tokens]`, so that
/// sixteen lanes compute the scores of sixteen positions. In *rows* it is `[tokens, dims]`.
pub(crate) trait KvStore {
    /// A plane in columns, from a slot on: `[dims, slots]`.
    type Columns: DecodedMatrix;
    /// A plane in rows, from a slot on: `[slots, dims]`.
    type Rows: DecodedMatrix;
    /// Whether each vector has an `f32` scale that the matrices leave out.
    const SCALES_APART: bool;
    /// Bytes of one slot's codes that lie side by side in a plane in columns.
    const CODE_UNIT: usize;
    /// Bytes of one scale (or zero).
    const SCALE_UNIT: usize;
    /// The number of planes of scales: one for scales, and one for zeros if there are any.
    const SCALE_PLANES: usize;

    /// Bytes of a vector's codes.
    fn code_bytes(dims: usize) -> usize;
    /// Bytes of a vector's scales and zeros.
    fn scale_bytes(dims: usize) -> usize;
    /// The columns of `plane` from `slot` on.
    fn columns(plane: Plane, slot: usize) -> Self::Columns;
    /// The rows of `plane` from `slot` on.
    fn rows(plane: Plane, slot: usize) -> Self::Rows;
    /// The scale of the vector in `slot`. It is 1 where the matrices include the scale.
    /// # Safety
    /// The plane lies in a page and has that slot.
    unsafe fn scale(plane: Plane, slot: usize) -> f32;
    /// Stores a vector as a column.
    /// # Safety
    /// The plane lies in a page, nobody else touches the slot, and `vector` has `dims` floats.
    unsafe fn put_column<L: Lanes>(plane: Plane, slot: usize, kind: KvVector, vector: *const f32);
    /// Stores a vector as a row.
    /// # Safety
    /// As [`KvStore::put_column`].
    unsafe fn put_row<L: Lanes>(plane: Plane, slot: usize, kind: KvVector, vector: *const f32);
}

/// Codes `[rows, columns]` side by side, without scales.
pub(crate) struct Plain<C> {
    codes: *const u8,
    stride: usize,
    code: PhantomData<C>,
}

impl<C> Clone for Plain<C> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<C> Copy for Plain<C> {}

impl<C> Plain<C> {
    /// A matrix whose first code is at `codes`, with `stride` codes from a row to the next.
    pub(crate) fn new(codes: *const u8, stride: usize) -> Self {
        Self { codes, stride, code: PhantomData }
    }
}

impl<C: Code> DecodedMatrix for Plain<C> {
    const GROUP: usize = usize::MAX;
    const LANES_BYTES: usize = LANES * C::BYTES;
    type Group<L: Lanes> = ();

    #[inline(always)]
    unsafe fn group<L: Lanes>(&self, _: usize, _: usize) {}
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(&self, (): (), row: usize, column: usize) -> L {
        // SAFETY: the caller keeps within the matrix.
        unsafe { C::lanes(self.line(row, column)) }
    }
    #[inline(always)]
    unsafe fn one(&self, row: usize, column: usize) -> f32 {
        // SAFETY: the caller keeps within the matrix.
        unsafe { C::one(self.line(row, column)) }
    }
    #[inline(always)]
    fn line(&self, row: usize, column: usize) -> *const u8 {
        self.codes.wrapping_add((row * self.stride + column) * C::BYTES)
    }
}

impl<C: Code> KvStore for C {
    type Columns = Plain<C>;
    type Rows = Plain<C>;
    const SCALES_APART: bool = C::SCALED;
    const CODE_UNIT: usize = C::BYTES;
    const SCALE_UNIT: usize = size_of::<f32>();
    const SCALE_PLANES: usize = 1;

    #[inline(always)]
    fn code_bytes(dims: usize) -> usize {
        dims * C::BYTES
    }
    #[inline(always)]
    fn scale_bytes(_: usize) -> usize {
        if C::SCALED { size_of::<f32>() } else { 0 }
    }
    #[inline(always)]
    fn columns(plane: Plane, slot: usize) -> Plain<C> {
        Plain::new(plane.codes.wrapping_add(slot * C::BYTES), plane.tokens)
    }
    #[inline(always)]
    fn rows(plane: Plane, slot: usize) -> Plain<C> {
        Plain::new(plane.codes.wrapping_add(slot * plane.dims * C::BYTES), plane.dims)
    }
    #[inline(always)]
    unsafe fn scale(plane: Plane, slot: usize) -> f32 {
        if !C::SCALED {
            return 1.0;
        }
        // SAFETY: there is a scale for each slot of a scaled code.
        unsafe { plane.scales.cast::<f32>().add(slot).read_unaligned() }
    }

    #[inline(always)]
    unsafe fn put_column<L: Lanes>(plane: Plane, slot: usize, _: KvVector, vector: *const f32) {
        let Plane { codes, tokens, dims, .. } = plane;
        // SAFETY: the caller gives a slot and a vector of the plane.
        unsafe {
            let inverse = put_scale::<L, C>(plane, slot, vector);
            let mut some = [0u8; LANES * size_of::<f32>()];
            for i in (0..dims).step_by(LANES) {
                let x = L::load_first(vector.add(i), dims - i);
                C::put_lanes(x, inverse, some.as_mut_ptr());
                for (d, code) in (i..dims.min(i + LANES)).zip(some.chunks_exact(C::BYTES)) {
                    let to = codes.add((d * tokens + slot) * C::BYTES);
                    std::ptr::copy_nonoverlapping(code.as_ptr(), to, C::BYTES);
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn put_row<L: Lanes>(plane: Plane, slot: usize, _: KvVector, vector: *const f32) {
        let dims = plane.dims;
        // SAFETY: the caller gives a slot and a vector of the plane.
        unsafe {
            let to = plane.codes.add(slot * dims * C::BYTES);
            let inverse = put_scale::<L, C>(plane, slot, vector);
            let whole = dims / LANES * LANES;
            for i in (0..whole).step_by(LANES) {
                C::put_lanes(L::load(vector.add(i)), inverse, to.add(i * C::BYTES));
            }
            for i in whole..dims {
                C::put(*vector.add(i), inverse, to.add(i * C::BYTES));
            }
        }
    }
}

/// Stores the scale of a vector, if its code has one. Returns the factor for the vector's elements.
#[inline(always)]
unsafe fn put_scale<L: Lanes, C: Code>(plane: Plane, slot: usize, vector: *const f32) -> f32 {
    if !C::SCALED {
        return 1.0;
    }
    let mut most = L::splat(0.0);
    // SAFETY: the caller gives a vector of the plane, and a place for each slot's scale.
    unsafe {
        for i in (0..plane.dims).step_by(LANES) {
            let x = L::load_first(vector.add(i), plane.dims - i);
            most = most.max(x).max(L::splat(0.0).sub(x));
        }
        let scale = C::scale(most.largest());
        plane.scales.cast::<f32>().add(slot).write_unaligned(scale);
        if scale > 0.0 { 1.0 / scale } else { 0.0 }
    }
}

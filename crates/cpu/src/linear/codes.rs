//! Decoding of coded chunks in registers: [`Coded`] for each pair of codes and scales.
//!
//! A decoder gives unsigned codes, 64 bytes a vector, and `f32` scales and mins. The scales are
//! exact, because the product of an `f16` and at most eight bits fits an `f32`. So every
//! instruction set decodes the same numbers.

use std::marker::PhantomData;

use lathe_tensor::ScaleType;

use crate::isa::{Simd, unroll};
use crate::pack::layout::{Codes, Constants};
use crate::pack::{PANEL, table};

/// A format as the kernels decode it.
pub(crate) trait Coded: 'static {
    /// Bits of an unsigned code after decoding.
    const BITS: u32;
    /// The code that stands for zero.
    const ZERO: i32;
    /// Bytes of a segment's codes.
    const SEGMENT_BYTES: usize;
    /// Scales of a segment: 1 or 2.
    const PARTS: usize;
    /// Whether a min is added.
    const MIN: bool;

    /// Segments in a chunk.
    fn segments(constants: &Constants) -> usize;
    /// Bytes of a chunk's scales.
    fn tail_bytes(constants: &Constants) -> usize;
    /// The codes of a segment.
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8];
    /// Writes the scales `[segments][PARTS][16]` and mins `[segments][16]` of a chunk.
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded);
}

/// Where decoded scales and mins go.
#[derive(Clone, Copy)]
pub(crate) struct Decoded {
    pub(crate) scales: *mut f32,
    pub(crate) mins: *mut f32,
}

/// How codes are stored.
pub(crate) trait StoredCodes: 'static {
    const BITS: u32;
    const ZERO: i32;
    const SEGMENT_BYTES: usize;
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8];
}

/// How scales are stored.
pub(crate) trait Tail: 'static {
    const PARTS: usize;
    const MIN: bool;
    fn segments(constants: &Constants) -> usize;
    fn tail_bytes(constants: &Constants) -> usize;
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded);
}

/// Codes of one width with scales of one kind.
pub(crate) struct Pair<W, T>(PhantomData<(W, T)>);

impl<W: StoredCodes, T: Tail> Coded for Pair<W, T> {
    const BITS: u32 = W::BITS;
    const ZERO: i32 = W::ZERO;
    const SEGMENT_BYTES: usize = W::SEGMENT_BYTES;
    const PARTS: usize = T::PARTS;
    const MIN: bool = T::MIN;

    #[inline(always)]
    fn segments(constants: &Constants) -> usize {
        T::segments(constants)
    }
    #[inline(always)]
    fn tail_bytes(constants: &Constants) -> usize {
        T::tail_bytes(constants)
    }
    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: as the caller promises.
        unsafe { W::codes::<S>(segment) }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded) {
        // SAFETY: as the caller promises.
        unsafe { T::scales::<S>(tail, constants, out) }
    }
}

/// Unsigned codes of `BITS` bits minus `ZERO`.
pub(crate) struct Plain<const BITS: u32, const ZERO: i32>;

impl<const BITS: u32, const ZERO: i32> StoredCodes for Plain<BITS, ZERO> {
    const BITS: u32 = BITS;
    const ZERO: i32 = ZERO;
    const SEGMENT_BYTES: usize = BITS as usize * 64;

    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: the caller gives a segment of this width.
        unsafe {
            match BITS {
                4 => nibbles::<S>(segment),
                5 => five_bits::<S>(segment),
                6 => six_bits::<S>(segment),
                _ => eight_bits::<S>(segment),
            }
        }
    }
}

/// Nibbles that index a table: IQ4's with `BITS` 8, e2m1's with `BITS` 5.
pub(crate) struct Table<const BITS: u32>;

impl<const BITS: u32> Table<BITS> {
    const CODES: Codes = if BITS == 8 { Codes::Iq4 } else { Codes::E2m1 };
    const VALUES: [u8; 16] = match table(Self::CODES) {
        Some(values) => values,
        None => [0; 16],
    };
}

impl<const BITS: u32> StoredCodes for Table<BITS> {
    const BITS: u32 = BITS;
    const ZERO: i32 = if BITS == 8 { 128 } else { 12 };
    const SEGMENT_BYTES: usize = 256;

    #[inline(always)]
    unsafe fn codes<S: Simd>(segment: *const u8) -> [S::B; 8] {
        // SAFETY: the caller gives a segment of nibbles.
        unsafe {
            let mut codes = nibbles::<S>(segment);
            unroll!(j in 8 => {
                codes[j] = S::lookup(&Self::VALUES, codes[j]);
            });
            codes
        }
    }
}

#[inline(always)]
unsafe fn nibbles<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 256 readable bytes.
    unsafe {
        let (a, b) = (S::load_b(p), S::load_b(p.add(64)));
        let (c, d) = (S::load_b(p.add(128)), S::load_b(p.add(192)));
        [
            S::low4(a),
            S::high4(a),
            S::low4(b),
            S::high4(b),
            S::low4(c),
            S::high4(c),
            S::low4(d),
            S::high4(d),
        ]
    }
}

#[inline(always)]
unsafe fn five_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 320 readable bytes.
    unsafe {
        let n = nibbles::<S>(p);
        let high = S::load_b(p.add(256));
        [
            S::merge::<4, 0, 0x10>(n[0], high),
            S::merge::<3, 0, 0x10>(n[1], high),
            S::merge::<2, 0, 0x10>(n[2], high),
            S::merge::<1, 0, 0x10>(n[3], high),
            S::merge::<0, 0, 0x10>(n[4], high),
            S::merge::<0, 1, 0x10>(n[5], high),
            S::merge::<0, 2, 0x10>(n[6], high),
            S::merge::<0, 3, 0x10>(n[7], high),
        ]
    }
}

#[inline(always)]
unsafe fn six_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 384 readable bytes.
    unsafe {
        let n = nibbles::<S>(p);
        let (a, b) = (S::load_b(p.add(256)), S::load_b(p.add(320)));
        [
            S::merge::<4, 0, 0x30>(n[0], a),
            S::merge::<2, 0, 0x30>(n[1], a),
            S::merge::<0, 0, 0x30>(n[2], a),
            S::merge::<0, 2, 0x30>(n[3], a),
            S::merge::<4, 0, 0x30>(n[4], b),
            S::merge::<2, 0, 0x30>(n[5], b),
            S::merge::<0, 0, 0x30>(n[6], b),
            S::merge::<0, 2, 0x30>(n[7], b),
        ]
    }
}

#[inline(always)]
unsafe fn eight_bits<S: Simd>(p: *const u8) -> [S::B; 8] {
    // SAFETY: the caller gives 512 readable bytes.
    unsafe {
        [
            S::load_b(p),
            S::load_b(p.add(64)),
            S::load_b(p.add(128)),
            S::load_b(p.add(192)),
            S::load_b(p.add(256)),
            S::load_b(p.add(320)),
            S::load_b(p.add(384)),
            S::load_b(p.add(448)),
        ]
    }
}

/// One `f16` scale a segment, and with `MIN` one `f16` min: `Scales::Half`, `Scales::HalfMin`.
pub(crate) struct Half<const MIN: bool>;

impl<const MIN: bool> Tail for Half<MIN> {
    const PARTS: usize = 1;
    const MIN: bool = MIN;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        1
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        if MIN { 64 } else { 32 }
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, _: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for one vector of each.
        unsafe {
            S::store(out.scales, S::load_f16(tail.cast()));
            if MIN {
                S::store(out.mins, S::load_f16(tail.add(32).cast()));
            }
        }
    }
}

/// `Scales::SuperMin`.
pub(crate) struct SuperMin;

impl Tail for SuperMin {
    const PARTS: usize = 1;
    const MIN: bool = true;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        8
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        256
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, _: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for eight vectors of each.
        unsafe {
            let w0 = S::load_i(tail.cast());
            let w1 = S::load_i(tail.add(64).cast());
            let w2 = S::load_i(tail.add(128).cast());
            let (t0, t1, t2) = (S::shr::<24>(w0), S::shr::<24>(w1), S::shr::<24>(w2));
            let w3 = S::or(S::or(t0, S::shl::<8>(t1)), S::shl::<16>(t2));
            let d = S::load_f16(tail.add(192).cast());
            let minus_dmin = S::mul(S::splat(-1.0), S::load_f16(tail.add(224).cast()));
            four_sixes::<S>(w0, d, out.scales);
            four_sixes::<S>(w1, d, out.scales.add(4 * PANEL));
            four_sixes::<S>(w2, minus_dmin, out.mins);
            four_sixes::<S>(w3, minus_dmin, out.mins.add(4 * PANEL));
        }
    }
}

/// The four lowest six-bit numbers of a word, times `d`.
#[inline(always)]
unsafe fn four_sixes<S: Simd>(w: S::I, d: S::F, out: *mut f32) {
    // SAFETY: the caller gives room for four vectors.
    unsafe {
        S::store(out, S::mul(S::to_f(S::and(w, 63)), d));
        S::store(out.add(PANEL), S::mul(S::to_f(S::and(S::shr::<6>(w), 63)), d));
        S::store(out.add(2 * PANEL), S::mul(S::to_f(S::and(S::shr::<12>(w), 63)), d));
        S::store(out.add(3 * PANEL), S::mul(S::to_f(S::and(S::shr::<18>(w), 63)), d));
    }
}

/// `Scales::SuperSigned`.
pub(crate) struct SuperSigned;

impl Tail for SuperSigned {
    const PARTS: usize = 2;
    const MIN: bool = false;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        8
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        288
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, _: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for sixteen vectors.
        unsafe {
            let d = S::load_f16(tail.add(256).cast());
            for i in 0..16 {
                let sub = S::load_i8(tail.add(16 * i).cast());
                S::store(out.scales.add(i * PANEL), S::mul(S::to_f(sub), d));
            }
        }
    }
}

/// `Scales::SuperSix`.
pub(crate) struct SuperSix;

impl Tail for SuperSix {
    const PARTS: usize = 1;
    const MIN: bool = false;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        8
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        128
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, _: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for eight vectors.
        unsafe {
            let low = S::load_i(tail.cast());
            let high = S::load_u16(tail.add(64).cast());
            let d = S::load_f16(tail.add(96).cast());
            unroll!(i in 8 => {
                let low = S::and(S::shr_by(low, 4 * i as u32), 15);
                let high = S::shl::<4>(S::and(S::shr_by(high, 2 * i as u32), 3));
                let sub = S::add(S::to_f(S::or(low, high)), S::splat(-32.0));
                S::store(out.scales.add(i * PANEL), S::mul(sub, d));
            });
        }
    }
}

/// `Scales::E8m0`: the exponent bits of an `f32`. Code 0 is half of the smallest normal number.
pub(crate) struct E8m0;

impl Tail for E8m0 {
    const PARTS: usize = 1;
    const MIN: bool = false;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        1
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        16
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for one vector.
        unsafe {
            let exponent = S::and(S::load_i8(tail.cast()), 255);
            let scale = S::bits_to_f(S::shl::<23>(exponent));
            S::store(out.scales, S::mul(scale, S::splat(constants.multiplier)));
        }
    }
}

/// `Scales::E4m3`. The code's bits are moved into an `f16`, whose exponent bias is 8 larger.
pub(crate) struct E4m3;

impl Tail for E4m3 {
    const PARTS: usize = 2;
    const MIN: bool = false;

    #[inline(always)]
    fn segments(_: &Constants) -> usize {
        1
    }
    #[inline(always)]
    fn tail_bytes(_: &Constants) -> usize {
        32
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for two vectors.
        unsafe {
            let multiplier = S::splat(constants.multiplier);
            for part in 0..2 {
                let scale = S::load_e4m3(tail.add(16 * part));
                S::store(out.scales.add(part * PANEL), S::mul(scale, multiplier));
            }
        }
    }
}

/// The scales at the start of a tail of `Scales::Group`.
#[inline(always)]
pub(crate) unsafe fn group_scale<S: Simd>(tail: *const u8, kind: ScaleType) -> S::F {
    // SAFETY: the caller gives a tail with scales of this type.
    unsafe {
        match kind {
            ScaleType::F32 => S::load(tail.cast()),
            ScaleType::F16 => S::load_f16(tail.cast()),
            ScaleType::BF16 => S::bits_to_f(S::shl::<16>(S::load_u16(tail.cast()))),
            ScaleType::E8M0 | ScaleType::E4M3Global => {
                S::bits_to_f(S::shl::<23>(S::and(S::load_i8(tail.cast()), 255)))
            }
        }
    }
}

/// `Scales::Group`. With `ZEROS` its zero points become mins, `-zero * scale`.
pub(crate) struct Group<const ZEROS: bool>;

impl<const ZEROS: bool> Tail for Group<ZEROS> {
    const PARTS: usize = 1;
    const MIN: bool = ZEROS;

    #[inline(always)]
    fn segments(constants: &Constants) -> usize {
        constants.group_segments
    }
    #[inline(always)]
    fn tail_bytes(constants: &Constants) -> usize {
        PANEL * (constants.scale.bytes() + usize::from(ZEROS))
    }
    #[inline(always)]
    unsafe fn scales<S: Simd>(tail: *const u8, constants: &Constants, out: Decoded) {
        // SAFETY: the caller gives a tail of this layout and room for a vector a segment of each.
        unsafe {
            let scale = group_scale::<S>(tail, constants.scale);
            let min = if ZEROS {
                let zeros = tail.add(PANEL * constants.scale.bytes());
                let zero = S::to_f(S::load_i8(zeros.cast()));
                S::mul(S::mul(zero, S::splat(-1.0)), scale)
            } else {
                scale
            };
            for segment in 0..constants.group_segments {
                S::store(out.scales.add(segment * PANEL), scale);
                if ZEROS {
                    S::store(out.mins.add(segment * PANEL), min);
                }
            }
        }
    }
}

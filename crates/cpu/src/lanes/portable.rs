//! Lanes as an array. The compiler uses the instructions of the target's baseline for it.

use super::{LANES, Lanes};

/// Sixteen floats in an array.
#[derive(Clone, Copy)]
pub(super) struct Portable([f32; LANES]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
}

impl Lanes for Portable {
    const BLOCK_ROWS: usize = 2;
    const BLOCK_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self([x; LANES])
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for 16 readable floats.
        Self(unsafe { from.cast::<[f32; LANES]>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for 16 writable floats.
        unsafe { to.cast::<[f32; LANES]>().write_unaligned(self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for 16 readable halves.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|b| half::f16::from_bits(b).to_f32()))
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        let bits = self.0.map(|x| half::f16::from_f32(x).to_bits());
        // SAFETY: the caller vouches for 16 writable halves.
        unsafe { to.cast::<[u16; LANES]>().write_unaligned(bits) }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for 16 readable halves.
        let bits = unsafe { from.cast::<[u16; LANES]>().read_unaligned() };
        Self(bits.map(|b| f32::from_bits(u32::from(b) << 16)))
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes.
        let codes = unsafe { from.cast::<[i8; LANES]>().read_unaligned() };
        Self(codes.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        // SAFETY: the caller vouches for 16 readable words.
        let codes = unsafe { from.cast::<[i16; LANES]>().read_unaligned() };
        Self(codes.map(f32::from))
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes.
        let codes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        // The exponent and the mantissa move to their places in an `f32`. The product with 2^(127 -
        // 7) = 2^120 corrects the exponent's bias, for subnormals too.
        Self(codes.map(|c| {
            let bits = (u32::from(c & 0x80) << 24) | (u32::from(c & 0x7f) << 20);
            f32::from_bits(bits) * f32::from_bits(0x7b80_0000)
        }))
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for a readable half.
        Self::splat(half::f16::from_bits(unsafe { from.read_unaligned() }).to_f32())
    }
    #[inline(always)]
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self {
        // SAFETY: the caller vouches for 16 readable bytes.
        let codes = unsafe { from.cast::<[u8; LANES]>().read_unaligned() };
        Self(codes.map(|c| f32::from(if high { c >> 4 } else { c & 15 })))
    }
    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> Self {
        // SAFETY: the caller vouches for 8 readable bytes.
        let codes = unsafe { from.cast::<[u8; LANES / 2]>().read_unaligned() };
        Self(std::array::from_fn(|i| f32::from(codes[i % 8] >> (i / 8 * 4) & 15)))
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }
    // Not `mul_add`, which calls libm for every element where there is no such instruction.
    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(std::array::from_fn(|i| self.0[i] * factor.0[i] + addend.0[i]))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| if a < b { a } else { b })
    }
    #[inline(always)]
    fn round(self) -> Self {
        // Adding and taking away 1.5 * 2^23 rounds to nearest even in the range that `exp` uses.
        const MAGIC: f32 = 12_582_912.0;
        Self(self.0.map(|x| (x + MAGIC) - MAGIC))
    }
    #[inline(always)]
    fn scale_power(self, n: Self) -> Self {
        self.zip(n, |x, n| x * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: Self) -> Self {
        Self(std::array::from_fn(|i| if probe.0[i] < limit.0[i] { 0.0 } else { self.0[i] }))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let mut x = self.0;
        let mut n = LANES;
        while n > 1 {
            n /= 2;
            for i in 0..n {
                x[i] += x[i + n];
            }
        }
        x[0]
    }
    #[inline(always)]
    fn prefetch(_at: *const u8) {}
    #[inline(always)]
    fn largest(self) -> f32 {
        self.0.into_iter().fold(f32::NEG_INFINITY, f32::max)
    }
}

//! Lanes as four NEON registers.

use std::arch::aarch64::*;

use super::Lanes;

/// Sixteen floats in four 128-bit registers.
#[derive(Clone, Copy)]
pub struct Neon([float32x4_t; 4]);

// SAFETY of every block here: `dispatch` hands this type to a kernel only where NEON was detected;
// memory is as the trait's callers vouch.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Neon {
    #[inline(always)]
    fn each(self, f: impl Fn(float32x4_t) -> float32x4_t) -> Self {
        Self(self.0.map(f))
    }
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(float32x4_t, float32x4_t) -> float32x4_t) -> Self {
        Self(std::array::from_fn(|i| f(self.0[i], other.0[i])))
    }
    #[inline(always)]
    fn signed(a: int16x8_t, b: int16x8_t) -> Self {
        unsafe {
            Self([
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(a))),
                vcvtq_f32_s32(vmovl_high_s16(a)),
                vcvtq_f32_s32(vmovl_s16(vget_low_s16(b))),
                vcvtq_f32_s32(vmovl_high_s16(b)),
            ])
        }
    }
    #[inline(always)]
    fn bytes(codes: uint8x16_t) -> Self {
        unsafe {
            let (a, b) = (vmovl_u8(vget_low_u8(codes)), vmovl_high_u8(codes));
            Self::signed(vreinterpretq_s16_u16(a), vreinterpretq_s16_u16(b))
        }
    }
    /// `a` where `first`, else `b`. If one of a pair is a NaN, the larger and the smaller of them
    /// is `b`, as on other instruction sets. `fmax` does otherwise.
    #[inline(always)]
    fn choose(first: uint32x4_t, a: float32x4_t, b: float32x4_t) -> float32x4_t {
        unsafe { vbslq_f32(first, a, b) }
    }
}

/// Exponent and mantissa move to their places in an `f32`. The product with 2^(127 - 7) = 2^120
/// corrects the exponent's bias, for subnormals too. The codes are extended with their sign, which
/// is the float's sign.
#[inline(always)]
fn e4m3(codes: int32x4_t) -> float32x4_t {
    // SAFETY: as for the impl below.
    unsafe {
        let codes = vreinterpretq_u32_s32(codes);
        let sign = vandq_u32(codes, vdupq_n_u32(0x8000_0000));
        let rest = vshlq_n_u32::<20>(vandq_u32(codes, vdupq_n_u32(0x7f)));
        let bits = vreinterpretq_f32_u32(vorrq_u32(sign, rest));
        vmulq_n_f32(bits, f32::from_bits(0x7b80_0000))
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Neon {
    // 24 registers of sums, a vector's four quarters and one broadcast fit into the 32 registers.
    const BLOCK_ROWS: usize = 6;
    const BLOCK_VECTORS: usize = 1;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        unsafe { Self([vdupq_n_f32(x); 4]) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(std::array::from_fn(|i| vld1q_f32(from.add(4 * i)))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            for i in 0..4 {
                vst1q_f32(to.add(4 * i), self.0[i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe {
            let half = |i: usize| vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(from.add(4 * i))));
            Self(std::array::from_fn(half))
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe {
            for i in 0..4 {
                vst1_u16(to.add(4 * i), vreinterpret_u16_f16(vcvt_f16_f32(self.0[i])));
            }
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let wide = |i: usize| vshll_n_u16::<16>(vld1_u16(from.add(4 * i)));
            Self(std::array::from_fn(|i| vreinterpretq_f32_u32(wide(i))))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe {
            let codes = vld1q_s8(from);
            Self::signed(vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes))
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        unsafe { Self::signed(vld1q_s16(from), vld1q_s16(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        unsafe {
            let codes = vld1q_s8(from.cast());
            let (a, b) = (vmovl_s8(vget_low_s8(codes)), vmovl_high_s8(codes));
            Self([
                e4m3(vmovl_s16(vget_low_s16(a))),
                e4m3(vmovl_high_s16(a)),
                e4m3(vmovl_s16(vget_low_s16(b))),
                e4m3(vmovl_high_s16(b)),
            ])
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        unsafe {
            let half = vreinterpret_f16_u16(vdup_n_u16(from.read_unaligned()));
            Self([vcvt_f32_f16(half); 4])
        }
    }
    #[inline(always)]
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self {
        unsafe {
            let codes = vld1q_u8(from);
            let half = if high { vshrq_n_u8::<4>(codes) } else { vandq_u8(codes, vdupq_n_u8(15)) };
            Self::bytes(half)
        }
    }
    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> Self {
        unsafe {
            let codes = vld1_u8(from);
            let low = vand_u8(codes, vdup_n_u8(15));
            Self::bytes(vcombine_u8(low, vshr_n_u8::<4>(codes)))
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vaddq_f32(a, b) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vsubq_f32(a, b) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vmulq_f32(a, b) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { vdivq_f32(a, b) })
    }
    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        let fused = |i: usize| unsafe { vfmaq_f32(addend.0[i], self.0[i], factor.0[i]) };
        Self(std::array::from_fn(fused))
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { Self::choose(vcgtq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        self.zip(other, |a, b| unsafe { Self::choose(vcltq_f32(a, b), a, b) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        self.each(|x| unsafe { vrndnq_f32(x) })
    }
    #[inline(always)]
    fn scale_power(self, n: Self) -> Self {
        self.zip(n, |x, n| unsafe {
            let biased = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
            vmulq_f32(x, vreinterpretq_f32_s32(vshlq_n_s32::<23>(biased)))
        })
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: Self) -> Self {
        Self(std::array::from_fn(|i| unsafe {
            let below = vcltq_f32(probe.0[i], limit.0[i]);
            vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(self.0[i]), below))
        }))
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        let [a, b, c, d] = self.0;
        unsafe {
            let four = vaddq_f32(vaddq_f32(a, c), vaddq_f32(b, d));
            vpadds_f32(vadd_f32(vget_low_f32(four), vget_high_f32(four)))
        }
    }
    #[inline(always)]
    fn prefetch(at: *const u8) {
        crate::isa::prefetch(at);
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        let [a, b, c, d] = self.0;
        unsafe { vmaxnmvq_f32(vmaxnmq_f32(vmaxnmq_f32(a, c), vmaxnmq_f32(b, d))) }
    }
}

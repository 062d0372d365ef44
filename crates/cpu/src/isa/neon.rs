//! [`Simd`] on NEON (every 64-bit Arm): four registers a vector.
//!
//! Integer dots multiply signed bytes. Processors with Arm v8.2's dot product use `sdot`
//! (Cortex-A55 and A76, Neoverse N1, Apple's A11 and later). Others multiply in `i16` and add pairs
//! to `i32` before they can saturate. Codes of eight bits become signed by subtracting 128, and 128
//! times the sum of the activations is added back.
//!
//! `sdot` and the prefetch are written in `asm!`, because Rust's intrinsics for them are not
//! stable.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{ByteCodes, ByteDots, SEGMENT, Simd};

/// NEON. With `DOT` also the dot product.
#[derive(Clone, Copy)]
pub(crate) struct Neon<const DOT: bool>;

// SAFETY of every block below: the caller of a `Simd` method promises the instructions and
// readable or writable pointers.
impl<const DOT: bool> Simd for Neon<DOT> {
    type Codes = ByteCodes;
    type F = [float32x4_t; 4];
    type I = [uint32x4_t; 4];
    type B = [uint8x16_t; 4];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [vdupq_n_f32(x); 4] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [vld1q_f32(p), vld1q_f32(p.add(4)), vld1q_f32(p.add(8)), vld1q_f32(p.add(12))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: see above.
        unsafe {
            for i in 0..4 {
                vst1q_f32(p.add(4 * i), x[i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        // SAFETY: see above.
        unsafe { widen_f16(vld1q_u16(p), vld1q_u16(p.add(8))) }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { std::array::from_fn(|i| vmulq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { std::array::from_fn(|i| vaddq_f32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { std::array::from_fn(|i| vfmaq_f32(c[i], a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn to_f(x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { x.map(|v| vcvtq_f32_s32(vreinterpretq_s32_u32(v))) }
    }
    #[inline(always)]
    unsafe fn bits_to_f(x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { x.map(|v| vreinterpretq_f32_u32(v)) }
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u32) -> Self::I {
        // SAFETY: see above.
        unsafe { [vld1q_u32(p), vld1q_u32(p.add(4)), vld1q_u32(p.add(8)), vld1q_u32(p.add(12))] }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u16) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let (a, b) = (vld1q_u16(p), vld1q_u16(p.add(8)));
            [
                vmovl_u16(vget_low_u16(a)),
                vmovl_high_u16(a),
                vmovl_u16(vget_low_u16(b)),
                vmovl_high_u16(b),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self::F {
        // SAFETY: see above. Sign, exponent and mantissa move into an f16, whose exponent bias is
        // 8 larger.
        unsafe {
            let codes = vld1q_s8(p.cast());
            let half = |wide: int16x8_t| {
                let wide = vreinterpretq_u16_s16(wide);
                let bits = vandq_u16(vshlq_n_u16::<7>(wide), vdupq_n_u16(0x3f80));
                vorrq_u16(bits, vandq_u16(wide, vdupq_n_u16(0x8000)))
            };
            let small = widen_f16(half(vmovl_s8(vget_low_s8(codes))), half(vmovl_high_s8(codes)));
            small.map(|v| vmulq_n_f32(v, 256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> Self::F {
        // SAFETY: see above. The codes are the high bytes of `f16`.
        unsafe {
            let (codes, zero) = (vld1q_u8(p), vdupq_n_u8(0));
            let halves = |x| vreinterpretq_u16_u8(x);
            widen_f16(halves(vzip1q_u8(zero, codes)), halves(vzip2q_u8(zero, codes)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let bytes = vld1q_s8(p);
            let (a, b) = (vmovl_s8(vget_low_s8(bytes)), vmovl_high_s8(bytes));
            [
                vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(a))),
                vreinterpretq_u32_s32(vmovl_high_s16(a)),
                vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(b))),
                vreinterpretq_u32_s32(vmovl_high_s16(b)),
            ]
        }
    }
    // A shift by a register of constants becomes an immediate. A negative count shifts to the
    // right.
    #[inline(always)]
    unsafe fn shr<const N: u32>(x: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { x.map(|v| vshlq_u32(v, vdupq_n_s32(-(N as i32)))) }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(x: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { x.map(|v| vshlq_u32(v, vdupq_n_s32(N as i32))) }
    }
    #[inline(always)]
    unsafe fn shr_by(x: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { x.map(|v| vshlq_u32(v, vdupq_n_s32(-(n as i32)))) }
    }
    #[inline(always)]
    unsafe fn and(x: Self::I, mask: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { x.map(|v| vandq_u32(v, vdupq_n_u32(mask))) }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { std::array::from_fn(|i| vorrq_u32(a[i], b[i])) }
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        // SAFETY: see above.
        unsafe { [vld1q_u8(p), vld1q_u8(p.add(16)), vld1q_u8(p.add(32)), vld1q_u8(p.add(48))] }
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, x: Self::B) {
        // SAFETY: see above.
        unsafe {
            for i in 0..4 {
                vst1q_u8(p.add(16 * i), x[i]);
            }
        }
    }
    #[inline(always)]
    unsafe fn b_to_i(x: Self::B) -> Self::I {
        // SAFETY: see above.
        unsafe { x.map(|v| vreinterpretq_u32_u8(v)) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe {
            let table = vld1q_u8(table.as_ptr());
            index.map(|v| vqtbl1q_u8(table, v))
        }
    }
    #[inline(always)]
    unsafe fn low4(x: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe { x.map(|v| vandq_u8(v, vdupq_n_u8(15))) }
    }
    #[inline(always)]
    unsafe fn high4(x: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe { x.map(|v| vshrq_n_u8::<4>(v)) }
    }
    #[inline(always)]
    unsafe fn merge<const LEFT: u32, const RIGHT: u32, const MASK: u8>(
        codes: Self::B,
        plane: Self::B,
    ) -> Self::B {
        // SAFETY: see above.
        unsafe {
            let (left, right) = (vdupq_n_s8(LEFT as i8), vdupq_n_s8(-(RIGHT as i8)));
            std::array::from_fn(|i| {
                let moved = vshlq_u8(vshlq_u8(plane[i], left), right);
                vorrq_u8(codes[i], vandq_u8(moved, vdupq_n_u8(MASK)))
            })
        }
    }
    #[inline(always)]
    unsafe fn dot_step(acc: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        // SAFETY: see above.
        unsafe {
            std::array::from_fn(|i| {
                let (code, x) = (vreinterpretq_s8_u8(codes[i]), vreinterpretq_s8_u8(x[i]));
                if DOT {
                    let acc = vreinterpretq_s32_u32(acc[i]);
                    return vreinterpretq_u32_s32(sdot_lane::<0>(acc, code, x));
                }
                // As in the dot of four-bit codes. That adds pairs once in eight products, which is
                // left out here.
                let acc = vreinterpretq_s16_u32(acc[i]);
                let acc = vmlal_s8(acc, vget_low_s8(code), vget_low_s8(x));
                vreinterpretq_u32_s16(vmlal_high_s8(acc, code, x))
            })
        }
    }
}

impl<const DOT: bool> ByteDots for Neon<DOT> {
    #[inline(always)]
    unsafe fn dot<const N: usize>(
        widths: [u32; 2],
        start: i32,
        codes: &[Self::B; N],
        x: *const i8,
    ) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let [bits, low_bits] = widths;
            if bits < 8 {
                dot_signed::<DOT, N>(widths, start, codes, x)
            } else {
                let flip = vdupq_n_u8(0x80);
                let signed = codes.map(|code| code.map(|v| veorq_u8(v, flip)));
                let start = start + 128 * sum_of::<N>(low_bits, x);
                dot_signed::<DOT, N>(widths, start, &signed, x)
            }
        }
    }
}

/// Sixteen halves, widened.
#[inline(always)]
unsafe fn widen_f16(a: uint16x8_t, b: uint16x8_t) -> [float32x4_t; 4] {
    // SAFETY: the caller promises NEON.
    unsafe {
        let (a, b) = (vreinterpretq_f16_u16(a), vreinterpretq_f16_u16(b));
        [
            vcvt_f32_f16(vget_low_f16(a)),
            vcvt_high_f32_f16(a),
            vcvt_f32_f16(vget_low_f16(b)),
            vcvt_high_f32_f16(b),
        ]
    }
}

/// `acc[i] + sum over b of a[i, b] * x[LANE, b]`.
#[inline(always)]
unsafe fn sdot_lane<const LANE: usize>(acc: int32x4_t, a: int8x16_t, x: int8x16_t) -> int32x4_t {
    let mut sum = acc;
    // SAFETY: the caller promises the dot product; registers alone are touched.
    unsafe {
        asm!(
            ".arch_extension dotprod",
            "sdot {sum:v}.4s, {a:v}.16b, {x:v}.4b[{lane}]",
            sum = inout(vreg) sum,
            a = in(vreg) a,
            x = in(vreg) x,
            lane = const LANE,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    sum
}

/// The sum of the `4 * N` activations `2^low_bits * high + low` at `x`.
#[inline(always)]
unsafe fn sum_of<const N: usize>(low_bits: u32, x: *const i8) -> i32 {
    // SAFETY: the caller gives `4 * N` bytes at `x` and `SEGMENT` further, and `N` is 4 or 8.
    unsafe {
        let (mut high, mut low) = (vdupq_n_s32(0), vdupq_n_s32(0));
        for at in (0..4 * N).step_by(16) {
            high = vpadalq_s16(high, vpaddlq_s8(vld1q_s8(x.add(at))));
            low = vpadalq_s16(low, vpaddlq_s8(vld1q_s8(x.add(SEGMENT + at))));
        }
        vaddvq_s32(vaddq_s32(vshlq_s32(high, vdupq_n_s32(low_bits as i32)), low))
    }
}

/// [`ByteDots::dot`] of codes that are signed bytes.
#[inline(always)]
unsafe fn dot_signed<const DOT: bool, const N: usize>(
    widths: [u32; 2],
    start: i32,
    codes: &[[uint8x16_t; 4]; N],
    x: *const i8,
) -> [uint32x4_t; 4] {
    // SAFETY: as the caller promises.
    unsafe {
        if DOT {
            dot_by_lanes(widths[1], start, codes, x)
        } else {
            dot_by_pairs(widths, start, codes, x)
        }
    }
}

/// By `sdot`. The high bytes and the low bytes have a chain of sums each.
#[inline(always)]
unsafe fn dot_by_lanes<const N: usize>(
    low_bits: u32,
    start: i32,
    codes: &[[uint8x16_t; 4]; N],
    x: *const i8,
) -> [uint32x4_t; 4] {
    // SAFETY: the caller gives `4 * N` bytes at `x` and `SEGMENT` further, `N` is 4 or 8, and
    // promises the dot product.
    unsafe {
        let (mut high, mut low) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(start); 4]);
        for first in (0..N).step_by(4) {
            let (highs, lows) = (vld1q_s8(x.add(4 * first)), vld1q_s8(x.add(SEGMENT + 4 * first)));
            for i in 0..4 {
                let code = |j: usize| vreinterpretq_s8_u8(codes[first + j][i]);
                high[i] = sdot_lane::<0>(high[i], code(0), highs);
                low[i] = sdot_lane::<0>(low[i], code(0), lows);
                high[i] = sdot_lane::<1>(high[i], code(1), highs);
                low[i] = sdot_lane::<1>(low[i], code(1), lows);
                high[i] = sdot_lane::<2>(high[i], code(2), highs);
                low[i] = sdot_lane::<2>(low[i], code(2), lows);
                high[i] = sdot_lane::<3>(high[i], code(3), highs);
                low[i] = sdot_lane::<3>(low[i], code(3), lows);
            }
        }
        join(low_bits, high, low)
    }
}

/// By products in `i16`. As many of them are added in `i16` as cannot saturate. Signed codes are at
/// most `2^(bits - 1)` for eight bits and below `2^bits` otherwise. Activations are at most 127.
#[inline(always)]
unsafe fn dot_by_pairs<const N: usize>(
    [bits, low_bits]: [u32; 2],
    start: i32,
    codes: &[[uint8x16_t; 4]; N],
    x: *const i8,
) -> [uint32x4_t; 4] {
    // SAFETY: the caller gives `4 * N` bytes at `x` and `SEGMENT` further.
    unsafe {
        let terms = match bits {
            4 | 5 => 8,
            6 => 4,
            _ => 2,
        };
        let (mut high, mut low) = ([vdupq_n_s32(0); 4], [vdupq_n_s32(start); 4]);
        for i in 0..4 {
            let zero = vdupq_n_s32(0);
            // One sum for each half of the register, made of neighbouring pairs of products.
            let (mut highs, mut lows) = ([zero; 2], [zero; 2]);
            for first in (0..N).step_by(terms) {
                let some = first..N.min(first + terms);
                add_pairs(&mut highs, codes, i, some.clone(), x);
                add_pairs(&mut lows, codes, i, some, x.add(SEGMENT));
            }
            high[i] = vpaddq_s32(highs[0], highs[1]);
            low[i] = vaddq_s32(low[i], vpaddq_s32(lows[0], lows[1]));
        }
        join(low_bits, high, low)
    }
}

/// Adds to `sums` the products of register `i` of `codes[some]` and the words `some` at `x`.
#[inline(always)]
unsafe fn add_pairs<const N: usize>(
    sums: &mut [int32x4_t; 2],
    codes: &[[uint8x16_t; 4]; N],
    i: usize,
    some: std::ops::Range<usize>,
    x: *const i8,
) {
    // SAFETY: the caller gives the words, and a range whose products an `i16` holds.
    unsafe {
        let mut products = [vdupq_n_s16(0); 2];
        for j in some {
            let word = x.add(4 * j).cast::<i32>().read_unaligned();
            let factor = vreinterpretq_s8_s32(vdupq_n_s32(word));
            let code = vreinterpretq_s8_u8(codes[j][i]);
            products[0] = vmlal_s8(products[0], vget_low_s8(code), vget_low_s8(factor));
            products[1] = vmlal_high_s8(products[1], code, factor);
        }
        for half in 0..2 {
            sums[half] = vpadalq_s16(sums[half], products[half]);
        }
    }
}

/// `2^low_bits * high + low`.
#[inline(always)]
unsafe fn join(low_bits: u32, high: [int32x4_t; 4], low: [int32x4_t; 4]) -> [uint32x4_t; 4] {
    // SAFETY: the caller promises NEON.
    unsafe {
        let by = vdupq_n_s32(low_bits as i32);
        std::array::from_fn(|i| vreinterpretq_u32_s32(vaddq_s32(low[i], vshlq_s32(high[i], by))))
    }
}

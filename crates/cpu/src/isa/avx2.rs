//! [`Simd`] on AVX2, FMA and F16C (Haswell, Zen and later): two registers a vector.
//!
//! Without AVX-VNNI an integer dot is `maddubs` (unsigned x signed bytes to pairs in `i16`), the
//! pairs being added in `i16` as long as the width of the codes rules out saturation
//! (`2 * (2^bits - 1) * 127 * terms < 2^15`), then `madd` to `i32`.

use std::arch::x86_64::*;

use super::Simd;

/// AVX2, FMA and F16C; with `VNNI` also AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>;

#[inline(always)]
unsafe fn both<T: Copy, U>(x: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
    [f(x[0]), f(x[1])]
}

// SAFETY of every block below: the caller of a `Simd` method promises the instructions and
// readable or writable pointers.
impl<const VNNI: bool> Simd for Avx2<VNNI> {
    type F = [__m256; 2];
    type I = [__m256i; 2];
    type B = [__m256i; 2];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_set1_ps(x); 2] }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_ps(p), _mm256_loadu_ps(p.add(8))] }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_ps(p, x[0]);
            _mm256_storeu_ps(p.add(8), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(p.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(p.add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_add_ps(a[0], b[0]), _mm256_add_ps(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        // SAFETY: see above.
        unsafe { [_mm256_fmadd_ps(a[0], b[0], c[0]), _mm256_fmadd_ps(a[1], b[1], c[1])] }
    }
    #[inline(always)]
    unsafe fn to_f(x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_cvtepi32_ps(v)) }
    }
    #[inline(always)]
    unsafe fn bits_to_f(x: Self::I) -> Self::F {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_castsi256_ps(v)) }
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u32) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(8).cast())] }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u16) -> Self::I {
        // SAFETY: see above.
        unsafe {
            [
                _mm256_cvtepu16_epi32(_mm_loadu_si128(p.cast())),
                _mm256_cvtepu16_epi32(_mm_loadu_si128(p.add(8).cast())),
            ]
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> Self::F {
        // SAFETY: see above. Sign, exponent and mantissa move into an f16, whose exponent bias is
        // 8 larger.
        unsafe {
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
            let bits = _mm256_and_si256(_mm256_slli_epi16::<7>(wide), _mm256_set1_epi16(0x3f80));
            let sign = _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000));
            let half = _mm256_or_si256(bits, sign);
            let halves = [_mm256_castsi256_si128(half), _mm256_extracti128_si256::<1>(half)];
            both(halves, |h| _mm256_mul_ps(_mm256_cvtph_ps(h), _mm256_set1_ps(256.0)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let bytes = _mm_loadu_si128(p.cast());
            [_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128::<8>(bytes))]
        }
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(x: Self::I) -> Self::I {
        // SAFETY: see above. A count in a register folds to an immediate.
        unsafe { both(x, |v| _mm256_srl_epi32(v, _mm_cvtsi32_si128(N as i32))) }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(x: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_sll_epi32(v, _mm_cvtsi32_si128(N as i32))) }
    }
    #[inline(always)]
    unsafe fn shr_by(x: Self::I, n: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_srl_epi32(v, _mm_cvtsi32_si128(n as i32))) }
    }
    #[inline(always)]
    unsafe fn and(x: Self::I, mask: u32) -> Self::I {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_and_si256(v, _mm256_set1_epi32(mask as i32))) }
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_or_si256(a[0], b[0]), _mm256_or_si256(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn add_i(a: Self::I, b: Self::I) -> Self::I {
        // SAFETY: see above.
        unsafe { [_mm256_add_epi32(a[0], b[0]), _mm256_add_epi32(a[1], b[1])] }
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        // SAFETY: see above.
        unsafe { [_mm256_loadu_si256(p.cast()), _mm256_loadu_si256(p.add(32).cast())] }
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, x: Self::B) {
        // SAFETY: see above.
        unsafe {
            _mm256_storeu_si256(p.cast(), x[0]);
            _mm256_storeu_si256(p.add(32).cast(), x[1]);
        }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            both(index, |v| _mm256_shuffle_epi8(table, v))
        }
    }
    #[inline(always)]
    unsafe fn b_to_i(x: Self::B) -> Self::I {
        x
    }
    #[inline(always)]
    unsafe fn low4(x: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_and_si256(v, _mm256_set1_epi8(15))) }
    }
    #[inline(always)]
    unsafe fn high4(x: Self::B) -> Self::B {
        // SAFETY: see above.
        unsafe { both(x, |v| _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15))) }
    }
    #[inline(always)]
    unsafe fn merge<const LEFT: u32, const RIGHT: u32, const MASK: u8>(
        codes: Self::B,
        plane: Self::B,
    ) -> Self::B {
        // SAFETY: see above. Bits that cross into a neighbouring byte are masked away.
        unsafe {
            let (left, right) = (_mm_cvtsi32_si128(LEFT as i32), _mm_cvtsi32_si128(RIGHT as i32));
            let moved = both(plane, |v| _mm256_srl_epi16(_mm256_sll_epi16(v, left), right));
            let bits = both(moved, |v| _mm256_and_si256(v, _mm256_set1_epi8(MASK as i8)));
            Self::or(codes, bits)
        }
    }
    #[inline(always)]
    unsafe fn dot<const N: usize>(
        bits: u32,
        start: i32,
        codes: &[Self::B; N],
        x: *const i8,
    ) -> Self::I {
        // SAFETY: see above.
        unsafe {
            let factor = |j: usize| _mm256_set1_epi32(x.cast::<i32>().add(j).read_unaligned());
            if VNNI {
                let mut sum = [_mm256_set1_epi32(start); 2];
                for (j, code) in codes.iter().enumerate() {
                    sum[0] = _mm256_dpbusd_avx_epi32(sum[0], code[0], factor(j));
                    sum[1] = _mm256_dpbusd_avx_epi32(sum[1], code[1], factor(j));
                }
                return sum;
            }
            if bits == 8 {
                return signed_dot(codes, factor);
            }
            let mut sum = [_mm256_set1_epi32(start); 2];
            // Terms whose sum still fits an i16.
            let terms = match bits {
                4 => 8,
                5 => 4,
                _ => 2,
            };
            for first in (0..N).step_by(terms) {
                let mut pairs = [_mm256_setzero_si256(); 2];
                for j in first..N.min(first + terms) {
                    for half in 0..2 {
                        let product = _mm256_maddubs_epi16(codes[j][half], factor(j));
                        pairs[half] = _mm256_add_epi16(pairs[half], product);
                    }
                }
                for half in 0..2 {
                    let four = _mm256_madd_epi16(pairs[half], _mm256_set1_epi16(1));
                    sum[half] = _mm256_add_epi32(sum[half], four);
                }
            }
            sum
        }
    }
    #[inline(always)]
    unsafe fn dot_step(acc: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return [
                    _mm256_dpbusd_avx_epi32(acc[0], codes[0], x[0]),
                    _mm256_dpbusd_avx_epi32(acc[1], codes[1], x[1]),
                ];
            }
            // As in the dot of four-bit codes, whose `madd` is one in eight.
            [
                _mm256_add_epi16(acc[0], _mm256_maddubs_epi16(codes[0], x[0])),
                _mm256_add_epi16(acc[1], _mm256_maddubs_epi16(codes[1], x[1])),
            ]
        }
    }
    #[inline(always)]
    unsafe fn dot_bf16(acc: Self::F, _w: Self::B, _x: *const u32) -> Self::F {
        acc // unreachable: AVX2 multiplies widened bf16
    }
}

/// Codes of eight bits would saturate `maddubs`; as `code - 128` their magnitude (at most 128)
/// times the activation with the code's sign (at most 127) does not. The zero point of 128 is
/// subtracted by this, so `start` is not added.
#[inline(always)]
unsafe fn signed_dot<const N: usize>(
    codes: &[[__m256i; 2]; N],
    factor: impl Fn(usize) -> __m256i,
) -> [__m256i; 2] {
    // SAFETY: register arithmetic; the caller promises AVX2.
    unsafe {
        let mut sum = [_mm256_setzero_si256(); 2];
        for (j, code) in codes.iter().enumerate() {
            for half in 0..2 {
                let signed = _mm256_xor_si256(code[half], _mm256_set1_epi8(-128));
                let product = _mm256_maddubs_epi16(
                    _mm256_abs_epi8(signed),
                    _mm256_sign_epi8(factor(j), signed),
                );
                let four = _mm256_madd_epi16(product, _mm256_set1_epi16(1));
                sum[half] = _mm256_add_epi32(sum[half], four);
            }
        }
        sum
    }
}

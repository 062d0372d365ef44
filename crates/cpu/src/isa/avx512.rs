//! [`Simd`] on AVX-512 with VNNI (Cascade Lake, Zen 4 and later): one register a vector.

use std::arch::x86_64::*;

use super::{ByteCodes, ByteDots, SEGMENT, Simd};

/// AVX-512 F, BW, DQ, VL and VNNI, with AVX2, FMA and F16C. [`Avx512::dot_bf16`] also needs BF16.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

// SAFETY of every block below: the caller of a `Simd` method promises the instructions and
// readable or writable pointers.
impl Simd for Avx512 {
    type Codes = ByteCodes;
    type F = __m512;
    type I = __m512i;
    type B = __m512i;

    #[inline(always)]
    unsafe fn splat(x: f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: __m512) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_ps(p, x) }
    }
    #[inline(always)]
    unsafe fn load_f16(p: *const u16) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_mul_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn add(a: __m512, b: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_add_ps(a, b) }
    }
    #[inline(always)]
    unsafe fn fma(a: __m512, b: __m512, c: __m512) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }
    #[inline(always)]
    unsafe fn to_f(x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi32_ps(x) }
    }
    #[inline(always)]
    unsafe fn bits_to_f(x: __m512i) -> __m512 {
        // SAFETY: see above.
        unsafe { _mm512_castsi512_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u16) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepu16_epi32(_mm256_loadu_si256(p.cast())) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(p: *const u8) -> __m512 {
        // SAFETY: see above. Sign, exponent and mantissa move into an f16, whose exponent bias is
        // 8 larger.
        unsafe {
            let wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(p.cast()));
            let bits = _mm256_and_si256(_mm256_slli_epi16::<7>(wide), _mm256_set1_epi16(0x3f80));
            let sign = _mm256_and_si256(wide, _mm256_set1_epi16(-0x8000));
            _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(bits, sign)), _mm512_set1_ps(256.0))
        }
    }
    #[inline(always)]
    unsafe fn load_e5m2(p: *const u8) -> __m512 {
        // SAFETY: see above. The codes are the high bytes of `f16`.
        unsafe {
            let wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(p.cast()));
            _mm512_cvtph_ps(_mm256_slli_epi16::<8>(wide))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_cvtepi8_epi32(_mm_loadu_si128(p.cast())) }
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srli_epi32::<N>(x) }
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_slli_epi32::<N>(x) }
    }
    #[inline(always)]
    unsafe fn shr_by(x: __m512i, n: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_srl_epi32(x, _mm_cvtsi32_si128(n as i32)) }
    }
    #[inline(always)]
    unsafe fn and(x: __m512i, mask: u32) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(x, _mm512_set1_epi32(mask as i32)) }
    }
    #[inline(always)]
    unsafe fn or(a: __m512i, b: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_or_si512(a, b) }
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_loadu_si512(p.cast()) }
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, x: __m512i) {
        // SAFETY: see above.
        unsafe { _mm512_storeu_si512(p.cast(), x) }
    }
    #[inline(always)]
    unsafe fn lookup(table: &[u8; 16], index: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let table = _mm_loadu_si128(table.as_ptr().cast());
            _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), index)
        }
    }
    #[inline(always)]
    unsafe fn b_to_i(x: __m512i) -> __m512i {
        x
    }
    #[inline(always)]
    unsafe fn low4(x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(x, _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn high4(x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_and_si512(_mm512_srli_epi16::<4>(x), _mm512_set1_epi8(15)) }
    }
    #[inline(always)]
    unsafe fn merge<const LEFT: u32, const RIGHT: u32, const MASK: u8>(
        codes: __m512i,
        plane: __m512i,
    ) -> __m512i {
        // SAFETY: see above. Bits that cross into a neighbouring byte are masked away. The
        // ternary logic is `codes | moved & mask`.
        unsafe {
            let moved = _mm512_srli_epi16::<RIGHT>(_mm512_slli_epi16::<LEFT>(plane));
            _mm512_ternarylogic_epi32::<0xf8>(codes, moved, _mm512_set1_epi8(MASK as i8))
        }
    }
    #[inline(always)]
    unsafe fn dot_step(acc: __m512i, codes: __m512i, x: __m512i) -> __m512i {
        // SAFETY: see above.
        unsafe { _mm512_dpbusd_epi32(acc, codes, x) }
    }
}

impl ByteDots for Avx512 {
    #[inline(always)]
    unsafe fn dot<const N: usize>(
        [_, low_bits]: [u32; 2],
        start: i32,
        codes: &[__m512i; N],
        x: *const i8,
    ) -> __m512i {
        // SAFETY: see above.
        unsafe {
            let (high_words, low_words) = (x.cast::<i32>(), x.add(SEGMENT).cast::<i32>());
            let (mut high, mut low) = (_mm512_setzero_si512(), _mm512_set1_epi32(start));
            for (j, &code) in codes.iter().enumerate() {
                let factor = _mm512_set1_epi32(high_words.add(j).read_unaligned());
                high = _mm512_dpbusd_epi32(high, code, factor);
                let factor = _mm512_set1_epi32(low_words.add(j).read_unaligned());
                low = _mm512_dpbusd_epi32(low, code, factor);
            }
            _mm512_add_epi32(_mm512_sll_epi32(high, _mm_cvtsi32_si128(low_bits as i32)), low)
        }
    }
}

impl Avx512 {
    /// `acc + w[lane, 0] * x[0] + w[lane, 1] * x[1]` for pairs of `bf16`, rounded as the
    /// instruction does.
    ///
    /// # Safety
    /// As the methods of [`Simd`]; the machine also has AVX-512 BF16.
    #[inline(always)]
    pub(crate) unsafe fn dot_bf16(acc: __m512, w: __m512i, x: *const u32) -> __m512 {
        // SAFETY: see above; the casts are between vectors of the same size.
        unsafe {
            let pair = _mm512_set1_epi32(x.read_unaligned() as i32);
            let (w, pair) = (
                std::mem::transmute::<__m512i, __m512bh>(w),
                std::mem::transmute::<__m512i, __m512bh>(pair),
            );
            _mm512_dpbf16_ps(acc, w, pair)
        }
    }
}

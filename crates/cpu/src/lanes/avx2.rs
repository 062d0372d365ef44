//! Lanes as two AVX2 registers.

use std::arch::x86_64::*;

use super::Lanes;

/// Sixteen floats in two 256-bit registers.
#[derive(Clone, Copy)]
pub(super) struct Avx2(__m256, __m256);

// SAFETY of every block here: `dispatch` hands this type to a kernel only where AVX2, FMA and
// F16C were detected; memory is as the trait's callers vouch.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Avx2 {
    #[inline(always)]
    fn widen(bytes: __m128i, signed: bool) -> (__m256i, __m256i) {
        unsafe {
            let high = _mm_srli_si128::<8>(bytes);
            if signed {
                (_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(high))
            } else {
                (_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(high))
            }
        }
    }
}

#[inline(always)]
fn e4m3(codes: __m256i) -> __m256 {
    // SAFETY: as for the impl below.
    unsafe {
        let sign = _mm256_and_si256(codes, _mm256_set1_epi32(i32::MIN));
        let rest = _mm256_slli_epi32::<20>(_mm256_and_si256(codes, _mm256_set1_epi32(0x7f)));
        let bits = _mm256_castsi256_ps(_mm256_or_si256(sign, rest));
        _mm256_mul_ps(bits, _mm256_set1_ps(f32::from_bits(0x7b80_0000)))
    }
}

#[inline(always)]
fn power(n: __m256) -> __m256 {
    // SAFETY: as for the impl below.
    unsafe {
        let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
        _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased))
    }
}

#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx2 {
    // The block has 12 registers of sums. With two vectors' halves and one broadcast they fit into
    // the 16 registers.
    const BLOCK_ROWS: usize = 3;
    const BLOCK_VECTORS: usize = 2;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        unsafe { Self(_mm256_set1_ps(x), _mm256_set1_ps(x)) }
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        unsafe { Self(_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))) }
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, self.0);
            _mm256_storeu_ps(to.add(8), self.1);
        }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        unsafe {
            let bits = _mm256_loadu_si256(from.cast());
            Self(
                _mm256_cvtph_ps(_mm256_castsi256_si128(bits)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(bits)),
            )
        }
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe {
            let low = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.0);
            let high = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(self.1);
            _mm_storeu_si128(to.cast(), low);
            _mm_storeu_si128(to.add(8).cast(), high);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let low = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Self(
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(low)),
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(high)),
            )
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe {
            let (low, high) = Self::widen(_mm_loadu_si128(from.cast()), true);
            Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        unsafe {
            let low = _mm256_cvtepi16_epi32(_mm_loadu_si128(from.cast()));
            let high = _mm256_cvtepi16_epi32(_mm_loadu_si128(from.add(8).cast()));
            Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        unsafe {
            // The codes are extended with their sign, because the top bit of a code is the float's
            // sign.
            let (low, high) = Self::widen(_mm_loadu_si128(from.cast()), true);
            Self(e4m3(low), e4m3(high))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        unsafe {
            let wide = _mm256_cvtph_ps(_mm_set1_epi16(from.cast::<i16>().read_unaligned()));
            Self(wide, wide)
        }
    }
    #[inline(always)]
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self {
        unsafe {
            let bits = _mm_cvtsi32_si128(if high { 4 } else { 0 });
            let codes = _mm_srl_epi16(_mm_loadu_si128(from.cast()), bits);
            let (low, high) = Self::widen(_mm_and_si128(codes, _mm_set1_epi8(15)), false);
            Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(high))
        }
    }
    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> Self {
        unsafe {
            let codes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(from.cast()));
            let low = _mm256_and_si256(codes, _mm256_set1_epi32(15));
            Self(_mm256_cvtepi32_ps(low), _mm256_cvtepi32_ps(_mm256_srli_epi32::<4>(codes)))
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        unsafe { Self(_mm256_add_ps(self.0, other.0), _mm256_add_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        unsafe { Self(_mm256_sub_ps(self.0, other.0), _mm256_sub_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, other.0), _mm256_mul_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        unsafe { Self(_mm256_div_ps(self.0, other.0), _mm256_div_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        unsafe {
            Self(
                _mm256_fmadd_ps(self.0, factor.0, addend.0),
                _mm256_fmadd_ps(self.1, factor.1, addend.1),
            )
        }
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        unsafe { Self(_mm256_max_ps(self.0, other.0), _mm256_max_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        unsafe { Self(_mm256_min_ps(self.0, other.0), _mm256_min_ps(self.1, other.1)) }
    }
    #[inline(always)]
    fn round(self) -> Self {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        unsafe { Self(_mm256_round_ps::<NEAREST>(self.0), _mm256_round_ps::<NEAREST>(self.1)) }
    }
    #[inline(always)]
    fn scale_power(self, n: Self) -> Self {
        unsafe { Self(_mm256_mul_ps(self.0, power(n.0)), _mm256_mul_ps(self.1, power(n.1))) }
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: Self) -> Self {
        unsafe {
            let low = _mm256_cmp_ps::<_CMP_NLT_UQ>(probe.0, limit.0);
            let high = _mm256_cmp_ps::<_CMP_NLT_UQ>(probe.1, limit.1);
            Self(_mm256_and_ps(self.0, low), _mm256_and_ps(self.1, high))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe {
            let both = _mm256_add_ps(self.0, self.1);
            let four = _mm_add_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
            let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
    #[inline(always)]
    fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe {
            let both = _mm256_max_ps(self.0, self.1);
            let four = _mm_max_ps(_mm256_castps256_ps128(both), _mm256_extractf128_ps::<1>(both));
            let two = _mm_max_ps(four, _mm_movehl_ps(four, four));
            _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps::<1>(two, two)))
        }
    }
}

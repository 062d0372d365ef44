//! Lanes as one AVX-512 register.

use std::arch::x86_64::*;

use super::Lanes;

/// Sixteen floats in a 512-bit register.
#[derive(Clone, Copy)]
pub(super) struct Avx512(__m512);

// SAFETY of every block here: `dispatch` hands this type to a kernel only where AVX-512
// F, BW, VL and DQ were detected; memory is as the trait's callers vouch.
#[allow(clippy::undocumented_unsafe_blocks)]
impl Lanes for Avx512 {
    // 24 sums, 4 vectors and one broadcast fit into the 32 registers.
    const BLOCK_ROWS: usize = 6;
    const BLOCK_VECTORS: usize = 4;

    #[inline(always)]
    fn splat(x: f32) -> Self {
        Self(unsafe { _mm512_set1_ps(x) })
    }
    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        Self(unsafe { _mm512_loadu_ps(from) })
    }
    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, self.0) }
    }
    #[inline(always)]
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        Self(unsafe { _mm512_maskz_loadu_ps(mask(n), from) })
    }
    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        unsafe { _mm512_mask_storeu_ps(to, mask(n), self.0) }
    }
    #[inline(always)]
    unsafe fn load_f16(from: *const u16) -> Self {
        Self(unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) })
    }
    #[inline(always)]
    unsafe fn store_f16(self, to: *mut u16) {
        unsafe {
            let bits = _mm512_cvtps_ph::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0);
            _mm256_storeu_si256(to.cast(), bits);
        }
    }
    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }
    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_i16(from: *const i16) -> Self {
        unsafe { Self(_mm512_cvtepi32_ps(_mm512_cvtepi16_epi32(_mm256_loadu_si256(from.cast())))) }
    }
    #[inline(always)]
    unsafe fn load_e4m3(from: *const u8) -> Self {
        unsafe {
            // Sign and magnitude move to their places in an `f32`. The product with 2^(127 - 7)
            // corrects the exponent's bias.
            let codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            let sign = _mm512_and_si512(codes, _mm512_set1_epi32(i32::MIN));
            let rest = _mm512_slli_epi32::<20>(_mm512_and_si512(codes, _mm512_set1_epi32(0x7f)));
            let bits = _mm512_castsi512_ps(_mm512_or_si512(sign, rest));
            Self(_mm512_mul_ps(bits, _mm512_set1_ps(f32::from_bits(0x7b80_0000))))
        }
    }
    #[inline(always)]
    unsafe fn splat_f16(from: *const u16) -> Self {
        unsafe { Self(_mm512_cvtph_ps(_mm256_set1_epi16(from.cast::<i16>().read_unaligned()))) }
    }
    #[inline(always)]
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self {
        unsafe {
            let bits = _mm_cvtsi32_si128(if high { 4 } else { 0 });
            let codes = _mm_srl_epi16(_mm_loadu_si128(from.cast()), bits);
            let codes = _mm_and_si128(codes, _mm_set1_epi8(15));
            Self(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)))
        }
    }
    #[inline(always)]
    unsafe fn load_u4(from: *const u8) -> Self {
        unsafe {
            let codes = _mm_loadl_epi64(from.cast());
            let both = _mm_unpacklo_epi64(codes, _mm_srli_epi16::<4>(codes));
            let codes = _mm_and_si128(both, _mm_set1_epi8(15));
            Self(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(codes)))
        }
    }
    #[inline(always)]
    fn add(self, other: Self) -> Self {
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn div(self, other: Self) -> Self {
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn fma(self, factor: Self, addend: Self) -> Self {
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }
    #[inline(always)]
    fn max(self, other: Self) -> Self {
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn min(self, other: Self) -> Self {
        Self(unsafe { _mm512_min_ps(self.0, other.0) })
    }
    #[inline(always)]
    fn round(self) -> Self {
        Self(unsafe {
            _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(self.0)
        })
    }
    #[inline(always)]
    fn scale_power(self, n: Self) -> Self {
        Self(unsafe { _mm512_scalef_ps(self.0, n.0) })
    }
    #[inline(always)]
    fn zero_below(self, probe: Self, limit: Self) -> Self {
        unsafe {
            let keep = _mm512_cmp_ps_mask::<_CMP_NLT_UQ>(probe.0, limit.0);
            Self(_mm512_maskz_mov_ps(keep, self.0))
        }
    }
    #[inline(always)]
    fn sum(self) -> f32 {
        unsafe { _mm512_reduce_add_ps(self.0) }
    }
    #[inline(always)]
    fn prefetch(at: *const u8) {
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }
    #[inline(always)]
    fn largest(self) -> f32 {
        unsafe { _mm512_reduce_max_ps(self.0) }
    }
}

#[inline(always)]
fn mask(n: usize) -> __mmask16 {
    if n >= 16 { !0 } else { (1 << n) - 1 }
}

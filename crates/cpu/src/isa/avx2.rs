//! [`Simd`] on AVX2, FMA and F16C (Haswell, Zen and later): two registers a vector.
//!
//! Without AVX-VNNI, codes and activations are multiplied as `i16` by `madd`. `maddubs` would take
//! twice as many bytes. But an activation has two bytes, and the sums of `maddubs` saturate unless
//! they are kept small (docs/performance-notes.md has the comparison).

use std::arch::x86_64::*;

use super::{ByteCodes, ByteDots, SEGMENT, Simd, WordCodes, WordDots, unroll};

/// AVX2, FMA and F16C. With `VNNI` also AVX-VNNI.
#[derive(Clone, Copy)]
pub(crate) struct Avx2<const VNNI: bool>;

/// The form of coded activations with and without AVX-VNNI.
pub(crate) trait CodesOfAvx2 {
    type Codes: 'static;
}

impl CodesOfAvx2 for Avx2<true> {
    type Codes = ByteCodes;
}

impl CodesOfAvx2 for Avx2<false> {
    type Codes = WordCodes;
}

#[inline(always)]
unsafe fn both<T: Copy, U>(x: [T; 2], f: impl Fn(T) -> U) -> [U; 2] {
    [f(x[0]), f(x[1])]
}

// SAFETY of every block below: the caller of a `Simd` method promises the instructions and
// readable or writable pointers.
impl<const VNNI: bool> Simd for Avx2<VNNI>
where
    Self: CodesOfAvx2,
{
    type Codes = <Self as CodesOfAvx2>::Codes;
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
    unsafe fn load_e5m2(p: *const u8) -> Self::F {
        // SAFETY: see above. The codes are the high bytes of `f16`.
        unsafe {
            let (codes, zero) = (_mm_loadu_si128(p.cast()), _mm_setzero_si128());
            [
                _mm256_cvtph_ps(_mm_unpacklo_epi8(zero, codes)),
                _mm256_cvtph_ps(_mm_unpackhi_epi8(zero, codes)),
            ]
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
    unsafe fn dot_step(acc: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        // SAFETY: see above.
        unsafe {
            if VNNI {
                return [
                    _mm256_dpbusd_avx_epi32(acc[0], codes[0], x[0]),
                    _mm256_dpbusd_avx_epi32(acc[1], codes[1], x[1]),
                ];
            }
            // One factor is the sum itself. The compiler would move a product that does not depend
            // on the sum out of the loop.
            [
                _mm256_add_epi32(acc[0], _mm256_madd_epi16(codes[0], acc[0])),
                _mm256_add_epi32(acc[1], _mm256_madd_epi16(codes[1], acc[1])),
            ]
        }
    }
}

impl ByteDots for Avx2<true> {
    #[inline(always)]
    unsafe fn dot<const N: usize>(
        [_, low_bits]: [u32; 2],
        start: i32,
        codes: &[Self::B; N],
        x: *const i8,
    ) -> Self::I {
        // SAFETY: see above.
        unsafe { dot_vnni(low_bits, start, codes, x) }
    }
}

impl WordDots for Avx2<false> {
    #[inline(always)]
    unsafe fn dots<const N: usize, const R: usize>(
        start: *const i32,
        codes: &[Self::B; N],
        x: *const i8,
        stride: usize,
    ) -> [Self::I; R] {
        // SAFETY: see above.
        unsafe { dots_split(start, codes, x, stride) }
    }
    #[inline(always)]
    unsafe fn store_words(p: *mut u8, codes: Self::B) {
        // SAFETY: see above.
        unsafe {
            for half in 0..2 {
                let [even, odd] = split(codes[half]);
                _mm256_storeu_si256(p.add(32 * half).cast(), even);
                _mm256_storeu_si256(p.add(64 + 32 * half).cast(), odd);
            }
        }
    }
    #[inline(always)]
    unsafe fn dot_words<const R: usize>(
        pairs: usize,
        start: *const i32,
        codes: *const u8,
        x: *const u8,
        stride: usize,
    ) -> [Self::I; R] {
        // SAFETY: see above.
        unsafe {
            let mut sums = [[_mm256_setzero_si256(); 2]; R];
            unroll!(r in R => {
                sums[r] = [_mm256_set1_epi32(start.add(r).read_unaligned()); 2];
            });
            for pair in 0..pairs {
                let code = Self::load_b(codes.add(64 * pair));
                unroll!(r in R => {
                    let word = x.add(stride * r + 4 * pair).cast::<i32>().read_unaligned();
                    let factor = _mm256_set1_epi32(word);
                    for half in 0..2 {
                        let product = _mm256_madd_epi16(code[half], factor);
                        sums[r][half] = _mm256_add_epi32(sums[r][half], product);
                    }
                });
            }
            sums
        }
    }
}

/// [`ByteDots::dot`] by AVX-VNNI. The high bytes and the low bytes have a chain of sums each.
#[inline(always)]
unsafe fn dot_vnni<const N: usize>(
    low_bits: u32,
    start: i32,
    codes: &[[__m256i; 2]; N],
    x: *const i8,
) -> [__m256i; 2] {
    // SAFETY: the caller gives `4 * N` bytes at `x` and `SEGMENT` further, and promises AVX-VNNI.
    unsafe {
        let (high_words, low_words) = (x.cast::<i32>(), x.add(SEGMENT).cast::<i32>());
        let (mut high, mut low) = ([_mm256_setzero_si256(); 2], [_mm256_set1_epi32(start); 2]);
        for j in 0..N {
            let high_factor = _mm256_set1_epi32(high_words.add(j).read_unaligned());
            let low_factor = _mm256_set1_epi32(low_words.add(j).read_unaligned());
            for half in 0..2 {
                let code = codes[j][half];
                high[half] = _mm256_dpbusd_avx_epi32(high[half], code, high_factor);
                low[half] = _mm256_dpbusd_avx_epi32(low[half], code, low_factor);
            }
        }
        for half in 0..2 {
            let high = _mm256_sll_epi32(high[half], _mm_cvtsi32_si128(low_bits as i32));
            low[half] = _mm256_add_epi32(low[half], high);
        }
        low
    }
}

/// [`WordDots::dots`]. Even and odd bytes of a vector of codes are multiplied apart: one
/// instruction makes two products, and nothing saturates.
#[inline(always)]
unsafe fn dots_split<const N: usize, const R: usize>(
    start: *const i32,
    codes: &[[__m256i; 2]; N],
    x: *const i8,
    stride: usize,
) -> [[__m256i; 2]; R] {
    // SAFETY: the caller gives `4 * N` words a row, and promises AVX2.
    unsafe {
        let mut sums = [[_mm256_setzero_si256(); 2]; R];
        unroll!(r in R => {
            sums[r] = [_mm256_set1_epi32(start.add(r).read_unaligned()); 2];
        });
        for j in 0..N {
            let (low, high) = (split(codes[j][0]), split(codes[j][1]));
            unroll!(r in R => {
                let x = x.add(stride * r + 8 * j).cast::<i32>();
                for word in 0..2 {
                    let factor = _mm256_set1_epi32(x.add(word).read_unaligned());
                    for (sum, codes) in sums[r].iter_mut().zip([low, high]) {
                        *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(codes[word], factor));
                    }
                }
            });
        }
        sums
    }
}

/// Bytes 0 and 2, and 1 and 3, of each lane as words.
#[inline(always)]
unsafe fn split(codes: __m256i) -> [__m256i; 2] {
    // SAFETY: the caller promises AVX2.
    unsafe { [_mm256_and_si256(codes, _mm256_set1_epi16(255)), _mm256_srli_epi16::<8>(codes)] }
}

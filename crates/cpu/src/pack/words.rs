//! `Words`: one 32-bit word of each of a panel's sixteen rows, in the registers of an instruction
//! set.
//!
//! Packing transposes: four neighbouring words of sixteen rows become four vectors of sixteen lanes
//! ([`Words::load4`]). Shifts and masks turn these into the vectors of a layout. Only bits move, so
//! every implementation gives the same bytes.
//!
//! Packing functions are generic over `Words` and `#[inline(always)]`. Each is compiled in a
//! function with the right features ([`super::fill`]). They have no closures: a closure is a
//! function of its own, compiled without those features, which made packing twice as slow.

use super::PANEL;

/// The first byte of each row.
pub(crate) type RowPointers = [*const u8; PANEL];

/// The lowest bit of each byte.
pub(crate) const ONES: u32 = 0x0101_0101;
/// The low nibbles of four bytes.
pub(crate) const LOW4: u32 = 0x0f0f_0f0f;

/// One little-endian word of each of sixteen rows.
pub(crate) trait Words: Copy {
    /// The four words from byte `at` of each row.
    ///
    /// # Safety
    /// Each row has bytes `at..at + 16`; the machine has the features of the implementation (so
    /// for all methods).
    unsafe fn load4(rows: &RowPointers, at: usize) -> [Self; 4];
    /// The same word in every lane.
    unsafe fn splat(word: u32) -> Self;
    /// `self & other`, and so on.
    unsafe fn and(self, other: Self) -> Self;
    unsafe fn or(self, other: Self) -> Self;
    unsafe fn xor(self, other: Self) -> Self;
    /// Shifts each word by `bits < 32`.
    unsafe fn left(self, bits: u32) -> Self;
    unsafe fn right(self, bits: u32) -> Self;
    /// Writes 64 bytes, a word a lane.
    ///
    /// # Safety
    /// `out` has room for them (so below).
    unsafe fn store(self, out: *mut u8);
    /// Writes 32 bytes, the low half of each word.
    unsafe fn store_halves(self, out: *mut u8);
    /// Writes 16 bytes, the low byte of each word.
    unsafe fn store_bytes(self, out: *mut u8);
}

/// Asks for the cache lines of `bytes` bytes from `start` on. They need not be readable.
#[inline(always)]
pub(crate) fn prefetch(start: *const u8, bytes: usize) {
    #[cfg(target_arch = "x86_64")]
    for line in (0..bytes).step_by(64) {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch of any address is no access.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(start.wrapping_add(line).cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = (start, bytes);
}

/// The eight words from byte `at` of each row.
///
/// # Safety
/// Each row has bytes `at..at + 32`.
#[inline(always)]
pub(crate) unsafe fn load8<W: Words>(rows: &RowPointers, at: usize) -> [W; 8] {
    // SAFETY: the caller's.
    let ([a, b, c, d], [e, f, g, h]) = unsafe { (W::load4(rows, at), W::load4(rows, at + 16)) };
    [a, b, c, d, e, f, g, h]
}

impl Words for [u32; PANEL] {
    #[inline(always)]
    unsafe fn load4(rows: &RowPointers, at: usize) -> [Self; 4] {
        let mut words = [[0; PANEL]; 4];
        for lane in 0..PANEL {
            // SAFETY: the caller's.
            let four = unsafe { rows[lane].add(at).cast::<[u32; 4]>().read_unaligned() };
            for i in 0..4 {
                words[i][lane] = u32::from_le(four[i]);
            }
        }
        words
    }

    #[inline(always)]
    unsafe fn splat(word: u32) -> Self {
        [word; PANEL]
    }

    #[inline(always)]
    unsafe fn and(mut self, other: Self) -> Self {
        for lane in 0..PANEL {
            self[lane] &= other[lane];
        }
        self
    }

    #[inline(always)]
    unsafe fn or(mut self, other: Self) -> Self {
        for lane in 0..PANEL {
            self[lane] |= other[lane];
        }
        self
    }

    #[inline(always)]
    unsafe fn xor(mut self, other: Self) -> Self {
        for lane in 0..PANEL {
            self[lane] ^= other[lane];
        }
        self
    }

    #[inline(always)]
    unsafe fn left(mut self, bits: u32) -> Self {
        for lane in 0..PANEL {
            self[lane] <<= bits;
        }
        self
    }

    #[inline(always)]
    unsafe fn right(mut self, bits: u32) -> Self {
        for lane in 0..PANEL {
            self[lane] >>= bits;
        }
        self
    }

    #[inline(always)]
    unsafe fn store(mut self, out: *mut u8) {
        for lane in 0..PANEL {
            self[lane] = self[lane].to_le();
        }
        // SAFETY: the caller's.
        unsafe { out.cast::<Self>().write_unaligned(self) }
    }

    #[inline(always)]
    unsafe fn store_halves(self, out: *mut u8) {
        let mut halves = [0u16; PANEL];
        for lane in 0..PANEL {
            halves[lane] = (self[lane] as u16).to_le();
        }
        // SAFETY: the caller's.
        unsafe { out.cast::<[u16; PANEL]>().write_unaligned(halves) }
    }

    #[inline(always)]
    unsafe fn store_bytes(self, out: *mut u8) {
        let mut bytes = [0u8; PANEL];
        for lane in 0..PANEL {
            bytes[lane] = self[lane] as u8;
        }
        // SAFETY: the caller's.
        unsafe { out.cast::<[u8; PANEL]>().write_unaligned(bytes) }
    }
}

#[cfg(target_arch = "x86_64")]
pub(crate) mod x86 {
    //! Four unpackings within 128 bits transpose four words of four rows. A register of 256 or 512
    //! bits holds two or four such squares side by side.

    use std::arch::x86_64::*;

    use super::{RowPointers, Words};

    /// AVX2: lanes 0..8 and 8..16.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx2(__m256i, __m256i);

    /// AVX-512 F, BW.
    #[derive(Clone, Copy)]
    pub(crate) struct Avx512(__m512i);

    /// Rows `first + 0..4` and `first + 4..8`.
    #[inline(always)]
    unsafe fn transposed8(rows: &RowPointers, first: usize, at: usize) -> [__m256i; 4] {
        // SAFETY: the callers' rows and features.
        unsafe {
            let mut square = [_mm256_setzero_si256(); 4];
            for i in 0..4 {
                let low = _mm_loadu_si128(rows[first + i].add(at).cast());
                let high = _mm_loadu_si128(rows[first + 4 + i].add(at).cast());
                square[i] = _mm256_inserti128_si256::<1>(_mm256_castsi128_si256(low), high);
            }
            let [a, b, c, d] = square;
            let (ab, cd) = (_mm256_unpacklo_epi32(a, b), _mm256_unpacklo_epi32(c, d));
            let (ab_high, cd_high) = (_mm256_unpackhi_epi32(a, b), _mm256_unpackhi_epi32(c, d));
            [
                _mm256_unpacklo_epi64(ab, cd),
                _mm256_unpackhi_epi64(ab, cd),
                _mm256_unpacklo_epi64(ab_high, cd_high),
                _mm256_unpackhi_epi64(ab_high, cd_high),
            ]
        }
    }

    // SAFETY of the bodies below: the callers' memory and features.
    impl Words for Avx2 {
        #[inline(always)]
        unsafe fn load4(rows: &RowPointers, at: usize) -> [Self; 4] {
            // SAFETY: see above.
            let ([a, b, c, d], [e, f, g, h]) =
                unsafe { (transposed8(rows, 0, at), transposed8(rows, 8, at)) };
            [Avx2(a, e), Avx2(b, f), Avx2(c, g), Avx2(d, h)]
        }

        #[inline(always)]
        unsafe fn splat(word: u32) -> Self {
            // SAFETY: see above.
            let words = unsafe { _mm256_set1_epi32(word as i32) };
            Avx2(words, words)
        }

        #[inline(always)]
        unsafe fn and(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_and_si256(self.0, other.0), _mm256_and_si256(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn or(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_or_si256(self.0, other.0), _mm256_or_si256(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn xor(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx2(_mm256_xor_si256(self.0, other.0), _mm256_xor_si256(self.1, other.1)) }
        }

        #[inline(always)]
        unsafe fn left(self, bits: u32) -> Self {
            // SAFETY: see above.
            unsafe {
                let bits = _mm_cvtsi32_si128(bits as i32);
                Avx2(_mm256_sll_epi32(self.0, bits), _mm256_sll_epi32(self.1, bits))
            }
        }

        #[inline(always)]
        unsafe fn right(self, bits: u32) -> Self {
            // SAFETY: see above.
            unsafe {
                let bits = _mm_cvtsi32_si128(bits as i32);
                Avx2(_mm256_srl_epi32(self.0, bits), _mm256_srl_epi32(self.1, bits))
            }
        }

        #[inline(always)]
        unsafe fn store(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe {
                _mm256_storeu_si256(out.cast(), self.0);
                _mm256_storeu_si256(out.add(32).cast(), self.1);
            }
        }

        #[inline(always)]
        unsafe fn store_halves(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_si256(out.cast(), self.halves()) }
        }

        #[inline(always)]
        unsafe fn store_bytes(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe {
                let halves = _mm256_and_si256(self.halves(), _mm256_set1_epi16(0xff));
                let (low, high) =
                    (_mm256_castsi256_si128(halves), _mm256_extracti128_si256::<1>(halves));
                _mm_storeu_si128(out.cast(), _mm_packus_epi16(low, high));
            }
        }
    }

    impl Avx2 {
        /// The low half of each word, in order.
        #[inline(always)]
        unsafe fn halves(self) -> __m256i {
            // SAFETY: the caller has AVX2.
            unsafe {
                let low = _mm256_set1_epi32(0xffff);
                let (a, b) = (_mm256_and_si256(self.0, low), _mm256_and_si256(self.1, low));
                // The instruction packs within 128 bits, so the quarters come in the order 0, 2, 1,
                // 3.
                _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi32(a, b))
            }
        }
    }

    // SAFETY of the bodies below: the callers' memory and features.
    impl Words for Avx512 {
        #[inline(always)]
        unsafe fn load4(rows: &RowPointers, at: usize) -> [Self; 4] {
            // SAFETY: see above.
            unsafe {
                let mut square = [_mm512_setzero_si512(); 4];
                for i in 0..4 {
                    let row = _mm_loadu_si128(rows[i].add(at).cast());
                    let all = _mm512_castsi128_si512(row);
                    let row = _mm_loadu_si128(rows[4 + i].add(at).cast());
                    let all = _mm512_inserti32x4::<1>(all, row);
                    let row = _mm_loadu_si128(rows[8 + i].add(at).cast());
                    let all = _mm512_inserti32x4::<2>(all, row);
                    let row = _mm_loadu_si128(rows[12 + i].add(at).cast());
                    square[i] = _mm512_inserti32x4::<3>(all, row);
                }
                let [a, b, c, d] = square;
                let (ab, cd) = (_mm512_unpacklo_epi32(a, b), _mm512_unpacklo_epi32(c, d));
                let (ab_high, cd_high) = (_mm512_unpackhi_epi32(a, b), _mm512_unpackhi_epi32(c, d));
                [
                    Avx512(_mm512_unpacklo_epi64(ab, cd)),
                    Avx512(_mm512_unpackhi_epi64(ab, cd)),
                    Avx512(_mm512_unpacklo_epi64(ab_high, cd_high)),
                    Avx512(_mm512_unpackhi_epi64(ab_high, cd_high)),
                ]
            }
        }

        #[inline(always)]
        unsafe fn splat(word: u32) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_set1_epi32(word as i32)) }
        }

        #[inline(always)]
        unsafe fn and(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_and_si512(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn or(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_or_si512(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn xor(self, other: Self) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_xor_si512(self.0, other.0)) }
        }

        #[inline(always)]
        unsafe fn left(self, bits: u32) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_sll_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        }

        #[inline(always)]
        unsafe fn right(self, bits: u32) -> Self {
            // SAFETY: see above.
            unsafe { Avx512(_mm512_srl_epi32(self.0, _mm_cvtsi32_si128(bits as i32))) }
        }

        #[inline(always)]
        unsafe fn store(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm512_storeu_si512(out.cast(), self.0) }
        }

        #[inline(always)]
        unsafe fn store_halves(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm256_storeu_si256(out.cast(), _mm512_cvtepi32_epi16(self.0)) }
        }

        #[inline(always)]
        unsafe fn store_bytes(self, out: *mut u8) {
            // SAFETY: see above.
            unsafe { _mm_storeu_si128(out.cast(), _mm512_cvtepi32_epi8(self.0)) }
        }
    }
}

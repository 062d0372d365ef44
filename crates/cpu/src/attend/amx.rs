//! AMX products of [`super::split`]. Sums are tiles 0 to 3, rows tiles 4 and 5, columns tiles 6 and
//! 7.

use std::arch::asm;
use std::arch::x86_64::*;

use super::split::{BLOCK, Blocks, CHUNK, SplitColumns, SplitProducts, SplitRows};
use crate::linear::amx::{configure, release};
use crate::linear::prompt::weights::{bf16_pairs, lane_by_lane};

/// The products, where AMX is available.
pub(super) const PRODUCTS: SplitProducts =
    SplitProducts { rows, columns, begin, multiply, end: release };

/// # Safety
/// AVX-512 with BF16 is available; otherwise as [`SplitRows::chunk`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn rows(split: &SplitRows) {
    /// The numbers that half a vector of `bf16` stands for.
    #[inline]
    #[target_feature(
        enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16"
    )]
    fn widen(high: __m256i) -> __m512 {
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(high)))
    }
    for row in 0..BLOCK {
        for chunk in 0..split.chunks {
            // SAFETY: as the caller promises; the casts are between vectors of the same size.
            unsafe {
                let (values, [high, low]) = split.chunk(row, chunk);
                let first = _mm512_loadu_ps(values.as_ptr());
                let second = _mm512_loadu_ps(values.as_ptr().add(CHUNK / 2));
                let near: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
                let first = _mm512_sub_ps(first, widen(_mm512_castsi512_si256(near)));
                let second = _mm512_sub_ps(second, widen(_mm512_extracti64x4_epi64::<1>(near)));
                let rest: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(second, first));
                _mm512_storeu_si512(high.cast(), near);
                _mm512_storeu_si512(low.cast(), rest);
            }
        }
    }
}

/// # Safety
/// AVX-512 with BF16 is available; otherwise as [`SplitColumns::pair`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn columns(split: &SplitColumns) {
    let order = lane_by_lane();
    let odd_lanes = _mm512_set1_epi32(0xffff_0000_u32 as i32);
    for pair in 0..split.chunks * CHUNK / 2 {
        for block in 0..split.blocks {
            // SAFETY: as the caller promises.
            unsafe {
                let (lines, [high, low]) = split.pair(pair, block);
                let [even, odd] = lines.map(|line| _mm512_loadu_ps(line.as_ptr()));
                let near = bf16_pairs(even, odd, order);
                let even = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32::<16>(near)));
                let odd =
                    _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(near, odd_lanes)));
                _mm512_storeu_si512(high.cast(), near);
                _mm512_storeu_si512(low.cast(), bf16_pairs(even, odd, order));
            }
        }
    }
}

/// # Safety
/// AMX is available, and [`release`] follows on this thread.
unsafe fn begin() {
    // SAFETY: as the caller promises.
    unsafe { configure(BLOCK) }
}

/// # Safety
/// Tiles are configured for sixteen rows; otherwise as [`super::split::multiply`].
unsafe fn multiply(blocks: &Blocks) {
    // SAFETY: the caller vouches for operands and sums of these counts; the compiler knows nothing
    // of tile registers.
    unsafe {
        load_sums(blocks);
        asm!(
            "2:",
            "tileloadd tmm6, [{b0} + {line} * 1]",
            "tileloadd tmm4, [{a0} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line} * 1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm4, [{a0} + {line} * 1 + 1024]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line} * 1 + 1024]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "tileloadd tmm6, [{b0} + {line} * 1 + 1024]",
            "tileloadd tmm4, [{a0} + {line} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {line} * 1 + 1024]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{a1} + {line} * 1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {a0}, 2048",
            "add {a1}, 2048",
            "add {b0}, 2048",
            "add {b1}, 2048",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) blocks.rows[0] => _,
            a1 = inout(reg) blocks.rows[1] => _,
            b0 = inout(reg) blocks.columns[0] => _,
            b1 = inout(reg) blocks.columns[1] => _,
            line = in(reg) 64usize,
            n = inout(reg) blocks.chunks => _,
            options(nostack)
        );
        store_sums(blocks);
    }
}

/// Loads the sums, or sets them to zero.
///
/// # Safety
/// As [`multiply`].
unsafe fn load_sums(blocks: &Blocks) {
    let line = blocks.stride * size_of::<f32>();
    let second = blocks.sums.wrapping_add(BLOCK * blocks.stride);
    let (rows, columns) = blocks.counts;
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            options(nomem, nostack)
        );
        if !blocks.fresh {
            asm!(
                "tileloadd tmm0, [{c} + {line} * 1]",
                c = in(reg) blocks.sums,
                line = in(reg) line,
                options(nostack, readonly)
            );
            if columns == 2 {
                asm!(
                    "tileloadd tmm1, [{c} + {line} * 1 + 64]",
                    c = in(reg) blocks.sums,
                    line = in(reg) line,
                    options(nostack, readonly)
                );
            }
            if rows == 2 {
                asm!(
                    "tileloadd tmm2, [{c} + {line} * 1]",
                    c = in(reg) second,
                    line = in(reg) line,
                    options(nostack, readonly)
                );
            }
            if rows == 2 && columns == 2 {
                asm!(
                    "tileloadd tmm3, [{c} + {line} * 1 + 64]",
                    c = in(reg) second,
                    line = in(reg) line,
                    options(nostack, readonly)
                );
            }
        }
    }
}

/// Stores the sums.
///
/// # Safety
/// As [`multiply`].
unsafe fn store_sums(blocks: &Blocks) {
    let line = blocks.stride * size_of::<f32>();
    let second = blocks.sums.wrapping_add(BLOCK * blocks.stride);
    let (rows, columns) = blocks.counts;
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilestored [{c} + {line} * 1], tmm0",
            c = in(reg) blocks.sums,
            line = in(reg) line,
            options(nostack)
        );
        if columns == 2 {
            asm!(
                "tilestored [{c} + {line} * 1 + 64], tmm1",
                c = in(reg) blocks.sums,
                line = in(reg) line,
                options(nostack)
            );
        }
        if rows == 2 {
            asm!(
                "tilestored [{c} + {line} * 1], tmm2",
                c = in(reg) second,
                line = in(reg) line,
                options(nostack)
            );
        }
        if rows == 2 && columns == 2 {
            asm!(
                "tilestored [{c} + {line} * 1 + 64], tmm3",
                c = in(reg) second,
                line = in(reg) line,
                options(nostack)
            );
        }
    }
}

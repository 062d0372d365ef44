//! Decodes weights of other formats to tiles of `bf16`.

use std::arch::x86_64::*;

use super::super::block::TILE_BYTES;
use super::super::codes::{Coded, Decoded, Group, Tail, group_scale};
use super::super::kernels::{AHEAD_BYTES, Float, prefetch};
use crate::isa::avx512::Avx512;
use crate::isa::{SEGMENT, Simd, unroll};
use crate::pack::PANEL;
use crate::pack::layout::Constants;

/// Decodes `segments` (whole chunks) to tiles of `bf16` pairs `[segments][16][16][2]`.
///
/// # Safety
/// AVX-512 with BF16 is available; both places hold the segments.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) unsafe fn to_tiles<C: Coded>(
    packed: *const u8,
    segments: usize,
    constants: &Constants,
    tiles: *mut u8,
) {
    // SAFETY: as the caller promises; a chunk has at most eight segments of two parts.
    unsafe {
        let in_chunk = C::segments(constants);
        let chunk_bytes = in_chunk * C::SEGMENT_BYTES + C::tail_bytes(constants);
        let (mut packed, mut tiles) = (packed, tiles);
        let (mut scales, mut mins) = ([0f32; 16 * PANEL], [0f32; 8 * PANEL]);
        let order = lane_by_lane();
        for _ in 0..segments / in_chunk {
            prefetch(packed.wrapping_add(AHEAD_BYTES), chunk_bytes);
            let tail = packed.add(in_chunk * C::SEGMENT_BYTES);
            let out = Decoded { scales: scales.as_mut_ptr(), mins: mins.as_mut_ptr() };
            C::scales::<Avx512>(tail, constants, out);
            for segment in 0..in_chunk {
                let codes = C::codes::<Avx512>(packed);
                let min = match C::MIN {
                    true => Avx512::load(mins.as_ptr().add(segment * PANEL)),
                    false => _mm512_setzero_ps(),
                };
                unroll!(j in 8 => {
                    let part = segment * C::PARTS + j * C::PARTS / 8;
                    let scale = Avx512::load(scales.as_ptr().add(part * PANEL));
                    let [first, second] = four_pairs::<C>(codes[j], scale, min, order);
                    _mm512_storeu_si512(tiles.add(128 * j).cast(), first);
                    _mm512_storeu_si512(tiles.add(128 * j + 64).cast(), second);
                });
                packed = packed.add(C::SEGMENT_BYTES);
                tiles = tiles.add(TILE_BYTES);
            }
            packed = packed.add(C::tail_bytes(constants));
        }
    }
}

/// [`to_tiles`] of fp8 under the scales of [`Group`].
///
/// # Safety
/// As [`to_tiles`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) unsafe fn to_tiles_of_floats<W: Float>(
    packed: *const u8,
    segments: usize,
    constants: &Constants,
    tiles: *mut u8,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let pairs = constants.group_segments * SEGMENT / 2;
        let (mut packed, mut tiles) = (packed, tiles);
        let order = lane_by_lane();
        for _ in 0..segments / constants.group_segments {
            let tail = packed.add(pairs * W::PAIR_BYTES);
            let scale = group_scale::<Avx512>(tail, constants.scale);
            for _ in 0..pairs {
                let (even, odd) = W::pair::<Avx512>(packed);
                let pair = bf16_pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale), order);
                _mm512_storeu_si512(tiles.cast(), pair);
                packed = packed.add(W::PAIR_BYTES);
                tiles = tiles.add(64);
            }
            packed = packed.add(Group::<false>::tail_bytes(constants));
        }
    }
}

/// The permutation that interleaves two vectors of sixteen `bf16`: lane by lane, the first vector's
/// number and then the second's.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn lane_by_lane() -> __m512i {
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * PANEL) as u16);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute(order) }
}

/// Rounds two numbers of each lane to `bf16` and puts them side by side.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
pub(crate) fn bf16_pairs(first: __m512, second: __m512, order: __m512i) -> __m512i {
    let both = _mm512_cvtne2ps_pbh(second, first);
    // SAFETY: both are 64 bytes of plain data.
    let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(both) };
    _mm512_permutexvar_epi16(order, both)
}

/// Computes `(code - zero) * scale + min` of four positions, as two vectors of `bf16` pairs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
fn four_pairs<C: Coded>(
    codes: __m512i,
    scale: __m512,
    min: __m512,
    order: __m512i,
) -> [__m512i; 2] {
    let zero = _mm512_set1_ps(-C::ZERO as f32);
    // A zero point that is a power of two has an exact product with a scale. So it can be added to
    // the min.
    let exact = C::ZERO & (C::ZERO - 1) == 0;
    let bias = if exact { _mm512_fmadd_ps(zero, scale, min) } else { min };
    let value = |word: __m512i| {
        let code = _mm512_cvtepi32_ps(word);
        let code = if exact { code } else { _mm512_add_ps(code, zero) };
        _mm512_fmadd_ps(code, scale, bias)
    };
    let byte = _mm512_set1_epi32(255);
    let numbers = [
        value(_mm512_and_si512(codes, byte)),
        value(_mm512_and_si512(_mm512_srli_epi32::<8>(codes), byte)),
        value(_mm512_and_si512(_mm512_srli_epi32::<16>(codes), byte)),
        value(_mm512_srli_epi32::<24>(codes)),
    ];
    let pair = |first, second| bf16_pairs(first, second, order);
    [pair(numbers[0], numbers[1]), pair(numbers[2], numbers[3])]
}

//! GGUF's blocks, taken apart: the codes and scales of sixteen rows' blocks, placed in a chunk.

use lathe_tensor::GgmlType;

use super::PANEL;
use super::layout::{Codes, Layout};
use super::place::{
    Blocks, LOW4, ONES, Words, map, map2, place_bytes, place_codes, place_words, plane, words_at,
};

/// A block of zeros, as long as any: what rows past the matrix's end are filled with.
static NOTHING: [u8; 256] = [0; 256];

/// Writes a panel from up to sixteen rows of blocks, `row_bytes` each.
#[inline(always)]
pub(crate) fn place_panel(kind: GgmlType, rows: &[u8], row_bytes: usize, out: &mut [u8]) {
    let block_bytes = kind.block_bytes();
    for (index, chunk) in out.chunks_exact_mut(Layout::of_ggml(kind).chunk_bytes()).enumerate() {
        let mut blocks: Blocks<'_> = [&NOTHING; PANEL];
        for (block, row) in blocks.iter_mut().zip(rows.chunks_exact(row_bytes)) {
            *block = &row[index * block_bytes..][..block_bytes];
        }
        place(kind, &blocks, chunk);
    }
}

/// Writes a chunk from one block of each row.
#[inline(always)]
fn place(kind: GgmlType, blocks: &Blocks<'_>, chunk: &mut [u8]) {
    let layout = Layout::of_ggml(kind);
    let Layout::Coded(codes, _) = layout else { return };
    let (segments, tail) = chunk.split_at_mut(layout.chunk_segments() * layout.segment_bytes());
    let segments = segments.chunks_exact_mut(layout.segment_bytes());
    for (index, segment) in segments.enumerate() {
        place_codes(codes, &segment_codes(kind, blocks, index), segment);
    }
    match kind {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::IQ4_NL => {
            place_bytes::<2>(blocks, 0, tail);
        }
        GgmlType::Q4_1 | GgmlType::Q5_1 => {
            place_bytes::<2>(blocks, 0, tail);
            place_bytes::<2>(blocks, 2, plane(tail, 2));
        }
        GgmlType::Q4_K | GgmlType::Q5_K => place_super_min(blocks, tail),
        GgmlType::Q6_K => {
            for i in 0..16 {
                place_bytes::<1>(blocks, 192 + i, &mut plane(tail, i)[..PANEL]);
            }
            place_bytes::<2>(blocks, 208, plane(tail, 16));
        }
        GgmlType::IQ4_XS => {
            place_bytes::<4>(blocks, 4, tail);
            place_bytes::<2>(blocks, 2, plane(tail, 4));
            place_bytes::<2>(blocks, 0, plane(tail, 6));
        }
    }
}

/// The unsigned codes of segment `index` of the blocks.
#[inline(always)]
fn segment_codes(kind: GgmlType, blocks: &Blocks<'_>, index: usize) -> [Words; 8] {
    match kind {
        GgmlType::Q4_0 | GgmlType::IQ4_NL => nibbles(blocks, 2),
        GgmlType::Q4_1 => nibbles(blocks, 4),
        GgmlType::Q5_0 => five_bits(blocks, 6, words_at(blocks, 2)),
        GgmlType::Q5_1 => five_bits(blocks, 8, words_at(blocks, 4)),
        GgmlType::Q8_0 => each(|j| map(words_at(blocks, 2 + 4 * j), |w| w ^ 0x8080_8080)),
        GgmlType::Q4_K => super_nibbles(blocks, 16, index),
        GgmlType::Q5_K => {
            let low = super_nibbles(blocks, 48, index);
            each(|j| {
                let high = words_at(blocks, 16 + 4 * j);
                map2(low[j], high, |low, high| low | ((high >> index) & ONES) << 4)
            })
        }
        GgmlType::Q6_K => q6_k(blocks, index),
        GgmlType::IQ4_XS => nibbles(blocks, 8 + 16 * index),
    }
}

#[inline(always)]
fn each(f: impl Fn(usize) -> Words) -> [Words; 8] {
    [f(0), f(1), f(2), f(3), f(4), f(5), f(6), f(7)]
}

/// 32 nibbles of sixteen bytes at `at`, the low ones first.
#[inline(always)]
fn nibbles(blocks: &Blocks<'_>, at: usize) -> [Words; 8] {
    each(|j| map(words_at(blocks, at + 4 * (j % 4)), |w| (w >> (4 * (j / 4))) & LOW4))
}

/// As [`nibbles`], bit 4 of code `k` being bit `k` of `high`.
#[inline(always)]
fn five_bits(blocks: &Blocks<'_>, at: usize, high: Words) -> [Words; 8] {
    let low = nibbles(blocks, at);
    // The product copies bits 0..4 of the factor to bits 0, 8, 16 and 24.
    let spread = |bits: u32| (bits.wrapping_mul(0x0020_4081) & ONES) << 4;
    each(|j| map2(low[j], high, |low, high| low | spread((high >> (4 * j)) & 15)))
}

/// Segment `index` of Q4_K or Q5_K: nibbles of 32 bytes, the low ones for even segments.
#[inline(always)]
fn super_nibbles(blocks: &Blocks<'_>, at: usize, index: usize) -> [Words; 8] {
    let shift = 4 * (index % 2);
    each(|j| map(words_at(blocks, at + index / 2 * 32 + 4 * j), |w| (w >> shift) & LOW4))
}

/// `struct { u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d; }`: in each half of 128 positions,
/// segment `g` of four has its low bits in nibble `g / 2` of `ql[32 (g % 2)..]` and its high
/// bits at bit `2g` of `qh`.
#[inline(always)]
fn q6_k(blocks: &Blocks<'_>, index: usize) -> [Words; 8] {
    let (half, g) = (index / 4, index % 4);
    let (low, high) = (half * 64 + g % 2 * 32, 128 + half * 32);
    each(|j| {
        let (low, high) = (words_at(blocks, low + 4 * j), words_at(blocks, high + 4 * j));
        map2(low, high, |low, high| {
            ((low >> (4 * (g / 2))) & LOW4) | ((high >> (2 * g)) & (3 * ONES)) << 4
        })
    })
}

/// The twelve bytes of sub-scales and the two `f16` of Q4_K or Q5_K blocks. In the file, scales
/// and mins 0..4 are the low six bits of bytes 0..4 and 4..8; scales and mins 4..8 have their low
/// nibbles in bytes 8..12 and their two high bits atop bytes 0..4 and 4..8.
#[inline(always)]
fn place_super_min(blocks: &Blocks<'_>, tail: &mut [u8]) {
    const SIX: u32 = 63 * ONES;
    const TWO: u32 = 3 * ONES;
    let [first, second, third] = [4, 8, 12].map(|at| words_at(blocks, at));
    let scales = map(first, |w| pack_sixes(w & SIX));
    let mins = map(second, |w| pack_sixes(w & SIX));
    let high = |third: u32, top: u32| pack_sixes(third & LOW4 | ((top >> 6) & TWO) << 4);
    let scales_high = map2(third, first, high);
    let mins_high = map2(map(third, |w| w >> 4), second, high);
    for (i, words) in [scales, scales_high, mins].into_iter().enumerate() {
        let words = map2(words, mins_high, |w, mins| w | ((mins >> (8 * i)) & 0xff) << 24);
        place_words(words, plane(tail, 4 * i));
    }
    place_bytes::<2>(blocks, 0, plane(tail, 12));
    place_bytes::<2>(blocks, 2, &mut plane(tail, 14)[..2 * PANEL]);
}

/// Four bytes of six bits each, without the gaps.
#[inline(always)]
fn pack_sixes(w: u32) -> u32 {
    w & 63 | (w >> 2) & (63 << 6) | (w >> 4) & (63 << 12) | (w >> 6) & (63 << 18)
}

/// The values of IQ4 codes.
pub(crate) const IQ4_VALUES: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// [`IQ4_VALUES`] as the unsigned codes that kernels multiply.
pub(crate) const IQ4_TABLE: [u8; 16] = unsigned(IQ4_VALUES, 128);

/// Twice the values of fp4 e2m1 codes, as unsigned codes.
pub(crate) const E2M1_TABLE: [u8; 16] =
    unsigned([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], 12);

const fn unsigned(values: [i8; 16], zero: i16) -> [u8; 16] {
    let mut table = [0; 16];
    let mut i = 0;
    while i < 16 {
        table[i] = (values[i] as i16 + zero) as u8;
        i += 1;
    }
    table
}

/// Tables by kind of code.
pub(crate) const fn table(codes: Codes) -> Option<[u8; 16]> {
    match codes {
        Codes::Iq4 => Some(IQ4_TABLE),
        Codes::E2m1 => Some(E2M1_TABLE),
        _ => None,
    }
}

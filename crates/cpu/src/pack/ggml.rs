//! GGUF's blocks, taken apart: the codes and scales of one block, placed in a chunk.

use lathe_tensor::GgmlType;

use super::layout::{Codes, Layout};
use super::place::{LOW4, ONES, place_codes, place_lane, plane, word};

/// Puts one block of a row into its lane of a chunk.
pub(crate) fn place(kind: GgmlType, block: &[u8], lane: usize, chunk: &mut [u8]) {
    let layout = Layout::of_ggml(kind);
    let Layout::Coded(codes, _) = layout else { return };
    let (segments, tail) = chunk.split_at_mut(layout.chunk_segments() * layout.segment_bytes());
    let segments = segments.chunks_exact_mut(layout.segment_bytes());
    for (index, segment) in segments.enumerate() {
        place_codes(codes, &segment_codes(kind, block, index), lane, segment);
    }
    match kind {
        GgmlType::Q4_0 | GgmlType::Q5_0 | GgmlType::Q8_0 | GgmlType::IQ4_NL => {
            place_lane(half(block, 0), lane, tail);
        }
        GgmlType::Q4_1 | GgmlType::Q5_1 => {
            place_lane(half(block, 0), lane, tail);
            place_lane(half(block, 2), lane, plane(tail, 2));
        }
        GgmlType::Q4_K | GgmlType::Q5_K => place_super_min(block, lane, tail),
        GgmlType::Q6_K => {
            for i in 0..16 {
                place_lane([block[192 + i]], lane, plane(tail, i));
            }
            place_lane(half(block, 208), lane, plane(tail, 16));
        }
        GgmlType::IQ4_XS => {
            place_lane([block[4], block[5], block[6], block[7]], lane, tail);
            place_lane(half(block, 2), lane, plane(tail, 4));
            place_lane(half(block, 0), lane, plane(tail, 6));
        }
    }
}

fn half(block: &[u8], at: usize) -> [u8; 2] {
    [block[at], block[at + 1]]
}

/// The unsigned codes of segment `index` of a block.
fn segment_codes(kind: GgmlType, block: &[u8], index: usize) -> [u32; 8] {
    match kind {
        GgmlType::Q4_0 | GgmlType::IQ4_NL => nibbles(&block[2..]),
        GgmlType::Q4_1 => nibbles(&block[4..]),
        GgmlType::Q5_0 => five_bits(&block[6..], word(block, 2)),
        GgmlType::Q5_1 => five_bits(&block[8..], word(block, 4)),
        GgmlType::Q8_0 => std::array::from_fn(|j| word(block, 2 + 4 * j) ^ 0x8080_8080),
        GgmlType::Q4_K => super_nibbles(&block[16..], index),
        GgmlType::Q5_K => {
            let low = super_nibbles(&block[48..], index);
            let high = |j: usize| ((word(block, 16 + 4 * j) >> index) & ONES) << 4;
            std::array::from_fn(|j| low[j] | high(j))
        }
        GgmlType::Q6_K => q6_k(block, index),
        GgmlType::IQ4_XS => nibbles(&block[8 + 16 * index..]),
    }
}

/// 32 nibbles, the low ones of sixteen bytes first.
fn nibbles(bytes: &[u8]) -> [u32; 8] {
    std::array::from_fn(|j| (word(bytes, 4 * (j % 4)) >> (4 * (j / 4))) & LOW4)
}

/// As [`nibbles`], bit 4 of code `k` being bit `k` of `high`.
fn five_bits(bytes: &[u8], high: u32) -> [u32; 8] {
    let low = nibbles(bytes);
    // The product copies bits 0..4 of the factor to bits 0, 8, 16 and 24.
    let spread = |bits: u32| (bits.wrapping_mul(0x0020_4081) & ONES) << 4;
    std::array::from_fn(|j| low[j] | spread((high >> (4 * j)) & 15))
}

/// Segment `index` of a Q4_K or Q5_K block: nibbles of 32 bytes, the low ones for even segments.
fn super_nibbles(bytes: &[u8], index: usize) -> [u32; 8] {
    std::array::from_fn(|j| (word(bytes, index / 2 * 32 + 4 * j) >> (4 * (index % 2))) & LOW4)
}

/// `struct { u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d; }`: in each half of 128 positions,
/// segment `g` of four has its low bits in nibble `g / 2` of `ql[32 (g % 2)..]` and its high
/// bits at bit `2g` of `qh`.
fn q6_k(block: &[u8], index: usize) -> [u32; 8] {
    let (half, g) = (index / 4, index % 4);
    let low = &block[half * 64 + g % 2 * 32..];
    let high = &block[128 + half * 32..];
    std::array::from_fn(|j| {
        let low = (word(low, 4 * j) >> (4 * (g / 2))) & LOW4;
        low | ((word(high, 4 * j) >> (2 * g)) & (3 * ONES)) << 4
    })
}

/// The scale and the min, six bits each, of segment `index` (ggml's `get_scale_min_k4`).
fn sub_scale(packed: &[u8], index: usize) -> (u32, u32) {
    let byte = |i: usize| u32::from(packed[i]);
    if index < 4 {
        (byte(index) & 63, byte(index + 4) & 63)
    } else {
        let low = byte(index + 4);
        ((low & 15) | (byte(index - 4) >> 6) << 4, (low >> 4) | (byte(index) >> 6) << 4)
    }
}

/// The twelve bytes of sub-scales and the two `f16` of a Q4_K or Q5_K block.
fn place_super_min(block: &[u8], lane: usize, tail: &mut [u8]) {
    let mut words = [0u32; 3];
    let mut mins_high = 0u32;
    for i in 0..4 {
        let (scale_low, min_low) = sub_scale(&block[4..16], i);
        let (scale_high, min_high) = sub_scale(&block[4..16], i + 4);
        words[0] |= scale_low << (6 * i);
        words[1] |= scale_high << (6 * i);
        words[2] |= min_low << (6 * i);
        mins_high |= min_high << (6 * i);
    }
    for (i, word) in words.into_iter().enumerate() {
        let word = word | ((mins_high >> (8 * i)) & 0xff) << 24;
        place_lane(word.to_le_bytes(), lane, plane(tail, 4 * i));
    }
    place_lane(half(block, 0), lane, plane(tail, 12));
    place_lane(half(block, 2), lane, plane(tail, 14));
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

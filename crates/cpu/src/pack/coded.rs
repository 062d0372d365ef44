//! The coded layouts: how GGUF's blocks of sixteen rows interleave into a chunk, and back.
//!
//! A chunk begins with its codes, 32 positions of k at a time. `c[j]` are the codes of positions
//! `4j..4j+4` as the four bytes of a word, `j` in `0..8`:
//! ```text
//! nibbles : 4 vectors; vector s, lane word = low4(c[2s]) | low4(c[2s+1]) << 4
//! bit 4   : 1 vector;  lane word = OR over j of bit4(c[j]) << j               (5-bit codes)
//! bits 4-5: 2 vectors; vector h, lane word = OR over i of bits45(c[4h+i]) << 2i  (6-bit codes)
//! bytes   : 8 vectors; vector j, lane word = c[j]                             (8-bit codes)
//! ```
//! Codes are unsigned; the zero point (8, 16, 32, 128) is subtracted in the integer dot.
//! After the codes of the whole chunk come the scales, lane by lane:
//! ```text
//! Q4_0 Q5_0 Q8_0 : f16 d          Q4_1 Q5_1 : f16 d, then f16 m       (chunk = 32)
//! Q4_K Q5_K      : three words of sub-scales, then f16 d, then f16 dmin  (chunk = 256)
//!                  word 0 = scales 0..4, word 1 = scales 4..8, word 2 = mins 0..4, six bits each
//!                  from bit 0; mins 4..8 (24 bits) fill the top bytes of words 0, 1, 2 in order
//! Q6_K           : sixteen i8 sub-scales (vector of bytes each), then f16 d   (chunk = 256)
//! ```
//! Every chunk has exactly the bytes of its sixteen blocks in the file.

use lathe_tensor::GgmlType;

use super::{Offset, PANEL};

/// Whether the type has a kernel; the others are refused before anything is packed.
pub(crate) fn has_kernel(kind: GgmlType) -> bool {
    !matches!(kind, GgmlType::IQ4_NL | GgmlType::IQ4_XS)
}

/// What unsigned codes are shifted by, and how many scales 32 of them have.
pub(crate) fn offset(kind: GgmlType) -> Offset {
    let (zero, parts) = match kind {
        GgmlType::Q4_0 => (8, 1),
        GgmlType::Q5_0 => (16, 1),
        GgmlType::Q6_K => (32, 2),
        GgmlType::Q8_0 => (128, 1),
        GgmlType::Q4_1 | GgmlType::Q5_1 | GgmlType::Q4_K | GgmlType::Q5_K => (0, 1),
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => unreachable!("refused by has_kernel"),
    };
    Offset { zero, parts }
}

const LOW4: u32 = 0x0f0f_0f0f;
const ONES: u32 = 0x0101_0101;

/// Puts one block of a row into its lane of a chunk (which is zero in that lane before).
pub(crate) fn place(kind: GgmlType, block: &[u8], lane: usize, chunk: &mut [u8]) {
    match kind {
        GgmlType::Q4_0 => {
            place_nibbles(&nibble_codes(&block[2..]), lane, &mut chunk[..256]);
            place_half(block, 0, lane, &mut chunk[256..]);
        }
        GgmlType::Q4_1 => {
            place_nibbles(&nibble_codes(&block[4..]), lane, &mut chunk[..256]);
            place_half(block, 0, lane, &mut chunk[256..]);
            place_half(block, 2, lane, &mut chunk[288..]);
        }
        GgmlType::Q5_0 => {
            let codes = five_bit_codes(&block[6..], word(block, 2));
            place_five(&codes, lane, &mut chunk[..320]);
            place_half(block, 0, lane, &mut chunk[320..]);
        }
        GgmlType::Q5_1 => {
            let codes = five_bit_codes(&block[8..], word(block, 4));
            place_five(&codes, lane, &mut chunk[..320]);
            place_half(block, 0, lane, &mut chunk[320..]);
            place_half(block, 2, lane, &mut chunk[352..]);
        }
        GgmlType::Q8_0 => {
            for j in 0..8 {
                put(chunk, j * 64 + lane * 4, word(block, 2 + 4 * j) ^ 0x8080_8080);
            }
            place_half(block, 0, lane, &mut chunk[512..]);
        }
        GgmlType::Q4_K => place_q4_k(block, lane, chunk),
        GgmlType::Q5_K => place_q5_k(block, lane, chunk),
        GgmlType::Q6_K => place_q6_k(block, lane, chunk),
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => unreachable!("refused by has_kernel"),
    }
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put(chunk: &mut [u8], at: usize, value: u32) {
    chunk[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Codes of 32 nibbles, low nibbles of sixteen bytes first.
fn nibble_codes(bytes: &[u8]) -> [u32; 8] {
    std::array::from_fn(|j| (word(bytes, 4 * (j % 4)) >> (4 * (j / 4))) & LOW4)
}

/// As [`nibble_codes`], bit 4 of code `k` being bit `k` of `high`.
fn five_bit_codes(bytes: &[u8], high: u32) -> [u32; 8] {
    let low = nibble_codes(bytes);
    // The product copies bits 0..4 of the factor to bits 0, 8, 16 and 24.
    std::array::from_fn(|j| {
        let bits = (high >> (4 * j)) & 15;
        low[j] | (bits.wrapping_mul(0x0020_4081) & ONES) << 4
    })
}

fn place_nibbles(codes: &[u32; 8], lane: usize, vectors: &mut [u8]) {
    for s in 0..4 {
        let word = (codes[2 * s] & LOW4) | (codes[2 * s + 1] & LOW4) << 4;
        put(vectors, s * 64 + lane * 4, word);
    }
}

fn place_five(codes: &[u32; 8], lane: usize, vectors: &mut [u8]) {
    place_nibbles(codes, lane, vectors);
    let plane = codes.iter().enumerate().fold(0, |plane, (j, c)| plane | ((c >> 4) & ONES) << j);
    put(vectors, 256 + lane * 4, plane);
}

fn place_six(codes: &[u32; 8], lane: usize, vectors: &mut [u8]) {
    place_nibbles(codes, lane, vectors);
    for h in 0..2 {
        let plane =
            (0..4).fold(0, |plane, i| plane | ((codes[4 * h + i] >> 4) & (3 * ONES)) << (2 * i));
        put(vectors, 256 + h * 64 + lane * 4, plane);
    }
}

/// Copies the `f16` at `at` of the block to its lane.
fn place_half(block: &[u8], at: usize, lane: usize, out: &mut [u8]) {
    out[lane * 2..lane * 2 + 2].copy_from_slice(&block[at..at + 2]);
}

/// The scale and the min, six bits each, of group `g` (ggml's `get_scale_min_k4`).
fn sub_scale(packed: &[u8], g: usize) -> (u32, u32) {
    let byte = |i: usize| u32::from(packed[i]);
    if g < 4 {
        (byte(g) & 63, byte(g + 4) & 63)
    } else {
        ((byte(g + 4) & 15) | (byte(g - 4) >> 6) << 4, (byte(g + 4) >> 4) | (byte(g) >> 6) << 4)
    }
}

/// The twelve bytes of sub-scales and the two `f16` of a Q4_K or Q5_K block.
fn place_k_scales(block: &[u8], lane: usize, out: &mut [u8]) {
    let mut words = [0u32; 3];
    let mut mins_high = 0u32;
    for g in 0..4 {
        let (scale_low, min_low) = sub_scale(&block[4..16], g);
        let (scale_high, min_high) = sub_scale(&block[4..16], g + 4);
        words[0] |= scale_low << (6 * g);
        words[1] |= scale_high << (6 * g);
        words[2] |= min_low << (6 * g);
        mins_high |= min_high << (6 * g);
    }
    for (i, word) in words.into_iter().enumerate() {
        put(out, i * 64 + lane * 4, word | ((mins_high >> (8 * i)) & 0xff) << 24);
    }
    place_half(block, 0, lane, &mut out[192..]);
    place_half(block, 2, lane, &mut out[224..]);
}

/// Group `g` of a Q4_K or Q5_K block: nibbles of 32 bytes, low half for even groups.
fn k_nibbles(codes: &[u8], g: usize) -> [u32; 8] {
    std::array::from_fn(|j| (word(codes, g / 2 * 32 + 4 * j) >> (4 * (g % 2))) & LOW4)
}

fn place_q4_k(block: &[u8], lane: usize, chunk: &mut [u8]) {
    for g in 0..8 {
        place_nibbles(&k_nibbles(&block[16..], g), lane, &mut chunk[g * 256..]);
    }
    place_k_scales(block, lane, &mut chunk[8 * 256..]);
}

fn place_q5_k(block: &[u8], lane: usize, chunk: &mut [u8]) {
    for g in 0..8 {
        let low = k_nibbles(&block[48..], g);
        let codes = std::array::from_fn(|j| low[j] | ((word(block, 16 + 4 * j) >> g) & ONES) << 4);
        place_five(&codes, lane, &mut chunk[g * 320..]);
    }
    place_k_scales(block, lane, &mut chunk[8 * 320..]);
}

/// `struct { u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d; }`: in each half of 128 positions, group
/// `g` of 32 has its low bits in nibble `g / 2` of `ql[32 (g % 2)..]` and its high bits at bit `2g` of `qh`.
fn place_q6_k(block: &[u8], lane: usize, chunk: &mut [u8]) {
    for g in 0..8 {
        let (half, quarter) = (g / 4, g % 4);
        let low = &block[half * 64 + quarter % 2 * 32..];
        let high = &block[128 + half * 32..];
        let codes = std::array::from_fn(|j| {
            (word(low, 4 * j) >> (4 * (quarter / 2))) & LOW4
                | ((word(high, 4 * j) >> (2 * quarter)) & (3 * ONES)) << 4
        });
        place_six(&codes, lane, &mut chunk[g * 384..]);
    }
    let scales = &mut chunk[8 * 384..];
    for i in 0..16 {
        scales[i * PANEL + lane] = block[192 + i];
    }
    place_half(block, 208, lane, &mut scales[256..]);
}

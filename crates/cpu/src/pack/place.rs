//! Puts the codes and scales of one row into its lane of a chunk (see [`super::layout`]).
//!
//! Codes travel as `[u32; 8]`, four to a word, so that packing is a few word operations per eight
//! weights. A lane is zero before it is written.

use super::PANEL;
use super::layout::Codes;

/// One bit a byte.
pub(crate) const ONES: u32 = 0x0101_0101;
/// The low nibbles of four bytes.
pub(crate) const LOW4: u32 = 0x0f0f_0f0f;

/// The little-endian word at `at`.
pub(crate) fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn put(vectors: &mut [u8], vector: usize, lane: usize, value: u32) {
    let at = vector * 64 + lane * 4;
    vectors[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

/// Places the codes of one segment; words hold unsigned codes, one a byte.
pub(crate) fn place_codes(codes: Codes, words: &[u32; 8], lane: usize, segment: &mut [u8]) {
    if codes.bits() == 8 {
        for (j, &word) in words.iter().enumerate() {
            put(segment, j, lane, word);
        }
        return;
    }
    for s in 0..4 {
        put(segment, s, lane, (words[2 * s] & LOW4) | (words[2 * s + 1] & LOW4) << 4);
    }
    if codes.bits() == 5 {
        let plane = words.iter().enumerate().fold(0, |p, (j, c)| p | ((c >> 4) & ONES) << j);
        put(segment, 4, lane, plane);
    }
    if codes.bits() == 6 {
        for h in 0..2 {
            let plane =
                (0..4).fold(0, |p, i| p | ((words[4 * h + i] >> 4) & (3 * ONES)) << (2 * i));
            put(segment, 4 + h, lane, plane);
        }
    }
}

/// Places `N` bytes in the lane of a plane of `N` bytes a lane.
pub(crate) fn place_lane<const N: usize>(value: [u8; N], lane: usize, plane: &mut [u8]) {
    plane[lane * N..lane * N + N].copy_from_slice(&value);
}

/// The plane at byte `lane_bytes` of each lane: planes before it take that many bytes a lane.
pub(crate) fn plane(tail: &mut [u8], lane_bytes: usize) -> &mut [u8] {
    &mut tail[lane_bytes * PANEL..]
}

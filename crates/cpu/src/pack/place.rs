//! Puts the codes and scales of sixteen rows into a chunk (see [`super::layout`]).
//!
//! Codes travel as `Words`, four codes of each of sixteen rows, so that packing a segment is a few
//! vector operations: loading a model is bound by reading the file and touching new pages.

use super::PANEL;
use super::layout::Codes;

/// One word of each row.
pub(crate) type Words = [u32; PANEL];
/// The bytes of each row's block.
pub(crate) type Blocks<'a> = [&'a [u8]; PANEL];

/// One bit a byte.
pub(crate) const ONES: u32 = 0x0101_0101;
/// The low nibbles of four bytes.
pub(crate) const LOW4: u32 = 0x0f0f_0f0f;

/// The little-endian word at `at` of each block.
#[inline(always)]
pub(crate) fn words_at(blocks: &Blocks<'_>, at: usize) -> Words {
    let mut words = [0; PANEL];
    for (word, block) in words.iter_mut().zip(blocks) {
        *word = u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
    }
    words
}

/// `f` of each word.
#[inline(always)]
pub(crate) fn map(mut words: Words, f: impl Fn(u32) -> u32) -> Words {
    for word in &mut words {
        *word = f(*word);
    }
    words
}

/// `f` of each pair of words.
#[inline(always)]
pub(crate) fn map2(mut words: Words, others: Words, f: impl Fn(u32, u32) -> u32) -> Words {
    for (word, other) in words.iter_mut().zip(others) {
        *word = f(*word, other);
    }
    words
}

#[inline(always)]
fn put(vectors: &mut [u8], vector: usize, words: Words) {
    let bytes: [u8; 64] = bytemuck::cast(words.map(u32::to_le));
    vectors[vector * 64..vector * 64 + 64].copy_from_slice(&bytes);
}

/// Places the codes of one segment; words hold unsigned codes, one a byte.
#[inline(always)]
pub(crate) fn place_codes(codes: Codes, words: &[Words; 8], segment: &mut [u8]) {
    if codes.bits() == 8 {
        for (j, &words) in words.iter().enumerate() {
            put(segment, j, words);
        }
        return;
    }
    for s in 0..4 {
        put(segment, s, map2(words[2 * s], words[2 * s + 1], |a, b| (a & LOW4) | (b & LOW4) << 4));
    }
    if codes.bits() == 5 {
        let mut plane = [0; PANEL];
        for (j, &words) in words.iter().enumerate() {
            plane = map2(plane, words, |plane, c| plane | ((c >> 4) & ONES) << j);
        }
        put(segment, 4, plane);
    }
    if codes.bits() == 6 {
        for h in 0..2 {
            let mut plane = [0; PANEL];
            for i in 0..4 {
                let shift = 2 * i;
                plane = map2(plane, words[4 * h + i], |plane, c| {
                    plane | ((c >> 4) & (3 * ONES)) << shift
                });
            }
            put(segment, 4 + h, plane);
        }
    }
}

/// Copies `N` bytes at `at` of each block to a plane of `N` bytes a lane.
#[inline(always)]
pub(crate) fn place_bytes<const N: usize>(blocks: &Blocks<'_>, at: usize, plane: &mut [u8]) {
    for (lane, block) in plane.chunks_exact_mut(N).zip(blocks) {
        lane.copy_from_slice(&block[at..at + N]);
    }
}

/// Writes words to a plane of four bytes a lane.
#[inline(always)]
pub(crate) fn place_words(words: Words, plane: &mut [u8]) {
    put(plane, 0, words);
}

/// Puts `N` bytes in one lane of a plane of `N` bytes a lane.
pub(crate) fn place_lane<const N: usize>(value: [u8; N], lane: usize, plane: &mut [u8]) {
    plane[lane * N..lane * N + N].copy_from_slice(&value);
}

/// The plane at byte `lane_bytes` of each lane: planes before it take that many bytes a lane.
pub(crate) fn plane(tail: &mut [u8], lane_bytes: usize) -> &mut [u8] {
    &mut tail[lane_bytes * PANEL..]
}

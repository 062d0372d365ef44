//! Puts the codes and scales of sixteen rows into a chunk (see [`super::layout`]). It makes vectors
//! of 64 bytes from words of each row.

use super::PANEL;
use super::words::{LOW4, ONES, Words};

/// Bytes of a segment of sixteen rows, in codes of this many bits.
pub(crate) const FOUR_BITS: usize = 256;
pub(crate) const FIVE_BITS: usize = 320;
pub(crate) const SIX_BITS: usize = 384;

/// The nibble at bit `shift` of each byte.
///
/// # Safety
/// The machine has `W`'s features, and `out` room for what is written (so below).
#[inline(always)]
pub(crate) unsafe fn low_nibbles<W: Words, const N: usize>(
    mut words: [W; N],
    shift: u32,
) -> [W; N] {
    for i in 0..N {
        // SAFETY: the caller's.
        words[i] = unsafe { words[i].right(shift).and(W::splat(LOW4)) };
    }
    words
}

/// Places the low nibbles of a segment. Words hold one code a byte, each less than 16.
#[inline(always)]
pub(crate) unsafe fn place_nibbles<W: Words>(codes: &[W; 8], segment: *mut u8) {
    for s in 0..4 {
        // SAFETY: the caller's.
        unsafe { codes[2 * s].or(codes[2 * s + 1].left(4)).store(segment.add(64 * s)) }
    }
}

/// Places bit `bit` of each byte of eight words as bits 0..8 of the bytes of a plane.
#[inline(always)]
pub(crate) unsafe fn place_plane<W: Words>(words: &[W; 8], bit: u32, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let mut plane = W::splat(0);
        for j in 0..8 {
            plane = plane.or(words[j].right(bit).and(W::splat(ONES)).left(j as u32));
        }
        plane.store(out);
    }
}

/// Places bits `bit` and `bit + 1` of each byte of eight words in two planes of four words.
#[inline(always)]
pub(crate) unsafe fn place_pair_planes<W: Words>(words: &[W; 8], bit: u32, out: *mut u8) {
    for h in 0..2 {
        // SAFETY: the caller's.
        unsafe {
            let mut plane = W::splat(0);
            for i in 0..4 {
                let pair = words[4 * h + i].right(bit).and(W::splat(3 * ONES));
                plane = plane.or(pair.left(2 * i as u32));
            }
            plane.store(out.add(64 * h));
        }
    }
}

/// Places the low half of each word: two bytes a lane.
#[inline(always)]
pub(crate) unsafe fn place_halves<W: Words>(words: W, plane: *mut u8) {
    // SAFETY: the caller's.
    unsafe { words.store_halves(plane) }
}

/// Places the high half of each word.
#[inline(always)]
pub(crate) unsafe fn place_high_halves<W: Words>(words: W, plane: *mut u8) {
    // SAFETY: the caller's.
    unsafe { words.right(16).store_halves(plane) }
}

/// Places the bytes of each word in four planes of a byte a lane.
#[inline(always)]
pub(crate) unsafe fn place_bytes<W: Words>(words: W, planes: *mut u8) {
    for i in 0..4 {
        // SAFETY: the caller's.
        unsafe { words.right(8 * i as u32).store_bytes(planes.add(PANEL * i)) }
    }
}

/// Puts `N` bytes in one lane of a plane of `N` bytes a lane.
pub(crate) fn place_lane<const N: usize>(value: [u8; N], lane: usize, plane: &mut [u8]) {
    plane[lane * N..lane * N + N].copy_from_slice(&value);
}

/// The plane that follows planes of `lane_bytes` bytes a lane.
pub(crate) fn plane(tail: &mut [u8], lane_bytes: usize) -> &mut [u8] {
    &mut tail[lane_bytes * PANEL..]
}

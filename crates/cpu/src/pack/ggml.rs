//! Takes GGUF's blocks apart and places the codes and scales of sixteen rows' blocks in a chunk.

use lathe_tensor::GgmlType;

use super::PANEL;
use super::layout::{Codes, PanelLayout};
use super::place::{
    FIVE_BITS, FOUR_BITS, SIX_BITS, low_nibbles, place_bytes, place_halves, place_high_halves,
    place_nibbles, place_pair_planes, place_plane,
};
use super::words::{LOW4, ONES, RowPointers, Words, load8, prefetch};

/// Writes a panel of `chunks` chunks, one block of each row a chunk. It also prefetches as many
/// bytes from `next` on, which are the rows of the next panel. The hardware does not prefetch
/// sixteen streams that end after one or two kilobytes.
///
/// # Safety
/// Rows have `chunks` blocks, `out` has room for as many chunks, the machine has `W`'s features (so
/// below).
#[inline(always)]
pub(crate) unsafe fn place_panel<W: Words>(
    kind: GgmlType,
    rows: &RowPointers,
    chunks: usize,
    next: *const u8,
    out: *mut u8,
) {
    let chunk_bytes = PanelLayout::of_ggml(kind).chunk_bytes();
    for chunk in 0..chunks {
        let at = chunk * kind.block_bytes();
        prefetch(next.wrapping_add(at * PANEL), kind.block_bytes() * PANEL);
        // SAFETY: the caller's.
        unsafe { place::<W>(kind, rows, at, out.add(chunk * chunk_bytes)) }
    }
}

/// Writes a chunk from the block at byte `at` of each row.
#[inline(always)]
unsafe fn place<W: Words>(kind: GgmlType, rows: &RowPointers, at: usize, out: *mut u8) {
    // SAFETY: the caller's; the offsets are those of the block's fields and the chunk's planes.
    unsafe {
        match kind {
            GgmlType::Q4_0 | GgmlType::IQ4_NL => {
                place_nibbles(&two_halves(W::load4(rows, at + 2)), out);
                place_halves(W::load4(rows, at)[0], out.add(FOUR_BITS));
            }
            GgmlType::Q4_1 => {
                place_nibbles(&two_halves(W::load4(rows, at + 4)), out);
                let scales = W::load4(rows, at)[0];
                place_halves(scales, out.add(FOUR_BITS));
                place_high_halves(scales, out.add(FOUR_BITS + 32));
            }
            GgmlType::Q5_0 => {
                place_nibbles(&two_halves(W::load4(rows, at + 6)), out);
                let [first, second, ..] = W::load4(rows, at);
                place_halves(first, out.add(FIVE_BITS));
                let high = first.right(16).or(second.left(16));
                place_fifth_bits(high, out.add(FOUR_BITS));
            }
            GgmlType::Q5_1 => {
                place_nibbles(&two_halves(W::load4(rows, at + 8)), out);
                let [scales, high, ..] = W::load4(rows, at);
                place_fifth_bits(high, out.add(FOUR_BITS));
                place_halves(scales, out.add(FIVE_BITS));
                place_high_halves(scales, out.add(FIVE_BITS + 32));
            }
            GgmlType::Q8_0 => {
                let (codes, flip) = (load8::<W>(rows, at + 2), W::splat(0x8080_8080));
                for j in 0..8 {
                    codes[j].xor(flip).store(out.add(64 * j));
                }
                place_halves(W::load4(rows, at)[0], out.add(512));
            }
            GgmlType::Q4_K => {
                place_super_nibbles::<W>(rows, at + 16, FOUR_BITS, out);
                place_super_min::<W>(rows, at, out.add(8 * FOUR_BITS));
            }
            GgmlType::Q5_K => {
                place_super_nibbles::<W>(rows, at + 48, FIVE_BITS, out);
                let high = load8::<W>(rows, at + 16);
                for segment in 0..8 {
                    place_plane(&high, segment as u32, out.add(segment * FIVE_BITS + FOUR_BITS));
                }
                place_super_min::<W>(rows, at, out.add(8 * FIVE_BITS));
            }
            GgmlType::Q6_K => place_q6_k::<W>(rows, at, out),
            GgmlType::IQ4_XS => {
                for segment in 0..8 {
                    let codes = W::load4(rows, at + 8 + 16 * segment);
                    place_nibbles(&two_halves(codes), out.add(segment * FOUR_BITS));
                }
                let [first, low, ..] = W::load4(rows, at);
                let tail = out.add(8 * FOUR_BITS);
                low.store(tail);
                place_high_halves(first, tail.add(64));
                place_halves(first, tail.add(96));
            }
        }
    }
}

/// The 32 nibbles of sixteen bytes, the low ones first.
#[inline(always)]
unsafe fn two_halves<W: Words>([a, b, c, d]: [W; 4]) -> [W; 8] {
    // SAFETY: the caller's.
    unsafe {
        let low = low_nibbles([a, b, c, d], 0);
        let high = low_nibbles([a, b, c, d], 4);
        [low[0], low[1], low[2], low[3], high[0], high[1], high[2], high[3]]
    }
}

/// Places bit `k` of `high`, which is bit 4 of code `k`. Byte `b` of the plane has bits `b`, `4 +
/// b`, `8 + b` and so on: every fourth bit, which three steps bring together.
#[inline(always)]
unsafe fn place_fifth_bits<W: Words>(high: W, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let mut plane = W::splat(0);
        for byte in 0..4 {
            let bits = high.right(byte).and(W::splat(0x1111_1111));
            let bits = bits.or(bits.right(3)).and(W::splat(0x0303_0303));
            let bits = bits.or(bits.right(6)).and(W::splat(0x000f_000f));
            let bits = bits.or(bits.right(12)).and(W::splat(0xff));
            plane = plane.or(bits.left(8 * byte));
        }
        plane.store(out);
    }
}

/// Places the nibbles of Q4_K or Q5_K. The low nibbles of each 32 bytes are a segment, the high
/// ones the next segment. Segments lie `segment_bytes` apart.
#[inline(always)]
unsafe fn place_super_nibbles<W: Words>(
    rows: &RowPointers,
    at: usize,
    segment_bytes: usize,
    out: *mut u8,
) {
    for pair in 0..4 {
        // SAFETY: the caller's.
        unsafe {
            let codes = load8::<W>(rows, at + 32 * pair);
            place_nibbles(&low_nibbles(codes, 0), out.add(2 * pair * segment_bytes));
            place_nibbles(&low_nibbles(codes, 4), out.add((2 * pair + 1) * segment_bytes));
        }
    }
}

/// Places a block of Q6_K: `struct { u8 ql[128]; u8 qh[64]; i8 scales[16]; f16 d; }`. In each half
/// of 128 positions, segment `g` of four has its low bits in nibble `g / 2` of `ql[32 (g % 2)..]`,
/// and its high bits at bit `2g` of `qh`.
#[inline(always)]
unsafe fn place_q6_k<W: Words>(rows: &RowPointers, at: usize, out: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        for half in 0..2 {
            let out = out.add(4 * half * SIX_BITS);
            for side in 0..2 {
                let low = load8::<W>(rows, at + 64 * half + 32 * side);
                place_nibbles(&low_nibbles(low, 0), out.add(side * SIX_BITS));
                place_nibbles(&low_nibbles(low, 4), out.add((side + 2) * SIX_BITS));
            }
            let high = load8::<W>(rows, at + 128 + 32 * half);
            for g in 0..4 {
                place_pair_planes(&high, 2 * g as u32, out.add(g * SIX_BITS + FOUR_BITS));
            }
        }
        let tail = out.add(8 * SIX_BITS);
        let scales = W::load4(rows, at + 192);
        for i in 0..4 {
            place_bytes(scales[i], tail.add(64 * i));
        }
        // The load covers the block's last sixteen bytes. `d` is the high half of their last word.
        place_high_halves(W::load4(rows, at + 194)[3], tail.add(256));
    }
}

/// Places the twelve bytes of sub-scales and the two `f16` of Q4_K or Q5_K blocks. In the file,
/// scales and mins 0..4 are the low six bits of bytes 0..4 and 4..8. Scales and mins 4..8 have
/// their low nibbles in bytes 8..12 and their two high bits in the top bits of bytes 0..4 and 4..8.
#[inline(always)]
unsafe fn place_super_min<W: Words>(rows: &RowPointers, at: usize, tail: *mut u8) {
    // SAFETY: the caller's.
    unsafe {
        let (six, two, low4) = (W::splat(63 * ONES), W::splat(3 * ONES), W::splat(LOW4));
        let [halves, first, second, third] = W::load4(rows, at);
        let scales = pack_sixes(first.and(six));
        let mins = pack_sixes(second.and(six));
        let high = third.and(low4).or(first.right(6).and(two).left(4));
        let scales_high = pack_sixes(high);
        let high = third.right(4).and(low4).or(second.right(6).and(two).left(4));
        let mins_high = pack_sixes(high);
        let words = [scales, scales_high, mins];
        for i in 0..3 {
            let byte = mins_high.right(8 * i as u32).left(24);
            words[i].or(byte).store(tail.add(64 * i));
        }
        place_halves(halves, tail.add(192));
        place_high_halves(halves, tail.add(224));
    }
}

/// Moves four bytes of six bits each together, without gaps.
#[inline(always)]
unsafe fn pack_sixes<W: Words>(w: W) -> W {
    // SAFETY: the caller's.
    unsafe {
        let (a, b) = (w.and(W::splat(63)), w.right(2).and(W::splat(63 << 6)));
        let (c, d) = (w.right(4).and(W::splat(63 << 12)), w.right(6).and(W::splat(63 << 18)));
        a.or(b).or(c.or(d))
    }
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

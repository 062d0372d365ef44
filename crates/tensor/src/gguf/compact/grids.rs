//! The IQ types of one, two and three bits: a code names a point of a grid, four or eight numbers
//! at once. The grids are ggml's tables, a byte a number (`tests/fixtures/make_compact_blocks.py`).

use super::half_at;

static IQ1: &[u8] = include_bytes!("grids/iq1_s.bin");
static IQ2_XXS: &[u8] = include_bytes!("grids/iq2_xxs.bin");
static IQ2_XS: &[u8] = include_bytes!("grids/iq2_xs.bin");
static IQ2_S: &[u8] = include_bytes!("grids/iq2_s.bin");
static IQ3_XXS: &[u8] = include_bytes!("grids/iq3_xxs.bin");
static IQ3_S: &[u8] = include_bytes!("grids/iq3_s.bin");

/// Point `index` of a grid, with the signs of `signs`, lowest bit first.
fn put(grid: &[u8], index: usize, signs: u8, out: &mut [i8]) {
    let point = &grid[index * out.len()..][..out.len()];
    for (lane, (out, byte)) in out.iter_mut().zip(point).enumerate() {
        let number = *byte as i8;
        *out = if signs >> lane & 1 == 1 { -number } else { number };
    }
}

/// Eight signs of seven bits: the last makes their number even.
fn even_signs(bits: u32) -> u8 {
    let bits = (bits & 127) as u8;
    bits | (bits.count_ones() as u8 & 1) << 7
}

fn word(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]])
}

fn short(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

/// Nibble `i` of the bytes from `at` on.
fn nibble(block: &[u8], at: usize, i: usize) -> u8 {
    block[at + i / 2] >> (4 * (i % 2)) & 15
}

/// Groups of 32: four points of a byte each, then a word of four times seven signs and the scale.
pub(super) fn iq2_xxs(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for group in 0..8 {
        let at = 2 + 8 * group;
        let rest = word(block, at + 4);
        scales[group] = d * (0.5 + (rest >> 28) as f32) * 0.25;
        for point in 0..4 {
            let out = &mut codes[32 * group + 8 * point..][..8];
            put(IQ2_XXS, block[at + point].into(), even_signs(rest >> (7 * point)), out);
        }
    }
}

/// Groups of 16: two points of nine bits and seven signs each.
pub(super) fn iq2_xs(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for (group, scale) in scales.iter_mut().enumerate() {
        *scale = d * (0.5 + f32::from(nibble(block, 66, group))) * 0.25;
    }
    for (point, out) in codes.chunks_exact_mut(8).enumerate() {
        let packed = short(block, 2 + 2 * point);
        put(IQ2_XS, (packed & 511).into(), even_signs(u32::from(packed >> 9)), out);
    }
}

/// Groups of 16: two points of ten bits in two planes, and a byte of signs each.
pub(super) fn iq2_s(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for (group, scale) in scales.iter_mut().enumerate() {
        *scale = d * (0.5 + f32::from(nibble(block, 74, group))) * 0.25;
    }
    for (point, out) in codes.chunks_exact_mut(8).enumerate() {
        let high = block[66 + point / 4] >> (2 * (point % 4)) & 3;
        let index = usize::from(block[2 + point]) | usize::from(high) << 8;
        put(IQ2_S, index, block[34 + point], out);
    }
}

/// Groups of 32: eight points of a byte each; behind all, a word of four times seven signs and the
/// scale.
pub(super) fn iq3_xxs(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for group in 0..8 {
        let rest = word(block, 66 + 4 * group);
        scales[group] = d * (0.5 + (rest >> 28) as f32) * 0.5;
        for point in 0..8 {
            let signs = even_signs(rest >> (7 * (point / 2))) >> (4 * (point % 2));
            let out = &mut codes[32 * group + 4 * point..][..4];
            put(IQ3_XXS, block[2 + 8 * group + point].into(), signs, out);
        }
    }
}

/// Groups of 32: eight points of nine bits in two planes, and a bit of sign for each number.
pub(super) fn iq3_s(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for group in 0..8 {
        scales[group] = d * f32::from(1 + 2 * nibble(block, 106, group));
    }
    for (point, out) in codes.chunks_exact_mut(4).enumerate() {
        let high = block[66 + point / 8] >> (point % 8) & 1;
        let index = usize::from(block[2 + point]) | usize::from(high) << 8;
        put(IQ3_S, index, nibble(block, 74, point), out);
    }
}

/// A point of -1, 0 and 1, each moved by an eighth, in eighths.
fn put_eighths(index: usize, down: bool, out: &mut [i8]) {
    put(IQ1, index, 0, out);
    let delta = if down { -1 } else { 1 };
    out.iter_mut().for_each(|number| *number = 8 * *number + delta);
}

/// Groups of 32: four points of eleven bits; three bits of scale and the direction of the move
/// share a short with the points' high bits.
pub(super) fn iq1_s(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let d = half_at(block, 0);
    for group in 0..8 {
        let high = short(block, 34 + 2 * group);
        scales[group] = d * f32::from(2 * (high >> 12 & 7) + 1) / 8.0;
        for point in 0..4 {
            let index = usize::from(block[2 + 4 * group + point])
                | usize::from(high >> (3 * point) & 7) << 8;
            let out = &mut codes[32 * group + 8 * point..][..8];
            put_eighths(index, high & 0x8000 != 0, out);
        }
    }
}

/// Groups of 16: two points of eleven bits, each with a direction of its own; three bits a scale.
/// The half that multiplies all is spread over the top nibbles of the scales.
pub(super) fn iq1_m(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    let part = |i: usize| short(block, 48 + 2 * i) >> 12 << (4 * i);
    let d = half::f16::from_bits((0..4).fold(0, |bits, i| bits | part(i))).to_f32();
    for (group, scale) in scales.iter_mut().enumerate() {
        let code = short(block, 48 + 2 * (group / 4)) >> (3 * (group % 4)) & 7;
        *scale = d * f32::from(2 * code + 1) / 8.0;
    }
    for (point, out) in codes.chunks_exact_mut(8).enumerate() {
        let high = nibble(block, 32, point);
        let index = usize::from(block[point]) | usize::from(high & 7) << 8;
        put_eighths(index, high & 8 != 0, out);
    }
}

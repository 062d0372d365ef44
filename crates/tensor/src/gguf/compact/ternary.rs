//! Ternary types: blocks of 256 numbers that are -1, 0 or 1 times one half.

use super::half_at;

/// Two bits a code: 32 bytes hold four runs of 32, lowest bits first.
pub(super) fn tq2_0(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    scales[0] = half_at(block, 64);
    for (i, code) in codes.iter_mut().enumerate() {
        let byte = block[i / 128 * 32 + i % 32];
        *code = (byte >> (2 * (i / 32 % 4)) & 3) as i8 - 1;
    }
}

/// Five codes a byte, base 3, scaled up to the whole byte: `byte * 3^n mod 256` is what is left
/// after `n` of them, and its product with 3 carries the next out. The last 16 codes lie four a
/// byte.
pub(super) fn tq1_0(block: &[u8], codes: &mut [i8], scales: &mut [f32]) {
    scales[0] = half_at(block, 52);
    for (first, (bytes, run)) in [(0, (0, 32)), (160, (32, 16)), (240, (48, 4))] {
        let powers: &[u8] = if run == 4 { &[1, 3, 9, 27] } else { &[1, 3, 9, 27, 81] };
        for (n, power) in powers.iter().enumerate() {
            for lane in 0..run {
                let left = block[bytes + lane].wrapping_mul(*power);
                codes[first + n * run + lane] = ((u16::from(left) * 3) >> 8) as i8 - 1;
            }
        }
    }
}

//! GGUF's non-linear 4-bit types. A code picks one of 16 values, which are denser around zero.
//!
//! IQ4_NL: blocks of 32, one half-precision scale. IQ4_XS: super-blocks of 256 with 6-bit
//! scales for its 8 sub-blocks.

use half::f16;

use super::search::{importance_weights, round_within, sums};
use super::{half_at, put_half};

/// The values of the 16 codes.
const VALUES: [f32; 16] = [
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0,
    89.0, 113.0,
];

/// The number of scales that are tried on either side of the scale that maps the largest magnitude
/// to an end.
const STEPS: i32 = 14;

pub(super) fn decode_iq4_nl(block: &[u8], out: &mut [f32]) {
    decode_codes(&block[2..], half_at(block, 0), out);
}

pub(super) fn decode_iq4_xs(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let high = u16::from_le_bytes([block[2], block[3]]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let low = block[4 + sub / 2] >> (4 * (sub % 2)) & 15;
        let scale = low | ((high >> (2 * sub)) as u8 & 3) << 4;
        decode_codes(&block[8 + sub * 16..], d * (f32::from(scale) - 32.0), out);
    }
}

/// Decodes 32 codes. Nibbles `i` and `i + 16` share byte `i`.
fn decode_codes(codes: &[u8], scale: f32, out: &mut [f32]) {
    for i in 0..16 {
        out[i] = scale * VALUES[usize::from(codes[i] & 15)];
        out[i + 16] = scale * VALUES[usize::from(codes[i] >> 4)];
    }
}

fn put_codes(values: &[f32], scale: f32, out: &mut [u8]) {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for i in 0..16 {
        out[i] = nearest(values[i] * inverse) | nearest(values[i + 16] * inverse) << 4;
    }
}

/// The code whose value is nearest. NaN gets 0.
fn nearest(value: f32) -> u8 {
    VALUES.windows(2).filter(|pair| value > (pair[0] + pair[1]) / 2.0).count() as u8
}

/// The nearest of the 16 values, without branches: it adds a step for each middle below the number.
#[inline(always)]
fn snap(value: f32) -> f32 {
    let mut snapped = VALUES[0];
    for k in 0..15 {
        let middle = (VALUES[k] + VALUES[k + 1]) / 2.0;
        snapped += if value > middle { VALUES[k + 1] - VALUES[k] } else { 0.0 };
    }
    snapped
}

pub(super) fn encode_iq4_nl(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let weights: [f32; 32] = weights(values, importance);
    // Half precision changes the scale a little, so its neighbours are tried too.
    let fitted = f16::from_f32(fit(values, &weights));
    let bits = fitted.to_bits();
    let candidates = [bits, bits.saturating_sub(1), bits.saturating_add(1)];
    let scale = candidates
        .map(|bits| f16::from_bits(bits).to_f32())
        .into_iter()
        .filter(|scale| scale.is_finite())
        .map(|scale| (scale, error(values, &weights, scale)))
        .fold((fitted.to_f32(), f32::INFINITY), |best, c| if c.1 < best.1 { c } else { best })
        .0;
    put_half(out, 0, scale);
    put_codes(values, scale, &mut out[2..]);
}

pub(super) fn encode_iq4_xs(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let weights: [f32; 256] = weights(values, importance);
    let sub = |i: usize| (&values[i * 32..][..32], &weights[i * 32..][..32]);
    let fits: [f32; 8] = std::array::from_fn(|i| fit(sub(i).0, sub(i).1));
    let largest = fits.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    // The largest scale uses the end of the signed range that reaches further.
    let d = f16::from_f32(largest / -32.0).to_f32();
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.fill(0);
    put_half(out, 0, d);
    let mut high = 0u16;
    for (i, &fitted) in fits.iter().enumerate() {
        let (values, weights) = sub(i);
        let centre = round_within(fitted * inverse, -32, 31);
        let scale = ((centre - 1).max(-32)..=(centre + 1).min(31))
            .map(|scale| (scale, error(values, weights, d * scale as f32)))
            .fold((centre, f32::INFINITY), |best, c| if c.1 < best.1 { c } else { best })
            .0;
        let code = (scale + 32) as u8;
        out[4 + i / 2] |= (code & 15) << (4 * (i % 2));
        high |= u16::from(code >> 4) << (2 * i);
        put_codes(values, d * scale as f32, &mut out[8 + i * 16..][..16]);
    }
    out[2..4].copy_from_slice(&high.to_le_bytes());
}

/// The weight of each squared error. With an importance it is that of the K-quants. Without one it
/// is the square of the number.
fn weights<const N: usize>(values: &[f32], importance: Option<&[f32]>) -> [f32; N] {
    match importance {
        Some(importance) => importance_weights(values, importance),
        None => std::array::from_fn(|i| values[i] * values[i]),
    }
}

/// The best scale found for `value ≈ scale * VALUES[code]`.
fn fit(values: &[f32], weights: &[f32]) -> f32 {
    let largest = values.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 || !largest.is_finite() {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    // Both ends of the table may stand for the largest number, and so may the values one step
    // inside.
    for end in [VALUES[0], VALUES[15]] {
        for step in -STEPS..=STEPS {
            let inverse = (end + step as f32) / largest;
            let [wqx, wqq] = sums(values, weights, |x, w| {
                let q = snap(inverse * x);
                [w * q * x, w * q * q]
            });
            if wqq > 0.0 && wqx * wqx > best_gain * wqq {
                best = wqx / wqq;
                best_gain = wqx * wqx / wqq;
            }
        }
    }
    best
}

fn error(values: &[f32], weights: &[f32], scale: f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let [error] = sums(values, weights, |x, w| {
        let difference = scale * snap(x * inverse) - x;
        [w * difference * difference]
    });
    error
}

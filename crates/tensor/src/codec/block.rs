//! GGUF's simple types: blocks of 32 with one half-precision scale, and for the `_1` types a
//! minimum. Nibbles `i` and `i + 16` share byte `i`. Encoders follow the Python package `gguf`
//! operation by operation, so that their bytes agree. With an importance they search for scales as
//! llama.cpp does. q8_0 has enough codes and does not search.

use half::f16;

use super::search::{best_symmetric, fit_affine, importance_weights, round_within};
use super::{half_at, put_half};

const LEN: usize = 32;
const HALF: usize = LEN / 2;

pub(super) fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for i in 0..HALF {
        let byte = block[2 + i];
        out[i] = d * (f32::from(byte & 15) - 8.0);
        out[i + HALF] = d * (f32::from(byte >> 4) - 8.0);
    }
}

pub(super) fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    for i in 0..HALF {
        let byte = block[4 + i];
        out[i] = d * f32::from(byte & 15) + min;
        out[i + HALF] = d * f32::from(byte >> 4) + min;
    }
}

pub(super) fn decode_q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let codes = five_bit_codes(&block[2..]);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = d * (f32::from(code) - 16.0);
    }
}

pub(super) fn decode_q5_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let codes = five_bit_codes(&block[4..]);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = d * f32::from(code) + min;
    }
}

/// Reads 4 bytes of fifth bits and 16 bytes of nibbles.
fn five_bit_codes(bytes: &[u8]) -> [u8; LEN] {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|i| {
        let byte = bytes[4 + i % HALF];
        let low = if i < HALF { byte & 15 } else { byte >> 4 };
        low | (((high >> i) & 1) as u8) << 4
    })
}

pub(super) fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(code as i8) * d;
    }
}

pub(super) fn encode_q4_0(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    if let Some(importance) = importance {
        let codes = search_symmetric(values, importance, 8, out);
        return put_nibbles(&codes, &mut out[2..]);
    }
    let d = largest_magnitude(values) / -8.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate(values[i] * inverse + 8.5, 15));
    put_half(out, 0, d);
    put_nibbles(&codes, &mut out[2..]);
}

pub(super) fn encode_q4_1(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    if let Some(importance) = importance {
        let codes = search_affine(values, importance, 15, out);
        return put_nibbles(&codes, &mut out[4..]);
    }
    let (min, max) = bounds(values);
    let d = (max - min) / 15.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate((values[i] - min) * inverse + 0.5, 15));
    put_half(out, 0, d);
    put_half(out, 2, min);
    put_nibbles(&codes, &mut out[4..]);
}

pub(super) fn encode_q5_0(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    if let Some(importance) = importance {
        let codes = search_symmetric(values, importance, 16, out);
        return put_five_bits(&codes, &mut out[2..]);
    }
    let d = largest_magnitude(values) / -16.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate(values[i] * inverse + 16.5, 31));
    put_half(out, 0, d);
    put_five_bits(&codes, &mut out[2..]);
}

pub(super) fn encode_q5_1(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    if let Some(importance) = importance {
        let codes = search_affine(values, importance, 31, out);
        return put_five_bits(&codes, &mut out[4..]);
    }
    let (min, max) = bounds(values);
    let d = (max - min) / 31.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate((values[i] - min) * inverse + 0.5, 31));
    put_half(out, 0, d);
    put_half(out, 2, min);
    put_five_bits(&codes, &mut out[4..]);
}

pub(super) fn encode_q8_0(values: &[f32], out: &mut [u8]) {
    let max = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let d = max / 127.0;
    let inverse = inverse_or_zero(d);
    put_half(out, 0, d);
    for (out, value) in out[2..].iter_mut().zip(values) {
        *out = round_half_away(value * inverse);
    }
}

/// Stores the scale with the least error under an importance. Returns the codes, which are the
/// nearest under the stored scale.
fn search_symmetric(values: &[f32], importance: &[f32], half: i32, out: &mut [u8]) -> [u8; LEN] {
    let d = fit_symmetric(values, &importance_weights::<LEN>(values, importance), half as f32);
    put_half(out, 0, d);
    let inverse = inverse_or_zero(f16::from_f32(d).to_f32());
    std::array::from_fn(|i| (round_within(inverse * values[i], -half, half - 1) + half) as u8)
}

/// The step between the scales that [`fit_symmetric`] tries, relative to the plain scale. For each
/// end of the codes it tries three larger ranges and eight that cut the largest number off.
const STEP: f32 = 0.04;

/// The best scale found for `value ≈ scale * code` with codes in `-half..=half - 1`. Either end of
/// the codes may stand for the largest number, and may cut it off. Both help where few columns have
/// most of the importance. llama.cpp tries one end, within 6 %.
fn fit_symmetric(values: &[f32], weights: &[f32; LEN], half: f32) -> f32 {
    let largest = largest_magnitude(values);
    if largest == 0.0 || !largest.is_finite() {
        return 0.0;
    }
    let steps =
        [-half, half - 1.0].into_iter().flat_map(|end| (-3..=8).map(move |step| (end, step)));
    let inverses = steps.map(|(end, step)| end * (1.0 + STEP * step as f32) / largest);
    best_symmetric(values, weights, half, inverses)
}

/// As [`search_symmetric`], for a scale and a minimum. The range includes zero.
fn search_affine(values: &[f32], importance: &[f32], levels: i32, out: &mut [u8]) -> [u8; LEN] {
    let fit = fit_affine(values, &importance_weights::<LEN>(values, importance), levels);
    put_half(out, 0, fit.scale);
    put_half(out, 2, -fit.min);
    let inverse = inverse_or_zero(f16::from_f32(fit.scale).to_f32());
    let min = f16::from_f32(-fit.min).to_f32();
    std::array::from_fn(|i| round_within(inverse * (values[i] - min), 0, levels) as u8)
}

/// The number of the largest magnitude, with its sign. The first one if there are several.
fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(values[0], |best, &v| if v.abs() > best.abs() { v } else { best })
}

fn bounds(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)))
}

fn inverse_or_zero(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Truncates to a code of at most `max`. Infinities and NaN become 0. They occur where the inverse
/// of a denormal scale overflows, and that scale is stored as zero.
fn truncate(value: f32, max: u8) -> u8 {
    wrap_to_byte(value).min(max)
}

/// Rounds ties away from zero. NaN becomes 0.
fn round_half_away(value: f32) -> u8 {
    let magnitude = value.abs();
    let whole = if magnitude < 256.0 { magnitude as i32 } else { 0 };
    let rounded = whole + i32::from(magnitude - whole as f32 >= 0.5 && magnitude < 256.0);
    (if value < 0.0 { -rounded } else { rounded }) as u8
}

fn wrap_to_byte(value: f32) -> u8 {
    if value.abs() < 2_147_483_648.0 { value as i32 as u8 } else { 0 }
}

fn put_nibbles(codes: &[u8; LEN], out: &mut [u8]) {
    for i in 0..HALF {
        out[i] = codes[i] & 15 | codes[i + HALF] << 4;
    }
}

fn put_five_bits(codes: &[u8; LEN], out: &mut [u8]) {
    let high = (0..LEN).fold(0u32, |bits, i| bits | u32::from(codes[i] >> 4) << i);
    out[..4].copy_from_slice(&high.to_le_bytes());
    put_nibbles(codes, &mut out[4..]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{dequantize, quantize_weighted};
    use crate::format::{Format, GgmlType};

    /// Values and importances of some blocks, from a linear congruential generator.
    fn blocks(count: usize) -> Vec<([f32; LEN], [f32; LEN])> {
        let mut state = 7u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 24) as f32
        };
        let one = |_| {
            let values = std::array::from_fn(|_| next() + next() + next() - 1.5);
            (values, std::array::from_fn(|_| 10f32.powf(4.0 * next() - 2.0)))
        };
        (0..count).map(one).collect()
    }

    fn coded(t: GgmlType, values: &[f32], importance: Option<&[f32]>) -> Vec<f32> {
        let codes = quantize_weighted(Format::Ggml(t), values, importance);
        let mut out = vec![0.0; values.len()];
        dequantize(Format::Ggml(t), &codes, &mut out);
        out
    }

    fn error(values: &[f32], weights: &[f32], of: impl Fn(f64) -> f64) -> f64 {
        let one =
            |(v, w): (&f32, &f32)| f64::from(*w) * (of(f64::from(*v)) - f64::from(*v)).powi(2);
        values.iter().zip(weights).map(one).sum()
    }

    fn found(t: GgmlType, values: &[f32], weights: &[f32], importance: Option<&[f32]>) -> f64 {
        let out = coded(t, values, importance);
        let one = |((v, o), w): ((&f32, &f32), &f32)| f64::from(*w) * f64::from(*o - *v).powi(2);
        values.iter().zip(&out).zip(weights).map(one).sum()
    }

    /// The oracle tries every scale of a fine grid, of both signs, in `f64`.
    #[test]
    fn with_an_importance_the_scale_comes_near_the_best() {
        for (t, half) in [(GgmlType::Q4_0, 8.0), (GgmlType::Q5_0, 16.0)] {
            let (mut ours, mut plain, mut oracle) = (0.0, 0.0, 0.0);
            for (values, importance) in blocks(20) {
                let weights = importance_weights::<LEN>(&values, &importance);
                ours += found(t, &values, &weights, Some(&importance));
                plain += found(t, &values, &weights, None);
                let largest = f64::from(largest_magnitude(&values));
                let of = |step: i32| {
                    let d = largest / -half * (1.0 + f64::from(step.abs()) * 0.002 - 0.5);
                    let d = if step < 0 { -d } else { d };
                    let nearest = |v: f64| (v / d).round_ties_even().clamp(-half, half - 1.0) * d;
                    error(&values, &weights, nearest)
                };
                oracle += (-500..=500).map(of).fold(f64::MAX, f64::min);
            }
            assert!(ours < 0.9 * plain && ours < 1.1 * oracle, "{t:?}: {ours} {plain} {oracle}");
        }
    }

    /// The same for scale and minimum.
    #[test]
    fn with_an_importance_scale_and_minimum_come_near_the_best() {
        for (t, levels) in [(GgmlType::Q4_1, 15.0), (GgmlType::Q5_1, 31.0)] {
            let (mut ours, mut plain, mut oracle) = (0.0, 0.0, 0.0);
            for (values, importance) in blocks(8) {
                let weights = importance_weights::<LEN>(&values, &importance);
                ours += found(t, &values, &weights, Some(&importance));
                plain += found(t, &values, &weights, None);
                let (low, high) = bounds(&values);
                let (low, range) = (f64::from(low), f64::from(high - low));
                let of = |from: i32, step: i32| {
                    let (min, d) = (
                        low + range * 0.005 * f64::from(from),
                        range / levels * (1.0 - 0.005 * f64::from(step)),
                    );
                    let code = |v: f64| ((v - min) / d).round_ties_even().clamp(0.0, levels);
                    error(&values, &weights, |v| min + d * code(v))
                };
                let all = (-10..=40).flat_map(|from| (-10..=80).map(move |step| (from, step)));
                oracle += all.map(|(from, step)| of(from, step)).fold(f64::MAX, f64::min);
            }
            assert!(ours < 0.9 * plain && ours < 1.15 * oracle, "{t:?}: {ours} {plain} {oracle}");
        }
    }

    #[test]
    fn blocks_of_odd_numbers_are_coded_with_an_importance() {
        let importance = [1.0; LEN];
        for t in [GgmlType::Q4_0, GgmlType::Q4_1, GgmlType::Q5_0, GgmlType::Q5_1] {
            assert!(coded(t, &[0.0; LEN], Some(&importance)).iter().all(|v| *v == 0.0), "{t:?}");
            let equal = coded(t, &[-0.75; LEN], Some(&[0.0; LEN]));
            assert!(equal.iter().all(|v| v.is_finite()), "{t:?}");
            for odd in [f32::NAN, f32::INFINITY, f32::MAX, 1e-42] {
                assert_eq!(coded(t, &[odd; LEN], Some(&importance)).len(), LEN);
            }
        }
    }
}

//! Scale searches: given numbers and weights, the scale (and offset) whose rounded codes have
//! the least weighted squared error.
//!
//! Rounding makes the error a piecewise quadratic function of the scale. Each search tries a
//! fan of starting scales; codes rounded with one of them make the error exactly quadratic, so
//! the best scale for those codes is a least-squares solution in closed form, and the best pair
//! of all is kept. This is the scheme of llama.cpp's K-quants; the fans are wider here.

/// `value ≈ scale * code - min`, with codes in `0..=levels` and `min >= 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineFit {
    /// Step between codes, not negative.
    pub scale: f32,
    /// What is subtracted, not negative.
    pub min: f32,
    /// The weighted squared error of the codes rounded with this scale and minimum.
    pub error: f32,
}

/// Starting scales that [`fit_affine`] tries on either side of the plain one.
const AFFINE_STEPS: i32 = 20;
/// Starting scales that [`fit_symmetric`] tries on either side of the plain one.
const SYMMETRIC_STEPS: i32 = 12;

/// The best affine fit found for `values` under `weights` (equally many, not negative).
pub fn fit_affine(values: &[f32], weights: &[f32], levels: i32) -> AffineFit {
    let (mut low, mut high) = (0.0f32, f32::NEG_INFINITY);
    for &v in values {
        low = low.min(v);
        high = high.max(v);
    }
    let range = high - low;
    if range.is_nan() || range <= 0.0 || range.is_infinite() {
        // All equal and not positive (or not numbers): the minimum alone says it.
        let (scale, min) = (0.0, -low);
        return AffineFit { scale, min, error: affine_error(values, weights, levels, scale, min) };
    }
    let plain = range / levels as f32;
    let mut best = measured(values, weights, levels, plain, -low);
    for step in -AFFINE_STEPS..=AFFINE_STEPS {
        let steps = levels as f32 + step as f32 * 0.05;
        if let Some((scale, min)) = solve_affine(values, weights, levels, steps / range, low) {
            let fit = measured(values, weights, levels, scale, min);
            if fit.error < best.error {
                best = fit;
            }
        }
    }
    best
}

fn measured(values: &[f32], weights: &[f32], levels: i32, scale: f32, min: f32) -> AffineFit {
    AffineFit { scale, min, error: affine_error(values, weights, levels, scale, min) }
}

/// Rounds with `inverse` and `low`, then solves the 2x2 normal equations for scale and minimum.
fn solve_affine(
    values: &[f32],
    weights: &[f32],
    levels: i32,
    inverse: f32,
    low: f32,
) -> Option<(f32, f32)> {
    let (mut w, mut wq, mut wqq, mut wx, mut wqx) = (0.0f32, 0.0f32, 0.0f32, 0.0f32, 0.0f32);
    for (&x, &weight) in values.iter().zip(weights) {
        let q = round_within(inverse * (x - low), 0, levels) as f32;
        w += weight;
        wq += weight * q;
        wqq += weight * q * q;
        wx += weight * x;
        wqx += weight * q * x;
    }
    let determinant = w * wqq - wq * wq;
    if determinant.is_nan() || determinant <= 0.0 {
        return None;
    }
    let scale = (w * wqx - wx * wq) / determinant;
    let min = (wq * wqx - wqq * wx) / determinant;
    if min < 0.0 {
        // The file stores no negative minimum: the best fit through zero.
        return (wqq > 0.0).then(|| (wqx / wqq, 0.0)).filter(|fit| fit.0 > 0.0);
    }
    (scale > 0.0).then_some((scale, min))
}

/// The weighted squared error of rounding `values` with this scale and minimum.
pub fn affine_error(values: &[f32], weights: &[f32], levels: i32, scale: f32, min: f32) -> f32 {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let mut error = 0.0;
    for (&x, &weight) in values.iter().zip(weights) {
        let q = round_within(inverse * (x + min), 0, levels) as f32;
        let difference = scale * q - min - x;
        error += weight * difference * difference;
    }
    error
}

/// The best scale found for `value ≈ scale * code` with codes in `-half..=half - 1`. It may be
/// negative, so that the number of largest magnitude meets the end that reaches further.
pub fn fit_symmetric(values: &[f32], weights: &[f32], half: i32) -> f32 {
    let largest = values.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 || !largest.is_finite() {
        return 0.0;
    }
    let (mut best, mut best_gain) = (0.0, 0.0);
    for step in -SYMMETRIC_STEPS..=SYMMETRIC_STEPS {
        let inverse = -(half as f32 + 0.1 * step as f32) / largest;
        let (mut wqx, mut wqq) = (0.0f32, 0.0f32);
        for (&x, &weight) in values.iter().zip(weights) {
            let q = round_within(inverse * x, -half, half - 1) as f32;
            wqx += weight * q * x;
            wqq += weight * q * q;
        }
        // The error falls by wqx^2 / wqq from that of coding everything as zero.
        if wqq > 0.0 && wqx * wqx > best_gain * wqq {
            best = wqx / wqq;
            best_gain = wqx * wqx / wqq;
        }
    }
    best
}

/// The weighted squared error of rounding `values` to `scale * code`, codes in `-half..half`.
pub fn symmetric_error(values: &[f32], weights: &[f32], half: i32, scale: f32) -> f32 {
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    let mut error = 0.0;
    for (&x, &weight) in values.iter().zip(weights) {
        let difference = scale * round_within(inverse * x, -half, half - 1) as f32 - x;
        error += weight * difference * difference;
    }
    error
}

/// Rounds to the nearest integer within bounds; NaN becomes 0.
pub fn round_within(value: f32, low: i32, high: i32) -> i32 {
    (value.round_ties_even() as i32).clamp(low, high)
}

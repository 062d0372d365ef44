//! Searches scales: for given numbers and weights, the scale (and offset) whose rounded codes have
//! the least weighted squared error.
//!
//! Rounding makes the error a piecewise quadratic function of the scale. Each search tries many
//! starting scales. For the codes that one of them gives, the error is quadratic, so the best scale
//! is a least-squares solution in closed form. The best pair of codes and scale is kept.
//! llama.cpp's K-quants use this scheme with fewer starting scales.
//!
//! Loops have separate sums for each lane, so that the compiler can use vector registers.

/// The number of separate sums. The length of every sub-block is a multiple of it.
const LANES: usize = 8;

/// `value ≈ scale * code - min`, with codes in `0..=levels` and `min >= 0`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct AffineFit {
    /// Step between codes, not negative.
    pub scale: f32,
    /// The minimum that is subtracted, not negative.
    pub min: f32,
}

/// Starting scales that [`fit_affine`] tries on either side of the plain one.
const AFFINE_STEPS: i32 = 20;
/// Starting scales that [`fit_symmetric`] tries on either side of the plain one.
const SYMMETRIC_STEPS: i32 = 12;

/// Rounds to the nearest integer within bounds, ties to even. NaN becomes `low`. The bounds must be
/// below 2^22, because the addition does not round to integers beyond that.
#[inline(always)]
pub fn round_float_within(value: f32, low: f32, high: f32) -> f32 {
    const MAGIC: f32 = 12_582_912.0; // 1.5 * 2^23: its neighbours are one apart
    // Not `clamp`: `max` and `min` are single instructions, and NaN becomes `low`.
    #[allow(clippy::manual_clamp)]
    let bounded = value.max(low).min(high);
    (bounded + MAGIC) - MAGIC
}

/// Rounds to the nearest integer within bounds. NaN becomes `low`.
pub fn round_within(value: f32, low: i32, high: i32) -> i32 {
    round_float_within(value, low as f32, high as f32) as i32
}

/// The weights of the squared errors of `N` numbers under an importance matrix: its entries, scaled
/// by the magnitudes of the numbers.
pub(super) fn importance_weights<const N: usize>(values: &[f32], importance: &[f32]) -> [f32; N] {
    let mean = values.iter().map(|v| v * v).sum::<f32>() / N as f32;
    std::array::from_fn(|i| importance[i] * (2.0 * mean + values[i] * values[i]).sqrt())
}

/// Sums `terms(value, weight)` over all numbers, in lanes.
#[inline(always)]
pub(super) fn sums<const N: usize>(
    values: &[f32],
    weights: &[f32],
    terms: impl Fn(f32, f32) -> [f32; N],
) -> [f32; N] {
    let mut lanes = [[0.0f32; LANES]; N];
    let (values, _) = values.as_chunks::<LANES>();
    let (weights, _) = weights.as_chunks::<LANES>();
    for (values, weights) in values.iter().zip(weights) {
        for lane in 0..LANES {
            let terms = terms(values[lane], weights[lane]);
            for n in 0..N {
                lanes[n][lane] += terms[n];
            }
        }
    }
    lanes.map(|lanes| lanes.iter().sum())
}

/// The best affine fit found for `values` under `weights`. Both are equally long, a multiple of 8.
/// Weights are not negative.
pub fn fit_affine(values: &[f32], weights: &[f32], levels: i32) -> AffineFit {
    let (mut low, mut high) = (0.0f32, f32::NEG_INFINITY);
    for &v in values {
        low = low.min(v);
        high = high.max(v);
    }
    let range = high - low;
    if range.is_nan() || range <= 0.0 || range.is_infinite() {
        // All values are equal and not positive, or not numbers. The minimum alone represents them.
        return AffineFit { scale: 0.0, min: -low };
    }
    let plain = AffineFit { scale: range / levels as f32, min: -low };
    let [w, wx, wxx] = sums(values, weights, |x, w| [w, w * x, w * x * x]);
    let mut best = plain;
    let mut best_error = affine_error(values, weights, levels, plain.scale, plain.min);
    for step in -AFFINE_STEPS..=AFFINE_STEPS {
        let inverse = (levels as f32 + step as f32 * 0.05) / range;
        let top = levels as f32;
        let [wq, wqq, wqx] = sums(values, weights, |x, w| {
            let q = round_float_within(inverse * (x - low), 0.0, top);
            [w * q, w * q * q, w * q * x]
        });
        let Some(fit) = solve_affine(w, wx, [wq, wqq, wqx]) else { continue };
        // The error of these codes with their least-squares scale.
        let error = wxx - fit.scale * wqx + fit.min * wx;
        if error < best_error {
            best = fit;
            best_error = error;
        }
    }
    best
}

/// The 2 x 2 normal equations for scale and minimum.
fn solve_affine(w: f32, wx: f32, [wq, wqq, wqx]: [f32; 3]) -> Option<AffineFit> {
    let determinant = w * wqq - wq * wq;
    if determinant.is_nan() || determinant <= 0.0 {
        return None;
    }
    let scale = (w * wqx - wx * wq) / determinant;
    let min = (wq * wqx - wqq * wx) / determinant;
    if min < 0.0 {
        // A file cannot store a negative minimum, so this is the best fit through zero.
        let scale = wqx / wqq;
        return (wqq > 0.0 && scale > 0.0).then_some(AffineFit { scale, min: 0.0 });
    }
    (scale > 0.0).then_some(AffineFit { scale, min })
}

/// The weighted squared error of rounding `values` with this scale and minimum.
pub fn affine_error(values: &[f32], weights: &[f32], levels: i32, scale: f32, min: f32) -> f32 {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let top = levels as f32;
    let [error] = sums(values, weights, |x, w| {
        let q = round_float_within(inverse * (x + min), 0.0, top);
        let difference = scale * q - min - x;
        [w * difference * difference]
    });
    error
}

/// The best scale found for `value ≈ scale * code` with codes in `-half..=half - 1`. It may be
/// negative. Then the number of the largest magnitude uses the end that reaches further.
pub fn fit_symmetric(values: &[f32], weights: &[f32], half: i32) -> f32 {
    let largest = values.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    if largest == 0.0 || !largest.is_finite() {
        return 0.0;
    }
    let half = half as f32;
    let steps = -SYMMETRIC_STEPS..=SYMMETRIC_STEPS;
    best_symmetric(values, weights, half, steps.map(|step| -(half + 0.1 * step as f32) / largest))
}

/// The best scale of all, over the codes that each of `inverses` gives. These are the inverses of
/// starting scales. Codes are in `-half..=half - 1`.
pub(super) fn best_symmetric(
    values: &[f32],
    weights: &[f32],
    half: f32,
    inverses: impl Iterator<Item = f32>,
) -> f32 {
    let (mut best, mut best_gain) = (0.0, 0.0);
    for inverse in inverses {
        let [wqx, wqq] = sums(values, weights, |x, w| {
            let q = round_float_within(inverse * x, -half, half - 1.0);
            [w * q * x, w * q * q]
        });
        // Compared with coding everything as zero, the error falls by wqx^2 / wqq.
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
    let half = half as f32;
    let [error] = sums(values, weights, |x, w| {
        let difference = scale * round_float_within(inverse * x, -half, half - 1.0) - x;
        [w * difference * difference]
    });
    error
}

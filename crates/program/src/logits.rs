//! Functions of one row of logits: log-softmax in `f64`, and the best tokens.

use std::cmp::Ordering;

/// `ln(sum(exp(x)))`, summed in `f64`, accurate to about 1e-7 nats. NaN counts as minus infinity,
/// and plus infinity as the largest `f32`. Minus infinity if every logit is.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = maximum(logits);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    f64::from(max) + sum(logits, |logit| exp_negative(finite(logit) - max)).ln()
}

/// The largest logit after [`finite`].
pub fn maximum(logits: &[f32]) -> f32 {
    // Eight independent chains of comparisons run faster than one.
    let mut lanes = [f32::NEG_INFINITY; 8];
    for chunk in logits.chunks(8) {
        for (lane, &logit) in lanes.iter_mut().zip(chunk) {
            // `>` is false for NaN.
            *lane = if logit > *lane { logit } else { *lane };
        }
    }
    finite(lanes.into_iter().fold(f32::NEG_INFINITY, f32::max))
}

/// The sum of `f` over `values` in `f64`, in a fixed order of eight partial sums.
pub fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f64 {
    let mut lanes = [0f64; 8];
    for chunk in values.chunks(8) {
        for (lane, &value) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(f(value));
        }
    }
    lanes.iter().sum()
}

/// `e^x` for `x <= 0`, with a relative error below 2e-7; 0 below -87. It has no branches, so that
/// loops over a vocabulary become vector code. `x = n ln 2 + r` and `e^x = 2^n e^r`, with the
/// Taylor series of `e^r`.
pub fn exp_negative(x: f32) -> f32 {
    // Adding 1.5 * 2^23 rounds to a whole number, which is then in the low bits.
    const ROUND: f32 = 12_582_912.0;
    let clamped = x.max(-87.0);
    let shifted = clamped * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 is split in two parts, so that the product with `n` is exact.
    let r = (clamped - n * 0.693_359_4) + n * 2.121_944_4e-4;
    let coefficients = [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0];
    let series = coefficients.into_iter().fold(1.0 / 5040.0, |sum, next| sum * r + next);
    let exponent = shifted.to_bits().wrapping_sub(ROUND.to_bits()).wrapping_add(127) << 23;
    let power = series * f32::from_bits(exponent);
    if x < -87.0 { 0.0 } else { power }
}

/// A logit that can be compared and subtracted. NaN becomes minus infinity, and plus infinity
/// becomes the largest `f32`.
pub fn finite(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

/// Descending by value, ascending by id: a total order over candidates with finite values.
pub fn best_first(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The token of the largest logit, with the lowest id on ties. `None` if every logit is minus
/// infinity or NaN.
pub fn argmax(logits: &[f32]) -> Option<u32> {
    let mut best = f32::NEG_INFINITY;
    let mut token = None;
    for (id, &logit) in logits.iter().enumerate() {
        if logit > best {
            best = logit;
            token = Some(id as u32);
        }
    }
    token
}

/// The `count` largest logits as `(logit, id)`, best first, ties by lower id. Logits of minus
/// infinity are left out. It makes one pass with a small buffer: a new candidate must beat the
/// worst of the best so far, and a full buffer is cut back to `count`.
pub fn top(logits: &[f32], count: usize, into: &mut Vec<(f32, u32)>) {
    into.clear();
    if count == 0 {
        return;
    }
    let room = (2 * count).max(64);
    let mut floor = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        // Later ids lose ties, so only strictly larger logits may enter.
        if logit > floor {
            into.push((finite(logit), id as u32));
            if into.len() == room {
                into.select_nth_unstable_by(count - 1, best_first);
                into.truncate(count);
                floor = into[count - 1].0;
            }
        }
    }
    into.sort_unstable_by(best_first);
    into.truncate(count);
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::{Rng, SeedableRng};

    #[test]
    fn top_equals_sort() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
        for round in 0..200 {
            let n = random.random_range(1..400);
            // Few distinct values, so that ties are common.
            let logits: Vec<f32> = (0..n).map(|_| random.random_range(-9..9) as f32).collect();
            let count = random.random_range(0..n + 3);
            let mut all: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
            all.sort_by(best_first);
            all.truncate(count);
            let mut got = Vec::new();
            top(&logits, count, &mut got);
            assert_eq!(got, all, "round {round}");
        }
    }

    #[test]
    fn exp_is_right() {
        assert_eq!(exp_negative(0.0), 1.0);
        assert_eq!(exp_negative(f32::NEG_INFINITY), 0.0);
        for step in 0..100_000 {
            let x = -(step as f32) * 87.0 / 100_000.0;
            let exact = f64::from(x).exp();
            let error = (f64::from(exp_negative(x)) - exact) / exact;
            assert!(error.abs() < 2e-7, "e^{x}: relative error {error}");
        }
    }

    #[test]
    fn log_sum_exp_is_right() {
        let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(3);
        let logits: Vec<f32> = (0..10_001).map(|_| random.random_range(-30.0..30.0)).collect();
        let exact = logits.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        assert!((log_sum_exp(&logits) - exact).abs() < 1e-7);
        let maximum_naive = logits.iter().copied().fold(f32::MIN, f32::max);
        assert_eq!(maximum(&logits), maximum_naive);
    }

    #[test]
    fn strange_logits_are_harmless() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        assert_eq!(argmax(&[nan, -inf, nan]), None);
        assert_eq!(argmax(&[nan, 1.0, inf, inf]), Some(2));
        assert_eq!(log_sum_exp(&[nan, -inf]), f64::NEG_INFINITY);
        assert!((log_sum_exp(&[nan, 0.0, 0.0]) - 2f64.ln()).abs() < 1e-12);
        assert!(log_sum_exp(&[inf, 0.0]).is_finite());
        let mut got = Vec::new();
        top(&[nan, 1.0, inf, -inf], 4, &mut got);
        assert_eq!(got, [(f32::MAX, 2), (1.0, 1)]);
    }
}

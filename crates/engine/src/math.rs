//! Numbers over one row of logits: log-softmax in `f64`, best tokens.

use std::cmp::Ordering;

/// `ln(sum(exp(x)))` in `f64`; logits that are not numbers count as minus infinity, plus infinity
/// as the largest `f32`. Minus infinity if nothing is left.
pub fn log_sum_exp(logits: &[f32]) -> f64 {
    let max = logits.iter().copied().map(finite).fold(f32::NEG_INFINITY, f32::max);
    if max == f32::NEG_INFINITY {
        return f64::NEG_INFINITY;
    }
    let max = f64::from(max);
    let sum: f64 = logits.iter().map(|&x| (f64::from(finite(x)) - max).exp()).sum();
    max + sum.ln()
}

/// A logit that can be compared and subtracted: NaN becomes minus infinity, plus infinity the
/// largest `f32`.
pub fn finite(logit: f32) -> f32 {
    if logit.is_nan() { f32::NEG_INFINITY } else { logit.min(f32::MAX) }
}

/// Descending by value, ascending by id: a total order over candidates with finite values.
pub fn best_first(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// The token of the largest logit, the lowest id on ties; `None` if no logit is a number above
/// minus infinity.
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

/// The `count` largest logits as `(logit, id)`, best first, ties by lower id; logits that are not
/// above minus infinity are left out. One pass with a small buffer: a new candidate must beat
/// the worst of the best so far, and the buffer is cut back to `count` when it is full.
pub fn top(logits: &[f32], count: usize, into: &mut Vec<(f32, u32)>) {
    into.clear();
    if count == 0 {
        return;
    }
    let room = (2 * count).max(64);
    let mut floor = f32::NEG_INFINITY;
    for (id, &logit) in logits.iter().enumerate() {
        // Later ids lose ties, so only strictly larger ones may enter.
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

//! The divergence of one model's next-token distribution from another's.

use serde::{Deserialize, Serialize};

/// `KL(base || model)` in nats a token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Divergence {
    /// The mean over all tokens.
    pub mean: f64,
    /// The standard error of the mean, as if tokens were independent.
    pub standard_error: f64,
}

/// The running sums over tokens.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct DivergenceSum {
    count: f64,
    sum: f64,
    squares: f64,
}

impl DivergenceSum {
    pub(crate) fn add(&mut self, divergence: f64) {
        self.count += 1.0;
        self.sum += divergence;
        self.squares += divergence * divergence;
    }

    pub(crate) fn finish(self) -> Divergence {
        let count = self.count.max(1.0);
        let mean = self.sum / count;
        let variance = (self.squares / count - mean * mean).max(0.0);
        Divergence { mean, standard_error: (variance / (count - 1.0).max(1.0)).sqrt() }
    }
}

/// The natural logarithms of the softmax of a row of logits.
pub(crate) fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    let offset = f64::from(most) + sum.ln();
    logits.iter().map(|x| f64::from(*x) - offset).collect()
}

/// `KL(base || model)` of two rows of log-probabilities, in nats.
pub(crate) fn kl_divergence(base: &[f64], model: &[f64]) -> f64 {
    let term = |(base, model): (&f64, &f64)| {
        if base.is_finite() { base.exp() * (base - model) } else { 0.0 }
    };
    // Only rounding could make it negative.
    base.iter().zip(model).map(term).sum::<f64>().max(0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn divergence_of_two_coins() {
        let coin = |p: f32| log_softmax(&[p.ln() + 3.0, (1.0 - p).ln() + 3.0]);
        let expected = 0.5 * (0.5f64 / 0.25).ln() + 0.5 * (0.5f64 / 0.75).ln();
        assert!((kl_divergence(&coin(0.5), &coin(0.25)) - expected).abs() < 1e-6);
        assert_eq!(kl_divergence(&coin(0.25), &coin(0.25)), 0.0);
        let mut sum = DivergenceSum::default();
        [1.0, 2.0, 3.0].into_iter().for_each(|it| sum.add(it));
        let found = sum.finish();
        assert!((found.mean - 2.0).abs() < 1e-12);
        assert!((found.standard_error - (1.0f64 / 3.0).sqrt()).abs() < 1e-12);
    }
}

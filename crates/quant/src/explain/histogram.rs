//! Histograms of numbers relative to their own root mean square.

use serde::{Deserialize, Serialize};

/// Bins on either side of zero.
const SIDE: usize = 40;
/// Bins for each unit of the root mean square.
const BINS_PER_UNIT: f64 = 4.0;

/// A histogram of `x / rms`. The root mean square is taken over each added piece (a tensor, a
/// token), so that pieces of all sizes count alike.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Histogram {
    /// The width of a bin.
    pub bin: f64,
    /// The lower end of the first bin. The two outer bins also count everything beyond them.
    pub first: f64,
    /// The count of each bin.
    pub counts: Vec<u64>,
    /// The largest `|x| / rms` of all.
    pub peak: f64,
    /// The mean of `(x / rms)^4`. It is 3 for a normal distribution, and larger with outliers.
    pub kurtosis: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        let counts = vec![0; 2 * SIDE];
        let bin = 1.0 / BINS_PER_UNIT;
        Histogram { bin, first: -(SIDE as f64) * bin, counts, peak: 0.0, kurtosis: 0.0 }
    }
}

impl Histogram {
    /// The number of values counted.
    pub fn total(&self) -> u64 {
        self.counts.iter().sum()
    }

    /// Adds a piece of numbers, which share one root mean square.
    pub fn add(&mut self, piece: &[f32]) {
        let squares = piece.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let rms = (squares / piece.len().max(1) as f64).sqrt();
        if rms <= 0.0 || !rms.is_finite() {
            return;
        }
        let before = self.total() as f64;
        let mut fourth = before * self.kurtosis;
        for x in piece {
            let ratio = f64::from(*x) / rms;
            let at = (ratio - self.first) / self.bin;
            self.counts[at.clamp(0.0, (2 * SIDE - 1) as f64) as usize] += 1;
            self.peak = self.peak.max(ratio.abs());
            fourth += ratio.powi(4);
        }
        self.kurtosis = fourth / (before + piece.len() as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_counted_by_their_own_size() {
        let mut histogram = Histogram::default();
        histogram.add(&[1.0, -1.0, 1.0, -1.0]);
        histogram.add(&[100.0, -100.0]);
        histogram.add(&[0.0; 3]);
        assert_eq!(histogram.total(), 6);
        assert_eq!((histogram.counts[SIDE + 4], histogram.counts[SIDE - 4]), (3, 3));
        assert_eq!((histogram.peak, histogram.kurtosis), (1.0, 1.0));
        // One number of a hundred is not zero: it is the whole mean square, and the kurtosis is
        // 100.
        let mut one = vec![0.0; 100];
        one[7] = 5.0;
        let mut spiky = Histogram::default();
        spiky.add(&one);
        assert!((spiky.peak - 10.0).abs() < 1e-9 && (spiky.kurtosis - 100.0).abs() < 1e-6);
        assert_eq!(spiky.counts[2 * SIDE - 1], 1);
    }
}

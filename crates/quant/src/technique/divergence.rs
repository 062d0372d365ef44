//! How far the distribution of rounded numbers is from that of the numbers. [`clip`](super::clip)
//! minimises it with `error = "kl"`.
//!
//! TensorRT chooses the ends of a range in this way (Migacz, "8-bit inference with TensorRT", GTC
//! 2017). `P` is the histogram of the numbers; those beyond the range count at its ends. `Q`
//! spreads each code's share of the numbers within the range evenly over the bins that round to it
//! and are not empty. The measure is `KL(P || Q)` in nats. A narrow range makes the ends of `P`
//! improbable under `Q`. A wide range makes codes so wide that bins of very different heights
//! become one.

use crate::matrix::Scales;
use lathe_tensor::codec::scaled::BlockScale;

/// Bins from the negative of the largest magnitude to the largest magnitude: sixteen for each code
/// of four bits.
const BINS: usize = 256;
/// The fewest numbers under one scale for which a histogram is meaningful.
pub(super) const LEAST: usize = 256;

/// The histogram of one block.
pub(super) struct Histogram {
    counts: [f64; BINS],
    /// The middle of each bin.
    centers: [f32; BINS],
    rounded: [f32; BINS],
}

impl Histogram {
    pub(super) fn new() -> Self {
        Histogram { counts: [0.0; BINS], centers: [0.0; BINS], rounded: [0.0; BINS] }
    }

    /// Counts the numbers of a block.
    pub(super) fn count(&mut self, values: &[f32]) {
        let largest = values.iter().fold(0f32, |most, value| most.max(value.abs()));
        let width = 2.0 * largest / BINS as f32;
        self.counts.fill(0.0);
        for value in values {
            let bin = ((value + largest) / width) as usize;
            self.counts[bin.min(BINS - 1)] += 1.0;
        }
        for (bin, center) in self.centers.iter_mut().enumerate() {
            *center = (bin as f32 + 0.5) * width - largest;
        }
    }

    /// `KL(P || Q)` if the numbers are rounded with scale `block`. Infinite if no number is within
    /// its range.
    pub(super) fn divergence(&mut self, scales: &Scales, block: BlockScale) -> f64 {
        scales.round(&self.centers, block, &mut self.rounded);
        let Some((first, last)) = self.range() else { return f64::INFINITY };
        let (below, above): (f64, f64) =
            (self.counts[..first].iter().sum(), self.counts[last + 1..].iter().sum());
        let within: f64 = self.counts[first..=last].iter().sum();
        if within == 0.0 {
            return f64::INFINITY;
        }
        // Numbers beyond the range count in the outermost bins that are not empty.
        let holds = |bin: &usize| self.counts[*bin] > 0.0;
        let ends = [(first..=last).find(holds), (first..=last).rev().find(holds)];
        let all = within + below + above;
        let mut sum = 0.0;
        let mut bin = first;
        while bin <= last {
            // Bins that round to one code are neighbours.
            let code = self.rounded[bin];
            let end = (bin..=last).find(|at| self.rounded[*at] != code).unwrap_or(last + 1);
            let share: f64 = self.counts[bin..end].iter().sum();
            let holding = self.counts[bin..end].iter().filter(|count| **count > 0.0).count();
            let q = share / holding.max(1) as f64 / within;
            for at in (bin..end).filter(holds) {
                let beyond = [below, above].into_iter().zip(ends);
                let beyond: f64 = beyond.filter(|(_, end)| *end == Some(at)).map(|it| it.0).sum();
                let p = (self.counts[at] + beyond) / all;
                sum += p * (p / q).ln();
            }
            bin = end;
        }
        sum
    }

    /// The first and the last bin within the codes' range, which ends half a step beyond the last
    /// code.
    fn range(&self) -> Option<(usize, usize)> {
        let half = |outermost: f32, inner: Option<&f32>| {
            inner.map_or(f32::INFINITY, |inner| (outermost - inner).abs() / 2.0)
        };
        let (low, high) = (self.rounded[0], self.rounded[BINS - 1]);
        let below = half(low, self.rounded.iter().find(|value| **value != low));
        let above = half(high, self.rounded.iter().rev().find(|value| **value != high));
        let first = self.centers.iter().position(|center| low - center <= below)?;
        let last = self.centers.iter().rposition(|center| center - high <= above)?;
        (first <= last).then_some((first, last))
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, parameters};
    use super::super::{clip, find};
    use super::*;
    use crate::matrix::Matrix;
    use lathe_tensor::Format;

    fn scales(values: &[f32], format: &str) -> Scales {
        let matrix =
            Matrix { name: "a", rows: 1, columns: values.len(), values, fused_largest: None };
        Scales::new("clip", &matrix, Format::parse(format).unwrap()).unwrap()
    }

    /// Numbers that decay from the middle, with some far out.
    fn tailed(count: usize) -> Vec<f32> {
        let number = |i: usize| {
            let u = (i * 7919 % 4001) as f32 / 4001.0 - 0.5;
            let far = if i % 500 == 7 { 4.0 } else { 1.0 };
            -far * u.signum() * (1.0 - 2.0 * u.abs()).max(1e-3).ln()
        };
        (0..count).map(number).collect()
    }

    /// From the definition, in f64, with lists instead of runs of bins.
    fn naive(values: &[f32], step: f64) -> f64 {
        let largest = values.iter().fold(0f64, |most, v| most.max(f64::from(v.abs())));
        let width = 2.0 * largest / BINS as f64;
        let mut counts = vec![0f64; BINS];
        for value in values {
            let bin = ((f64::from(*value) + largest) / width) as usize;
            counts[bin.min(BINS - 1)] += 1.0;
        }
        let code = |bin: usize| {
            let center = (bin as f64 + 0.5) * width - largest;
            (center / step, (center / step).round_ties_even().clamp(-8.0, 7.0))
        };
        let within: Vec<usize> =
            (0..BINS).filter(|bin| (code(*bin).0 - code(*bin).1).abs() <= 0.5).collect();
        let holding: Vec<usize> = within.iter().copied().filter(|bin| counts[*bin] > 0.0).collect();
        let inside: f64 = holding.iter().map(|bin| counts[*bin]).sum();
        let all = values.len() as f64;
        let mut p: Vec<f64> = holding.iter().map(|bin| counts[*bin] / all).collect();
        let beyond = |range: std::ops::Range<usize>| counts[range].iter().sum::<f64>() / all;
        p[0] += beyond(0..within[0]);
        *p.last_mut().unwrap() += beyond(within[within.len() - 1] + 1..BINS);
        let q = |bin: usize| {
            let same: Vec<usize> =
                holding.iter().copied().filter(|other| code(*other).1 == code(bin).1).collect();
            same.iter().map(|bin| counts[*bin]).sum::<f64>() / same.len() as f64 / inside
        };
        holding.iter().zip(p).map(|(bin, p)| p * (p / q(*bin)).ln()).sum()
    }

    #[test]
    fn it_is_the_divergence_of_the_definition() {
        let values = tailed(1024);
        let scales = scales(&values, "int4-channel-f32");
        let largest = values.iter().fold(0f32, |most, v| most.max(v.abs()));
        let mut histogram = Histogram::new();
        histogram.count(&values);
        for ratio in [1.0f32, 0.83, 0.61, 0.4, 0.2] {
            let scale = ratio * largest / 7.5;
            let found = histogram.divergence(&scales, BlockScale { scale, zero: 0 });
            let expected = naive(&values, f64::from(scale));
            assert!(
                (found - expected).abs() < 1e-3 * (1.0 + expected),
                "{ratio}: {found} {expected}"
            );
        }
        // A range of nearly zero contains no number.
        let none = histogram.divergence(&scales, BlockScale { scale: 1e-9, zero: 0 });
        assert!(none.is_infinite(), "{none}");
    }

    #[test]
    fn the_chosen_scale_diverges_least() {
        let values = tailed(2048);
        let scales = scales(&values[..1024], "int4-channel-f32");
        let matrix =
            Matrix { name: "a", rows: 2, columns: 1024, values: &values, fused_largest: None };
        let ratios = clip::shrinking(40, 0.8);
        let chosen = clip::search(&scales, &matrix, &clip::Measure::Divergence, &ratios);
        for (row, chosen) in values.chunks(1024).zip(&chosen) {
            let largest = row.iter().fold(0f32, |most, v| most.max(v.abs()));
            let all: Vec<f64> =
                ratios.iter().map(|ratio| naive(row, f64::from(ratio * largest / 7.5))).collect();
            let least = all.iter().copied().fold(f64::INFINITY, f64::min);
            let of_chosen = naive(row, f64::from(chosen.scale));
            assert!(of_chosen <= least * 1.02, "{of_chosen} {least}");
            assert!(of_chosen < 0.95 * all[0], "the range's own scale is worse: {of_chosen}");
        }
    }

    #[test]
    fn few_numbers_a_scale_are_refused() {
        let case = case(4, 128, 1);
        let technique = find("clip").unwrap();
        let settings = parameters(technique, &[("error", toml::Value::String("kl".into()))]);
        let format = Format::parse("int4-g64-bf16").unwrap();
        let error = technique.group()(&case.group(), format, &settings).unwrap_err().to_string();
        assert!(error.contains("found 64 numbers a scale, expected 256 or more"), "{error}");
    }
}

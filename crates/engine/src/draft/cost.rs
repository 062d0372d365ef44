//! `StepCost`: what one more row costs a step, measured while the engine runs.

use std::time::Duration;

/// How much an observation still counts after one more.
const KEPT: f64 = 0.97;
/// The cost of a row, as a part of a step of one row, before anything is measured.
const FIRST_GUESS: f64 = 0.3;
/// Observations that the first guess counts for.
const GUESS_WEIGHT: f64 = 4.0;

/// A line through the times of steps without prompt rows: `time = base + row * rows`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct StepCost {
    weight: f64,
    rows: f64,
    rows_squared: f64,
    time: f64,
    rows_time: f64,
}

impl StepCost {
    /// Takes note of a step.
    pub(crate) fn observe(&mut self, rows: usize, time: Duration) {
        let (rows, time) = (rows as f64, time.as_secs_f64());
        let sums = [
            (&mut self.weight, 1.0),
            (&mut self.rows, rows),
            (&mut self.rows_squared, rows * rows),
            (&mut self.time, time),
            (&mut self.rows_time, rows * time),
        ];
        sums.into_iter().for_each(|(sum, term)| *sum = *sum * KEPT + term);
    }

    /// The least probability of acceptance at which a drafted row pays, in a step of `sequences`
    /// plain rows. A step of time `t` makes `sequences` tokens. One more row makes `p` tokens for
    /// the time `row`. That is the faster rate if `p > sequences * row / t`.
    pub(crate) fn probability_min(&self, sequences: usize) -> f64 {
        let sequences = sequences.max(1) as f64;
        let row = self.row();
        sequences * row / self.time(sequences, row).max(row * sequences).max(f64::MIN_POSITIVE)
    }

    /// What a step of `sequences` plain rows takes, in seconds; 0 before any was measured.
    pub(crate) fn step_seconds(&self, sequences: usize) -> f64 {
        if self.weight < 1.0 { 0.0 } else { self.time(sequences as f64, self.row()) }
    }

    /// Means of rows and time. Before anything is measured, those of a step that takes 1.
    fn means(&self) -> (f64, f64) {
        match self.weight < 1.0 {
            true => (1.0, 1.0),
            false => (self.rows / self.weight, self.time / self.weight),
        }
    }

    /// The slope: what one more row takes. The first guess has the weight of some observations that
    /// are a row apart.
    fn row(&self) -> f64 {
        let (rows, time) = self.means();
        let weight = self.weight.max(1.0);
        let variance = (self.rows_squared / weight - rows * rows).max(0.0);
        let covariance = self.rows_time / weight - rows * time;
        let guess = FIRST_GUESS * time / (1.0 + (rows - 1.0) * FIRST_GUESS);
        if self.weight < 1.0 {
            return guess;
        }
        let pull = GUESS_WEIGHT / (self.weight + GUESS_WEIGHT) * 0.25;
        ((covariance + pull * guess) / (variance + pull)).max(0.0)
    }

    fn time(&self, sequences: f64, row: f64) -> f64 {
        let (rows, time) = self.means();
        time + row * (sequences - rows)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn observed(row: f64, rows: impl Iterator<Item = usize>) -> StepCost {
        let mut cost = StepCost::default();
        rows.for_each(|rows| cost.observe(rows, Duration::from_secs_f64(1.0 + row * rows as f64)));
        cost
    }

    #[test]
    fn a_row_pays_by_what_it_costs() {
        assert!((StepCost::default().probability_min(1) - FIRST_GUESS).abs() < 1e-9);
        for row in [0.0, 0.1, 1.0] {
            let cost = observed(row, (0..200).map(|step| 1 + step % 5));
            for sequences in [1, 4, 32] {
                let n = sequences as f64;
                let expected = n * row / (1.0 + row * n);
                let found = cost.probability_min(sequences);
                assert!((found - expected).abs() < 0.1, "{row} {sequences}: {found} {expected}");
            }
        }
    }

    #[test]
    fn the_first_guess_stays_until_rows_differ() {
        let found = observed(0.5, (0..100).map(|_| 1)).probability_min(1);
        assert!((found - FIRST_GUESS).abs() < 1e-6, "{found}");
    }
}

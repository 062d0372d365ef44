//! Time by kind of stage, if the environment variable `LATHE_PROFILE` is `1`: printed to stderr
//! when the executor is dropped.

use std::time::{Duration, Instant};

use crate::stage::Stage;

/// Times of all steps so far.
#[derive(Debug, Default)]
pub(crate) struct Profile {
    on: bool,
    /// Steps of one row, and of more.
    steps: [u64; 2],
    kinds: [[(Duration, u64); Stage::KINDS.len()]; 2],
}

impl Profile {
    /// On if the environment says so.
    pub(crate) fn from_environment() -> Self {
        Self { on: std::env::var("LATHE_PROFILE").is_ok_and(|v| v == "1"), ..Self::default() }
    }

    /// The time now, if anyone wants to know.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.on.then(Instant::now)
    }

    /// Counts the time since `start` for `stage`'s kind, in a step of `rows`.
    pub(crate) fn stop(&mut self, stage: &Stage, rows: usize, start: Option<Instant>) {
        if let Some(start) = start {
            let (time, count) = &mut self.kinds[usize::from(rows > 1)][stage.kind()];
            *time += start.elapsed();
            *count += 1;
        }
    }

    /// Counts a step of `rows`.
    pub(crate) fn step(&mut self, rows: usize) {
        self.steps[usize::from(rows > 1)] += 1;
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        for (what, steps, kinds) in [
            ("one row", self.steps[0], &self.kinds[0]),
            ("several rows", self.steps[1], &self.kinds[1]),
        ] {
            if !self.on || steps == 0 {
                continue;
            }
            let total: Duration = kinds.iter().map(|(time, _)| *time).sum();
            eprintln!("{steps} steps of {what}, {:.1} us a step in stages", micros(total, steps));
            for (name, (time, count)) in Stage::KINDS.iter().zip(kinds) {
                if *count > 0 {
                    let (per_step, each) = (micros(*time, steps), micros(*time, *count));
                    eprintln!(
                        "{name:>14}: {per_step:9.1} us a step, {count:8} runs, {each:8.2} us each"
                    );
                }
            }
        }
    }
}

fn micros(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

//! Times of stages by kind, printed to stderr when the executor is dropped. The environment
//! variable `LATHE_PROFILE=1` turns them on.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::stage::Stage;

/// Times of all steps so far.
#[derive(Debug)]
pub(crate) struct Profile {
    on: bool,
    one_row: Times,
    several_rows: Times,
}

/// Times of the steps of one class.
#[derive(Debug, Default)]
struct Times {
    steps: u64,
    /// Time and number of runs by [`Stage::kind`].
    kinds: BTreeMap<&'static str, (Duration, u64)>,
}

impl Profile {
    /// On if the environment says so.
    pub(crate) fn from_environment() -> Self {
        let on = std::env::var("LATHE_PROFILE").is_ok_and(|v| v == "1");
        Self { on, one_row: Times::default(), several_rows: Times::default() }
    }

    /// The time now, if the profile is on.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.on.then(Instant::now)
    }

    /// Counts the time since `start` for `stage`'s kind, in a step of `rows`.
    pub(crate) fn stop(&mut self, stage: &Stage, rows: usize, start: Option<Instant>) {
        if let Some(start) = start {
            let (time, count) = self.times(rows).kinds.entry(stage.kind()).or_default();
            *time += start.elapsed();
            *count += 1;
        }
    }

    /// Counts a step of `rows`.
    pub(crate) fn step(&mut self, rows: usize) {
        self.times(rows).steps += 1;
    }

    fn times(&mut self, rows: usize) -> &mut Times {
        if rows > 1 { &mut self.several_rows } else { &mut self.one_row }
    }
}

impl Times {
    /// Prints the times of steps of `rows`, if there were any.
    fn print(&self, rows: &str) {
        let steps = self.steps;
        if steps == 0 {
            return;
        }
        let total: Duration = self.kinds.values().map(|(time, _)| *time).sum();
        eprintln!("{steps} steps of {rows}, {:.1} us a step in stages", micros(total, steps));
        for (name, (time, count)) in &self.kinds {
            let (per_step, each) = (micros(*time, steps), micros(*time, *count));
            eprintln!("{name:>14}: {per_step:9.1} us a step, {count:8} runs, {each:8.2} us each");
        }
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        if self.on {
            self.one_row.print("one row");
            self.several_rows.print("several rows");
        }
    }
}

fn micros(time: Duration, count: u64) -> f64 {
    time.as_secs_f64() * 1e6 / count as f64
}

//! What one rendering may use. A template is code from a checkpoint, so every string, list and step
//! is counted, and what goes over a limit is an error.

use std::cell::Cell;
use std::time::{Duration, Instant};

use super::error::{Failure, Outcome};

/// Bytes of a template's source. The longest published templates have some 40 thousand.
pub(super) const SOURCE_BYTES: usize = 1 << 18;
/// Expressions and statements within each other in the source.
pub(super) const DEPTH: usize = 160;
/// Evaluations within each other: some ten for each level of the source.
pub(super) const RUN_DEPTH: usize = 2000;
/// Lists, tuples and dictionaries within each other.
pub(super) const VALUE_DEPTH: usize = 200;
/// Bytes of all values and of the output at one time: several prompts of a million tokens.
const LIVE_BYTES: usize = 28 << 20;
/// Evaluated expressions, loop passes, and pieces of 64 bytes that were made.
const STEPS: u64 = 4_000_000;
/// Running time. Long conversations take a few milliseconds.
const TIME: Duration = Duration::from_millis(700);
/// Steps between two looks at the clock.
const CLOCK_STEPS: u64 = 1024;
/// Items of one `range`, as in Jinja's sandbox.
pub(super) const RANGE_ITEMS: i128 = 100_000;

/// Counts what a rendering uses.
#[derive(Debug)]
pub(super) struct Meter {
    live: Cell<usize>,
    /// Bytes that were ever made.
    made: Cell<u64>,
    steps: Cell<u64>,
    started: Instant,
}

impl Meter {
    pub(super) fn new() -> Self {
        let (live, made, steps) = (Cell::new(0), Cell::new(0), Cell::new(0));
        Self { live, made, steps, started: Instant::now() }
    }

    /// Counts `steps` steps.
    pub(super) fn step(&self, steps: u64) -> Outcome<()> {
        let before = self.steps.get();
        let after = before.saturating_add(steps);
        self.steps.set(after);
        if after > STEPS {
            return Err(Failure::limit("steps", STEPS));
        }
        let late = before / CLOCK_STEPS != after / CLOCK_STEPS && self.started.elapsed() > TIME;
        if late {
            return Err(Failure::limit("milliseconds", TIME.as_millis() as u64));
        }
        Ok(())
    }

    /// Counts `bytes` that live until [`Meter::release`].
    pub(super) fn take(&self, bytes: usize) -> Outcome<()> {
        let made = self.made.get();
        self.made.set(made.saturating_add(bytes as u64));
        self.step(self.made.get() / 64 - made / 64)?;
        let live = self.live.get().saturating_add(bytes);
        if live > LIVE_BYTES {
            return Err(Failure::limit("bytes", LIVE_BYTES as u64));
        }
        self.live.set(live);
        Ok(())
    }

    /// Counts `bytes` that are there already; the next [`Meter::take`] refuses what is too much.
    pub(super) fn hold(&self, bytes: usize) {
        self.live.set(self.live.get().saturating_add(bytes));
    }

    /// Counts a look at every one of `bytes` bytes.
    pub(super) fn scan(&self, bytes: usize) -> Outcome<()> {
        self.step(bytes as u64 / 64)
    }

    pub(super) fn release(&self, bytes: usize) {
        self.live.set(self.live.get().saturating_sub(bytes));
    }

    /// Refuses what would take more than is left, before it is made.
    pub(super) fn foresee(&self, bytes: usize) -> Outcome<()> {
        match self.live.get().saturating_add(bytes) > LIVE_BYTES {
            true => Err(Failure::limit("bytes", LIVE_BYTES as u64)),
            false => Ok(()),
        }
    }
}

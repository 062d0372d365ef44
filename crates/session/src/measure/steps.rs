//! How long a step of one sequence takes that computes several tokens at once, as a step that
//! verifies drafted tokens does.

use std::time::Instant;

use lathe_engine::score::Feed;
use lathe_program::Executor;
use serde::Serialize;

use crate::error::SessionError;
use crate::measure::timing::median;
use crate::startup::milliseconds;

/// Steps of each size in a measurement.
const ROUNDS: usize = 9;

/// A step of some size.
#[derive(Debug, Clone, Serialize)]
pub struct StepTime {
    /// Tokens that the step computes, with logits for each.
    pub tokens: usize,
    /// The middle of several steps.
    pub step_ms: f64,
    /// Against a step of one token.
    pub relative_to_one: f64,
}

/// Times steps of each of `sizes` after a prompt of `prompt` tokens; sizes take turns, so that a
/// drift of the machine's speed meets all of them.
///
/// # Errors
/// If the steps do not fit context or cache, or the device fails.
pub fn measure(
    executor: &mut dyn Executor,
    prompt: usize,
    sizes: &[usize],
) -> Result<Vec<StepTime>, SessionError> {
    let vocabulary = executor.program().vocabulary;
    let longest = sizes.iter().copied().max().unwrap_or(1).max(1);
    let tokens: Vec<u32> = (0..prompt + longest).map(|i| (i * 7919 % vocabulary) as u32).collect();
    let mut feed = Feed::new(executor, &tokens, prompt)?;
    let mut computed = 0;
    while computed < prompt {
        let rows = feed.rows();
        feed.run(executor, rows)?;
        computed += rows;
    }
    let mut all: Vec<usize> = sizes.to_vec();
    all.push(1);
    let mut times = vec![Vec::new(); all.len()];
    for round in 0..=ROUNDS {
        for (size, times) in all.iter().zip(&mut times) {
            let start = Instant::now();
            feed.rehearse(executor, *size)?;
            // The first round meets cold buffers.
            if round > 0 {
                times.push(milliseconds(start));
            }
        }
    }
    let medians: Vec<f64> = times.iter().map(|times| median(times)).collect();
    let one = medians[sizes.len()];
    let step = |(&tokens, &step_ms): (&usize, &f64)| StepTime {
        tokens,
        step_ms,
        relative_to_one: step_ms / one,
    };
    Ok(sizes.iter().zip(&medians).map(step).collect())
}

//! The time of a step of one sequence that computes several tokens at once, like a step that
//! verifies drafted tokens.

use std::time::Instant;

use lathe_engine::score::Feed;
use lathe_program::Executor;
use serde::Serialize;

use crate::error::SessionError;
use crate::measure::timing::median;
use crate::startup::milliseconds;

/// Measured steps of each size.
const ROUNDS: usize = 9;

/// The time of a step of one size.
#[derive(Debug, Clone, Serialize)]
pub struct StepTime {
    /// Tokens of the step, with logits for each.
    pub tokens: usize,
    /// The median of several steps, in milliseconds.
    pub step_ms: f64,
    /// The ratio to a step of one token.
    pub relative_to_one: f64,
}

/// Times steps of each of `sizes` after a prompt of `prompt` tokens. The sizes take turns, so that
/// a drift of the machine's speed affects all of them.
///
/// # Errors
/// If the steps do not fit the context or the cache, or the device fails.
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
            // The first round runs with cold buffers and does not count.
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

//! Times an engine: a batch of prompts, then decoding step by step.

use std::time::Instant;

use lathe_engine::{Engine, Event, Request};
use lathe_tensor::random::SplitMix64;

use crate::error::SessionError;
use crate::measure::experts::{ExpertTap, StepLoad};
use crate::startup::milliseconds;

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Workload {
    /// Tokens of each prompt.
    pub prompt: usize,
    /// Tokens to generate for each prompt, including the first.
    pub generate: usize,
    /// Prompts at the same time.
    pub batch: usize,
    /// Size of the vocabulary.
    pub vocabulary: usize,
}

/// Times of one run.
#[derive(Debug, Clone, Default)]
pub struct Timing {
    /// Milliseconds until every sequence had its first token.
    pub prefill_ms: f64,
    /// Milliseconds of each later step in which every sequence got a token.
    pub steps_ms: Vec<f64>,
    /// Rows of each expert in those steps, if there are experts.
    pub loads: Vec<StepLoad>,
}

impl Workload {
    /// Prompts of random tokens. Each `round` has other tokens, so that no prefix cache helps.
    fn requests(&self, round: u64) -> impl Iterator<Item = Request> + '_ {
        let mut random = SplitMix64::new(0x9e37_79b9_7f4a_7c15 ^ round);
        (0..self.batch).map(move |_| Request {
            prompt: (0..self.prompt)
                .map(|_| (random.next_u64() % self.vocabulary as u64) as u32)
                .collect(),
            max_tokens: Some(self.generate),
            ignore_stop: true,
            ..Request::default()
        })
    }
}

/// Runs the workload once. `tap` reads the routers between the timed steps.
///
/// # Errors
/// If the engine fails, or a sequence ends early.
pub fn run(
    engine: &mut Engine,
    workload: &Workload,
    round: u64,
    mut tap: Option<&mut ExpertTap>,
) -> Result<Timing, SessionError> {
    let mut generated = vec![0_usize; workload.batch];
    let mut ids = Vec::new();
    let start = Instant::now();
    for request in workload.requests(round) {
        ids.push(engine.add(request, None)?);
    }
    let mut timing = Timing::default();
    while !engine.is_idle() {
        let step_start = Instant::now();
        let events = engine.step()?;
        let step_ms = milliseconds(step_start);
        let before = generated.iter().all(|&count| count > 0);
        let mut advanced = 0;
        for event in events.iter().filter(|event| ids.contains(&event.request())) {
            match event {
                Event::Token { request, .. } => {
                    let index = ids.iter().position(|id| id == request).expect("our request");
                    generated[index] += 1;
                    advanced += 1;
                }
                Event::Finished { reason, generated_tokens, .. } => {
                    if *generated_tokens < workload.generate {
                        return Err(SessionError::EndedEarly {
                            generated: *generated_tokens,
                            reason: format!("{reason:?}"),
                        });
                    }
                }
            }
        }
        if before && advanced == workload.batch {
            timing.steps_ms.push(step_ms);
            if let Some(tap) = &mut tap {
                timing.loads.extend(tap.read(engine.executor()));
            }
        } else if !before && generated.iter().all(|&count| count > 0) {
            timing.prefill_ms = milliseconds(start);
        }
    }
    Ok(timing)
}

/// The median: the middle value, or the mean of the two middle values. NaN if empty.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => (sorted[middle - 1] + sorted[middle]) / 2.0,
    }
}

/// The exponent `e` of the best fit `time = constant * tokens^e`, by least squares of the
/// logarithms. 1 is linear growth and 2 is quadratic.
pub fn growth_exponent(tokens: &[f64], times: &[f64]) -> f64 {
    let points: Vec<(f64, f64)> = tokens.iter().zip(times).map(|(x, y)| (x.ln(), y.ln())).collect();
    let count = points.len() as f64;
    let mean_x = points.iter().map(|p| p.0).sum::<f64>() / count;
    let mean_y = points.iter().map(|p| p.1).sum::<f64>() / count;
    let covariance: f64 = points.iter().map(|p| (p.0 - mean_x) * (p.1 - mean_y)).sum();
    let variance: f64 = points.iter().map(|p| (p.0 - mean_x).powi(2)).sum();
    covariance / variance
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn exponents() {
        let tokens: Vec<f64> = (1..50).map(f64::from).collect();
        let square: Vec<f64> = tokens.iter().map(|n| 3.0 * n * n).collect();
        assert!((growth_exponent(&tokens, &square) - 2.0).abs() < 1e-9);
        assert!((growth_exponent(&tokens, &tokens) - 1.0).abs() < 1e-9);
    }

    #[test]
    fn prompts_are_random_and_repeatable() {
        let workload = Workload { prompt: 8, generate: 2, batch: 2, vocabulary: 100 };
        let prompts = |round| workload.requests(round).map(|r| r.prompt).collect::<Vec<_>>();
        assert_eq!(prompts(1), prompts(1));
        assert_ne!(prompts(1), prompts(2));
        assert_ne!(prompts(1)[0], prompts(1)[1]);
        assert!(prompts(1).concat().iter().all(|&token| token < 100));
    }
}

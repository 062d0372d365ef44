//! Tests of choosing tokens: every parameter of sampling, penalties with chosen rows, biases, masks
//! and reports, with as many steps in flight as the executor allows.
//!
//! The backend's choice is compared with that of [`Sampler`] on the backend's own logits. So
//! rounding of the logits does not matter.

use std::sync::Arc;

use super::compare::{Failure, Settings, options};
use super::models::SmallDecoder;
use super::random::Random;
use super::weights::SeededWeights;
use crate::backend::{Backend, BackendError, StepOutput};
use crate::program::Program;
use crate::sampling::{Sampler, Sampling, TokenCounts, TokenLogprobs, TokenMask};
use crate::step::{Choice, Report, SequenceId, Step, StepSequence, TableChange, TokenSource};

const SEQUENCES: usize = 3;
const PROMPT: usize = 5;
const STEPS: usize = 40;
/// The largest error of a reported log-probability, compared with the logits.
const LOGPROB_ERROR: f32 = 1e-4;

/// Decodes a few sequences with tokens chosen on the device, and checks every choice.
///
/// # Errors
/// [`Failure`] names the first step and sequence that is wrong.
pub fn choices(backend: &dyn Backend, settings: &Settings) -> Result<(), Failure> {
    let failure = |reason| Failure { case: "choices".to_owned(), reason };
    let program = SmallDecoder::grouped().fitting(settings.format.block_len()).program();
    (0..settings.seeds)
        .try_for_each(|seed| check(backend, settings, &program, seed))
        .map_err(failure)
}

/// The host's copy of one sequence.
struct Text {
    prompt: Vec<u32>,
    /// By step that was collected.
    tokens: Vec<u32>,
}

fn check(
    backend: &dyn Backend,
    settings: &Settings,
    program: &Program,
    seed: u64,
) -> Result<(), String> {
    let text = |error: BackendError| error.to_string();
    let weights = SeededWeights { program, format: settings.format, seed: 5 };
    let blocks = (PROMPT + STEPS).div_ceil(program.kv.block_tokens);
    let kv_blocks = SEQUENCES * program.kv.groups.len() * blocks;
    let options = options(settings, kv_blocks, SEQUENCES * PROMPT);
    let mut executor =
        backend.prepare(Arc::new(program.clone()), &weights, &options).map_err(text)?;
    let ahead = executor.limits().steps_in_flight > 1;
    let mut random = Random::named(seed, "choices");
    let token = |random: &mut Random| random.below(program.vocabulary) as u32;
    let mut texts: Vec<Text> = (0..SEQUENCES)
        .map(|_| Text {
            prompt: (0..PROMPT).map(|_| token(&mut random)).collect(),
            tokens: Vec::new(),
        })
        .collect();
    let mut before: Option<Step> = None;
    for index in 0..STEPS {
        if let Some(step) = before.as_ref().filter(|_| !ahead) {
            verify(&executor.collect().map_err(text)?, step, &mut texts, program.vocabulary)?;
        }
        let step = step(program, &texts, index, &mut random);
        executor.submit(&step).map_err(text)?;
        if let Some(step) = before.replace(step).filter(|_| ahead) {
            verify(&executor.collect().map_err(text)?, &step, &mut texts, program.vocabulary)?;
        }
    }
    let last = before.expect("there were steps");
    verify(&executor.collect().map_err(text)?, &last, &mut texts, program.vocabulary)
}

/// A step of the prompts, or of the tokens that the step before chose.
fn step(program: &Program, texts: &[Text], index: usize, random: &mut Random) -> Step {
    let mut step = Step::default();
    let blocks = (PROMPT + STEPS).div_ceil(program.kv.block_tokens) as u32;
    for (number, text) in texts.iter().enumerate() {
        let id = SequenceId(number as u32);
        let cached = if index == 0 { 0 } else { PROMPT + index - 1 };
        let rows = if index == 0 { PROMPT } else { 1 };
        if index == 0 {
            step.tokens.extend(text.prompt.iter().map(|token| TokenSource::Given(*token)));
            let groups = program.kv.groups.len() as u32;
            step.tables.push(TableChange::Clear { sequence: id });
            step.tables.extend((0..groups).map(|group| {
                let first = (number as u32 * groups + group) * blocks;
                let pages = (first..first + blocks).collect();
                TableChange::Extend { sequence: id, group, pages }
            }));
        } else {
            step.tokens.push(TokenSource::Chosen(number as u32));
        }
        step.positions.extend((cached..cached + rows).map(|position| position as u32));
        step.sequences.push(StepSequence {
            id,
            first_row: (step.tokens.len() - rows) as u32,
            rows: rows as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        });
        // All tokens except the one that the step before chooses.
        let known = &text.tokens[..index.saturating_sub(1)];
        let row = step.tokens.len() as u32 - 1;
        step.choices.push(choice(
            row,
            (PROMPT + index) as u64,
            (&text.prompt, known),
            program,
            random,
        ));
    }
    step
}

fn choice(
    row: u32,
    counter: u64,
    (prompt, known): (&[u32], &[u32]),
    program: &Program,
    random: &mut Random,
) -> Choice {
    let vocabulary = program.vocabulary;
    let token = |random: &mut Random| random.below(vocabulary) as u32;
    let sampling = Sampling {
        temperature: random.pick(&[0.0, 0.3, 1.0, 2.5]),
        top_k: random.pick(&[0, 0, 1, 7, vocabulary + 1]),
        top_p: random.pick(&[1.0, 1.0, 0.8, 0.05]),
        min_p: random.pick(&[0.0, 0.0, 0.2]),
        repetition_penalty: random.pick(&[1.0, 1.3]),
        presence_penalty: random.pick(&[0.0, 0.6]),
        frequency_penalty: random.pick(&[0.0, -0.3]),
        seed: random.next(),
    };
    let mut counts = TokenCounts::new(prompt);
    known.iter().for_each(|token| counts.record(*token));
    let bias: Arc<[(u32, f32)]> =
        [(token(random), 2.0), (token(random), f32::NEG_INFINITY), (token(random), -1.0)].into();
    let mut mask = TokenMask::none(vocabulary);
    let allowed = random.between(1, vocabulary);
    (0..allowed).for_each(|_| mask.allow(token(random)));
    Choice {
        counts: random.coin().then(|| Arc::new(counts)),
        bias: random.coin().then_some(bias),
        mask: (random.below(3) == 0).then(|| Arc::new(mask)),
        report: Report {
            logprobs: random.pick(&[None, Some(0), Some(4)]),
            logits: random.below(4) > 0,
        },
        ..Choice::sample(row, sampling, counter)
    }
}

/// Checks the choices of a step, and appends its tokens to the texts.
fn verify(
    output: &StepOutput<'_>,
    step: &Step,
    texts: &mut [Text],
    vocabulary: usize,
) -> Result<(), String> {
    let asked = step.choices.iter().filter(|choice| choice.report.logits).count();
    let found = (output.tokens.len(), output.logprobs.len(), output.logits.len());
    let expected = (step.choices.len(), step.choices.len(), asked * vocabulary);
    if found != expected {
        return Err(format!("tokens, log-probabilities and logits {found:?}, not {expected:?}"));
    }
    let mut logits = output.logits.chunks_exact(vocabulary);
    let mut sampler = Sampler::default();
    for (index, (choice, text)) in step.choices.iter().zip(texts).enumerate() {
        let (token, logprobs) = (output.tokens[index], &output.logprobs[index]);
        let at = |reason: String| format!("position {}, choice {index}: {reason}", choice.counter);
        let seen = match step.tokens[choice.row as usize] {
            TokenSource::Chosen(_) => text.tokens.last().copied(),
            TokenSource::Given(_) => None,
        };
        if choice.report.logits {
            let row = logits.next().expect("counted");
            let generated: Vec<u32> = seen.into_iter().collect();
            let expected = sampler.choose(choice, &generated, row);
            if token != expected {
                return Err(at(format!("chose {token:?}, expected {expected:?} by {choice:?}")));
            }
            let expected = choice.report.logprobs.zip(token);
            let expected = expected.map(|(count, t)| TokenLogprobs::of(row, t, count as usize));
            close(logprobs.as_ref(), expected.as_ref()).map_err(at)?;
        }
        // If no token can be chosen, the next row runs token 0.
        text.tokens.push(token.unwrap_or(0));
    }
    Ok(())
}

fn close(found: Option<&TokenLogprobs>, expected: Option<&TokenLogprobs>) -> Result<(), String> {
    let same = match (found, expected) {
        (None, None) => true,
        (Some(found), Some(expected)) => {
            let near = |a: f32, b: f32| a == b || (a - b).abs() <= LOGPROB_ERROR;
            let mut top = found.top.iter().zip(&expected.top);
            found.top.len() == expected.top.len()
                && near(found.logprob, expected.logprob)
                && top.all(|(a, b)| a.0 == b.0 && near(a.1, b.1))
        }
        _ => false,
    };
    if same { Ok(()) } else { Err(format!("log-probabilities {found:?}, expected {expected:?}")) }
}

//! Runs cases on the reference and on a backend, and compares the results.

use std::sync::Arc;

use lathe_tensor::Format;

use super::cases::{Case, cases};
use super::random::Random;
use super::schedule::Schedule;
use super::weights::SeededWeights;
use crate::backend::{Backend, BackendError, Executor, ExecutorOptions};
use crate::kv::KvFormat;
use crate::reference::ReferenceBackend;
use crate::step::{Step, TREE_ROWS_MAX};

/// The allowed difference from the reference: `absolute + relative * |reference|`. The cases'
/// values are near 1, so the absolute part covers the rounding of sums whose terms cancel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Tolerance {
    /// The part that is always allowed.
    pub absolute: f32,
    /// The part for each unit of the reference.
    pub relative: f32,
}

/// The settings of a comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// Format of the matrices.
    pub format: Format,
    /// Format of the cache, on both sides.
    pub kv_format: KvFormat,
    /// [`ExecutorOptions::exact`].
    pub exact: bool,
    /// The allowed difference.
    pub tolerance: Tolerance,
    /// Cases of each kind.
    pub seeds: u64,
    /// [`ExecutorOptions::threads`].
    pub threads: Option<usize>,
}

impl Default for Settings {
    /// `f32` everywhere, exact, for sums of up to a few hundred terms.
    fn default() -> Self {
        Self {
            format: Format::F32,
            kv_format: KvFormat::F32,
            exact: true,
            tolerance: Tolerance { absolute: 2e-5, relative: 2e-5 },
            seeds: 12,
            threads: None,
        }
    }
}

/// The result of a comparison.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Summary {
    /// Cases that agreed.
    pub cases: usize,
    /// Numbers that were compared.
    pub numbers: usize,
    /// The largest `|difference| / allowed`.
    pub worst: f32,
    /// Cases that the backend does not support, with its reason.
    pub unsupported: Vec<String>,
}

/// A difference between a backend and the reference.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
#[error("{case}: {reason}")]
pub struct Failure {
    /// The case's name.
    pub case: String,
    /// What differed, and where.
    pub reason: String,
}

/// Runs all cases.
///
/// # Errors
/// [`Failure`] names the first case that differs, or that fails on either side.
pub fn check(backend: &dyn Backend, settings: &Settings) -> Result<Summary, Failure> {
    let mut report = Summary::default();
    for case in cases(settings.seeds, settings.format.block_len()) {
        check_case(backend, settings, &case, &mut report)?;
    }
    Ok(report)
}

/// Runs one case.
///
/// # Errors
/// As [`check`].
pub fn check_case(
    backend: &dyn Backend,
    settings: &Settings,
    case: &Case,
    report: &mut Summary,
) -> Result<(), Failure> {
    let tokens = if case.attends { 90 } else { 9 };
    check_case_of(backend, settings, case, Size { rows_max: 17, tokens }, report)
}

/// The size of a case's steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Rows of the largest step.
    pub rows_max: usize,
    /// Tokens of the longest sequence.
    pub tokens: usize,
}

/// As [`check_case`], with steps of this size.
///
/// # Errors
/// As [`check`].
pub fn check_case_of(
    backend: &dyn Backend,
    settings: &Settings,
    case: &Case,
    size: Size,
    report: &mut Summary,
) -> Result<(), Failure> {
    let failure = |reason: String| Failure { case: case.name.clone(), reason };
    let program = Arc::new(case.program.clone());
    let weights = SeededWeights { program: &program, format: settings.format, seed: 7 };
    let options = options(settings, KV_BLOCKS, size.rows_max);
    let reference = ReferenceBackend::new().prepare(Arc::clone(&program), &weights, &options);
    let mut reference = reference.map_err(|error| failure(format!("reference: {error}")))?;
    let mut tested = match backend.prepare(Arc::clone(&program), &weights, &options) {
        Ok(tested) => tested,
        Err(BackendError::Unsupported { feature, .. }) => {
            report.unsupported.push(format!("{}: {feature}", case.name));
            return Ok(());
        }
        Err(error) => return Err(failure(error.to_string())),
    };
    for (index, step) in steps(case, size).iter().enumerate() {
        let compared = compare_step(&mut *reference, &mut *tested, step, settings, report);
        compared.map_err(|reason| failure(format!("step {index}: {reason}")))?;
    }
    report.cases += 1;
    Ok(())
}

/// Pages of a case's cache.
const KV_BLOCKS: usize = 400;

pub(super) fn options(settings: &Settings, kv_blocks: usize, rows_max: usize) -> ExecutorOptions {
    ExecutorOptions {
        kv_blocks,
        kv_format: Some(settings.kv_format),
        rows_max,
        threads: settings.threads,
        exact: settings.exact,
    }
}

/// Several sequences in random chunks. If rows see each other, the sequences are longer and there
/// is a tree.
fn steps(case: &Case, size: Size) -> Vec<Step> {
    let mut random = Random::named(1, &case.name);
    let vocabulary = case.program.vocabulary;
    let sequences = (0..random.between(1, 3))
        .map(|_| {
            let tokens = random.between(1, size.tokens);
            (0..tokens).map(|_| random.below(vocabulary) as u32).collect()
        })
        .collect();
    let mut schedule = Schedule::new(&case.program, sequences, KV_BLOCKS, &mut random);
    let mut steps = Vec::new();
    while let Some(step) = schedule.random_step(size.rows_max, &mut random) {
        steps.push(step);
    }
    if case.attends {
        let rows = random.between(2, size.rows_max.min(TREE_ROWS_MAX));
        steps.push(schedule.random_tree(0, rows, &mut random));
    }
    if let Some(step) = steps.last_mut() {
        step.choices.retain(|choice| choice.row % 2 == 0);
    }
    steps
}

fn compare_step(
    reference: &mut dyn Executor,
    tested: &mut dyn Executor,
    step: &Step,
    settings: &Settings,
    report: &mut Summary,
) -> Result<(), String> {
    let expected = reference.run(step).map_err(|error| format!("reference: {error}"))?;
    let found = tested.run(step).map_err(|error| error.to_string())?;
    let Tolerance { absolute, relative } = settings.tolerance;
    let taps = expected.captures.len();
    if found.captures.len() != taps {
        return Err(format!("{} captures, expected {taps}", found.captures.len()));
    }
    let pairs = expected.captures.iter().zip(&found.captures);
    let named = pairs.enumerate().map(|(tap, (e, f))| (format!("tap {tap}"), *e, *f));
    let logits = std::iter::once(("logits".to_owned(), expected.logits, found.logits));
    for (what, expected, found) in named.chain(logits) {
        if expected.len() != found.len() {
            return Err(format!("{what}: {} numbers, expected {}", found.len(), expected.len()));
        }
        for (index, (e, f)) in expected.iter().zip(found).enumerate() {
            let ratio = (e - f).abs() / (absolute + relative * e.abs());
            let close = ratio <= 1.0;
            if !close {
                let of = expected.len();
                return Err(format!("{what}: number {index} of {of} is {f}, expected {e}"));
            }
            report.worst = report.worst.max(ratio);
        }
        report.numbers += expected.len();
    }
    Ok(())
}

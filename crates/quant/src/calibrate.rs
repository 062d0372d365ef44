//! Calibration: runs the served program on some text and keeps [`Statistics`] of what its linear
//! layers read.
//!
//! Memory is one triangle of `width^2 / 2` numbers a linear group, however much text there is. The
//! whole program is watched at once; layer by layer is for models whose triangles do not fit.

use std::collections::BTreeMap;

use lathe_program::{
    BlockTable, Executor, ExecutorOptions, ObservedInput, Observer, Op, Program, Step, StepSequence,
};

use crate::error::QuantError;
use crate::statistics::Statistics;

/// What calibration saw, by the index of the linear op.
#[derive(Debug, Clone, Default)]
pub struct Calibration {
    statistics: BTreeMap<usize, Statistics>,
    /// Tokens that ran.
    pub tokens: usize,
}

impl Calibration {
    /// Of the inputs of op `index`.
    pub fn of(&self, index: usize) -> Option<&Statistics> {
        self.statistics.get(&index)
    }
}

/// Adds up the inputs of linear ops.
struct Collector<'a> {
    statistics: &'a mut BTreeMap<usize, Statistics>,
}

impl Observer for Collector<'_> {
    fn op(&mut self, index: usize, _: &Op, inputs: &[ObservedInput<'_>]) {
        if let (Some(statistics), [input]) = (self.statistics.get_mut(&index), inputs) {
            statistics.add(input.data);
        }
    }
}

/// Pages of the cache that [`run`] needs for windows of `window` tokens.
pub fn pages(program: &Program, window: usize) -> usize {
    program.kv.groups.len() * window.div_ceil(program.kv.block_tokens)
}

/// Runs `tokens` in windows of `window`, each from an empty cache, and watches the linear ops for
/// which `wanted` says so. `progress` hears how many tokens are done.
///
/// # Errors
/// If a token is not of the vocabulary, there are none, or the executor fails (or cannot be
/// watched).
pub fn run(
    executor: &mut dyn Executor,
    options: &ExecutorOptions,
    tokens: &[u32],
    window: usize,
    wanted: impl Fn(usize) -> bool,
    progress: &mut dyn FnMut(usize),
) -> Result<Calibration, QuantError> {
    let program = executor.program().clone();
    if tokens.is_empty() {
        return Err(QuantError::Calibration("there are no tokens".to_owned()));
    }
    if let Some(token) = tokens.iter().find(|token| **token as usize >= program.vocabulary) {
        return Err(QuantError::Calibration(format!(
            "token {token}, the vocabulary has {}",
            program.vocabulary
        )));
    }
    let mut calibration = Calibration::default();
    for (index, op) in program.ops.iter().enumerate() {
        if let (Op::Linear { input, .. }, true) = (op, wanted(index)) {
            let width = program.value_width(*input);
            calibration.statistics.insert(index, Statistics::new(width));
        }
    }
    for text in tokens.chunks(window.max(1)) {
        for (chunk, rows) in text.chunks(options.rows_max.max(1)).enumerate() {
            let cached = chunk * options.rows_max.max(1);
            let expanded = executor.expanded_until(text.len());
            let stride = window.div_ceil(program.kv.block_tokens);
            let step = step_of(&program, rows, cached, expanded, stride as u32);
            let mut collector = Collector { statistics: &mut calibration.statistics };
            executor.run_observed(&step, &mut collector)?;
            calibration.tokens += rows.len();
            progress(calibration.tokens);
        }
    }
    Ok(calibration)
}

/// One sequence, with `stride` pages of the pool for each group. Windows keep all their pages: more
/// memory than serving takes, for the same numbers.
pub(crate) fn step_of(
    program: &Program,
    tokens: &[u32],
    cached: usize,
    expanded: usize,
    stride: u32,
) -> Step {
    let (rows, end) = (tokens.len(), cached + tokens.len());
    let pages = end.div_ceil(program.kv.block_tokens) as u32;
    let tables = (0..program.kv.groups.len() as u32)
        .map(|group| BlockTable {
            first: 0,
            blocks: (0..pages).map(|p| group * stride + p).collect(),
        })
        .collect();
    let sequence = StepSequence {
        first_row: 0,
        rows: rows as u32,
        cached: cached as u32,
        tables,
        expanded: expanded as u32,
        ancestors: None,
    };
    Step {
        tokens: tokens.to_vec(),
        positions: (cached as u32..end as u32).collect(),
        sequences: vec![sequence],
        logits_rows: Vec::new(),
    }
}

//! Calibration: runs the served program one layer at a time and keeps [`Statistics`] of the inputs
//! of its linear layers.
//!
//! A layer is a `Section`. Its input is the stream that the layers before it made. So memory holds
//! one layer, its triangles of products, and a stream of `[tokens, width]`, whatever the model's
//! size. Any backend can run it. Each window of the text begins with an empty cache.

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::Arc;

use lathe_program::{
    Backend, BackendError, BlockTable, Executor, ExecutorOptions, KvFormat, Program, Routing,
    SequenceId, Step, StepInput, StepSequence, TokenSource, Value, Weight, WeightSource,
    replace_tables,
};
use lathe_tensor::Tensor;
use rayon::prelude::*;

use crate::error::QuantError;
use crate::section::Section;
use crate::statistics::Statistics;

/// The text that calibration runs, and the backend that runs it.
#[derive(Clone, Copy)]
pub struct Calibration<'a> {
    /// The backend that runs the layers.
    pub backend: &'a dyn Backend,
    /// The text, as tokens.
    pub tokens: &'a [u32],
    /// Tokens of a window. Tokens of different windows do not attend to each other.
    pub window: usize,
    /// Worker threads of the backend; `None` means every core.
    pub threads: Option<usize>,
    /// See [`ExecutorOptions::exact`].
    pub exact: bool,
    /// The format of the cache; `f32` if `None`.
    pub kv_format: Option<KvFormat>,
}

/// Shared, read-only numbers. A stream is the largest thing that calibration holds, so it is not
/// copied.
#[derive(Debug, Clone)]
pub(crate) struct Floats(Arc<Vec<f32>>);

impl From<Vec<f32>> for Floats {
    fn from(values: Vec<f32>) -> Self {
        Floats(Arc::new(values))
    }
}

impl Deref for Floats {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

/// The stream between two layers: `[tokens, width]`.
#[derive(Debug, Clone)]
pub(crate) struct Stream {
    pub width: usize,
    pub values: Floats,
}

impl Stream {
    /// The rows `rows` as a step's input.
    fn rows(&self, rows: std::ops::Range<usize>) -> StepInput {
        StepInput { values: self.values[rows.start * self.width..rows.end * self.width].to_vec() }
    }
}

/// The streams that enter a layer.
#[derive(Debug, Clone)]
pub(crate) struct Prefixes {
    /// The stream that calibration runs through the layer.
    pub stream: Stream,
    /// The float model's stream, if a technique compares the two.
    pub float: Option<Stream>,
}

/// The output of a section for one window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Seen<'a> {
    /// One slice for each tap, `[rows, width]`.
    pub taps: &'a [&'a [f32]],
    /// The chosen experts of each router, `[rows, experts_per_token]`.
    pub routings: &'a [Vec<u32>],
}

/// The weights of a section, in their state at this point of the job.
struct SectionWeights(Vec<Tensor>);

impl WeightSource for SectionWeights {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        Ok(self.0[weight.0 as usize].clone())
    }
}

impl Calibration<'_> {
    /// Checks that `program` knows all tokens.
    ///
    /// # Errors
    /// If there are fewer than two tokens, or one is outside the vocabulary.
    pub(crate) fn check(&self, program: &Program) -> Result<(), QuantError> {
        let too_few = match self.tokens.len() {
            0 => "there are no tokens",
            1 => "1 token, expected a text of at least 2",
            _ => "",
        };
        if !too_few.is_empty() {
            return Err(QuantError::Calibration(too_few.to_owned()));
        }
        match self.tokens.iter().find(|token| **token as usize >= program.vocabulary) {
            None => Ok(()),
            Some(token) => Err(QuantError::Calibration(format!(
                "token {token}, the vocabulary has {}",
                program.vocabulary
            ))),
        }
    }

    /// Runs `section` on all windows, in order. `seen` gets the values of each tap and the choices
    /// of each router. `weight` loads the weights. `stream` is the section's input (`None` if the
    /// section begins with the tokens).
    ///
    /// # Errors
    /// If a weight cannot be loaded or the backend fails.
    pub(crate) fn run(
        &self,
        section: &Section,
        stream: Option<&Stream>,
        weight: &mut dyn FnMut(Weight) -> Result<Tensor, QuantError>,
        seen: &mut dyn FnMut(Seen<'_>),
    ) -> Result<(), QuantError> {
        let mut prepared = self.prepare(section, stream, weight)?;
        (0..prepared.windows()).try_for_each(|window| prepared.run(window, seen))
    }

    /// Prepares `section` with its weights and `stream`. It then runs one window at a time.
    ///
    /// # Errors
    /// If a weight cannot be loaded or the backend fails.
    pub(crate) fn prepare(
        &self,
        section: &Section,
        stream: Option<&Stream>,
        weight: &mut dyn FnMut(Weight) -> Result<Tensor, QuantError>,
    ) -> Result<Prepared<'_>, QuantError> {
        let program = Arc::new(section.program.clone());
        let tensors = section.weights.iter().map(|origin| weight(*origin));
        let weights = SectionWeights(tensors.collect::<Result<_, _>>()?);
        let window = self.window.clamp(1, program.context_max);
        let stride = window.div_ceil(program.kv.block_tokens);
        let options = ExecutorOptions {
            kv_blocks: (program.kv.groups.len() * stride).max(1),
            kv_format: Some(self.kv_format.unwrap_or(KvFormat::F32)),
            rows_max: window,
            threads: self.threads,
            exact: self.exact,
        };
        let executor = self.backend.prepare(Arc::clone(&program), &weights, &options)?;
        let (tokens, stream) = (self.tokens, stream.cloned());
        Ok(Prepared { executor, program, tokens, stream, window, stride })
    }
}

/// A section that is ready to run.
pub(crate) struct Prepared<'a> {
    executor: Box<dyn Executor>,
    program: Arc<Program>,
    tokens: &'a [u32],
    /// The input stream, if the section has an input.
    stream: Option<Stream>,
    window: usize,
    stride: usize,
}

impl Prepared<'_> {
    /// The number of windows of the text.
    pub(crate) fn windows(&self) -> usize {
        self.tokens.len().div_ceil(self.window)
    }

    /// Runs window `index`.
    ///
    /// # Errors
    /// If the backend fails.
    pub(crate) fn run(
        &mut self,
        index: usize,
        seen: &mut dyn FnMut(Seen<'_>),
    ) -> Result<(), QuantError> {
        let Self { executor, program, tokens, stream, window, stride } = self;
        let first = index * *window;
        let text = &tokens[first..tokens.len().min(first + *window)];
        let expanded = executor.expanded_until(text.len());
        let mut step = step_of(program, text, expanded, *stride as u32);
        step.inputs = stream.iter().map(|it| it.rows(first..first + text.len())).collect();
        let taps: Vec<Vec<f32>> =
            executor.run(&step)?.captures.iter().map(|tap| tap.to_vec()).collect();
        let width = |tap: usize| program.capture_widths()[tap];
        let rows = text.len();
        let taps: Vec<&[f32]> =
            taps.iter().enumerate().map(|(tap, it)| &it[..rows * width(tap)]).collect();
        let chosen = |index| {
            let routing = executor.routing(Routing(index as u32));
            routing.map_or(Vec::new(), |it| it.experts.to_vec())
        };
        let routings: Vec<Vec<u32>> = (0..program.routings).map(chosen).collect();
        seen(Seen { taps: &taps, routings: &routings });
        Ok(())
    }
}

/// A step of one sequence from an empty cache, with `stride` pages of the pool for each group.
/// Sliding windows keep all their pages. That takes more memory than serving does and gives the
/// same numbers.
pub(crate) fn step_of(program: &Program, tokens: &[u32], expanded: usize, stride: u32) -> Step {
    let rows = tokens.len();
    let pages = rows.div_ceil(program.kv.block_tokens) as u32;
    let tables: Vec<BlockTable> = (0..program.kv.groups.len() as u32)
        .map(|group| BlockTable {
            first: 0,
            blocks: (0..pages).map(|p| group * stride + p).collect(),
        })
        .collect();
    let id = SequenceId(0);
    let sequence = StepSequence {
        id,
        first_row: 0,
        rows: rows as u32,
        cached: 0,
        expanded: expanded as u32,
        long_rope: program.long_rope(rows),
        ancestors: None,
    };
    Step {
        tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
        positions: (0..rows as u32).collect(),
        sequences: vec![sequence],
        tables: replace_tables(id, &tables),
        ..Step::default()
    }
}

/// The statistics of the inputs of one layer's linear ops.
#[derive(Debug, Clone, Default)]
pub(crate) struct Observed(BTreeMap<Value, Arc<Statistics>>);

impl Observed {
    /// Empty statistics for `values` with their widths. `products` says whether products of
    /// different channels are kept.
    pub(crate) fn new(values: impl Iterator<Item = (Value, usize)>, products: bool) -> Self {
        let new = if products { Statistics::new } else { Statistics::without_products };
        Self(values.map(|(value, width)| (value, Arc::new(new(width)))).collect())
    }

    /// Adds the rows of one window for each of `values`. Values that are not observed are skipped.
    pub(crate) fn add(&mut self, values: &[Value], rows: &[&[f32]]) {
        let rows: BTreeMap<&Value, &&[f32]> = values.iter().zip(rows).collect();
        let all: Vec<(&Value, &mut Arc<Statistics>)> = self.0.iter_mut().collect();
        // All values run together, because a narrow input alone does not keep all threads busy.
        all.into_par_iter().with_max_len(1).for_each(|(value, statistics)| {
            if let Some(rows) = rows.get(value) {
                Arc::make_mut(statistics).add(rows);
            }
        });
    }

    pub(crate) fn of(&self, value: Value) -> Option<&Arc<Statistics>> {
        self.0.get(&value)
    }
}

//! What several tests share: running a model on the reference backend, and where fixtures are.
#![allow(dead_code)]

use std::sync::Arc;

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::weights::ModelWeights;
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions, Program, SequenceId,
    Step, StepSequence, TokenSource, Weight, WeightSource, replace_tables,
};
use lathe_tensor::{Bytes, Format, Tensor, codec};

/// Weights rounded to bf16, as a converter to a Hugging Face directory leaves them.
struct Rounded<'a>(ModelWeights<'a>);

impl WeightSource for Rounded<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let tensor = self.0.tensor(weight)?;
        let codes = Bytes::new(codec::quantize(Format::BF16, &tensor.to_f32()));
        Ok(Tensor::new(tensor.shape, Format::BF16, codes).expect("fits"))
    }
}

/// A prepared reference executor for one sequence of up to `context` tokens.
pub(crate) fn prepare(model: &Model, context: usize) -> Box<dyn Executor> {
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(context)).expect("lowers"));
    let weights = model.weights(&program).expect("weights");
    let unused: Vec<_> = weights.unused().iter().filter(|name| !name.ends_with("bias")).collect();
    assert!(unused.is_empty(), "tensors that nothing uses: {unused:?}");
    prepare_with(&program, &weights)
}

/// As [`prepare`], with the weights rounded to bf16.
pub(crate) fn prepare_rounded(model: &Model, context: usize) -> Box<dyn Executor> {
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(context)).expect("lowers"));
    prepare_with(&program, &Rounded(model.weights(&program).expect("weights")))
}

/// A prepared reference executor of `program` for one sequence as long as its context.
pub(crate) fn prepare_with(
    program: &Arc<Program>,
    weights: &dyn WeightSource,
) -> Box<dyn Executor> {
    let context = program.context_max;
    let options = ExecutorOptions {
        kv_blocks: blocks(program, context) * program.kv.groups.len(),
        kv_format: None,
        rows_max: context,
        threads: Some(2),
        exact: true,
    };
    ReferenceBackend::new().prepare(Arc::clone(program), weights, &options).expect("prepares")
}

fn blocks(program: &Program, tokens: usize) -> usize {
    tokens.div_ceil(program.kv.block_tokens)
}

/// Logits `[wanted, vocabulary]` of rows `wanted` of `tokens`, which follow `cached` others.
pub(crate) fn run(
    executor: &mut dyn Executor,
    cached: usize,
    tokens: &[u32],
    wanted: std::ops::Range<usize>,
) -> Vec<f32> {
    let program = Arc::clone(executor.program());
    let count = blocks(&program, program.context_max) as u32;
    let table = |group: u32| BlockTable {
        first: 0,
        blocks: (group * count..(group + 1) * count).collect(),
    };
    let tables: Vec<BlockTable> = (0..program.kv.groups.len() as u32).map(table).collect();
    let id = SequenceId(0);
    let step = Step {
        tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
        positions: (cached as u32..(cached + tokens.len()) as u32).collect(),
        sequences: vec![StepSequence {
            id,
            first_row: 0,
            rows: tokens.len() as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: program.long_rope(program.context_max),
            ancestors: None,
        }],
        tables: replace_tables(id, &tables),
        choices: (wanted.start as u32..wanted.end as u32).map(Choice::logits_of).collect(),
        inputs: Vec::new(),
    };
    executor.run(&step).expect("runs").logits.to_vec()
}

/// The natural logarithm of the softmax at `token`.
pub(crate) fn log_probability(logits: &[f32], token: u32) -> f64 {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max) as f64;
    let sum: f64 = logits.iter().map(|x| (*x as f64 - max).exp()).sum();
    logits[token as usize] as f64 - max - sum.ln()
}

/// The token with the largest logit.
pub(crate) fn best(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
    best.expect("a vocabulary").0 as u32
}

//! The expanded and the absorbed form of latent attention make the same logits, up to rounding.

use std::sync::Arc;

use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_program::conformance::SeededWeights;
use lathe_program::conformance::models::SmallDecoder;
use lathe_program::{
    Backend, BlockTable, Choice, ExecutorOptions, KvFormat, Program, SequenceId, Step,
    StepSequence, TokenSource, replace_tables,
};
use lathe_tensor::Format;

const TOKENS: usize = 200;

/// Logits of a text in two chunks, with its first `expanded` rows expanded.
fn logits(
    program: &Arc<Program>,
    kv_format: KvFormat,
    exact: bool,
    expanded: usize,
    threads: usize,
) -> Vec<f32> {
    let weights = SeededWeights { program, format: Format::F32, seed: 5 };
    let blocks = TOKENS.div_ceil(program.kv.block_tokens);
    let options = ExecutorOptions {
        kv_blocks: blocks,
        kv_format: Some(kv_format),
        rows_max: TOKENS,
        threads: Some(threads),
        exact,
    };
    let backend = CpuBackend::new(CpuOptions::default());
    let mut executor = backend.prepare(Arc::clone(program), &weights, &options).unwrap();
    let mut all = Vec::new();
    for chunk in [0..130, 130..TOKENS] {
        let rows = chunk.len() as u32;
        let id = SequenceId(0);
        let table = BlockTable { first: 0, blocks: (0..blocks as u32).rev().collect() };
        let sequence = StepSequence {
            id,
            first_row: 0,
            rows,
            cached: chunk.start as u32,
            expanded: expanded as u32,
            long_rope: false,
            ancestors: None,
        };
        let step = Step {
            tokens: chunk.clone().map(|at| TokenSource::Given((at * at % 83) as u32)).collect(),
            positions: chunk.map(|at| at as u32).collect(),
            sequences: vec![sequence],
            tables: replace_tables(id, &[table]),
            choices: (0..rows).map(Choice::logits_of).collect(),
            inputs: Vec::new(),
        };
        all.extend_from_slice(executor.run(&step).unwrap().logits);
    }
    all
}

/// The largest difference and the largest number.
fn compare(a: &[f32], b: &[f32]) -> (f32, f32) {
    assert_eq!(a.len(), b.len());
    let difference = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    (difference, a.iter().map(|x| x.abs()).fold(0.0, f32::max))
}

/// In `f32` the forms differ only by the rounding of sums of some hundred terms: 1e-5 of the
/// largest logit after two layers. Matrices in halves (not `exact`) and latents of four bits are
/// the same numbers in both forms. Rounding of matrices and queries differs: 1e-2.
#[test]
fn both_forms_agree() {
    let program = Arc::new(SmallDecoder::latent().program());
    for (kv_format, exact, tolerance) in [
        (KvFormat::F32, true, 1e-5),
        (KvFormat::Int4, true, 1e-5),
        (KvFormat::F16, false, 1e-2),
        (KvFormat::Int4, false, 1e-2),
    ] {
        let absorbed = logits(&program, kv_format, exact, 0, 2);
        for expanded in [TOKENS, 128, 150] {
            let found = logits(&program, kv_format, exact, expanded, 2);
            let (difference, largest) = compare(&absorbed, &found);
            assert!(
                difference <= tolerance * largest,
                "{kv_format:?}, exact {exact}, {expanded} rows: {difference} of {largest}"
            );
            assert!(difference > 0.0, "the forms are expected to round differently");
            assert!(found == logits(&program, kv_format, exact, expanded, 1), "threads matter");
        }
    }
}

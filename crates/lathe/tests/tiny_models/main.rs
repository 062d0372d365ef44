//! Every family's tiny random checkpoint (`tests/fixtures/make_tiny_models.py`) on the CPU backend:
//! the logits of Hugging Face transformers in `f32`, and texts that no schedule changes.

mod logits;
mod quantized;
mod schedules;

use std::path::PathBuf;
use std::sync::Arc;

use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::{Backend, Executor, ExecutorOptions, Program};

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"))
}

/// All tiny models by name.
fn models() -> Vec<Model> {
    let entries = std::fs::read_dir(fixtures()).expect("fixtures");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    let open = |path: &PathBuf| Model::open(path).unwrap_or_else(|e| panic!("{path:?}: {e}"));
    paths.iter().map(open).collect()
}

/// The program of `model` for its whole context, with blocks of a few positions.
fn program(model: &Model, block_tokens: usize) -> Arc<Program> {
    let options = LowerOptions { block_tokens, ..LowerOptions::new(model.spec.context_max) };
    Arc::new(lower(&model.spec, &options).expect("lowers"))
}

fn options(kv_blocks: usize, rows_max: usize, exact: bool) -> ExecutorOptions {
    ExecutorOptions { kv_blocks, kv_format: None, rows_max, threads: Some(1), exact }
}

/// `model` on the CPU.
fn executor(model: &Model, program: &Arc<Program>, options: &ExecutorOptions) -> Box<dyn Executor> {
    let weights = model.weights(program).expect("weights");
    let backend = CpuBackend::new(CpuOptions::default());
    backend.prepare(Arc::clone(program), &weights, options).expect("prepares")
}

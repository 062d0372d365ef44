//! Adapters beside their matrices against the same terms folded in.

use std::path::Path;
use std::sync::Arc;

use lathe_cpu::CpuBackend;
use lathe_model::Model;
use lathe_model::adapter::AdapterChoice;
use lathe_model::export::{GgufOptions, to_gguf};
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::spec::LowRank;
use lathe_program::conformance::Random;
use lathe_program::reference::ReferenceBackend;
use lathe_program::shard::{ShardOptions, ShardedBackend};
use lathe_program::{
    Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions, HostCollective,
    InputTransform, Op, Program, SequenceId, Step, StepSequence, TokenSource, Weight, WeightSource,
    replace_tables,
};
use lathe_tensor::{Bytes, Format, Tensor, codec};

use crate::made::{Made, make};
use crate::{bases, fixtures};

/// Rows of the prompt.
const ROWS: usize = 21;

fn cpu() -> CpuBackend {
    CpuBackend::new(Default::default())
}

fn with_adapter(base: &Path, made: &Made) -> Model {
    let choice = AdapterChoice::Folder(made.adapter());
    Model::open_with(base, &choice.into()).unwrap_or_else(|error| panic!("{base:?}: {error}"))
}

struct Ready {
    executor: Box<dyn Executor>,
    tokens: Vec<u32>,
}

fn prepare_with(
    program: &Arc<Program>,
    weights: &dyn WeightSource,
    backend: &dyn Backend,
    exact: bool,
) -> Ready {
    let options = ExecutorOptions {
        kv_blocks: ROWS.div_ceil(program.kv.block_tokens) * program.kv.groups.len(),
        kv_format: None,
        rows_max: ROWS,
        threads: Some(2),
        exact,
    };
    let executor = backend.prepare(Arc::clone(program), weights, &options).expect("prepares");
    let mut random = Random::new(9);
    let tokens = (0..ROWS).map(|_| random.below(program.vocabulary) as u32).collect();
    Ready { executor, tokens }
}

fn prepare(model: &Model, backend: &dyn Backend, exact: bool) -> Ready {
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(ROWS)).expect("lowers"));
    let weights = model.weights(&program).expect("weights");
    prepare_with(&program, &weights, backend, exact)
}

impl Ready {
    /// Logits of all rows, `chunk` rows a step.
    fn logits(&mut self, chunk: usize) -> Vec<f32> {
        let program = Arc::clone(self.executor.program());
        let count = ROWS.div_ceil(program.kv.block_tokens) as u32;
        let mut logits = Vec::new();
        for (index, tokens) in self.tokens.chunks(chunk).enumerate() {
            let (cached, rows) = ((index * chunk) as u32, tokens.len() as u32);
            let tables: Vec<BlockTable> = (0..program.kv.groups.len() as u32)
                .map(|g| BlockTable { first: 0, blocks: (g * count..(g + 1) * count).collect() })
                .collect();
            let step = Step {
                tokens: tokens.iter().map(|token| TokenSource::Given(*token)).collect(),
                positions: (cached..cached + rows).collect(),
                sequences: vec![StepSequence {
                    id: SequenceId(0),
                    first_row: 0,
                    rows,
                    cached,
                    expanded: 0,
                    long_rope: program.long_rope(program.context_max),
                    ancestors: None,
                }],
                tables: replace_tables(SequenceId(0), &tables),
                choices: (0..rows).map(Choice::logits_of).collect(),
                inputs: Vec::new(),
            };
            logits.extend_from_slice(self.executor.run(&step).expect("runs").logits);
        }
        logits
    }
}

fn all_logits(model: &Model, backend: &dyn Backend, exact: bool) -> Vec<f32> {
    prepare(model, backend, exact).logits(ROWS)
}

/// The largest difference, as a part of the largest logit.
fn off(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    assert!(found.iter().all(|logit| logit.is_finite()));
    let largest = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
    found.iter().zip(expected).fold(0f32, |most, (f, e)| most.max((f - e).abs())) / largest
}

/// Products are associated otherwise, so that results differ by rounding of `f32` alone; where a
/// router's margin is smaller than that, a token goes to another expert.
#[test]
fn adapters_compute_what_folded_weights_do() {
    let mut wrong = Vec::new();
    for (seed, base) in bases().iter().enumerate() {
        let made = make(base, seed as u64, 1.0);
        assert!(made.modules > 1, "{base:?}");
        let adapted = with_adapter(base, &made);
        let folded = Model::open(&made.folded()).expect("opens");
        let plain = Model::open(base).expect("opens");
        let backends: [(&dyn Backend, bool); 3] =
            [(&ReferenceBackend::new(), true), (&cpu(), true), (&cpu(), false)];
        for (backend, exact) in backends {
            // Its experts' inputs are rounded to codes, and a token near a router's border goes
            // to another expert.
            if !exact && base.ends_with("gpt-oss-mxfp4") {
                continue;
            }
            let expected = all_logits(&folded, backend, exact);
            let found = off(&all_logits(&adapted, backend, exact), &expected);
            let changed = off(&all_logits(&plain, backend, exact), &expected);
            let what = format!("{base:?} on {}, exact {exact}", backend.name());
            println!("{what}: off by {found:.1e}, the adapter changes {changed:.1e}");
            let bound = if exact { 1e-5 } else { 1e-3 };
            if found > bound || changed < 1e-2 {
                wrong.push(format!("{what}: off by {found:.1e} of {changed:.1e}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn rows_are_the_same_in_any_company() {
    for (seed, base) in bases().iter().enumerate() {
        let made = make(base, seed as u64, 0.7);
        let adapted = with_adapter(base, &made);
        let mut ready = prepare(&adapted, &cpu(), false);
        let at_once = ready.logits(ROWS);
        for chunk in [1, 6] {
            assert!(ready.logits(chunk) == at_once, "{base:?} in chunks of {chunk}");
        }
    }
}

fn cpu_rank(end: Arc<HostCollective>) -> Box<dyn Backend> {
    Box::new(cpu().collective(end))
}

fn reference_rank(end: Arc<HostCollective>) -> Box<dyn Backend> {
    Box::new(ReferenceBackend::new().collective(end))
}

/// Sums over ranks are added in another order.
#[test]
fn two_ranks_compute_what_one_does() {
    for (seed, base) in bases().iter().enumerate() {
        let made = make(base, seed as u64, 0.7);
        let adapted = with_adapter(base, &made);
        let two = ShardOptions::new(2);
        let reference: [&dyn Backend; 2] =
            [&ReferenceBackend::new(), &ShardedBackend::new(two.clone(), reference_rank)];
        for [one, two] in [reference, [&cpu(), &ShardedBackend::new(two, cpu_rank)]] {
            let expected = all_logits(&adapted, one, true);
            let found = off(&all_logits(&adapted, two, true), &expected);
            assert!(found < 1e-4, "{base:?} on {}: off by {found:.1e}", one.name());
        }
    }
}

/// No rank sums or gathers more often than without the adapter.
#[test]
fn adapters_ask_for_no_further_collectives() {
    for name in ["llama", "qwen2-moe", "deepseek-v3", "phi3"] {
        let base = fixtures().join(name);
        let made = make(&base, 3, 1.0);
        let collectives = |model: &Model| {
            let program = lower(&model.spec, &LowerOptions::new(ROWS)).expect("lowers");
            let ranks = lathe_program::shard::shard(&program, &ShardOptions::new(2)).expect("cut");
            let is_collective = |op: &&Op| matches!(op.kind(), "all_reduce" | "all_gather");
            ranks[0].program.ops.iter().filter(is_collective).count()
        };
        let plain = Model::open(&base).expect("opens");
        assert_eq!(collectives(&with_adapter(&base, &made)), collectives(&plain), "{name}");
    }
}

/// A model's linear layers in another format, and, for a program
/// without adapters, with their low-rank terms added.
struct Converted<'a> {
    model: &'a Model,
    format: Format,
    /// The program with the adapter, and its weights.
    adapted: (&'a Program, &'a dyn WeightSource),
    /// The program that runs.
    program: &'a Program,
}

impl WeightSource for Converted<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let decl = self.program.weight(weight);
        let (adapted, weights) = self.adapted;
        let named = |name: &str| weights.tensor(adapted.weight_named(name).expect("declared"));
        let tensor = named(&decl.name)?;
        let Some(low_rank) = self.model.spec.adapters.get(&decl.name) else { return Ok(tensor) };
        // Rows that are no whole number of blocks stay as they are.
        let tensor = match tensor.columns().is_multiple_of(self.format.block_len()) {
            true => {
                let codes = Bytes::new(codec::quantize(self.format, &tensor.to_f32()));
                Tensor::new(tensor.shape, self.format, codes).expect("fits")
            }
            false => tensor,
        };
        if std::ptr::eq(adapted, self.program) {
            return Ok(tensor);
        }
        let [down, up] = [named(&low_rank.down)?, named(&LowRank::up_of(&decl.name))?];
        let (down, up, columns) = (down.to_f32(), up.to_f32(), tensor.columns());
        let mut values = tensor.to_f32();
        for (at, value) in values.iter_mut().enumerate() {
            let (row, column) = (at / columns, at % columns);
            let term = |k: usize| {
                f64::from(up[row * low_rank.rank + k]) * f64::from(down[k * columns + column])
            };
            let sum: f64 = (0..low_rank.rank).map(term).sum();
            *value = (f64::from(*value) + f64::from(low_rank.scale) * sum) as f32;
        }
        Ok(Tensor::from_f32(&tensor.shape, &values))
    }
}

/// The matrices keep their own format, the terms theirs.
#[test]
fn adapters_correct_quantized_weights() {
    for (name, format) in [("llama", "q8_0"), ("phi3", "q4_0"), ("qwen3", "q4_1")] {
        let base = fixtures().join(name);
        let made = make(&base, 4, 1.0);
        let model = with_adapter(&base, &made);
        let plain = Model::open(&base).expect("opens");
        let [adapted, folded] = [&model, &plain]
            .map(|model| Arc::new(lower(&model.spec, &LowerOptions::new(ROWS)).expect("lowers")));
        let weights = model.weights(&adapted).expect("weights");
        let format = Format::parse(format).expect("a format");
        let backends: [&dyn Backend; 2] = [&ReferenceBackend::new(), &cpu()];
        for backend in backends {
            let [found, expected] = [&adapted, &folded].map(|program| {
                let adapted = (&*adapted, &weights as &dyn WeightSource);
                let source = Converted { model: &model, format, adapted, program };
                prepare_with(program, &source, backend, true).logits(ROWS)
            });
            let off = off(&found, &expected);
            assert!(off < 1e-5, "{name} in {format} on {}: off by {off:.1e}", backend.name());
        }
    }
}

/// The rows of matrices whose inputs are rotated, rotated as well: their products are the same.
struct Rotated<'a>(&'a dyn WeightSource, &'a Program, &'a Model);

impl WeightSource for Rotated<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let tensor = self.0.tensor(weight)?;
        let Some(transform) = self.2.spec.inputs.get(&self.1.weight(weight).name) else {
            return Ok(tensor);
        };
        let mut values = tensor.to_f32();
        transform.apply(&mut values, tensor.columns());
        Ok(Tensor::from_f32(&tensor.shape, &values))
    }
}

/// What is done to the input of a matrix is not done to that of its adapter.
#[test]
fn adapters_read_inputs_as_they_are() {
    for name in ["llama", "qwen2-moe", "gemma3"] {
        let base = fixtures().join(name);
        let made = make(&base, 5, 1.0);
        let plain = with_adapter(&base, &made);
        let mut turned = with_adapter(&base, &made);
        let rotation = InputTransform { hadamard: Some(16), ..InputTransform::default() };
        // Not all, so that groups fall apart in different ways.
        let whole = lower(&plain.spec, &LowerOptions::new(ROWS)).expect("lowers");
        let columns =
            |name: &str| whole.weight(whole.weight_named(name).expect("declared")).shape[1];
        let names = plain.spec.adapters.keys().filter(|name| rotation.check(columns(name)).is_ok());
        let names = names.enumerate().filter(|(index, _)| index % 4 != 3);
        turned.spec.inputs = names.map(|(_, name)| (name.clone(), rotation)).collect();
        let program = Arc::new(lower(&turned.spec, &LowerOptions::new(ROWS)).expect("lowers"));
        assert!(program.ops.iter().any(|op| op.kind() == "transform"));
        let weights = turned.weights(&program).expect("weights");
        let rotated = Rotated(&weights, &program, &turned);
        let backends: [&dyn Backend; 2] = [&ReferenceBackend::new(), &cpu()];
        for backend in backends {
            let expected = all_logits(&plain, backend, true);
            let found = prepare_with(&program, &rotated, backend, true).logits(ROWS);
            let off = off(&found, &expected);
            assert!(off < 1e-5, "{name} on {}: off by {off:.1e}", backend.name());
        }
    }
}

/// Names are Hugging Face's whatever the base lies in; GGUF's rows of queries and keys are
/// permuted.
#[test]
fn bases_in_gguf_take_the_same_adapter() {
    let base = fixtures().join("llama");
    let made = make(&base, 1, 1.0);
    let adapted = with_adapter(&base, &made);
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("llama.gguf");
    let options = GgufOptions { format: Format::F32, embedding: None };
    to_gguf(&Model::open(&base).expect("opens"), &path, &options).expect("exports");
    let from_gguf = with_adapter(&path, &made);
    assert_eq!(from_gguf.spec.adapters, adapted.spec.adapters);
    let reference = ReferenceBackend::new();
    let expected = all_logits(&adapted, &reference, true);
    assert!(off(&all_logits(&from_gguf, &reference, true), &expected) < 1e-6);
}

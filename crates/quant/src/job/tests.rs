//! Jobs on the tiny checkpoints: folds change no logits, calibration sees what it should, and what
//! cannot be is named.

use std::path::Path;
use std::sync::Arc;

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, BackendError, Executor, ExecutorOptions, KvFormat, ObservedInput, Observer,
    WeightSource,
};

use super::*;
use crate::calibrate;

const TOKENS: [u32; 24] =
    [3, 60, 17, 5, 5, 42, 9, 33, 21, 8, 1, 2, 30, 31, 44, 50, 12, 7, 19, 28, 4, 40, 11, 6];

fn open(name: &str) -> (Model, Arc<Program>) {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    let model = Model::open(&root.join(name)).expect(name);
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(64)).expect(name));
    (model, program)
}

fn executor(
    program: &Arc<Program>,
    weights: &dyn WeightSource,
    rows_max: usize,
) -> (Box<dyn Executor>, ExecutorOptions) {
    let options = ExecutorOptions {
        kv_blocks: calibrate::pages(program, 24),
        kv_format: Some(KvFormat::F32),
        rows_max,
        threads: None,
        exact: true,
    };
    let executor = ReferenceBackend::new().prepare(Arc::clone(program), weights, &options);
    (executor.expect("prepares"), options)
}

fn calibrated(program: &Arc<Program>, weights: &dyn WeightSource, rows_max: usize) -> Calibration {
    let (mut executor, options) = executor(program, weights, rows_max);
    calibrate::run(&mut *executor, &options, &TOKENS, 12, |_| true, &mut |_| ()).expect("runs")
}

/// What a job made of all weights before anything is rounded.
struct Prepared(Vec<Tensor>);

impl Prepared {
    fn of(job: &Job<'_>) -> Self {
        let one = |index: usize| match job.norms.get(&Weight(index as u32)) {
            Some(norm) => norm.clone(),
            None => {
                let (shape, values) = job.load(Weight(index as u32)).expect("loads");
                Tensor::from_f32_vec(shape, values)
            }
        };
        Prepared((0..job.program.weights.len()).map(one).collect())
    }
}

impl WeightSource for Prepared {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        Ok(self.0[weight.0 as usize].clone())
    }
}

/// The input of the head, for every row.
#[derive(Default)]
struct LastHidden(Vec<f32>);

impl Observer for LastHidden {
    fn op(&mut self, _: usize, op: &Op, inputs: &[ObservedInput<'_>]) {
        if matches!(op, Op::Logits { .. }) {
            self.0 = inputs[0].data.to_vec();
        }
    }
}

fn last_hidden(program: &Arc<Program>, weights: &dyn WeightSource) -> Vec<f32> {
    let (mut executor, _) = executor(program, weights, 24);
    let step = calibrate::step_of(program, &TOKENS, 0, executor.expanded_until(24), 2);
    let mut seen = LastHidden::default();
    executor.run_observed(&step, &mut seen).expect("runs");
    seen.0
}

#[test]
fn folded_scales_change_no_output() {
    // Plain and offset norms, norms with a bias, tied heads, both kinds of gated activation.
    for (name, format) in [
        ("llama", "int4-g16-f32"),
        ("llama-tied", "int4-g16-f32"),
        ("qwen3", "int4-g16-f32"),
        ("gemma", "int4-g16-f32"),
        ("gemma3", "int4-g16-f32"),
        ("cohere", "int4-g16-f32"),
    ] {
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let calibration = calibrated(&program, &weights, 24);
        let recipe = Recipe::simple(Format::parse(format).unwrap(), "awq+rtn").unwrap();
        let mut job = Job::new(&weights, &recipe, Some(&calibration), |_| ()).expect(name);
        job.prepare().expect(name);
        let scaled = job.prepared.iter().filter(|it| it.scales.is_some_and(|[a, b]| a < b));
        let layers = model.spec.layers.len();
        let scaled = scaled.count();
        assert!(scaled >= layers, "{name}: {scaled} of {layers} layers: {:?}", job.prepared);
        let expected = last_hidden(&program, &weights);
        let found = last_hidden(&program, &Prepared::of(&job));
        let most = expected.iter().fold(0f32, |most, x| most.max(x.abs()));
        for (found, expected) in found.iter().zip(&expected) {
            assert!((found - expected).abs() < 1e-5 * most, "{name}: {found} {expected}");
        }
    }
}

#[test]
fn calibration_is_the_same_however_steps_are_cut() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let (whole, cut) = (calibrated(&program, &weights, 24), calibrated(&program, &weights, 5));
    assert_eq!((whole.tokens, cut.tokens), (24, 24));
    let mut seen = 0;
    for (index, op) in program.ops.iter().enumerate() {
        let (Op::Linear { input, .. }, Some(whole), Some(cut)) =
            (op, whole.of(index), cut.of(index))
        else {
            continue;
        };
        assert_eq!((whole.rows(), whole.width()), (24, program.value_width(*input)));
        let close = |(a, b): (f64, f64)| (a - b).abs() < 1e-4 * (1.0 + a.abs());
        assert!(whole.hessian().into_iter().zip(cut.hessian()).all(close));
        seen += 1;
    }
    assert_eq!(seen, 4 * model.spec.layers.len());
    let (mut executor, options) = executor(&program, &weights, 24);
    for (tokens, expected) in [(&[][..], "no tokens"), (&[1, 1 << 30][..], "token 1073741824")] {
        let found = calibrate::run(&mut *executor, &options, tokens, 12, |_| true, &mut |_| ());
        let error = found.unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn what_cannot_be_quantized_is_named() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let calibration = calibrated(&program, &weights, 24);
    let refused = |text: &str, calibration: Option<&Calibration>| {
        let recipe = Recipe::parse(text, None).unwrap();
        let job = Job::new(&weights, &recipe, calibration, |_| ());
        let outcome = job.and_then(|mut job| job.prepare());
        outcome.unwrap_err().to_string()
    };
    let rtn = "[[technique]]\nuse = \"rtn\"";
    for (head, expected) in [
        // ffn.down has 48 columns.
        ("format = \"int4-g32-bf16\"", ["layers.0.ffn.down", "48"]),
        ("format = \"q4_0\"", ["layers.0.ffn.down", "48"]),
        ("format = \"q4_0\"\ntensors = [\"layers.9.*\"]", ["no tensor is called", "layers.9.*"]),
        ("format = \"q4_0\"\ntensors = [\"embedding\"]", ["embedding", "cannot be quantized"]),
        ("format = \"q4_0\"\nkeep = [\"*\"]", ["quantizes no tensor", ""]),
    ] {
        let error = refused(&format!("{head}\n{rtn}"), None);
        assert!(expected.iter().all(|it| error.contains(it)), "{head}: {error}");
    }
    let gptq = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"gptq\"";
    let error = refused(gptq, None);
    assert!(error.contains("layers.0.attention.query needs calibration"), "{error}");
    let error = refused(gptq, Some(&Calibration::default()));
    assert!(error.contains("needs calibration"), "{error}");
    let awq = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"awq\"\n\
               tensors = [\"*.attention.output\"]";
    let error = refused(&format!("{awq}\n{rtn}"), Some(&calibration));
    assert!(error.contains("attention.output") && error.contains("attend"), "{error}");
    let half = "format = \"int4-g16-bf16\"\n[[technique]]\nuse = \"rtn\"\ntensors = [\"*.down\"]";
    let error = refused(half, None);
    assert!(error.contains("no technique rounds tensor layers.0.attention"), "{error}");
}

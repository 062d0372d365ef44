//! Runs that end in the middle of a layer, and runs that continue them.

use std::cell::Cell;
use std::sync::Arc;

use lathe_model::export::Replacement;
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, BackendError, DeviceMemory, Executor, ExecutorOptions, KvFormat, Missing, Program,
    WeightSource,
};
use lathe_tensor::Format;

use super::super::tests::{TOKENS, open};
use super::*;
use crate::recipe::Recipe;

/// The reference backend, which fails after it has prepared some sections.
struct Failing {
    reference: ReferenceBackend,
    left: Cell<usize>,
}

impl Backend for Failing {
    fn name(&self) -> &'static str {
        self.reference.name()
    }

    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing> {
        self.reference.supports(program, options)
    }

    fn memory(&self) -> Result<DeviceMemory, BackendError> {
        self.reference.memory()
    }

    fn default_kv_format(&self, program: &Program, exact: bool) -> KvFormat {
        self.reference.default_kv_format(program, exact)
    }

    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError> {
        self.reference.runs_format(format, columns)
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        let left = self.left.get().checked_sub(1);
        self.left.set(left.ok_or_else(|| BackendError::Device("interrupted".to_owned()))?);
        self.reference.prepare(program, weights, options)
    }
}

fn calibration<'a>(backend: &'a dyn Backend, tokens: &'a [u32]) -> Calibration<'a> {
    Calibration { backend, tokens, window: 12, threads: None, exact: true, kv_format: None }
}

fn recipe(method: &str) -> Recipe {
    Recipe::simple(Format::parse("int4-g16-f32-asym").unwrap(), method).unwrap()
}

/// Everything that a job would hand to a writer.
fn result(job: &mut Job<'_>) -> Vec<(usize, Tensor)> {
    let weights = 0..job.plan.program.weights.len();
    let replaced: Vec<usize> =
        weights.filter(|index| Replacement::format(job, Weight(*index as u32)).is_some()).collect();
    let mut one = |index: usize| Replacement::tensor(job, Weight(index as u32)).expect("a weight");
    replaced.into_iter().map(|index| (index, one(index))).collect()
}

fn planes(tensor: &Tensor) -> [&[u8]; 3] {
    [&tensor.codes, &tensor.scales, &tensor.zeros]
}

#[test]
fn an_interrupted_run_goes_on_and_gives_the_same_bits() {
    for (name, method) in [
        ("llama", "gptq"),
        ("gemma3", "awq+gptq"),
        ("llama", "rotate+gptaq"),
        ("llama", "gptq+low-rank"),
    ] {
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let recipe = recipe(method);
        let reference = ReferenceBackend::new();
        let mut whole = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        whole.calibrate(&model.spec, &calibration(&reference, &TOKENS)).unwrap();
        let reports = whole.reports().tensors.clone();
        let expected = result(&mut whole);
        assert_eq!(whole.corrections().is_empty(), !method.ends_with("low-rank"));

        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("run");
        // One section makes the stream. A layer takes two, and one more if the float model runs
        // too.
        let a_layer = if method.ends_with("gptaq") { 3 } else { 2 };
        let left = Cell::new(2 * a_layer);
        let failing = Failing { reference: ReferenceBackend::new(), left };
        let mut first = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        let error = first
            .calibrate_resumable(&model.spec, &calibration(&failing, &TOKENS), &folder)
            .unwrap_err();
        assert!(matches!(error, QuantError::Backend(_)), "{error}");
        assert!(folder.join("layer-0.safetensors").is_file());
        assert!(!folder.join("layer-1.safetensors").exists());
        drop(first);

        // Finished layers do not run again: only the sections of the other layers do.
        let layers = model.spec.layers.len();
        let left = Cell::new(a_layer * (layers - 1));
        let again = Failing { reference: ReferenceBackend::new(), left };
        let mut seen = Vec::new();
        let mut second =
            Job::new(&weights, &recipe, true, |now| seen.push(now.done)).expect("a job");
        second
            .calibrate_resumable(&model.spec, &calibration(&again, &TOKENS), &folder)
            .expect("goes on");
        assert_eq!(again.left.get(), 0, "{name}");
        assert_eq!(second.reports().tensors.len(), reports.len());
        for (found, expected) in second.reports().tensors.iter().zip(&reports) {
            assert_eq!((&found.tensor, &found.report), (&expected.tensor, &expected.report));
        }
        let found = result(&mut second);
        assert_eq!(second.corrections().len(), whole.corrections().len());
        for (weight, expected) in whole.corrections() {
            let found = &second.corrections()[weight];
            for (found, expected) in [(&found.a, &expected.a), (&found.b, &expected.b)] {
                assert!(found.shape == expected.shape && planes(found) == planes(expected));
            }
        }
        drop(second);
        assert!(seen[0] > 0 && seen.is_sorted(), "{seen:?}");
        assert_eq!(found.len(), expected.len());
        for ((index, found), (_, expected)) in found.iter().zip(&expected) {
            let name = &program.weights[*index].name;
            assert_eq!((&found.shape, found.format), (&expected.shape, expected.format));
            assert!(planes(found) == planes(expected), "{name} differs");
        }
    }
}

#[test]
fn another_run_and_a_damaged_folder_are_refused() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let reference = ReferenceBackend::new();
    let run = |method: &str, tokens: &[u32]| {
        let recipe = recipe(method);
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        job.calibrate_resumable(&model.spec, &calibration(&reference, tokens), folder.path())
    };
    run("gptq", &TOKENS).unwrap();
    let refused = |result: Result<(), QuantError>, expected: &str| {
        let error = result.unwrap_err();
        assert!(matches!(error, QuantError::Resume { .. }), "{error}");
        let text = error.to_string();
        assert!(text.contains(expected), "{text}");
        assert!(text.contains(&folder.path().display().to_string()), "{text}");
    };
    refused(run("awq", &TOKENS), "another recipe");
    refused(run("gptq", &TOKENS[1..]), "another calibration text");
    run("gptq", &TOKENS).unwrap();
    let other = open("llama-tied");
    let other_weights = other.0.weights(&other.1).unwrap();
    let recipe = recipe("gptq");
    let mut job = Job::new(&other_weights, &recipe, true, |_| ()).unwrap();
    let found =
        job.calibrate_resumable(&other.0.spec, &calibration(&reference, &TOKENS), folder.path());
    refused(found, "another model");
    std::fs::write(folder.path().join("layer-1.safetensors"), "no").unwrap();
    refused(run("gptq", &TOKENS), "layer-1.safetensors");
    std::fs::write(folder.path().join("state.json"), "{").unwrap();
    refused(run("gptq", &TOKENS), "state.json");
}

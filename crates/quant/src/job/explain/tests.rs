//! The pass, compared with runs of whole models with the same weights.

use std::sync::Arc;

use lathe_program::reference::ReferenceBackend;
use lathe_program::{BackendError, Program, WeightSource};
use lathe_tensor::Format;

use super::super::tests::{TOKENS, calibration, executor, open};
use super::*;
use crate::budget::planned;
use crate::calibrate::step_of;
use crate::recipe::Recipe;

/// The model's weights, with the job's results where `quantized` says so.
struct Mixed(Vec<Tensor>);

impl WeightSource for Mixed {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        Ok(self.0[weight.0 as usize].clone())
    }
}

fn mixed(job: &Job<'_>, quantized: impl Fn(&str) -> bool) -> Mixed {
    let one = |index: usize| {
        let weight = Weight(index as u32);
        match quantized(&job.plan.name(weight)) {
            true => job.current(weight).expect("made"),
            false => job.unrounded(weight).expect("loads"),
        }
    };
    Mixed((0..job.plan.program.weights.len()).map(one).collect())
}

/// Log-probabilities of all tokens in one window.
fn whole(program: &Arc<Program>, weights: &Mixed) -> Vec<Vec<f64>> {
    let mut executor = executor(program, weights);
    let mut step = step_of(program, &TOKENS, executor.expanded_until(24), 2);
    step.choices = (0..24).map(lathe_program::Choice::logits_of).collect();
    let logits = executor.run(&step).expect("runs").logits.to_vec();
    logits.chunks(program.vocabulary).map(log_softmax).collect()
}

fn mean_kl(base: &[Vec<f64>], model: &[Vec<f64>]) -> f64 {
    let all = base.iter().zip(model).map(|(base, model)| kl_divergence(base, model));
    all.sum::<f64>() / base.len() as f64
}

fn explained<'a>(job: &mut Job<'a>, model: &lathe_model::Model) -> Explanation {
    let backend = ReferenceBackend::new();
    let text = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
    let mut last = Progress { done: 0, total: 0 };
    let mut progress = |now: Progress| {
        assert!(now.done >= last.done && now.done <= now.total);
        last = now;
    };
    let found = job.explain(&model.spec, &text, &mut progress).expect("explains");
    assert_eq!(last.done, last.total);
    found
}

/// Every stream equals a run of the whole model with those weights: with soft caps of logits,
/// windows and experts too.
#[test]
fn each_layer_alone_is_the_whole_model_with_that_layer_quantized() {
    for name in ["llama", "gemma2", "llama-tied", "mixtral", "cohere"] {
        let (model, program) = open(name);
        let weights = model.weights(&program).unwrap();
        let recipe = Recipe::simple(Format::parse("int3-g16-f32").unwrap(), "rtn").unwrap();
        let mut job = Job::new(&weights, &recipe, false, |_| ()).expect(name);
        let found = explained(&mut job, &model);
        let base = whole(&program, &mixed(&job, |_| false));
        let expected = mean_kl(&base, &whole(&program, &mixed(&job, |_| true)));
        let close = |found: f64, expected: f64| (found - expected).abs() < 1e-3 * expected + 1e-6;
        assert!(expected > 1e-3 && close(found.kl.mean, expected), "{name}: {found:?} {expected}");
        assert_eq!(found.layers.len(), model.spec.layers.len());
        for layer in &found.layers {
            let prefix = format!("layers.{}.", layer.layer);
            let alone = whole(&program, &mixed(&job, |tensor| tensor.starts_with(&prefix)));
            let expected = mean_kl(&base, &alone);
            assert!(close(layer.kl.mean, expected), "{name} {prefix}: {:?} {expected}", layer.kl);
            assert!(layer.stream_error > 0.0 && layer.alone_error > 0.0);
        }
        let first = &found.layers[0];
        assert_eq!(first.stream_error, first.alone_error, "{name}");
        assert_eq!(found.budgets.len(), found.layers.len() + 1);
        assert!(found.weights.after.is_none() && found.activations.before.total() > 0);
    }
}

/// The pass sees the same inputs as calibration, so that output errors agree.
#[test]
fn errors_of_outputs_are_those_that_calibration_reports() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let text = "format = \"int4-g16-f32\"\nprefix = \"float\"\n[[technique]]\nuse = \"rotate\"\n\
                [[technique]]\nuse = \"gptq\"";
    let recipe = Recipe::parse(text, None).unwrap();
    let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
    let backend = ReferenceBackend::new();
    let all = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
    job.calibrate(&model.spec, &all).unwrap();
    let found = explained(&mut job, &model);
    let tensors: Vec<_> = found.layers.iter().flat_map(|layer| &layer.tensors).collect();
    assert_eq!(tensors.len(), job.reports().tensors.len());
    for report in &job.reports().tensors {
        let tensor = tensors.iter().find(|it| it.tensor == report.tensor).expect("the tensor");
        let outputs = tensor.error.outputs.expect("its inputs were seen");
        let expected = report.report.output_error.expect("calibrated");
        let total = outputs.sources.total;
        assert!((total / expected - 1.0).abs() < 1e-3, "{}: {total} {expected}", report.tensor);
        assert!((tensor.error.weights.sqnr_db - report.report.sqnr_db).abs() < 1e-6);
        // GPTQ has more weight error than nearest codes, and less output error.
        assert!(tensor.error.weights.sources.codes > 0.0 && outputs.sources.codes < 0.0);
        assert!(tensor.activation_int8.is_some_and(|error| error > 0.0 && error < 1e-2));
    }
    let (before, after) = (&found.weights.before, found.weights.after.as_ref().expect("rotated"));
    assert_eq!(before.total(), after.total());
    assert!(before != after);
}

/// Codes are analysed without their correction. Its remaining error, the streams and the KL include
/// it.
#[test]
fn corrections_are_explained_beside_the_codes() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let explained = |method: &str| {
        let recipe = Recipe::simple(Format::parse("int3-g16-f32").unwrap(), method).unwrap();
        let recipe = Recipe { prefix: Prefix::Float, ..recipe };
        let mut job = Job::new(&weights, &recipe, true, |_| ()).unwrap();
        let backend = ReferenceBackend::new();
        let all = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
        job.calibrate(&model.spec, &all).unwrap();
        let reports = job.reports().tensors.clone();
        (explained(&mut job, &model), reports)
    };
    let ((plain, _), (found, reports)) = (explained("rtn"), explained("rtn+low-rank"));
    let tensors = |of: &Explanation| -> Vec<TensorExplanation> {
        of.layers.iter().flat_map(|layer| layer.tensors.clone()).collect()
    };
    for (before, after) in tensors(&plain).iter().zip(&tensors(&found)) {
        assert!(before.corrected.is_none() && before.error == after.error);
        let corrected = after.corrected.expect("it is corrected");
        let report = reports.iter().find(|it| it.tensor == after.tensor).unwrap();
        let error = report.report.output_error.unwrap();
        let outputs = corrected.outputs.expect("its inputs were seen");
        assert!((outputs - error).abs() < 1e-3 * error + 1e-9, "{outputs} {error}");
        assert!(outputs < after.error.outputs.unwrap().sources.total);
        assert!(corrected.bits > 0.0 && corrected.rank > 0);
    }
    assert!(found.layers[0].bits > plain.layers[0].bits);
    assert!(found.kl.mean < plain.kl.mean && !found.weights.before.counts.is_empty());
    assert!(found.weights.after.is_none(), "a correction prepares no weights");
}

/// A plan stays within its budget, is the best of all plans by its own measure, and its formats
/// reach the layers.
#[test]
fn a_budget_gives_each_layer_a_format() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let backend = ReferenceBackend::new();
    let text = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
    for sensitivity in ["kl", "hessian"] {
        let recipe = format!(
            "format = \"int4-g16-f32\"\n[budget]\nbits = 7.0\nformats = [\"int3-g16-f32\", \
             \"int8-g16-f32\"]\nsensitivity = \"{sensitivity}\"\n[[technique]]\nuse = \"rtn\""
        );
        let recipe = Recipe::parse(&recipe, None).unwrap();
        assert!(Job::new(&weights, &recipe, true, |_| ()).is_err(), "not planned yet");
        let plan = planned(&weights, &recipe, &model.spec, &text, &mut |_| ()).unwrap();
        let again = Recipe::parse(&plan.to_toml(), None).unwrap();
        assert_eq!(again.formats, plan.formats);
        // With scales the formats take 5 and 10 bits. Four layers may take 28 bits, so one layer
        // has 10.
        let eights: Vec<&str> = plan
            .formats
            .iter()
            .filter(|(_, format)| format.to_string() == "int8-g16-f32")
            .map(|(pattern, _)| pattern.as_str())
            .collect();
        assert_eq!((plan.formats.len(), eights.len()), (4, 1), "{:?}", plan.formats);
        let mut job = Job::new(&weights, &plan, false, |_| ()).unwrap();
        let found = explained(&mut job, &model);
        let bits: f64 = found.layers.iter().map(|it| it.bits).sum::<f64>() / 4.0;
        assert_eq!(bits, 6.25);
        for layer in &found.layers {
            let eight = eights[0] == format!("layers.{}.*", layer.layer);
            let expected = if eight { "int8-g16-f32" } else { "int3-g16-f32" };
            assert!(layer.tensors.iter().all(|it| it.format == expected));
        }
        if sensitivity == "kl" {
            // The layer that would lose most in three bits has eight.
            let three = Recipe::simple(Format::parse("int3-g16-f32").unwrap(), "rtn").unwrap();
            let mut job = Job::new(&weights, &three, false, |_| ()).unwrap();
            let all = explained(&mut job, &model);
            let worst = all.layers.iter().max_by(|a, b| a.kl.mean.total_cmp(&b.kl.mean)).unwrap();
            assert_eq!(eights[0], format!("layers.{}.*", worst.layer));
            assert!(found.kl.mean < all.kl.mean, "{:?} {:?}", found.kl, all.kl);
        }
    }
    let poor = "format = \"int4-g16-f32\"\n[budget]\nbits = 4.5\nformats = [\"int3-g16-f32\"]\n\
                [[technique]]\nuse = \"rtn\"";
    let poor = Recipe::parse(poor, None).unwrap();
    let error = planned(&weights, &poor, &model.spec, &text, &mut |_| ()).unwrap_err();
    assert!(error.to_string().contains("the least that its formats take is 5"), "{error}");
}

#[test]
fn a_text_that_cannot_be_used_is_refused() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let recipe = Recipe::simple(Format::parse("int4-g16-f32").unwrap(), "rtn").unwrap();
    let mut job = Job::new(&weights, &recipe, false, |_| ()).unwrap();
    let backend = ReferenceBackend::new();
    for tokens in [&[][..], &[1, 2, 9999]] {
        let text = calibration(&backend, tokens);
        let error = job.explain(&model.spec, &text, &mut |_| ()).unwrap_err();
        assert!(matches!(error, QuantError::Calibration(_)), "{error}");
    }
}

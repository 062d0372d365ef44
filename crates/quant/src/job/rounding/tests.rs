//! Corrections on the tiny checkpoints: later layers see them, budgets count them, and impossible
//! ones are refused.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;

use super::super::tests::{TOKENS, calibration, open};
use super::*;
use crate::budget::planned;
use crate::calibrate::Calibration;
use crate::inputs::with_inputs;

fn steps(list: &[&str]) -> String {
    list.iter().map(|step| format!("\n[[technique]]\nuse = {step}\n")).collect()
}

/// A job of `text` on a tiny model, calibrated.
fn with_job<T>(name: &str, text: &str, then: impl FnOnce(&Job<'_>) -> T) -> Result<T, QuantError> {
    let (model, _) = open(name);
    let recipe = Recipe::parse(text, None)?;
    let spec = with_inputs(&model.spec, &recipe)?;
    let program = Arc::new(lower(&spec, &LowerOptions::new(64))?);
    let weights = model.weights(&program).unwrap();
    let mut job = Job::new(&weights, &recipe, true, |_| ())?;
    let backend = ReferenceBackend::new();
    job.calibrate(&spec, &calibration(&backend, &TOKENS))?;
    Ok(then(&job))
}

fn codes(job: &Job<'_>) -> BTreeMap<String, Vec<u8>> {
    job.ledger
        .finished
        .iter()
        .map(|(weight, it)| (job.plan.name(*weight), it.codes.to_vec()))
        .collect()
}

/// A correction of full rank leaves no error. So the layers behind it read the float model's
/// stream. Without it they do not.
#[test]
fn layers_behind_a_correction_see_it() {
    let made = |prefix: &str, correction: &[&str]| {
        let head = format!("format = \"int3-g16-f32\"\nprefix = \"{prefix}\"\n");
        let all = [&["\"gptq\""], correction].concat();
        with_job("llama", &(head + &steps(&all)), codes).unwrap()
    };
    let whole = "\"low-rank\"\nrank = 4096\ndtype = \"f32\"";
    let float = made("float", &[]);
    let (corrected, plain) = (made("quantized", &[whole]), made("quantized", &[]));
    let same = |a: &[u8], b: &[u8]| a.iter().zip(b).filter(|(a, b)| a == b).count();
    let (mut all, mut near, mut far) = (0, 0, 0);
    for (name, expected) in float.iter().filter(|it| !it.0.starts_with("layers.0.")) {
        all += expected.len();
        near += same(&corrected[name], expected);
        far += same(&plain[name], expected);
    }
    // A byte holds two codes, and rounding the sum of two matrices changes a few of them.
    assert!(near * 100 > 98 * all && far * 100 < 95 * all, "{near} and {far} of {all}");
}

/// The reported error includes the correction. It equals the error of the tensors that would be
/// written.
#[test]
fn reports_are_of_corrected_matrices() {
    for (method, rank) in [("\"gptq\"", 4), ("\"rtn\"", 4096)] {
        let correction = format!("\"low-rank\"\nrank = {rank}");
        let text = "format = \"int3-g16-f32\"\n".to_owned() + &steps(&[method, &correction]);
        with_job("llama", &text, |job| {
            assert_eq!(job.corrections().len(), job.reports().tensors.len());
            let mut bits = 0.0;
            let mut elements = 0.0;
            for report in &job.reports().tensors {
                let weight = job.plan.program.weight_named(&report.tensor).unwrap();
                let (exact, found) =
                    (job.load(weight).unwrap().1, job.current(weight).unwrap().to_f32());
                let noise: f64 =
                    exact.iter().zip(&found).map(|(a, b)| f64::from(a - b).powi(2)).sum();
                let signal: f64 = exact.iter().map(|a| f64::from(*a).powi(2)).sum();
                let db = 10.0 * (signal / noise).log10();
                assert!((report.report.sqnr_db - db).abs() < 1e-3, "{}: {db}", report.tensor);
                let correction = report.correction.as_ref().expect("it is corrected");
                let error = |it: &MatrixReport| it.output_error.expect("calibrated");
                let (before, after) = (error(&correction.uncorrected), error(&report.report));
                assert!(after < 0.9 * before, "{}: {after} {before}", report.tensor);
                let [rows, columns] = job.plan.program.weight(weight).shape[..] else { panic!() };
                let rank = rank.min(rows).min(columns);
                assert_eq!(
                    (correction.rank, correction.bytes),
                    (rank, 2 * rank * (rows + columns))
                );
                // Three bits, and a scale of 32 bits for 16 weights.
                bits += (rows * columns * 5 + rank * (rows + columns) * 16) as f64;
                elements += (rows * columns) as f64;
            }
            assert!((job.bits_per_weight().unwrap() - bits / elements).abs() < 1e-9);
        })
        .unwrap();
    }
}

/// Of several rounds each matrix keeps the one with the least loss. The first equals a run of one
/// round.
#[test]
fn more_rounds_lose_no_more() {
    for weighting in ["inputs", "none"] {
        let made = |rounds: usize| {
            let correction = format!(
                "\"low-rank\"\nrank = 6\ndtype = \"f32\"\nweighting = \"{weighting}\"\nrounds = {rounds}"
            );
            let text = "format = \"int3-g16-f32\"\nprefix = \"float\"\n".to_owned();
            let text = text + &steps(&["\"rtn\"", &correction]);
            with_job("llama", &text, |job| job.reports().tensors.clone()).unwrap()
        };
        let (one, four) = (made(1), made(4));
        let mut better = 0;
        for (one, four) in one.iter().zip(&four) {
            let (before, after) = (loss(&one.report), loss(&four.report));
            assert!(after <= before, "{}: {after} {before}", one.tensor);
            let round = four.correction.as_ref().expect("it is corrected").round;
            assert_eq!(round > 1, after < before, "{}", one.tensor);
            better += usize::from(after < before);
        }
        assert!(better > 0, "some matrix gains by another round");
    }
}

/// The codes are of the rotated matrix, and `A` reads the input before its rotation. Together they
/// are the whole matrix.
#[test]
fn rotated_inputs_are_corrected_in_the_basis_of_the_codes() {
    let rotation = "\"hadamard\"\nblock = 0\ninputs = \"down\"";
    let correction = "\"low-rank\"\nrank = 4096\ndtype = \"f32\"";
    let text = "format = \"int4-g16-f32\"\n".to_owned();
    let text = text + &steps(&["\"rotate\"", rotation, "\"rtn\"", correction]);
    with_job("llama", &text, |job| {
        let mut rotated = 0;
        for (weight, correction) in job.corrections() {
            let (found, exact) =
                (job.current(*weight).unwrap().to_f32(), job.load(*weight).unwrap().1);
            let most = exact.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!(found.iter().zip(&exact).all(|(a, b)| (a - b).abs() < 1e-5 * most));
            let down = job.plan.name(*weight).ends_with("ffn.down");
            assert_eq!(correction.rotation, down.then_some(48));
            rotated += usize::from(down);
        }
        assert!(rotated > 0);
    })
    .unwrap();
}

#[test]
fn what_no_adapter_can_say_is_refused() {
    let correction = &["\"rtn\"", "\"low-rank\""];
    let refused = |model: &str, head: &str, list: &[&str]| {
        with_job(model, &(head.to_owned() + &steps(list)), |_| ()).unwrap_err().to_string()
    };
    let error = refused("mixtral", "format = \"int4-g16-f32\"\ntensors = [\"*\"]\n", correction);
    assert!(error.contains("low-rank of tensor layers.0.ffn.experts"), "{error}");
    assert!(error.contains("stack of experts"), "{error}");
    let head = "format = \"int8-channel-f32\"\nactivations = \"int8-token\"\n";
    let error = refused("llama", head, correction);
    assert!(error.contains("layers.0.attention.query") && error.contains("rounded"), "{error}");
    let named = "\"low-rank\"\ntensors = [\"*.ffn.*\"]";
    let other = "\"low-rank\"\ntensors = [\"*.down\"]";
    let error = refused("llama", "format = \"int8-channel-f32\"\n", &["\"rtn\"", named, other]);
    assert!(error.contains("ffn.down twice"), "{error}");
    // Experts are quantized, and matrices beside them are corrected, if the step names them.
    let list = &["\"rtn\"", "\"low-rank\"\ntensors = [\"*.attention.*\"]"];
    let text = "format = \"int4-g16-f32\"\ntensors = [\"*\"]\n".to_owned() + &steps(list);
    let names = with_job("mixtral", &text, |job| {
        job.corrections().keys().map(|it| job.plan.name(*it)).collect::<Vec<_>>()
    });
    let names = names.unwrap();
    assert!(!names.is_empty() && names.iter().all(|it| it.contains(".attention.")), "{names:?}");
}

/// A budget has fewer bits for codes if there are corrections. The error says how many they need.
#[test]
fn budgets_count_corrections() {
    let (model, program) = open("llama");
    let weights = model.weights(&program).unwrap();
    let backend = ReferenceBackend::new();
    let text = Calibration { window: 24, ..calibration(&backend, &TOKENS) };
    let correction = "\"low-rank\"\nrank = 1\nweighting = \"none\"";
    let plan = |bits: f64| {
        let head = format!(
            "format = \"int4-g16-f32\"\n[budget]\nbits = {bits:?}\nformats = [\"int3-g16-f32\", \
             \"int8-g16-f32\"]\n"
        );
        let recipe = Recipe::parse(&(head + &steps(&["\"rtn\"", correction])), None).unwrap();
        let plan = planned(&weights, &recipe, &model.spec, &text, &mut |_| ())?;
        Job::new(&weights, &plan, false, |_| ())?.bits_per_weight()
    };
    let error = plan(4.0).unwrap_err().to_string();
    let least: f64 = error.rsplit(' ').next().unwrap().parse().unwrap();
    assert!(least > 5.3, "{error}");
    assert!((plan(least + 1e-9).unwrap() - least).abs() < 1e-6, "all in three bits");
    let more = plan(8.0).unwrap();
    assert!(more <= 8.0 && more > least, "{more}");
}

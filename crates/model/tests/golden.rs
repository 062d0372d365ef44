//! Whole models on the reference backend against values from Hugging Face transformers in `f32`.

mod support;

use std::path::Path;

use lathe_model::Model;
use lathe_program::Executor;
use lathe_test_support::shared;
use serde_json::Value;
use support::{best, log_probability, prepare, prepare_rounded, run};

fn numbers<T>(value: &Value, item: impl Fn(&Value) -> Option<T>) -> Vec<T> {
    let list = value.as_array().expect("a list");
    list.iter().map(|value| item(value).expect("a number")).collect()
}

fn tokens(value: &Value) -> Vec<u32> {
    numbers(value, |value| value.as_u64().map(|id| id as u32))
}

/// Every log-probability within 1e-3 nats; the greedy text the same while margins exceed 1e-3.
fn check(model: &Path, golden: &Path, prepare: impl Fn(&Model, usize) -> Box<dyn Executor>) {
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(golden).unwrap()).unwrap();
    let model = Model::open(model).expect("opens");
    let mut executor = prepare(&model, 512);
    let text = tokens(&golden["tokens"]);
    let expected = numbers(&golden["logprobs"], Value::as_f64);
    let logits = run(&mut *executor, 0, &text, 0..text.len() - 1);
    let rows = logits.chunks(model.spec.vocabulary).zip(&text[1..]);
    let off = rows
        .zip(&expected)
        .map(|((logits, next), expected)| (log_probability(logits, *next) - expected).abs());
    let worst = off.fold(0.0, f64::max);
    assert!(worst < 1e-3, "a log-probability is off by {worst} nats");

    let prompt = tokens(&golden["greedy_prompt_tokens"]);
    let margins = numbers(&golden["greedy_margins"], Value::as_f64);
    let mut last = run(&mut *executor, 0, &prompt, prompt.len() - 1..prompt.len());
    let steps = tokens(&golden["greedy_tokens"]).into_iter().zip(margins);
    for (at, (expected, margin)) in steps.enumerate() {
        if margin <= 1e-3 {
            break;
        }
        assert_eq!(best(&last), expected, "token {at} of the greedy text, margin {margin}");
        last = run(&mut *executor, prompt.len() + at, &[expected], 0..1);
    }
}

fn check_shared(name: &str) {
    let model = shared(name, &format!("models/{name}"));
    if let (Some(model), Some(golden)) = (model, shared(name, &format!("golden/{name}.json"))) {
        check(&model, &golden, prepare);
    }
}

#[test]
fn draft_llama() {
    check_shared("draft-llama");
}

#[test]
fn mla_moe() {
    check_shared("mla-moe");
}

#[test]
fn swa_sink_moe() {
    check_shared("swa-sink-moe");
}

#[test]
fn smollm2_gguf() {
    let Some(golden) = shared("smollm2_gguf", "golden/smollm2-135m.json") else { return };
    let Some(model) = lathe_test_support::smollm2("smollm2_gguf") else { return };
    // The values were made from the dequantized weights rounded to bf16.
    check(&model, &golden, prepare_rounded);
}

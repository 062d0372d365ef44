//! Texts that outgrow the original context of a LongRoPE model, against transformers' `generate`
//! (`tests/fixtures/make_crossing.py`).

use std::path::Path;
use std::sync::Arc;

use lathe_engine::{Engine, EngineConfig, Event, Request};
use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, ExecutorOptions};
use serde_json::Value;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/phi3");

/// A prompt, and the reference's tokens with their log-probabilities.
struct Golden {
    prompt: Vec<u32>,
    tokens: Vec<u32>,
    logprobs: Vec<f64>,
}

fn golden() -> Vec<Golden> {
    let text = std::fs::read_to_string(Path::new(FOLDER).join("crossing.json")).unwrap();
    let texts: Value = serde_json::from_str(&text).unwrap();
    let numbers = |value: &Value| -> Vec<f64> {
        value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let ids = |value: &Value| numbers(value).into_iter().map(|id| id as u32).collect();
    let one = |text: &Value| Golden {
        prompt: ids(&text["prompt"]),
        tokens: ids(&text["tokens"]),
        logprobs: numbers(&text["logprobs"]),
    };
    texts.as_array().unwrap().iter().map(one).collect()
}

fn engine(context: usize, config: EngineConfig) -> Engine {
    let model = Model::open(Path::new(FOLDER)).unwrap();
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(context)).unwrap());
    let weights = model.weights(&program).unwrap();
    let options = ExecutorOptions {
        kv_blocks: 64,
        kv_format: None,
        rows_max: 8,
        threads: Some(1),
        exact: true,
    };
    let executor =
        ReferenceBackend::new().prepare(Arc::clone(&program), &weights, &options).unwrap();
    Engine::new(executor, config).unwrap()
}

/// The first `tokens` tokens after each prompt are the reference's.
fn agree(context: usize, config: &EngineConfig, tokens: usize) {
    let golden = golden();
    let mut engine = engine(context, config.clone());
    let mut ids = Vec::new();
    for text in &golden {
        let (prompt, max_tokens) = (text.prompt.clone(), Some(tokens));
        let logprobs = Some(0);
        let request =
            Request { prompt, max_tokens, logprobs, ignore_stop: true, ..Request::default() };
        ids.push(engine.add(request, None).unwrap());
    }
    let mut made = vec![0; golden.len()];
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            let Event::Token { request, token, logprobs, .. } = event else { continue };
            let which = ids.iter().position(|id| *id == request).unwrap();
            let (text, at) = (&golden[which], made[which]);
            assert_eq!(token, text.tokens[at], "text {which}, token {at} in {config:?}");
            let off = (f64::from(logprobs.unwrap().logprob) - text.logprobs[at]).abs();
            assert!(off < 1e-4, "text {which}, token {at}: off by {off}");
            made[which] += 1;
        }
        engine.validate();
    }
    assert_eq!(made, vec![tokens; golden.len()]);
}

#[test]
fn the_table_is_that_of_the_length_reached() {
    for (prefix_cache, kv_cache) in [(true, true), (false, true), (false, false)] {
        let config = EngineConfig { prefix_cache, kv_cache, ..EngineConfig::default() };
        agree(64, &config, 30);
    }
}

#[test]
fn the_context_does_not_choose_the_table() {
    for context in [25, 30, 64] {
        agree(context, &EngineConfig::default(), 4);
    }
}

//! A request's greedy text does not depend on its company.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use lathe_cpu::CpuBackend;
use lathe_engine::{Engine, EngineConfig, Event, Request, RequestId};
use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, ExecutorOptions};

use crate::shared;

const CONTEXT: usize = 256;

/// An engine of its own for `model`, with `kv_blocks` pages.
fn engine(model: &Model, backend: &dyn Backend, exact: bool, kv_blocks: usize) -> Engine {
    let program = Arc::new(lower(&model.spec, &LowerOptions::new(CONTEXT)).expect("a program"));
    let weights = model.weights(&program).expect("its weights");
    let rows_max = 64;
    let options = ExecutorOptions { kv_blocks, kv_format: None, rows_max, threads: Some(2), exact };
    let executor = backend.prepare(Arc::clone(&program), &weights, &options).expect("an executor");
    let config = EngineConfig::default();
    Engine::new(executor, config).expect("an engine")
}

/// Greedy tokens of every request, added together.
fn generate(engine: &mut Engine, prompts: &[Vec<u32>], max_tokens: usize) -> Vec<Vec<u32>> {
    let mut tokens: BTreeMap<RequestId, Vec<u32>> = BTreeMap::new();
    for (index, prompt) in prompts.iter().enumerate() {
        let max_tokens = Some(max_tokens + index);
        let request = Request { prompt: prompt.clone(), max_tokens, ..Request::default() };
        tokens.insert(engine.add(request, None).expect("accepted"), Vec::new());
    }
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            if let Event::Token { request, token, .. } = event {
                tokens.get_mut(&request).expect("a known request").push(token);
            }
        }
    }
    tokens.into_values().collect()
}

/// Eight prompts of 1 to 150 tokens; two of them begin alike, two are the same.
fn prompts(shared: &Path) -> Vec<Vec<u32>> {
    let golden = fs::read_to_string(shared.join("golden/draft-llama.json")).expect("golden");
    let golden: serde_json::Value = serde_json::from_str(&golden).expect("JSON");
    let tokens: Vec<u32> = serde_json::from_value(golden["tokens"].clone()).expect("ids");
    [0..1, 5..8, 0..48, 0..61, 100..133, 200..350, 100..133, 17..94]
        .map(|range| tokens[range].to_vec())
        .to_vec()
}

fn check(model: &Model, backend: &dyn Backend, exact: bool, prompts: &[Vec<u32>], tokens: usize) {
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let mut engine = engine(model, backend, exact, 64);
            generate(&mut engine, std::slice::from_ref(prompt), tokens + index).remove(0)
        })
        .collect();
    assert!(alone.iter().enumerate().all(|(index, found)| found.len() == tokens + index));
    let mut roomy = engine(model, backend, exact, 256);
    assert_eq!(generate(&mut roomy, prompts, tokens), alone, "together, exact {exact}");
    // The second time their prompts are in the cache.
    assert_eq!(generate(&mut roomy, prompts, tokens), alone, "cached, exact {exact}");
    assert!(roomy.stats().prefix_hit_tokens > 0, "{:?}", roomy.stats());
    // Room for about half of them, so that some have to give way and start anew.
    let mut tight = engine(model, backend, exact, 24);
    assert_eq!(generate(&mut tight, prompts, tokens), alone, "crowded, exact {exact}");
    assert!(tight.stats().preemptions > 0, "{:?}", tight.stats());
}

#[test]
fn eight_requests_together_as_alone_on_the_cpu() {
    let Some(shared) = shared("eight_requests_together_as_alone_on_the_cpu") else { return };
    let model = Model::open(&shared.join("models/draft-llama")).expect("the model");
    let backend = CpuBackend::new(Default::default());
    for exact in [false, true] {
        check(&model, &backend, exact, &prompts(&shared), 24);
    }
}

#[test]
fn three_requests_together_as_alone_on_the_reference() {
    let Some(shared) = shared("three_requests_together_as_alone_on_the_reference") else { return };
    let model = Model::open(&shared.join("models/draft-llama")).expect("the model");
    let prompts = &prompts(&shared)[..3];
    let backend = ReferenceBackend::new();
    let alone: Vec<Vec<u32>> = prompts
        .iter()
        .enumerate()
        .map(|(index, prompt)| {
            let mut engine = engine(&model, &backend, true, 64);
            generate(&mut engine, std::slice::from_ref(prompt), 4 + index).remove(0)
        })
        .collect();
    assert_eq!(generate(&mut engine(&model, &backend, true, 64), prompts, 4), alone);
}

//! Every family's tiny random checkpoint (`tests/fixtures/make_tiny_models.py`) on the reference
//! backend against the logits of Hugging Face transformers in `f32`.

mod support;

use std::path::PathBuf;

use lathe_model::Model;
use serde_json::Value;
use support::{prepare, run};

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"))
}

fn names() -> Vec<String> {
    let entries = std::fs::read_dir(fixtures()).expect("fixtures");
    let mut names: Vec<String> = entries
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

struct Golden {
    tokens: Vec<u32>,
    /// `[tokens, vocabulary]`.
    logits: Vec<f64>,
}

fn golden(name: &str) -> Golden {
    let text = std::fs::read_to_string(fixtures().join(name).join("golden.json")).expect(name);
    let value: Value = serde_json::from_str(&text).expect(name);
    let list = |value: &Value| value.as_array().expect("a list").clone();
    Golden {
        tokens: list(&value["tokens"]).iter().map(|id| id.as_u64().unwrap() as u32).collect(),
        logits: list(&value["logits"])
            .iter()
            .flat_map(list)
            .map(|logit| logit.as_f64().unwrap())
            .collect(),
    }
}

fn largest_difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let differences = found.iter().zip(expected).map(|(a, b)| (*a as f64 - b).abs());
    differences.fold(0.0, f64::max)
}

#[test]
fn logits_equal_the_reference() {
    let mut wrong = Vec::new();
    for name in names() {
        let golden = golden(&name);
        let model = Model::open(&fixtures().join(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut executor = prepare(&model, model.spec.context_max);
        let count = golden.tokens.len();
        let logits = run(&mut *executor, 0, &golden.tokens, 0..count);
        let off = largest_difference(&logits, &golden.logits);
        println!("{name}: {off:.1e}");
        // The values are rounded to 1e-5.
        if off.is_nan() || off > 2e-4 {
            wrong.push(format!("{name}: {off:.1e}"));
        }
    }
    assert!(wrong.is_empty(), "logits that are off by more than 2e-4: {wrong:?}");
}

#[test]
fn one_token_at_a_time_is_the_same() {
    for name in names() {
        let golden = golden(&name);
        let model = Model::open(&fixtures().join(&name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut executor = prepare(&model, model.spec.context_max);
        let count = golden.tokens.len();
        let at_once = run(&mut *executor, 0, &golden.tokens, 0..count);
        let one_by_one: Vec<f32> = (0..count)
            .flat_map(|at| run(&mut *executor, at, &golden.tokens[at..=at], 0..1))
            .collect();
        assert!(at_once == one_by_one, "{name}: logits depend on the size of a step");
    }
}

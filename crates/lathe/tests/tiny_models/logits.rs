//! Logits against the reference.

use lathe_engine::score::Feed;
use lathe_model::Model;
use lathe_program::Executor;
use serde_json::Value;

use crate::{executor, fixtures, models, options, program};

/// `f32` in another order of additions, with this backend's own exponential. The values are
/// rounded to 1e-5.
const EXACT: f64 = 2e-4;
/// Activations of integer products and the cache in 16 bits under scales.
const DEFAULT: f64 = 5e-3;

struct Golden {
    tokens: Vec<u32>,
    /// `[tokens, vocabulary]`.
    logits: Vec<f64>,
}

fn golden(name: &str) -> Golden {
    let text = std::fs::read_to_string(fixtures().join(name).join("golden.json")).expect(name);
    let mut value: Value = serde_json::from_str(&text).expect(name);
    let rows: Vec<Vec<f64>> = serde_json::from_value(value["logits"].take()).expect(name);
    Golden {
        tokens: serde_json::from_value(value["tokens"].take()).expect(name),
        logits: rows.concat(),
    }
}

/// Logits of all positions, in steps of `rows`.
fn logits(model: &Model, tokens: &[u32], rows: usize, exact: bool) -> Vec<f32> {
    let program = program(model, 4);
    let options = options(200, 64, exact);
    let mut executor: Box<dyn Executor> = executor(model, &program, &options);
    let mut feed = Feed::new(&*executor, tokens, 0).expect("fits");
    let mut logits = Vec::new();
    while feed.rows() > 0 {
        let rows = feed.rows().min(rows);
        logits.extend_from_slice(feed.run(&mut *executor, rows).expect("runs").1);
    }
    logits
}

fn check(exact: bool, bound: f64) {
    let mut wrong = Vec::new();
    for model in models() {
        let golden = golden(&model.name);
        let found = logits(&model, &golden.tokens, golden.tokens.len(), exact);
        assert_eq!(found.len(), golden.logits.len());
        let differences = found.iter().zip(&golden.logits).map(|(a, b)| (f64::from(*a) - b).abs());
        let off =
            differences.fold(0.0, |most, off| if off.is_nan() { off } else { f64::max(most, off) });
        println!("{}: {off:.1e}", model.name);
        if off.is_nan() || off > bound {
            wrong.push(format!("{}: {off:.1e}", model.name));
        }
    }
    assert!(wrong.is_empty(), "logits that are off by more than {bound}: {wrong:?}");
}

#[test]
fn exact_logits_equal_the_reference() {
    check(true, EXACT);
}

#[test]
fn logits_of_the_default_path_are_near_the_reference() {
    check(false, DEFAULT);
}

#[test]
fn one_token_at_a_time_is_the_same() {
    for model in models() {
        let tokens = golden(&model.name).tokens;
        let at_once = logits(&model, &tokens, tokens.len(), false);
        let one_by_one = logits(&model, &tokens, 1, false);
        assert!(at_once == one_by_one, "{}: logits depend on the size of a step", model.name);
    }
}

//! `score` and `run` against Hugging Face transformers in float32 (../shared/golden).

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use serde_json::Value;

use crate::shared;
use crate::support::{lathe, run_json};
use lathe_test_support::smollm2;

/// How close a device has to be, in nats a token.
struct Bar {
    flags: &'static [&'static str],
    /// Largest difference of a log-probability.
    max: f64,
    /// Mean absolute difference.
    mean: f64,
    /// A greedy choice with this lead, in logits, is the same.
    margin: f64,
    /// The last position's largest logits.
    logits: f64,
}

/// f32 throughout, in another order of additions.
const REFERENCE: Bar =
    Bar { flags: &["--device", "reference"], max: 1e-3, mean: 1e-3, margin: 1e-3, logits: 1e-2 };
/// f32 with SIMD's order of additions and its own exponential.
const EXACT: Bar = Bar {
    flags: &["--device", "cpu", "--exact"],
    max: 5e-3,
    mean: 5e-3,
    margin: 0.05,
    logits: 0.02,
};
/// Activations as integers, a cache in 16 bits.
const CPU: Bar =
    Bar { flags: &["--device", "cpu"], max: 0.2, mean: 0.01, margin: 0.05, logits: 0.5 };

fn golden(shared: &Path, name: &str) -> Value {
    let path = shared.join(format!("golden/{name}.json"));
    serde_json::from_str(&fs::read_to_string(path).expect("the golden file")).expect("JSON")
}

fn floats(value: &Value) -> Vec<f64> {
    serde_json::from_value(value.clone()).expect("numbers")
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).expect("token ids")
}

/// Scores the first `count` golden tokens and compares with what `bar` allows.
fn check_scores(model: &Path, golden: &Value, count: usize, bar: &Bar) {
    let home = tempfile::tempdir().expect("a folder");
    let tokens = ids(&golden["tokens"]);
    let file = home.path().join("tokens.json");
    fs::write(&file, serde_json::to_string(&tokens[..count]).expect("JSON")).expect("written");
    let mut command = lathe(home.path());
    command.arg("score").arg(model).arg("--tokens").arg(file).arg("--json").args(bar.flags);
    let found = run_json(&mut command);

    let (logprobs, expected) = (floats(&found["logprobs"]), floats(&golden["logprobs"]));
    assert_eq!(logprobs.len(), count - 1);
    let differences = logprobs.iter().zip(&expected).map(|(a, b)| (a - b).abs());
    let differences: Vec<f64> = differences.collect();
    let (worst, max) =
        differences.iter().copied().enumerate().max_by(|a, b| a.1.total_cmp(&b.1)).expect("some");
    let mean = differences.iter().sum::<f64>() / differences.len() as f64;
    println!("{} {:?}: mean {mean:.2e}, max {max:.2e}", model.display(), bar.flags);
    assert!(
        max <= bar.max,
        "token {}: {} found, {} expected ({:?})",
        worst + 1,
        logprobs[worst],
        expected[worst],
        bar.flags
    );
    assert!(mean <= bar.mean, "mean difference {mean}, at most {} ({:?})", bar.mean, bar.flags);
    let nll = -logprobs.iter().sum::<f64>() / logprobs.len() as f64;
    assert!((found["mean_nll"].as_f64().expect("a number") - nll).abs() < 1e-9);
    if count == tokens.len() {
        let top = floats(&found["top"]["logits"]);
        for (rank, (found, expected)) in
            top.iter().zip(floats(&golden["last_top_logits"])).enumerate()
        {
            let difference = (found - expected).abs();
            assert!(difference <= bar.logits, "logit of rank {rank}: {found}, not {expected}");
        }
    }
}

/// Continues the golden prompt greedily: the same tokens, up to the first that was so close a race
/// that rounding may decide it otherwise.
fn check_greedy(model: &Path, golden: &Value, count: usize, bar: &Bar) {
    let home = tempfile::tempdir().expect("a folder");
    let prompt: Vec<String> =
        ids(&golden["greedy_prompt_tokens"]).iter().map(u32::to_string).collect();
    let mut command = lathe(home.path());
    command.arg("run").arg(model).args(["--prompt-ids", &prompt.join(","), "--json"]);
    command.args(["--temperature", "0", "--ignore-eos", "--max-tokens", &count.to_string()]);
    let found = ids(&run_json(command.args(bar.flags))["token_ids"]);
    assert_eq!(found.len(), count);
    let (expected, margins) = (ids(&golden["greedy_tokens"]), floats(&golden["greedy_margins"]));
    let same = found.iter().zip(&expected).take_while(|(a, b)| a == b).count();
    println!("{} {:?}: {same} of {count} greedy tokens", model.display(), bar.flags);
    assert!(
        same == count || margins[same] <= bar.margin,
        "token {same}: {} found, {} expected, whose lead is {} ({:?})",
        found[same],
        expected[same],
        margins[same],
        bar.flags
    );
}

fn check_draft_llama(test: &str, bar: &Bar) {
    let Some(shared) = shared(test) else { return };
    let golden = golden(&shared, "draft-llama");
    let model = shared.join("models/draft-llama");
    check_scores(&model, &golden, 384, bar);
    check_greedy(&model, &golden, 48, bar);
}

/// SmolLM2's golden values are of its weights dequantized and rounded to bf16, as
/// ../shared/peers/gguf_to_hf.py writes them: the same folder, written by `lathe convert`, once for
/// all tests.
fn smollm2_bf16(gguf: &Path) -> &'static Path {
    static FOLDER: OnceLock<PathBuf> = OnceLock::new();
    FOLDER.get_or_init(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("smollm2-135m-bf16");
        if folder.exists() {
            fs::remove_dir_all(&folder).expect("the folder of an earlier run goes");
        }
        let home = tempfile::tempdir().expect("a folder");
        let mut command = lathe(home.path());
        command.arg("convert").arg(gguf).arg(&folder);
        run_json(command.args(["--to", "safetensors", "--format", "bf16", "--json"]));
        folder
    })
}

fn check_smollm2(test: &str, count: usize, bar: &Bar) {
    let (Some(shared), Some(gguf)) = (shared(test), smollm2(test)) else { return };
    let golden = golden(&shared, "smollm2-135m");
    let model = smollm2_bf16(&gguf);
    check_scores(model, &golden, count, bar);
    check_greedy(model, &golden, count.min(48), bar);
}

fn check_smollm2_gguf(test: &str, bar: &Bar) {
    let (Some(shared), Some(gguf)) = (shared(test), smollm2(test)) else { return };
    check_scores(&gguf, &golden(&shared, "smollm2-135m"), 384, bar);
}

#[test]
fn draft_llama_on_the_reference() {
    check_draft_llama("draft_llama_on_the_reference", &REFERENCE);
}

#[test]
fn draft_llama_on_the_cpu_exactly() {
    check_draft_llama("draft_llama_on_the_cpu_exactly", &EXACT);
}

#[test]
fn draft_llama_on_the_cpu() {
    check_draft_llama("draft_llama_on_the_cpu", &CPU);
}

/// A prefix: a scalar interpreter takes its time.
#[test]
fn smollm2_on_the_reference() {
    check_smollm2("smollm2_on_the_reference", 32, &REFERENCE);
}

#[test]
fn smollm2_on_the_cpu_exactly() {
    check_smollm2("smollm2_on_the_cpu_exactly", 384, &EXACT);
}

#[test]
fn smollm2_on_the_cpu() {
    check_smollm2("smollm2_on_the_cpu", 384, &CPU);
}

/// The GGUF file itself: what rounding its weights to bf16 changed comes on top.
#[test]
fn smollm2_gguf_on_the_cpu_exactly() {
    let bar = Bar { max: 0.1, mean: 0.01, logits: 0.1, ..EXACT };
    check_smollm2_gguf("smollm2_gguf_on_the_cpu_exactly", &bar);
}

#[test]
fn smollm2_gguf_on_the_cpu() {
    check_smollm2_gguf("smollm2_gguf_on_the_cpu", &CPU);
}

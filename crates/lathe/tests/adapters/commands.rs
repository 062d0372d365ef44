//! `--adapter` on the commands.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use crate::fixtures;
use crate::made::make;
use crate::support::{lathe, run, run_error, run_json};

/// A model's folder with an adapter of its own, another adapter, and some tokens.
struct Case {
    home: TempDir,
    model: PathBuf,
    other: PathBuf,
    tokens: PathBuf,
    modules: usize,
}

fn case() -> Case {
    let home = TempDir::new().unwrap();
    let base = fixtures().join("llama");
    let model = home.path().join("model");
    std::fs::create_dir(&model).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(base.join(name), model.join(name)).unwrap();
    }
    let own = make(&base, 1, 1.0);
    own.peft.write(&model.join("adapter"));
    let other = home.path().join("other");
    make(&base, 2, 0.5).peft.write(&other);
    let tokens = home.path().join("tokens.json");
    std::fs::write(&tokens, "[3, 14, 15, 9, 26, 5, 35]").unwrap();
    Case { home, model, other, tokens, modules: own.modules }
}

impl Case {
    fn words<'a>(&'a self, command: &'a str, more: &[&'a str]) -> std::process::Command {
        let mut lathe = lathe(self.home.path());
        lathe.arg(command).arg(&self.model).args(more);
        lathe
    }

    fn score(&self, more: &[&str]) -> Value {
        let tokens = self.tokens.to_str().unwrap();
        let words = ["--exact", "--json", "--tokens", tokens];
        run_json(self.words("score", &words).args(more))["logprobs"].clone()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_folder_s_own_adapter_is_used_unless_another_or_none_is_named() {
    let case = case();
    let own = case.score(&[]);
    let none = case.score(&["--adapter", "none"]);
    let other = case.score(&["--adapter", text(&case.other)]);
    assert_eq!(case.score(&["--adapter", text(&case.model.join("adapter"))]), own);
    assert!(own != none && own != other && none != other);
    // The other one replaces the folder's own: it is what a plain folder has with it.
    std::fs::rename(case.model.join("adapter"), case.home.path().join("away")).unwrap();
    assert_eq!(case.score(&["--adapter", text(&case.other)]), other);
    assert_eq!(case.score(&[]), none);
}

#[test]
fn what_is_loaded_is_told() {
    let case = case();
    let words = ["--prompt-ids", "1,2,3", "--max-tokens", "2"];
    let (code, _, told) = run(&mut case.words("run", &words));
    assert_eq!(code, 0, "{told}");
    assert!(
        told.contains(&format!("model/adapter: rank 3 to 16 beside {} matrices", case.modules)),
        "{told}"
    );
    let (_, _, told) = run(case.words("run", &words).args(["--adapter", "none"]));
    assert!(!told.contains("beside"), "{told}");
    let inspect = |more: &[&str]| {
        run_json(case.words("inspect", &["--json", "--no-measure", "--context", "16"]).args(more))
    };
    let (with, without) = (inspect(&[]), inspect(&["--adapter", "none"]));
    assert!(without.get("adapter").is_none());
    let bytes = |report: &Value, field: &str| report[field].as_u64().unwrap();
    let adapter = bytes(&with["adapter"], "bytes");
    assert_eq!(with["adapter"]["matrices"], case.modules);
    assert_eq!(bytes(&with, "weight_bytes"), bytes(&without, "weight_bytes") + adapter);
    // A decoding step reads all of it.
    let read = |report: &Value| bytes(&report["decode"], "weight_bytes");
    assert_eq!(read(&with), read(&without) + adapter);
}

#[test]
fn what_would_lose_the_adapter_is_refused() {
    let case = case();
    let out = case.home.path().join("out.gguf");
    let words = [text(&out), "--to", "gguf", "--format", "f32"];
    let error = run_error(&mut case.words("convert", &words), 2);
    assert!(error.contains("would lose the adapter"), "{error}");
    assert!(!out.exists());
    let (code, _, told) = run(case.words("convert", &words).args(["--adapter", "none"]));
    assert_eq!(code, 0, "{told}");
    let folder = case.home.path().join("quantized");
    let words = [text(&folder), "--format", "w8a16", "--method", "rtn"];
    let error = run_error(&mut case.words("quantize", &words), 2);
    assert!(error.contains("would lose the adapter"), "{error}");
}

#[test]
fn bad_adapters_are_bad_input() {
    let case = case();
    let error = run_error(
        &mut case.words("score", &["--tokens", text(&case.tokens), "--adapter", "nowhere"]),
        2,
    );
    assert!(error.contains("no adapter_config.json"), "{error}");
    let words = ["--dummy-weights", "--adapter", text(&case.other)];
    let error = run_error(&mut case.words("bench", &words), 2);
    assert!(error.contains("made up"), "{error}");
    let words = ["--format", "q4_0", "--no-measure", "--adapter", text(&case.other)];
    let error = run_error(&mut case.words("inspect", &words), 2);
    assert!(error.contains("made up"), "{error}");
    // Half of an adapter of its own is not passed over.
    std::fs::remove_file(case.model.join("adapter/adapter_config.json")).unwrap();
    let error = run_error(&mut case.words("score", &["--tokens", text(&case.tokens)]), 2);
    assert!(error.contains("no adapter_config.json"), "{error}");
}

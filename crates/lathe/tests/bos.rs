//! `--bos`: which token comes before a text that is scored, evaluated or calibrated with.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::{Value, json};
use support::{lathe, run_error, run_json};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama");
const TEXT: &str = "one two three user { assistant } one one two";
/// The tokens of [`TEXT`].
const IDS: [u32; 10] = [5, 6, 7, 3, 8, 4, 9, 5, 5, 6];
const BOS: u32 = 1;

/// A folder with a model whose tokenizer has a word a token.
struct Words(tempfile::TempDir);

impl Words {
    fn new() -> Self {
        let words = Words(tempfile::tempdir().expect("a folder"));
        std::fs::create_dir(words.0.path().join("model")).expect("a folder");
        for name in ["config.json", "model.safetensors"] {
            let to = words.0.path().join("model").join(name);
            std::fs::copy(Path::new(MODEL).join(name), to).expect("copies");
        }
        let list = ["<unk>", "<s>", "</s>", "user", "assistant", "one", "two", "three", "{", "}"];
        let vocabulary: serde_json::Map<String, Value> =
            list.iter().enumerate().map(|(id, word)| ((*word).to_owned(), id.into())).collect();
        let tokenizer = json!({
            "version": "1.0", "added_tokens": [], "normalizer": null, "post_processor": null,
            "decoder": {"type": "Fuse"}, "pre_tokenizer": {"type": "WhitespaceSplit"},
            "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}});
        words.write("model/tokenizer.json", &tokenizer.to_string());
        words.write("text.txt", TEXT);
        words
    }

    fn write(&self, name: &str, text: &str) {
        std::fs::write(self.0.path().join(name), text).expect("writes");
    }

    fn configure(&self, settings: Value) {
        self.write("model/tokenizer_config.json", &settings.to_string());
    }

    /// `lathe COMMAND model ...`.
    fn lathe(&self, words: &[&str]) -> Command {
        let mut command = lathe(self.0.path());
        command.current_dir(self.0.path()).args([words[0], "model"]).args(&words[1..]);
        command.args(["--json", "--exact"]).stdin(Stdio::null());
        command
    }

    fn mean_nll(&self, ids: &[u32]) -> f64 {
        self.write("ids.json", &json!(ids).to_string());
        let report = run_json(&mut self.lathe(&["score", "--tokens", "ids.json"]));
        report["mean_nll"].as_f64().expect("a number")
    }
}

#[test]
fn a_text_begins_with_it_as_the_tokenizer_says() {
    let words = Words::new();
    let plain = words.mean_nll(&IDS);
    let begun = words.mean_nll(&[&[BOS][..], &IDS].concat());
    assert!((plain - begun).abs() > 1e-3, "{plain} {begun}");
    let named = json!({"bos_token": "<s>"});
    let adds = json!({"bos_token": "<s>", "add_bos_token": true});
    let does_not = json!({"bos_token": "<s>", "add_bos_token": false});
    for (settings, choice, begins) in [
        (&named, "auto", false),
        (&adds, "auto", true),
        (&does_not, "auto", false),
        (&does_not, "yes", true),
        (&adds, "no", false),
    ] {
        words.configure(settings.clone());
        let told = if begins { json!(BOS) } else { Value::Null };
        let expected = if begins { begun } else { plain };
        let text = ["--text", "text.txt", "--bos", choice];
        for name in ["score", "eval"] {
            let report = run_json(&mut words.lathe(&[&[name][..], &text].concat()));
            assert_eq!(report["bos"], told, "{name}: {settings} {choice}");
            let found = report["mean_nll"].as_f64().expect("a number");
            assert!((found - expected).abs() < 1e-9, "{name}: {settings} {choice}: {found}");
        }
    }
    words.configure(json!({}));
    let text = ["eval", "--text", "text.txt", "--bos", "yes"];
    let told = run_error(&mut words.lathe(&text), 2);
    assert!(told.contains("bos_token"), "{told}");
}

#[test]
fn every_window_begins_with_it() {
    let words = Words::new();
    words.configure(json!({"bos_token": "<s>", "add_bos_token": true}));
    let report = run_json(&mut words.lathe(&["eval", "--text", "text.txt", "--context", "5"]));
    assert_eq!((&report["tokens"], &report["stride"]), (&json!(10), &json!(4)));
    let windows = IDS.chunks(4).map(|own| (own.len(), [&[BOS][..], own].concat()));
    let nll: f64 = windows.map(|(own, ids)| words.mean_nll(&ids) * own as f64).sum();
    let found = report["mean_nll"].as_f64().expect("a number");
    assert!((found - nll / 10.0).abs() < 1e-9, "{found} {nll}");

    let arguments = ["--format", "w8a16", "--method", "clip", "--calibration", "text.txt"];
    let mut quantize = words.lathe(&[&["quantize", "out"][..], &arguments].concat());
    let done = quantize.output().expect("runs");
    let told = String::from_utf8(done.stderr).expect("text");
    assert!(told.contains("begins with token 1 (--bos)"), "{told}");
    let report: Value = serde_json::from_slice(&done.stdout).expect(&told);
    assert_eq!(report["calibration_tokens"], 11, "{told}");
}

//! `--kv-format`: every command that has a cache takes it, what it costs is told, and a name that
//! nobody knows is refused with those that are known.

mod support;

use std::process::{Command, Stdio};

use serde_json::Value;
use support::{lathe, run_error, run_json};

const FORMATS: [&str; 7] = ["f32", "f16", "bf16", "int16", "fp8", "int8", "int4"];

fn command(home: &tempfile::TempDir, words: &[&str]) -> Command {
    let mut command = lathe(home.path());
    command.args(words).stdin(Stdio::null());
    command
}

#[test]
fn unknown_formats_are_refused_with_the_known_ones() {
    let home = tempfile::tempdir().expect("a folder");
    for words in [
        &["run", "tiny", "hi"][..],
        &["chat", "tiny"],
        &["score", "tiny", "--text", "x"],
        &["eval", "tiny", "--text", "x"],
        &["bench", "tiny"],
        &["inspect", "tiny"],
    ] {
        let words = [words, &["--kv-format", "q4"]].concat();
        let reason = run_error(&mut command(&home, &words), 2);
        assert!(reason.contains("q4"), "{words:?}: {reason}");
        assert!(FORMATS.iter().all(|format| reason.contains(format)), "{words:?}: {reason}");
    }
    for words in [&["pull", "tiny"][..], &["convert", "tiny", "out", "--to", "gguf"]] {
        let words = [words, &["--kv-format", "int8"]].concat();
        let reason = run_error(&mut command(&home, &words), 2);
        assert!(reason.contains("--kv-format"), "{words:?}: {reason}");
    }
}

#[test]
fn every_format_runs_on_both_devices() {
    let home = tempfile::tempdir().expect("a folder");
    for device in ["cpu", "reference"] {
        let mut bytes = Vec::new();
        for format in FORMATS {
            let words =
                ["run", "tiny", "--prompt-ids", "1,2,3,4,5,6,7", "--max-tokens", "6", "--json"];
            let words = [&words[..], &["--device", device, "--kv-format", format]].concat();
            let report = run_json(&mut command(&home, &words));
            assert_eq!(report["generated_tokens"], 6, "{device} {format}: {report}");
            bytes.push(report["kv_bytes"].as_u64().expect("bytes"));
        }
        if device == "reference" {
            // It rounds as the format does, and keeps the rounded numbers in f32.
            continue;
        }
        assert_eq!(bytes[0], 2 * bytes[1], "f16 is half of f32: {bytes:?}");
        assert!(bytes[1] == bytes[2] && bytes[2] < bytes[3] && bytes[3] < bytes[0], "{bytes:?}");
        assert!(bytes[2] > bytes[5] && bytes[5] > bytes[6], "{bytes:?}");
    }
}

#[test]
fn inspect_tells_what_each_format_takes() {
    let home = tempfile::tempdir().expect("a folder");
    let words = ["inspect", "tiny", "--no-measure", "--json", "--context", "64"];
    let words = [&words[..], &["--memory", "64M", "--kv-format", "int8"]].concat();
    let report = run_json(&mut command(&home, &words));
    assert_eq!(report["kv_format"], "int8");
    let all = report["kv_formats"].as_array().expect("formats");
    let names: Vec<&str> = all.iter().filter_map(|cost| cost["format"].as_str()).collect();
    assert_eq!(names, FORMATS);
    let number = |cost: &Value, field: &str| cost[field].as_u64().expect("a number");
    let spec = &all[5];
    assert_eq!(report["kv_bytes_per_token"], spec["bytes_per_token"]);
    assert_eq!(report["memory"]["largest_batch"], spec["largest_batch"]);
    for cost in all {
        // 64 tokens are whole pages, and `tiny` has no windows.
        assert_eq!(number(cost, "bytes_at_context"), 64 * number(cost, "bytes_per_token"));
        let room = 64_000_000 - number(&report, "weight_bytes");
        let fits = number(cost, "largest_batch") * number(cost, "bytes_at_context");
        assert!(fits <= room && fits + number(cost, "bytes_at_context") > room, "{cost}");
    }
}

#[test]
fn eval_compares_two_formats_of_one_model() {
    let home = tempfile::tempdir().expect("a folder");
    let text = home.path().join("text.txt");
    std::fs::write(&text, "the cat sat on the mat and looked at the dog, ".repeat(8)).expect("it");
    let text = text.to_str().expect("UTF-8");
    let words = ["eval", "tiny", "--text", text, "--base", "tiny", "--json", "--exact"];
    let kl = |format: &str| {
        let more = ["--kv-format", format, "--base-kv-format", "f32"];
        let report = run_json(&mut command(&home, &[&words[..], &more].concat()));
        assert_eq!(
            (&report["kv_format"], &report["base_kv_format"]),
            (&format.into(), &"f32".into())
        );
        report["kl_mean"].as_f64().expect("a number")
    };
    assert_eq!(kl("f32"), 0.0);
    let (int8, int4) = (kl("int8"), kl("int4"));
    assert!(0.0 < int8 && int8 < int4, "{int8} {int4}");
}

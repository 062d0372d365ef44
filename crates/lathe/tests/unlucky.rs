//! What goes wrong without anybody's intent: weights that are no numbers, streams that nobody
//! reads.

mod support;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use serde_json::Value;
use support::{lathe, run, run_error};

/// A copy of a tiny Llama whose tensor `name` has `value` as its first number.
fn with_number(folder: &Path, name: &str, value: f32) -> PathBuf {
    let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama"));
    let to = folder.join("model");
    fs::create_dir(&to).expect("a folder");
    fs::copy(tiny.join("config.json"), to.join("config.json")).expect("copied");
    let mut bytes = fs::read(tiny.join("model.safetensors")).expect("read");
    let length = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).expect("a header");
    let at = 8 + length + header[name]["data_offsets"][0].as_u64().expect("an offset") as usize;
    match header[name]["dtype"].as_str() {
        Some("F32") => bytes[at..at + 4].copy_from_slice(&value.to_le_bytes()),
        // The upper half of an `f32`.
        Some("BF16") => bytes[at..at + 2].copy_from_slice(&value.to_le_bytes()[2..]),
        other => panic!("{other:?}"),
    }
    fs::write(to.join("model.safetensors"), bytes).expect("written");
    to
}

const NORM: &str = "model.layers.0.input_layernorm.weight";
const GATE: &str = "model.layers.1.mlp.gate_proj.weight";

#[test]
fn a_model_that_is_no_number_is_not_scored() {
    for (name, value) in [(NORM, f32::NAN), (GATE, f32::NAN), (GATE, f32::INFINITY)] {
        let folder = tempfile::tempdir().expect("a folder");
        let model = with_number(folder.path(), name, value);
        let tokens = folder.path().join("tokens.json");
        fs::write(&tokens, "[1, 2, 3, 4, 5]").expect("written");
        let mut score = lathe(folder.path());
        let error = run_error(score.arg("score").arg(&model).arg("--tokens").arg(&tokens), 2);
        let reason = format!("tensor {name} has NaN or infinite numbers, expected finite ones");
        assert!(error.ends_with(&reason), "{error}");
    }
}

#[test]
fn a_tensor_that_is_no_number_is_not_quantized() {
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let folder = tempfile::tempdir().expect("a folder");
        let model = with_number(folder.path(), GATE, value);
        let out = folder.path().join("out");
        let mut quantize = lathe(folder.path());
        quantize.arg("quantize").arg(&model).arg(&out).args(["--format", "int8-channel-bf16"]);
        let error = run_error(&mut quantize, 2);
        let reason =
            format!("tensor layers.1.ffn.gate: element 0 is {value}, expected finite numbers");
        assert!(error.ends_with(&reason), "{error}");
        assert!(!out.exists());
    }
}

/// With `--json` there is exactly one object, also where the command fails or its words are wrong.
#[test]
fn errors_are_json_too() {
    let home = tempfile::tempdir().expect("a folder");
    for arguments in [&["inspect", "nothing-here", "--json"][..], &["inspect", "--json", "--jsn"]] {
        let (code, out, err) = run(lathe(home.path()).args(arguments));
        assert_eq!(code, 2, "{err}");
        let found: Value = serde_json::from_str(&out).expect("one object");
        assert_eq!(err, format!("error: {}\n", found["error"].as_str().expect("a reason")));
    }
}

/// A command whose remarks nobody reads does its work all the same.
#[test]
fn a_closed_or_full_stderr_costs_nothing() {
    let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama"));
    for redirect in ["2>&-", "2>/dev/full"] {
        let folder = tempfile::tempdir().expect("a folder");
        let out = folder.path().join("out");
        let plain = lathe(folder.path());
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &format!("exec \"$0\" \"$@\" {redirect}")]).arg(plain.get_program());
        for (name, value) in plain.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command.arg("quantize").arg(tiny).arg(&out).args([
            "--format",
            "int8-channel-bf16",
            "--json",
        ]);
        let output = command.stderr(Stdio::null()).output().expect("starts");
        assert_eq!(output.status.code(), Some(0), "{redirect}");
        assert!(out.exists() && !output.stdout.is_empty(), "{redirect}");
    }
}

/// What the user keeps beside OUT is neither deleted nor written over.
#[test]
fn files_beside_the_result_stay() {
    let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama"));
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    let quantize = |out: &str, more: &[&str]| {
        let mut command = lathe(folder.path());
        command.arg("quantize").arg(tiny).arg(format!("{}{out}", path("").display()));
        command.args(["--format", "int8-channel-bf16"]).args(more);
        command
    };
    let tokens = path("tokens.json");
    fs::write(&tokens, "[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]").expect("written");
    let tokens = tokens.display().to_string();
    let calibrated = ["--method", "gptq", "--calibration", &tokens];
    for (diary, words) in [("o.partial", &[][..]), ("o.quantizing", &calibrated)] {
        fs::create_dir(path(diary)).expect("a folder");
        fs::write(path(diary).join("diary"), "mine").expect("written");
        let error = run_error(&mut quantize("o/", words), 2);
        assert!(error.contains(diary) && error.contains("move it away"), "{error}");
        let kept = fs::read_to_string(path(diary).join("diary")).expect("kept");
        assert_eq!((kept.as_str(), path("o").exists()), ("mine", false));
        fs::remove_dir_all(path(diary)).expect("removed");
    }
    // A run that asks for no calibration leaves the layers of one that does.
    fs::create_dir(path("o.quantizing")).expect("a folder");
    fs::write(path("o.quantizing").join("state.json"), "{}").expect("written");
    let (code, _, err) = run(&mut quantize("o/", &[]));
    assert_eq!(code, 0, "{err}");
    assert!(path("o.quantizing").join("state.json").exists());
    for name in ["config.json", "model.safetensors", "recipe.toml", "provenance.json"] {
        assert!(path("o").join(name).exists(), "{name}");
    }
    assert!(!path("o").join(".made-by-lathe").exists() && !path("o.partial").exists());
}

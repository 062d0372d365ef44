//! What the tests of the command share: the built program, with an environment of its own.
#![allow(dead_code, reason = "each test file uses a part")]

pub(crate) mod hub;

use std::path::Path;
use std::process::{Command, Output};

/// The program, with a cache in `home` and no way to any network.
pub(crate) fn lathe(home: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_lathe"));
    for name in ["HF_HUB_CACHE", "HF_TOKEN", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"] {
        command.env_remove(name);
    }
    for name in ["http_proxy", "https_proxy", "all_proxy"] {
        command.env_remove(name).env_remove(name.to_uppercase());
    }
    command.env("HF_HOME", home).env("HF_HUB_OFFLINE", "1").env("PIP_NO_INDEX", "1");
    command.env_remove("PIP_FIND_LINKS");
    command
}

/// Exit code, stdout and stderr.
pub(crate) fn outcome(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("UTF-8");
    (output.status.code().unwrap_or(-1), text(&output.stdout), text(&output.stderr))
}

/// Runs to the end.
pub(crate) fn run(command: &mut Command) -> (i32, String, String) {
    outcome(&command.output().expect("the program starts"))
}

/// Runs, and expects success and one JSON object on stdout.
pub(crate) fn run_json(command: &mut Command) -> serde_json::Value {
    let (code, out, err) = run(command);
    assert_eq!(code, 0, "stderr: {err}");
    assert_eq!(out.lines().count(), 1, "one line on stdout: {out}");
    serde_json::from_str(&out).expect("JSON on stdout")
}

/// Runs, and expects exit code `expected` with one line on stderr, the reason.
pub(crate) fn run_error(command: &mut Command, expected: i32) -> String {
    let (code, out, err) = run(command);
    assert_eq!(code, expected, "stdout: {out} stderr: {err}");
    let reasons: Vec<&str> = err.lines().filter(|line| line.starts_with("error: ")).collect();
    assert_eq!(reasons.len(), 1, "one reason: {err}");
    reasons[0].to_owned()
}

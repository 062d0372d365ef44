//! `cargo xtask instruction-sets`: the integration tests once more, with weaker instruction sets
//! than this machine's. It runs what `cargo test --workspace` has built, and builds nothing anew.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, ensure};
use serde_json::Value;

/// The sets of `LATHE_ISA`, each with the tests that would take minutes. The unit tests of the
/// CPU's kernels compare every set with the portable one, and those make up for it.
const SETS: [(&str, &[&str]); 2] = [("avx2", &[]), ("portable", &["conformance", "invariance"])];

/// Packages and those of their tests that run models on the CPU.
const PACKAGES: [(&str, &[&str]); 4] = [
    ("lathe-cpu", &["conformance", "invariance", "latent", "ranks"]),
    ("lathe-engine", &["long_rope", "schedules"]),
    ("lathe-session", &["generate", "two_streams"]),
    ("lathe", &["bos", "compact_gguf", "kv_format", "quantize", "tiny_models"]),
];

/// A test program.
struct Program {
    package: &'static str,
    test: String,
    path: PathBuf,
    /// The folder in which cargo would run it.
    folder: PathBuf,
}

pub(crate) fn run(root: &Path) -> anyhow::Result<Vec<String>> {
    let programs = programs(root)?;
    let expected: usize = PACKAGES.iter().map(|(_, tests)| tests.len()).sum();
    let found = programs.len();
    ensure!(found == expected, "{found} of the {expected} tests of {PACKAGES:?} were built");
    let mut failed = Vec::new();
    for (set, without) in SETS {
        for program in programs.iter().filter(|program| !without.contains(&&*program.test)) {
            let start = Instant::now();
            let status = Command::new(&program.path)
                .current_dir(&program.folder)
                .arg("--quiet")
                .env("LATHE_ISA", set)
                .stdout(Stdio::null())
                .status()
                .with_context(|| program.path.display().to_string())?;
            let Program { package, test, .. } = program;
            eprintln!("{set}: {package} {test} ({:.1} s)", start.elapsed().as_secs_f64());
            if !status.success() {
                failed.push(format!("LATHE_ISA={set} {}: {status}", program.path.display()));
            }
        }
    }
    Ok(failed)
}

/// The integration tests of [`PACKAGES`], built as `cargo test --workspace` builds them.
fn programs(root: &Path) -> anyhow::Result<Vec<Program>> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(root)
        .args(["test", "--workspace", "--no-run", "--quiet", "--message-format=json"])
        .stderr(Stdio::inherit())
        .output()
        .context("cargo test --no-run")?;
    ensure!(output.status.success(), "cargo test --no-run: {}", output.status);
    let mut programs = Vec::new();
    for line in String::from_utf8(output.stdout)?.lines() {
        let message: Value = serde_json::from_str(line).context("a message of cargo")?;
        programs.extend(program(&message));
    }
    Ok(programs)
}

/// The test program that a message of cargo speaks of, if it is one of ours.
fn program(message: &Value) -> Option<Program> {
    let executable = message["executable"].as_str()?;
    let target = &message["target"];
    target["kind"].as_array()?.iter().find(|kind| *kind == "test")?;
    let folder = Path::new(message["manifest_path"].as_str()?).parent()?;
    let name = target["name"].as_str()?;
    let (package, tests) = PACKAGES.iter().find(|(package, _)| {
        folder.ends_with(Path::new("crates").join(package.trim_start_matches("lathe-")))
    })?;
    tests.contains(&name).then(|| Program {
        package,
        test: name.to_owned(),
        path: executable.into(),
        folder: folder.to_owned(),
    })
}

//! The command line's contract with real models: golden values, batches, and broken files.

mod batch;
mod golden;
mod malformed;
#[path = "../support/mod.rs"]
mod support;

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// The folder beside the project, or `None` (said aloud) where it is absent.
fn shared(test: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared");
    if path.is_dir() {
        return Some(path);
    }
    let required = env::var("LATHE_REQUIRE_SHARED").is_ok_and(|value| value == "1");
    assert!(!required, "{test}: ../shared is not here");
    println!("skipped: {test}: ../shared is not here");
    None
}

/// SmolLM2's GGUF file: `LATHE_SMOLLM2`, or where `lathe pull smollm2-135m` puts it.
fn smollm2(test: &str) -> Option<PathBuf> {
    if let Some(path) = env::var_os("LATHE_SMOLLM2") {
        return Some(path.into());
    }
    let found = cached_smollm2();
    if found.is_none() {
        println!("skipped: {test}: SmolLM2 is not in the cache, and LATHE_SMOLLM2 is not set");
    }
    found
}

fn cached_smollm2() -> Option<PathBuf> {
    let home = env::var_os("HF_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache/huggingface")))?;
    let folders = |path: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let models = folders(&home.join("hub"));
    let snapshots = models.into_iter().flat_map(|model| folders(&model.join("snapshots")));
    let name = "SmolLM2-135M-Instruct.Q4_1.gguf";
    snapshots.map(|snapshot| snapshot.join(name)).find(|path| path.is_file())
}

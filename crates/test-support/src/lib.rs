//! What tests of several crates need: files that do not lie in the project.
//!
//! A test whose file is missing says by name that it is skipped. With `LATHE_REQUIRE_SHARED=1` it
//! fails.
#![forbid(unsafe_code)]

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

/// SmolLM2's GGUF file, as `lathe pull smollm2-135m` names it.
const SMOLLM2: &str = "SmolLM2-135M-Instruct.Q4_1.gguf";

/// `path` in the folder `shared` beside the project. `None` skips the test `name`.
///
/// # Panics
/// If the file is missing and `LATHE_REQUIRE_SHARED` is 1.
pub fn shared(name: &str, path: &str) -> Option<PathBuf> {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../../shared"));
    let path = root.join(path);
    let found = path.exists();
    found.then_some(path).or_else(|| skip(name, "../shared is not here"))
}

/// SmolLM2's GGUF file: `LATHE_SMOLLM2`, or the one in the Hub's cache. `None` skips the test
/// `name`.
///
/// # Panics
/// If the file is missing and `LATHE_REQUIRE_SHARED` is 1.
pub fn smollm2(name: &str) -> Option<PathBuf> {
    let given = env::var_os("LATHE_SMOLLM2").map(PathBuf::from);
    let missing = "SmolLM2 is not in the cache, and LATHE_SMOLLM2 is not set";
    given.or_else(cached_smollm2).or_else(|| skip(name, missing))
}

fn skip(name: &str, reason: &str) -> Option<PathBuf> {
    let required = env::var("LATHE_REQUIRE_SHARED").is_ok_and(|value| value == "1");
    assert!(!required, "{name}: {reason}");
    println!("skipped: {name}: {reason}");
    None
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
    snapshots.map(|snapshot| snapshot.join(SMOLLM2)).find(|path| path.is_file())
}

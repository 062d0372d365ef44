//! Low-rank adapters: every tiny model with a random adapter computes what it computes with the
//! same terms folded into its weights, on every backend and over ranks; and the commands.

mod commands;
mod hostile;
mod logits;
mod made;
#[path = "../support/mod.rs"]
mod support;

use std::path::PathBuf;

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"))
}

/// The folders of all tiny models, but those without a linear layer in floats to fold terms into.
fn bases() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixtures()).expect("fixtures");
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.retain(|path| !path.ends_with("deepseek-v3-fp8"));
    paths.sort();
    assert!(paths.len() > 30, "{paths:?}");
    paths
}

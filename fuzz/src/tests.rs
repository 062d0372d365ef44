//! Every target on its seeds, and on seeds with some bytes changed or cut off.

use std::path::PathBuf;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// How often each seed is damaged.
const DAMAGED: usize = 24;

/// The files below the given paths of the repository whose names end with `suffix`.
fn seeds(paths: &[&str], suffix: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/.."));
    let (mut open, mut found) = (Vec::new(), Vec::new());
    open.extend(paths.iter().map(|path| root.join(path)));
    while let Some(path) = open.pop() {
        if path.is_dir() {
            open.extend(path.read_dir().unwrap().map(|entry| entry.unwrap().path()));
        } else if path.to_string_lossy().ends_with(suffix) {
            let data = std::fs::read(&path).unwrap();
            found.push((path, data));
        }
    }
    found.sort();
    assert!(!found.is_empty(), "no seeds in {paths:?}");
    found
}

fn run(target: fn(&[u8]), paths: &[&str], suffix: &str) {
    let mut random = ChaCha8Rng::seed_from_u64(1);
    for (path, data) in seeds(paths, suffix) {
        eprintln!("{}", path.display());
        target(&data);
        for _ in 0..DAMAGED {
            let mut data = data.clone();
            for _ in 0..random.random_range(1..4) {
                let at = random.random_range(0..data.len());
                data[at] = random.random();
            }
            if random.random_bool(0.2) {
                data.truncate(random.random_range(0..data.len()));
            }
            target(&data);
        }
    }
}

#[test]
fn safetensors() {
    run(super::safetensors, &["tests/fixtures/quantized"], ".safetensors");
}

#[test]
fn gguf() {
    run(super::gguf, &["tests/fixtures/tensor"], ".gguf");
}

#[test]
fn tokenizer() {
    run(super::tokenizer, &["fuzz/seeds/tokenizer"], ".json");
}

#[test]
fn chat_template() {
    run(super::chat_template, &["crates/model/tests/fixtures/chat"], ".jinja");
}

#[test]
fn config() {
    let paths = ["crates/model/tests/fixtures/configs", "tests/fixtures"];
    run(super::config, &paths[..1], ".json");
    run(super::config, &paths[1..], "config.json");
}

#[test]
fn adapter() {
    run(super::adapter, &["fuzz/seeds/adapter"], ".json");
}

#[test]
fn recipe() {
    run(super::recipe, &["fuzz/seeds/recipe"], ".toml");
}

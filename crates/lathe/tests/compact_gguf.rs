//! GGUF files in types that no kernel reads run, with the numbers that the types stand for.

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use lathe_tensor::gguf::{GgufFile, GgufType};
use serde_json::Value;
use support::{lathe, run, run_json};

const WIDTH: usize = 256;
const VOCABULARY: usize = 64;

/// Types by number, and where the halves of a block lie, which are to be small.
const KINDS: [(u32, &[usize]); 13] = [
    (10, &[80, 82]),
    (11, &[108]),
    (16, &[0]),
    (17, &[0]),
    (18, &[0]),
    (19, &[0]),
    (21, &[0]),
    (22, &[0]),
    (29, &[]),
    (34, &[52]),
    (35, &[64]),
    (39, &[]),
    (40, &[]),
];

/// A file as its bytes: little-endian, version 3, alignment 32.
#[derive(Default)]
struct File {
    entries: Vec<u8>,
    entry_count: u64,
    infos: Vec<u8>,
    tensor_count: u64,
    data: Vec<u8>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

impl File {
    fn entry(&mut self, key: &str, kind: u32, value: &[u8]) {
        self.entries.extend([&text(key)[..], &kind.to_le_bytes(), value].concat());
        self.entry_count += 1;
    }

    fn tensor(&mut self, name: &str, shape: &[usize], kind: u32, bytes: &[u8]) {
        self.data.resize(self.data.len().next_multiple_of(32), 0);
        self.infos.extend(text(name));
        self.infos.extend((shape.len() as u32).to_le_bytes());
        shape.iter().rev().for_each(|&d| self.infos.extend((d as u64).to_le_bytes()));
        self.infos.extend(kind.to_le_bytes());
        self.infos.extend((self.data.len() as u64).to_le_bytes());
        self.data.extend(bytes);
        self.tensor_count += 1;
    }

    fn write(&self, path: &Path) {
        let mut file = [b"GGUF", &3u32.to_le_bytes()[..]].concat();
        file.extend(self.tensor_count.to_le_bytes());
        file.extend(self.entry_count.to_le_bytes());
        file.extend(&self.entries);
        file.extend(&self.infos);
        file.resize(file.len().next_multiple_of(32), 0);
        file.extend(&self.data);
        std::fs::write(path, file).expect("writes");
    }
}

/// Numbers that a seed makes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as u32
    }

    /// Blocks of a type with random codes and small scales.
    fn blocks(&mut self, (kind, halves): (u32, &[usize])) -> Vec<u8> {
        let (length, size) = GgufType(kind).block().expect("a known type");
        let mut all = Vec::new();
        for _ in 0..WIDTH * WIDTH / length as usize {
            let mut block: Vec<u8> = (0..size).map(|_| self.next() as u8).collect();
            for at in halves {
                // Halves of 2^-11 to 2^-9, of either sign.
                block[at + 1] = block[at + 1] & 0x87 | 0x10;
            }
            match kind {
                29 => block[55] = block[55] & 0x0f | 0x10,
                39 => block[0] = 118 + block[0] % 3,
                40 => block[..4].iter_mut().for_each(|scale| *scale = 8 + *scale % 16),
                _ => {}
            }
            all.extend(block);
        }
        all
    }
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// A Llama of two layers; `matrix` makes each of its matrices, which are numbered.
fn llama(mut matrix: impl FnMut(usize, &str, &mut File)) -> File {
    let mut file = File::default();
    file.entry("general.architecture", 8, &text("llama"));
    for (key, value) in [
        ("context_length", 64u32),
        ("embedding_length", WIDTH as u32),
        ("block_count", 2),
        ("feed_forward_length", WIDTH as u32),
        ("attention.head_count", 4),
        ("attention.head_count_kv", 4),
        ("vocab_size", VOCABULARY as u32),
    ] {
        file.entry(&format!("llama.{key}"), 4, &value.to_le_bytes());
    }
    file.entry("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes());
    let mut random = Random(5);
    let mut embedding = || (random.next() % 2001) as f32 / 1000.0 - 1.0;
    let table: Vec<f32> = (0..VOCABULARY * WIDTH).map(|_| embedding()).collect();
    file.tensor("token_embd.weight", &[VOCABULARY, WIDTH], 0, &floats(&table));
    let head: Vec<f32> = table.iter().rev().map(|value| value / 8.0).collect();
    file.tensor("output.weight", &[VOCABULARY, WIDTH], 0, &floats(&head));
    file.tensor("output_norm.weight", &[WIDTH], 0, &floats(&[1.0; WIDTH]));
    let names = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"];
    for layer in 0..2 {
        for norm in ["attn_norm", "ffn_norm"] {
            let name = format!("blk.{layer}.{norm}.weight");
            file.tensor(&name, &[WIDTH], 0, &floats(&[1.0; WIDTH]));
        }
        for (index, name) in names.iter().enumerate() {
            matrix(layer * names.len() + index, &format!("blk.{layer}.{name}"), &mut file);
        }
    }
    file
}

fn command(home: &Path, words: &[&str]) -> Command {
    let mut command = lathe(home);
    command.args(words).stdin(Stdio::null());
    command
}

fn score(home: &Path, model: &Path, device: &str) -> (f64, Value) {
    let (model, tokens) = (model.display().to_string(), home.join("tokens.json"));
    let tokens = tokens.display().to_string();
    let words = ["score", &model, "--tokens", &tokens, "--device", device, "--exact", "--json"];
    let report = run_json(&mut command(home, &words));
    (report["mean_nll"].as_f64().expect("a number"), report["logprobs"].clone())
}

#[test]
fn types_without_kernels_run() {
    let home = tempfile::tempdir().expect("a folder");
    let path = |name: &str| -> PathBuf { home.path().join(name) };
    let ids: Vec<String> = (0..40).map(|i| (i * 7 % 61).to_string()).collect();
    std::fs::write(path("tokens.json"), format!("[{}]", ids.join(","))).expect("writes");
    let mut random = Random(1);
    let compact = llama(|index, name, file| {
        // The last matrix has the type whose second scale lies beside it.
        let kind = KINDS[index.min(12)];
        let shape = [WIDTH, WIDTH];
        file.tensor(&format!("{name}.weight"), &shape, kind.0, &random.blocks(kind));
        if index == 13 {
            file.tensor(&format!("{name}.scale"), &[1], 0, &floats(&[0.5]));
        }
    });
    compact.write(&path("compact.gguf"));
    // The same numbers in f32.
    let read = GgufFile::open(&path("compact.gguf")).expect("opens");
    let plain = llama(|_, name, file| {
        let name = format!("{name}.weight");
        let tensor = read.tensor(&name).expect("reads");
        let values = tensor.to_f32();
        assert!(values.iter().all(|value| value.is_finite()) && values.iter().any(|v| *v != 0.0));
        file.tensor(&name, &[WIDTH, WIDTH], 0, &floats(&values));
    });
    plain.write(&path("plain.gguf"));

    let (expected, logprobs) = score(home.path(), &path("plain.gguf"), "reference");
    let found = score(home.path(), &path("compact.gguf"), "reference");
    assert_eq!((found.0, &found.1), (expected, &logprobs), "the reference has the same numbers");
    let (found, _) = score(home.path(), &path("compact.gguf"), "cpu");
    assert!((found - expected).abs() < 1e-4, "{found} for {expected}");

    let model = path("compact.gguf").display().to_string();
    let words = ["inspect", &model, "--no-measure", "--context", "32"];
    let (code, out, told) = run(&mut command(home.path(), &words));
    assert_eq!(code, 0, "{told}");
    let told = format!("{out}{told}");
    assert!(told.contains("Q2_K as f32 (1), Q3_K as q6_k (1)"), "{told}");
    assert!(told.contains("IQ3_S as int8-g32-f32 (1)"), "{told}");
}

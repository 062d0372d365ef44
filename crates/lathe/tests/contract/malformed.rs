//! Broken checkpoints: exit code 2, one reason on stderr, little memory.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use lathe_tensor::gguf::{MetaValue, Metadata, Writer};
use serde_json::{Value, json};

use crate::shared;
use crate::support::{lathe, run_error};

/// Virtual memory that a refusal may take: the program, its threads and a mapped file fit several
/// times, the sizes that broken headers claim do not.
const MEMORY_KIB: usize = 4 << 20;

/// `lathe score MODEL` under the memory limit.
fn score(home: &Path, model: &Path) -> Command {
    let tokens = home.join("tokens.json");
    fs::write(&tokens, "[1, 2, 3]").expect("written");
    let plain = lathe(home);
    let mut command = Command::new("sh");
    let limited = format!("ulimit -v {MEMORY_KIB}; exec \"$0\" \"$@\"");
    command.args(["-c", &limited]).arg(plain.get_program());
    for (name, value) in plain.get_envs() {
        match value {
            Some(value) => command.env(name, value),
            None => command.env_remove(name),
        };
    }
    command.arg("score").arg(model).arg("--tokens").arg(tokens);
    command
}

fn refused(model: &Path) -> String {
    let home = tempfile::tempdir().expect("a folder");
    run_error(&mut score(home.path(), model), 2)
}

/// A folder with a copy of draft-llama, to be broken.
fn copy(shared: &Path) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    for name in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
        // Read and written, so that the copy can be changed whatever the original's mode.
        let bytes = fs::read(shared.join("models/draft-llama").join(name)).expect("read");
        fs::write(folder.path().join(name), bytes).expect("written");
    }
    let path = folder.path().to_owned();
    (folder, path)
}

fn change_config(path: &Path, key: &str, value: Value) -> String {
    let file = path.join("config.json");
    let original = fs::read_to_string(&file).expect("read");
    let mut config: Value = serde_json::from_str(&original).expect("JSON");
    config[key] = value;
    fs::write(&file, config.to_string()).expect("written");
    let reason = refused(path);
    fs::write(&file, original).expect("restored");
    reason
}

#[test]
fn broken_configurations() {
    let Some(shared) = shared("broken_configurations") else { return };
    let (_folder, path) = copy(&shared);
    let changes = [
        ("architectures", json!(["MambaForCausalLM"])),
        ("model_type", json!("mamba")),
        ("hidden_size", json!(0)),
        ("hidden_size", json!(-5)),
        ("hidden_size", json!(1_u64 << 60)),
        ("hidden_size", json!("wide")),
        ("num_hidden_layers", json!(4_000_000_000_u64)),
        ("num_attention_heads", json!(7)),
        ("num_key_value_heads", json!(0)),
        ("vocab_size", json!(1_u64 << 40)),
        ("hidden_act", json!("tanh")),
        ("rope_scaling", json!({"rope_type": "spiral"})),
        ("quantization_config", json!({"quant_method": "secret"})),
    ];
    for (key, value) in changes {
        let reason = change_config(&path, key, value.clone());
        println!("{key} = {value}: {reason}");
    }
    for text in ["", "{", "[]", "null", &"[".repeat(1 << 20), "{\"a\": 1e999}"] {
        fs::write(path.join("config.json"), text).expect("written");
        refused(&path);
    }
    fs::remove_file(path.join("config.json")).expect("removed");
    refused(&path);
}

/// A safetensors file with this header and `bytes` zero bytes after it.
fn safetensors(header: &[u8], length: u64, bytes: usize) -> Vec<u8> {
    let mut file = length.to_le_bytes().to_vec();
    file.extend_from_slice(header);
    file.resize(file.len() + bytes, 0);
    file
}

#[test]
fn broken_safetensors() {
    let Some(shared) = shared("broken_safetensors") else { return };
    let (_folder, path) = copy(&shared);
    let file = path.join("model.safetensors");
    let whole = fs::read(&file).expect("read");
    let header_end = 8 + u64::from_le_bytes(whole[..8].try_into().expect("8 bytes")) as usize;
    for length in [0, 4, 8, 100, header_end - 1, header_end, header_end + 10, whole.len() - 1] {
        fs::write(&file, &whole[..length]).expect("written");
        refused(&path);
    }
    let tensor = |dtype: &str, shape: Value, offsets: [u64; 2]| {
        let norm = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        json!({ "model.norm.weight": norm })
    };
    let name = |header: &Value| header.to_string().into_bytes();
    let mut overlap = tensor("F32", json!([4]), [0, 16]);
    overlap["model.embed_tokens.weight"] =
        json!({"dtype": "F32", "shape": [4], "data_offsets": [8, 24]});
    let headers = [
        overlap,
        tensor("F32", json!([4]), [0, 12]),
        tensor("F32", json!([1_u64 << 62, 1 << 10]), [0, 16]),
        tensor("F32", json!([4]), [16, 0]),
        tensor("F32", json!([4]), [u64::MAX - 3, u64::MAX]),
        tensor("I4096", json!([4]), [0, 16]),
        tensor("F32", json!("four"), [0, 16]),
        tensor("F32", json!([4]), [0, 16]),
    ];
    for header in headers {
        let bytes = name(&header);
        fs::write(&file, safetensors(&bytes, bytes.len() as u64, 16)).expect("written");
        println!("{header}: {}", refused(&path));
    }
    for length in [u64::MAX, 1 << 40, 3] {
        fs::write(&file, safetensors(b"{}", length, 64)).expect("written");
        refused(&path);
    }
    let deep = "[".repeat(1 << 20).into_bytes();
    fs::write(&file, safetensors(&deep, deep.len() as u64, 0)).expect("written");
    refused(&path);
    fs::remove_file(&file).expect("removed");
    fs::write(
        path.join("model.safetensors.index.json"),
        json!({"weight_map": {"model.norm.weight": "../outside.safetensors"}}).to_string(),
    )
    .expect("written");
    refused(&path);
}

#[test]
fn broken_gguf_headers() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    let header = |tensors: u64, entries: u64| {
        let mut bytes = b"GGUF\x03\x00\x00\x00".to_vec();
        bytes.extend(tensors.to_le_bytes());
        bytes.extend(entries.to_le_bytes());
        bytes
    };
    let key = |kind: u32| {
        let mut bytes = 1_u64.to_le_bytes().to_vec();
        bytes.push(b'k');
        bytes.extend(kind.to_le_bytes());
        bytes
    };
    let join = |parts: &[Vec<u8>]| parts.concat();
    let array = |kind: u32, count: u64| {
        [kind.to_le_bytes().to_vec(), count.to_le_bytes().to_vec()].concat()
    };
    let nested: Vec<u8> = std::iter::repeat_n(array(9, 1), 100_000).flatten().collect();
    let cases = [
        Vec::new(),
        b"GGUF".to_vec(),
        b"GGML\x03\x00\x00\x00".to_vec(),
        b"GGUF\x63\x00\x00\x00".to_vec(),
        header(0, 0),
        header(u64::MAX, 0),
        header(0, u64::MAX),
        header(1 << 40, 1 << 40),
        join(&[header(0, 1), u64::MAX.to_le_bytes().to_vec()]),
        join(&[header(0, 1), key(77)]),
        join(&[header(0, 1), key(8), (1_u64 << 50).to_le_bytes().to_vec()]),
        join(&[header(0, 1), key(9), array(4, 1 << 61)]),
        join(&[header(0, 1), key(9), array(8, 1 << 40)]),
        join(&[header(0, 1), key(9), nested]),
    ];
    for (index, bytes) in cases.iter().enumerate() {
        fs::write(&file, bytes).expect("written");
        println!("case {index}: {}", refused(&file));
    }
}

#[test]
fn truncated_and_incomplete_gguf() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("model.gguf");
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", MetaValue::String("llama".into()));
    metadata.insert("llama.block_count", MetaValue::U32(1));
    Writer::create(&file, &metadata, &[]).expect("a file").finish().expect("finished");
    let reason = refused(&file);
    assert!(reason.contains("llama."), "names what is missing: {reason}");
    let whole = fs::read(&file).expect("read");
    for length in (0..whole.len().min(120)).step_by(7) {
        fs::write(&file, &whole[..length]).expect("written");
        refused(&file);
    }
    metadata.insert("general.architecture", MetaValue::String("mamba".into()));
    Writer::create(&file, &metadata, &[]).expect("a file").finish().expect("finished");
    assert!(refused(&file).contains("mamba"));
}

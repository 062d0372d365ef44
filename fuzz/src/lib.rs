//! What the fuzz targets run: a reader of files that strangers write meets any bytes.
//!
//! Each function takes the bytes of one file. A typed error is right, a value that can be used is
//! right, and a panic is a finding. `cargo test` runs them on the seeds and on damaged seeds.
#![forbid(unsafe_code)]

use std::fs;
use std::path::Path;

use lathe_model::adapter::Adapter;
use lathe_model::chat::{ChatTemplate, Message};
use lathe_model::families::Family;
use lathe_model::tokenizer::Tokenizer;
use lathe_model::{DecoderSpec, Model, OpenOptions};
use lathe_quant::recipe::Recipe;
use lathe_tensor::Bytes;
use lathe_tensor::gguf::GgufFile;
use lathe_tensor::safetensors::SafetensorsFile;
use serde_json::{Map, Value, json};

/// A safetensors file without tensors: the length of its header, and the header.
const NO_TENSORS: &[u8] = b"\x02\0\0\0\0\0\0\0{}";

/// A GGUF file: its values and its tensors.
pub fn gguf(data: &[u8]) {
    let path = Path::new("fuzz");
    let Ok(file) = GgufFile::from_bytes(path, Bytes::new(data.to_vec())) else { return };
    for (_, value) in file.metadata.iter() {
        let Some(array) = value.as_array() else { continue };
        let lengths = [
            array.byte_strings().map(Iterator::count),
            array.integers().map(|v| v.len()),
            array.floats().map(|v| v.len()),
            array.booleans().map(|v| v.len()),
            array.arrays().map(|v| v.len()),
        ];
        lengths.into_iter().flatten().for_each(|n| assert_eq!(n, array.len()));
    }
    for info in &file.tensors {
        if let Ok(tensor) = file.tensor(&info.name) {
            assert_eq!(tensor.to_f32().len(), info.shape.iter().product::<usize>());
        }
    }
}

/// A safetensors file: its tensors.
pub fn safetensors(data: &[u8]) {
    let path = Path::new("fuzz");
    let Ok(file) = SafetensorsFile::from_bytes(path, Bytes::new(data.to_vec())) else { return };
    for name in file.names() {
        let raw = file.raw(name).expect("a listed name");
        let elements: usize = raw.shape.iter().product();
        assert_eq!(elements * raw.dtype.bytes(), raw.bytes.len());
        if let Ok(tensor) = file.tensor(name) {
            assert_eq!(tensor.to_f32().len(), elements);
        }
    }
}

/// A `tokenizer.json`: what it encodes, it can decode.
pub fn tokenizer(data: &[u8]) {
    let folder = folder(&[("tokenizer.json", data)]);
    let path = folder.path().join("tokenizer.json");
    let Ok(tokenizer) = Tokenizer::from_file(&path) else { return };
    let Ok(tokens) = tokenizer.encode("Hello,  w\u{f6}rld \u{1f600}\n 12", true) else { return };
    for token in &tokens {
        assert!((*token as usize) < tokenizer.vocabulary(), "{token}");
    }
    tokenizer.decode(&tokens, false).expect("the tokenizer's own tokens");
}

/// A chat template, given a short conversation.
pub fn chat_template(data: &[u8]) {
    let Ok(source) = std::str::from_utf8(data) else { return };
    let Ok(template) = ChatTemplate::new(source, Map::new()) else { return };
    let messages = [Message::new("system", "Be brief."), Message::new("user", "Hello")];
    // The outcome is the template's: a text, its own refusal, or an error of its code.
    let _ = template.render(&messages, true, json!({}));
}

/// A `config.json`, with what it says of quantization: a folder that has it and no tensors.
pub fn config(data: &[u8]) {
    let folder = folder(&[("config.json", data), ("model.safetensors", NO_TENSORS)]);
    // Without tensors, no config makes a model that runs. Opening gives a typed error or a model
    // whose weights are missing.
    let _ = Model::open_with(folder.path(), &OpenOptions::default());
    if let Ok(config) = serde_json::from_slice::<Value>(data) {
        let _ = DecoderSpec::from_hf_config(&config);
    }
}

/// The `adapter_config.json` of an adapter for a small Llama.
pub fn adapter(data: &[u8]) {
    let model = json!({
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64,
        "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "max_position_embeddings": 256, "hidden_act": "silu", "tie_word_embeddings": true,
    });
    let family = Family::of_config(&model).expect("Llama is known");
    let spec = family.spec(&model).expect("the config is whole");
    let files = [("adapter_config.json", data), ("adapter_model.safetensors", NO_TENSORS)];
    let _ = Adapter::open(folder(&files).path(), &spec, family.rules());
}

/// A recipe of quantization.
pub fn recipe(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = Recipe::parse(text, None);
}

/// A temporary folder with `files`.
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, data) in files {
        fs::write(folder.path().join(name), data).expect("the file is written");
    }
    folder
}

#[cfg(test)]
mod tests;

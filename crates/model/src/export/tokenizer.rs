//! Tokenizers from one layout to the other.

use std::path::Path;

use lathe_tensor::gguf::{GgufFile, MetaValue, Metadata};
use serde_json::Value;

use super::{ExportError, io};
use crate::generation::read_json;
use crate::tokenizer::GgufVocabulary;

/// The type that GGUF gives ids that no text has.
const UNUSED: i32 = 5;

/// Adds what `tokenizer.json` and its neighbours in `directory` say to GGUF `metadata`; nothing
/// if there is no tokenizer. The vocabulary is filled up to the model's.
pub(super) fn add_to_gguf(
    directory: &Path,
    vocabulary: usize,
    metadata: &mut Metadata,
) -> Result<(), ExportError> {
    if !directory.join("tokenizer.json").is_file() {
        return Ok(());
    }
    let mut tokens = GgufVocabulary::from_hugging_face(directory)?;
    for id in tokens.tokens.len()..vocabulary {
        tokens.tokens.push(format!("[PAD{id}]"));
        tokens.token_types.push(UNUSED);
        if !tokens.scores.is_empty() {
            tokens.scores.push(0.0);
        }
    }
    tokens.write(metadata);
    if let Some(template) = chat_template(directory)? {
        metadata.insert("tokenizer.chat_template", MetaValue::String(template));
    }
    Ok(())
}

/// The source of a directory's default chat template.
fn chat_template(directory: &Path) -> Result<Option<String>, ExportError> {
    let path = directory.join("chat_template.jinja");
    if path.is_file() {
        return std::fs::read_to_string(&path).map(Some).map_err(io(&path));
    }
    let path = directory.join("tokenizer_config.json");
    let config = read_json(&path).map_err(io(&path))?.unwrap_or(Value::Null);
    let own = &config["chat_template"];
    let named = own.as_array().into_iter().flatten().find(|entry| entry["name"] == "default");
    let text = own.as_str().or(named.and_then(|entry| entry["template"].as_str()));
    Ok(text.map(str::to_owned))
}

/// Writes `tokenizer.json` and `tokenizer_config.json` of a GGUF file's vocabulary, if it has one.
pub(super) fn write_hugging_face(file: &GgufFile, directory: &Path) -> Result<(), ExportError> {
    if file.metadata.get("tokenizer.ggml.model").is_none() {
        return Ok(());
    }
    let vocabulary = GgufVocabulary::from_metadata(&file.metadata)?;
    let path = directory.join("tokenizer.json");
    let json = vocabulary.to_tokenizer_json()?;
    std::fs::write(&path, serde_json::to_string(&json).unwrap_or_default()).map_err(io(&path))?;
    let template = file.metadata.optional::<&str>("tokenizer.chat_template").unwrap_or(None);
    let path = directory.join("tokenizer_config.json");
    let config = vocabulary.to_tokenizer_config(template);
    let text = serde_json::to_string_pretty(&config).unwrap_or_default() + "\n";
    std::fs::write(&path, text).map_err(io(&path))
}

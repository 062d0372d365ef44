//! `GenerationDefaults`: what a model's own files say about when to stop and how to sample.

use std::path::Path;

use lathe_tensor::gguf::GgufFile;
use serde_json::Value;

use crate::config::Config;
use crate::spec::SpecError;
use crate::tokenizer::Tokenizer;

/// Settings that come with a model; what is not said is absent.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct GenerationDefaults {
    /// Tokens that end an answer, ascending.
    pub stop_tokens: Vec<u32>,
    /// Whether the model asks to be sampled from (`do_sample`) instead of greedy decoding.
    pub sample: bool,
    /// Divides the logits.
    pub temperature: Option<f32>,
    /// Candidates kept.
    pub top_k: Option<usize>,
    /// Probability mass kept.
    pub top_p: Option<f32>,
    /// Least probability kept, relative to the best.
    pub min_p: Option<f32>,
    /// Divides the logits of tokens that were there before.
    pub repetition_penalty: Option<f32>,
}

impl GenerationDefaults {
    /// From a Hugging Face directory: `generation_config.json` for all, and the end tokens of
    /// `config.json` and of the tokenizer.
    ///
    /// # Errors
    /// If a field that is there has the wrong type.
    pub fn from_hf(
        generation: Option<&Value>,
        config: &Value,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, SpecError> {
        let mut defaults = GenerationDefaults::default();
        defaults.stop_tokens.extend(end_tokens(&Config::new(config, "")?)?);
        if let Some(generation) = generation {
            let c = Config::new(generation, "generation_config.json: ")?;
            defaults.stop_tokens.extend(end_tokens(&c)?);
            let number = |key: &str| Ok::<_, SpecError>(c.number(key)?.map(|x| x as f32));
            defaults.sample = c.flag("do_sample")?.unwrap_or(false);
            defaults.temperature = number("temperature")?;
            defaults.top_k = c.size("top_k")?;
            defaults.top_p = number("top_p")?;
            defaults.min_p = number("min_p")?;
            defaults.repetition_penalty = number("repetition_penalty")?;
        }
        defaults.add_tokenizer(tokenizer);
        Ok(defaults)
    }

    /// From a GGUF file: the end tokens that its metadata names, and the tokenizer's.
    pub fn from_gguf(file: &GgufFile, tokenizer: Option<&Tokenizer>) -> Self {
        let mut defaults = GenerationDefaults::default();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            let id = file.metadata.optional::<u32>(&format!("tokenizer.ggml.{key}"));
            defaults.stop_tokens.extend(id.ok().flatten());
        }
        defaults.add_tokenizer(tokenizer);
        defaults
    }

    fn add_tokenizer(&mut self, tokenizer: Option<&Tokenizer>) {
        self.stop_tokens.extend(tokenizer.into_iter().flat_map(|t| t.end_tokens().iter().copied()));
        self.stop_tokens.sort_unstable();
        self.stop_tokens.dedup();
    }
}

/// `eos_token_id`: one, several or none; of a model that also sees, its text part's.
fn end_tokens(c: &Config) -> Result<Vec<u32>, SpecError> {
    let text = c.object("text_config")?;
    let c = if c.has("eos_token_id") { *c } else { text.unwrap_or(*c) };
    let ids = match c.get("eos_token_id") {
        Some(Value::Array(_)) => c.sizes("eos_token_id")?.unwrap_or_default(),
        _ => c.size("eos_token_id")?.into_iter().collect(),
    };
    ids.into_iter()
        .map(u32::try_from)
        .collect::<Result<_, _>>()
        .map_err(|_| SpecError::value("eos_token_id", "a huge number", "token ids"))
}

/// A JSON file, if it is there.
pub(crate) fn read_json(path: &Path) -> Result<Option<Value>, std::io::Error> {
    let text = match std::fs::read_to_string(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        text => text?,
    };
    let value = serde_json::from_str(&text)?;
    Ok(Some(value))
}

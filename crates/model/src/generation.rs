//! `GenerationDefaults`: what a model's own files say about when to stop and how to sample.

use std::path::Path;

use lathe_tensor::gguf::GgufFile;
use serde_json::Value;

use crate::config::{Config, shorten};
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
    /// Tokens that are never chosen.
    pub suppress_tokens: Vec<u32>,
    /// Strings that end an answer.
    pub stop_strings: Vec<String>,
    /// Tokens of an answer at most.
    pub max_new_tokens: Option<usize>,
    /// What the file asks for and nothing here does, as `field: value`.
    pub not_followed: Vec<String>,
}

/// Candidates kept where a file asks for sampling and does not say how many: transformers'
/// default.
const TOP_K_DEFAULT: usize = 50;

/// Fields of a `generation_config.json` that change what is generated and that are not followed,
/// with the numbers that leave it unchanged. Null, false and empty lists leave it unchanged too.
const NOT_FOLLOWED: &[(&str, &[f64])] = &[
    ("assistant_early_exit", &[]),
    ("bad_words_ids", &[]),
    ("begin_suppress_tokens", &[]),
    ("constraints", &[]),
    ("diversity_penalty", &[0.0]),
    ("dola_layers", &[]),
    ("encoder_no_repeat_ngram_size", &[0.0]),
    ("encoder_repetition_penalty", &[1.0]),
    ("epsilon_cutoff", &[0.0]),
    ("eta_cutoff", &[0.0]),
    ("exponential_decay_length_penalty", &[]),
    ("force_words_ids", &[]),
    ("forced_bos_token_id", &[]),
    ("forced_decoder_ids", &[]),
    ("forced_eos_token_id", &[]),
    ("guidance_scale", &[1.0]),
    ("max_time", &[]),
    ("min_length", &[0.0]),
    ("min_new_tokens", &[0.0]),
    ("no_repeat_ngram_size", &[0.0]),
    ("num_beam_groups", &[1.0]),
    ("num_beams", &[1.0]),
    ("penalty_alpha", &[0.0]),
    ("prompt_lookup_num_tokens", &[]),
    ("sequence_bias", &[]),
    ("top_h", &[]),
    ("typical_p", &[1.0]),
    ("watermarking_config", &[]),
];

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
            defaults.top_k = match optional_size(&c, "top_k")? {
                None if defaults.sample && !is_negative(&c, "top_k") => Some(TOP_K_DEFAULT),
                top_k => top_k,
            };
            defaults.top_p = number("top_p")?;
            defaults.min_p = number("min_p")?;
            defaults.repetition_penalty = number("repetition_penalty")?;
            defaults.suppress_tokens = token_ids(&c, "suppress_tokens")?;
            defaults.stop_strings = match c.get("stop_strings") {
                Some(Value::String(one)) => vec![one.clone()],
                _ => c
                    .texts("stop_strings")?
                    .unwrap_or_default()
                    .into_iter()
                    .map(Into::into)
                    .collect(),
            };
            defaults.max_new_tokens = optional_size(&c, "max_new_tokens")?.filter(|n| *n > 0);
            let asks = |(key, neutral): &&(&str, &[f64])| {
                c.get(key).is_some_and(|value| !changes_nothing(value, neutral))
            };
            let not_followed = NOT_FOLLOWED.iter().filter(asks);
            let told = |(key, _): &(&str, &[f64])| {
                format!("{key}: {}", c.get(key).map(shorten).unwrap_or_default())
            };
            defaults.not_followed = not_followed.map(told).collect();
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
    token_ids(&c, "eos_token_id")
}

/// One token, several or none. A negative number is no token: some files write -1 for "none".
fn token_ids(c: &Config, key: &str) -> Result<Vec<u32>, SpecError> {
    let ids: Vec<i64> = match c.get(key) {
        None => Vec::new(),
        Some(Value::Array(_)) => {
            let ids = c.numbers(key)?.unwrap_or_default();
            ids.into_iter().map(|id| id as i64).collect()
        }
        Some(_) if is_negative(c, key) => Vec::new(),
        Some(_) => c.size(key)?.into_iter().map(|id| id as i64).collect(),
    };
    let ids = ids.into_iter().filter(|id| *id >= 0).map(u32::try_from);
    let bad = |_| SpecError::value(key, "a huge number", "token ids");
    ids.collect::<Result<_, _>>().map_err(bad)
}

/// A size for which some files write -1 where they mean none.
fn optional_size(c: &Config, key: &str) -> Result<Option<usize>, SpecError> {
    if is_negative(c, key) { Ok(None) } else { c.size(key) }
}

fn is_negative(c: &Config, key: &str) -> bool {
    c.get(key).and_then(Value::as_f64).is_some_and(|number| number < 0.0)
}

fn changes_nothing(value: &Value, neutral: &[f64]) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Number(number) => number.as_f64().is_some_and(|number| neutral.contains(&number)),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::String(_) => false,
    }
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(generation: Value) -> GenerationDefaults {
        GenerationDefaults::from_hf(Some(&generation), &json!({"eos_token_id": -1}), None)
            .expect("valid")
    }

    #[test]
    fn negative_numbers_mean_none() {
        let defaults = read(json!({"do_sample": true, "top_k": -1, "eos_token_id": -1}));
        assert_eq!((defaults.top_k, defaults.stop_tokens), (None, vec![]));
        assert_eq!(read(json!({"eos_token_id": [7, -1]})).stop_tokens, [7]);
        assert_eq!(read(json!({"max_new_tokens": -1})).max_new_tokens, None);
    }

    #[test]
    fn sampling_without_top_k_keeps_fifty() {
        assert_eq!(read(json!({"do_sample": true})).top_k, Some(50));
        assert_eq!(read(json!({"do_sample": true, "top_k": 0})).top_k, Some(0));
        assert_eq!(read(json!({})).top_k, None);
    }

    #[test]
    fn what_a_file_asks_for_is_followed_or_told() {
        let defaults = read(json!({
            "suppress_tokens": [3, 5], "stop_strings": "END", "max_new_tokens": 40,
            "begin_suppress_tokens": [1], "no_repeat_ngram_size": 3, "num_beams": 1,
            "typical_p": 1.0, "bad_words_ids": null,
        }));
        assert_eq!(defaults.suppress_tokens, [3, 5]);
        assert_eq!(defaults.stop_strings, ["END"]);
        assert_eq!(defaults.max_new_tokens, Some(40));
        assert_eq!(
            defaults.not_followed,
            ["begin_suppress_tokens: [1]", "no_repeat_ngram_size: 3"]
        );
    }
}

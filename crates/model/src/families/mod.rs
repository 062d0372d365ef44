//! The table of families: from a `config.json` or GGUF metadata to a [`DecoderSpec`], and from
//! canonical weight names to the names in a file.
//!
//! A family's name stands in this folder and nowhere else. A row says how the family differs from
//! a plain Llama; whatever a row does not know, and that would change the computation, is refused.

mod base;
mod cohere;
mod deepseek;
mod dense;
mod ernie;
mod fields;
mod gemma;
mod gguf;
mod gpt_oss;
mod granite;
mod llama;
mod olmo;
mod qwen;
mod rope;
mod rows;

pub use gguf::GgufFamily;
use serde_json::Value;

use crate::config::{Config, Seen};
use crate::names::Rules;
use crate::spec::{DecoderSpec, SpecError};

/// One family of Hugging Face checkpoints.
pub struct Family {
    /// `model_type` in `config.json`.
    model_types: &'static [&'static str],
    /// The class that runs it, in `architectures`.
    architecture: &'static str,
    /// Reads the configuration.
    spec: fn(&Config) -> Result<DecoderSpec, SpecError>,
    /// Where the weights are, most special rules first.
    rules: &'static [Rules],
}

impl Family {
    /// The family of a `config.json`.
    ///
    /// # Errors
    /// If no row has its `model_type` and class.
    pub fn of_config(config: &Value) -> Result<&'static Family, SpecError> {
        let config = Config::new(config, "")?;
        let classes = config.texts("architectures")?.unwrap_or_default();
        let class = classes.first().copied();
        let row = match config.text("model_type")? {
            Some(kind) => rows::TABLE.iter().find(|row| row.model_types.contains(&kind)),
            None => rows::TABLE.iter().find(|row| Some(row.architecture) == class),
        };
        let name = class.or(config.text("model_type")?).unwrap_or("(none given)");
        let row = row.ok_or_else(|| SpecError::Architecture(name.to_owned()))?;
        if class.is_some_and(|class| class != row.architecture) {
            return Err(SpecError::Architecture(name.to_owned()));
        }
        Ok(row)
    }

    /// Where this family's checkpoints have the weights, most special rules first.
    pub fn rules(&self) -> &'static [Rules] {
        self.rules
    }

    /// The spec that a `config.json` of this family describes, within limits.
    ///
    /// # Errors
    /// If a feature is not supported (the error names it), or a field is missing or out of range.
    pub fn spec(&self, config: &Value) -> Result<DecoderSpec, SpecError> {
        Ok(self.spec_with_notes(config, &[])?.0)
    }

    /// As [`Self::spec`], with what a user should be told about the file. Fields in
    /// `allow_unknown` are ignored where they would be refused.
    ///
    /// # Errors
    /// As [`Self::spec`].
    pub fn spec_with_notes(
        &self,
        config: &Value,
        allow_unknown: &[String],
    ) -> Result<(DecoderSpec, Vec<String>), SpecError> {
        let seen = Seen::default();
        let spec = (self.spec)(&Config::new(config, "")?.noting(&seen))?;
        spec.validate()?;
        fields::check_unread(self.architecture, config, &seen, allow_unknown)?;
        Ok((spec, seen.into_notes()))
    }
}

/// `model_type` and class of every family of Hugging Face checkpoints.
pub fn names() -> impl Iterator<Item = (&'static str, &'static str)> {
    let of_row = |row: &'static Family| {
        row.model_types.iter().map(|model_type| (*model_type, row.architecture))
    };
    rows::TABLE.iter().flat_map(of_row)
}

impl DecoderSpec {
    /// The spec that a `config.json` describes.
    ///
    /// # Errors
    /// If the family or one of its features is not supported (the error names it), or a field is
    /// missing or out of range.
    pub fn from_hf_config(config: &Value) -> Result<DecoderSpec, SpecError> {
        Family::of_config(config)?.spec(config)
    }
}

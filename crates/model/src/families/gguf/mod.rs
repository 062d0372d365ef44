//! Families of GGUF files: from metadata (and from which tensors there are) to a [`DecoderSpec`].
//!
//! What a file shows is read off the file: a bias is there if its tensor is. A row adds what
//! llama.cpp knows of an architecture without saying it in the file.

mod base;
mod experts;
mod rope;
mod rows;

use lathe_tensor::gguf::GgufFile;

use crate::names::Rules;
use crate::spec::{DecoderSpec, SpecError};
use base::Meta;

/// One family of GGUF files.
pub struct GgufFamily {
    /// `general.architecture`.
    architecture: &'static str,
    /// Reads the metadata.
    spec: fn(&Meta) -> Result<DecoderSpec, SpecError>,
    rules: &'static [Rules],
}

impl GgufFamily {
    /// The family of a file.
    ///
    /// # Errors
    /// If no row has its `general.architecture`.
    pub fn of(file: &GgufFile) -> Result<&'static GgufFamily, SpecError> {
        let meta = Meta { file, architecture: "general" };
        let name = meta.text("architecture")?;
        let name = name.ok_or_else(|| SpecError::Missing("general.architecture".to_owned()))?;
        let row = rows::TABLE.iter().find(|row| row.architecture == name);
        row.ok_or_else(|| SpecError::Architecture(name.to_owned()))
    }

    /// The spec that a file of this family describes, within limits.
    pub fn spec(&self, file: &GgufFile) -> Result<DecoderSpec, SpecError> {
        let spec = (self.spec)(&Meta { file, architecture: self.architecture })?;
        spec.validate()?;
        Ok(spec)
    }

    /// Where this family's files have the weights, most special rules first.
    pub fn rules(&self) -> &'static [Rules] {
        self.rules
    }
}

impl DecoderSpec {
    /// The spec that a GGUF file describes.
    ///
    /// # Errors
    /// As [`DecoderSpec::from_hf_config`].
    pub fn from_gguf(file: &GgufFile) -> Result<DecoderSpec, SpecError> {
        GgufFamily::of(file)?.spec(file)
    }
}

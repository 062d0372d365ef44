//! Writing models back: to a Hugging Face directory, and to GGUF.
//!
//! Whole files of another family are refused by what they have that the target cannot say; a
//! weight is read, converted and written before the next, so that memory stays small.

mod adapter;
mod compressed;
mod encode;
mod gguf;
mod hugging_face;
mod inputs;
mod plain_llama;
mod quantization_config;
mod readers;
mod tokenizer;

use lathe_program::{StaticScale, Weight};
use lathe_tensor::gguf::GgufError;
use lathe_tensor::safetensors::SafetensorsError;
use lathe_tensor::{Bytes, FloatType, Format, Tensor, TensorError, codec};

pub use adapter::{LowRank, to_adapter};
pub use compressed::{PackedLayout, to_packed};
pub use encode::Integers;
pub use gguf::{GgufOptions, to_gguf, to_gguf_replacing};
pub use hugging_face::{HuggingFaceOptions, to_hugging_face};
pub use readers::{Contents, Folder, Reader};

use crate::checkpoint::CheckpointError;
use crate::model::ModelError;
use crate::spec::SpecError;
use crate::tokenizer::TokenizerError;
use crate::weights::WeightsError;

/// Weights that take the place of a model's own while it is written. A weight is asked for once,
/// and is not kept: memory holds one at a time.
pub trait Replacement {
    /// The format in which `weight` will come; `None` if it stays what it is.
    fn format(&self, weight: Weight) -> Option<Format>;

    /// The weight, in the program's shape and in the format that was promised.
    ///
    /// # Errors
    /// If it cannot be made.
    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError>;

    /// Whether the inputs of all quantized matrices are rounded under scales that are stored beside
    /// them.
    fn stores_input_scales(&self) -> bool {
        false
    }

    /// The scale of the inputs of `weight`, if there is one.
    fn input_scale(&self, _: Weight) -> Option<StaticScale> {
        None
    }
}

/// Why a weight could not be made; the maker's own error.
pub type ReplacementError = Box<dyn std::error::Error + Send + Sync>;

/// Replaces nothing.
struct Nothing;

impl Replacement for Nothing {
    fn format(&self, _: Weight) -> Option<Format> {
        None
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        Err(format!("weight {} is not replaced", weight.0).into())
    }
}

/// Why a model could not be written.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The target cannot say something that the model has.
    #[error("{feature} cannot be written to {target}")]
    Feature {
        /// What.
        feature: String,
        /// Which layout.
        target: &'static str,
    },
    /// A weight that was to be written could not be made.
    #[error("weight {name}: {source}")]
    Replacement {
        /// Its canonical name.
        name: String,
        /// Why.
        source: ReplacementError,
    },
    /// A file cannot be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// Which file.
        path: std::path::PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// A tensor cannot be stored in the format that was asked for.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// Its name in the new file.
        name: String,
        /// What does not fit.
        source: TensorError,
    },
    /// The model's own description is not consistent.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The model's weights cannot be read.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A tensor cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The tokenizer cannot be read, or not be said there.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The safetensors file cannot be written.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// The GGUF file cannot be written.
    #[error(transparent)]
    Gguf(#[from] GgufError),
}

fn io(path: &std::path::Path) -> impl Fn(std::io::Error) -> ExportError + '_ {
    |source| ExportError::Io { path: path.to_owned(), source }
}

/// The bytes of `tensor` in `format`, plain floats or GGUF blocks.
fn bytes_in(tensor: &Tensor, format: Format) -> Bytes {
    if tensor.format == format {
        return tensor.codes.clone();
    }
    Bytes::new(codec::quantize(format, &tensor.to_f32()))
}

/// A number as its shortest spelling in `f32` reads: 1e-5, not 9.99999974e-6.
fn as_written(number: f32) -> f64 {
    number.to_string().parse().unwrap_or(f64::from(number))
}

/// Plain floats stay what they are; anything else becomes bf16.
fn float_of(format: Format) -> FloatType {
    match format {
        Format::Float(float) => float,
        _ => FloatType::BF16,
    }
}

//! Why something could not be quantized.

use lathe_model::export::ExportError;
use lathe_model::weights::WeightsError;
use lathe_model::{ModelError, SpecError};
use lathe_program::BackendError;
use lathe_tensor::TensorError;

/// Why something could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum QuantError {
    /// A recipe contains something that is not allowed.
    #[error("recipe: {0}")]
    Recipe(String),
    /// A tensor cannot be stored in the format that was asked for.
    #[error("tensor {tensor}: {source}")]
    Format {
        /// Canonical name.
        tensor: String,
        /// What does not fit.
        source: TensorError,
    },
    /// A number of a tensor, or of what it reads, is NaN or infinite.
    #[error("tensor {tensor}: {what}, expected finite numbers")]
    NotFinite {
        /// Canonical name.
        tensor: String,
        /// What was found.
        what: String,
    },
    /// A technique cannot handle a tensor.
    #[error("{technique} of tensor {tensor}: {reason}")]
    Technique {
        /// The technique's name.
        technique: &'static str,
        /// Canonical name of the tensor.
        tensor: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// A technique needs statistics of a tensor's inputs, and calibration saw none.
    #[error(
        "{technique} of tensor {tensor} needs calibration, and none of its inputs was observed"
    )]
    Unobserved {
        /// The technique's name.
        technique: &'static str,
        /// Canonical name of the tensor.
        tensor: String,
    },
    /// A layer cannot be run by itself.
    #[error("a layer reads both {first} and {second} of what is before it, expected one value")]
    Section {
        /// A value that it reads.
        first: String,
        /// Another one.
        second: String,
    },
    /// The calibration tokens cannot be used.
    #[error("calibration: {0}")]
    Calibration(String),
    /// An interrupted run cannot be resumed, or its state cannot be saved.
    #[error("{}: {reason}", .folder.display())]
    Resume {
        /// The folder of its finished layers.
        folder: std::path::PathBuf,
        /// What was found and what was expected.
        reason: String,
    },
    /// The model's description is not consistent.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// The model's weights do not match its description.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A weight cannot be read.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The backend that runs calibration failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The result cannot be written.
    #[error(transparent)]
    Export(#[from] ExportError),
}

//! A checkpoint: tensors by the names that its files give them, whatever the container.
//!
//! Numbers that a file keeps in several tensors (codes and scales) come as one [`Tensor`] here;
//! what the tensors are for is the business of [`crate::weights`].

mod awq;
mod compressed;
mod fp8;
mod gptq;
pub(crate) mod inputs;
mod int8;
mod integers;
mod modelopt;
mod mxfp4;
mod naming;
mod nf4;
mod packed;
mod planes;
mod quantization;
mod scheme;
mod targets;

use std::path::{Path, PathBuf};

use lathe_tensor::gguf::{GgufError, GgufFile};
use lathe_tensor::safetensors::{
    Checkpoint as SafetensorsFiles, Dtype, RawTensor, SafetensorsError,
};
use lathe_tensor::{ActivationFormat, Tensor, TensorError};

pub use self::awq::AwqScheme;
pub use self::compressed::CompressedTensors;
pub use self::gptq::GptqScheme;
pub use self::inputs::{InputScheme, ModuleInput};
pub use self::quantization::Quantization;
pub use self::scheme::{Encoding, Scheme};
pub(crate) use self::scheme::{MIXED, part_of};
use crate::spec::SpecError;

/// Why a tensor of a checkpoint could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A safetensors file is malformed or lacks something.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A GGUF file is malformed or lacks something.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The tensor and its scales do not fit together.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// Its name in the file.
        name: String,
        /// What does not fit.
        source: TensorError,
    },
    /// A tensor has a type or shape that its encoding cannot have.
    #[error("tensor {name} is {found}, expected {expected}")]
    Encoding {
        /// Its name in the file.
        name: String,
        /// Type and shape.
        found: String,
        /// What its encoding asks for.
        expected: String,
    },
    /// The configuration names a method of quantization that no tensor of the files is stored by.
    #[error(
        "quantization_config: no tensor of the files is quantized so, expected some `*{ending}`"
    )]
    NotQuantized {
        /// How the names of such tensors end.
        ending: &'static str,
    },
    /// The description of the checkpoint asks for something that is not supported.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// The tensors of a model, mapped from one or many files.
#[derive(Debug)]
pub enum Checkpoint {
    /// A Hugging Face directory's safetensors.
    Safetensors {
        /// The files.
        files: SafetensorsFiles,
        /// How some tensors are stored.
        quantization: Quantization,
    },
    /// A GGUF file.
    Gguf(GgufFile),
}

impl Checkpoint {
    /// Where the checkpoint lies.
    pub fn path(&self) -> PathBuf {
        match self {
            Checkpoint::Safetensors { files, .. } => files.path().to_owned(),
            Checkpoint::Gguf(file) => file.path().to_owned(),
        }
    }

    /// The safetensors of a directory.
    ///
    /// # Errors
    /// If there are none, a file is malformed, or no tensor is stored as `quantization` says.
    pub fn open_safetensors(
        path: &Path,
        quantization: Quantization,
    ) -> Result<Self, CheckpointError> {
        let files = SafetensorsFiles::open(path)?;
        let naming = quantization.naming();
        match naming.example().filter(|_| !naming.is_used(&files)) {
            None => Ok(Checkpoint::Safetensors { files, quantization }),
            Some(ending) => Err(CheckpointError::NotQuantized { ending }),
        }
    }

    /// Gives the memory of the mapped files back (see [`lathe_tensor::Bytes::release`]).
    pub fn release(&self) {
        match self {
            Checkpoint::Safetensors { files, .. } => files.release(),
            Checkpoint::Gguf(file) => file.release(),
        }
    }

    /// Names of all tensors as they lie in the files.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Checkpoint::Safetensors { files, .. } => files.names().collect(),
            Checkpoint::Gguf(file) => file.tensors.iter().map(|t| t.name.as_str()).collect(),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Checkpoint::Safetensors { files, quantization } => {
                quantization.naming().codes_of(files, name).is_some()
            }
            Checkpoint::Gguf(file) => file.info(name).is_some(),
        }
    }

    /// The shape in which [`Self::tensor`] gives a tensor. Codes are not unpacked for it.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, CheckpointError> {
        match self {
            Checkpoint::Safetensors { files, quantization } => quantization.shape(files, name),
            Checkpoint::Gguf(file) => match file.info(name) {
                Some(info) => Ok(info.shape.clone()),
                None => Ok(file.tensor(name)?.shape),
            },
        }
    }

    /// Names of the tensors that [`Self::tensor`] reads for `name`: itself, and its scales.
    pub fn parts_of(&self, name: &str) -> Vec<String> {
        match self {
            Checkpoint::Safetensors { files, quantization } => {
                quantization.naming().parts_of(files, name)
            }
            Checkpoint::Gguf(file) => {
                let scale = file.scale_of(name).map(|scale| scale.name.clone());
                [name.to_owned()].into_iter().chain(scale).collect()
            }
        }
    }

    /// Whether [`Self::stored_input`] may find something.
    pub(crate) fn may_store_inputs(&self) -> bool {
        let Checkpoint::Safetensors { quantization, .. } = self else { return false };
        matches!(quantization, Quantization::Fp8Tensors | Quantization::ModelOpt)
    }

    /// How the input of `module` is rounded, where a scale that the files store for it says so, and
    /// that scale, as [`lathe_program::StaticScale`] has it: the step of a code for fp8, and the
    /// divisor for NVFP4.
    ///
    /// # Errors
    /// If the tensor of the scale is not one number.
    pub(crate) fn stored_input(
        &self,
        module: &str,
    ) -> Result<Option<(ActivationFormat, f32)>, CheckpointError> {
        match self {
            Checkpoint::Safetensors { files, quantization: Quantization::Fp8Tensors } => {
                fp8::stored_input(files, module)
            }
            Checkpoint::Safetensors { files, quantization: Quantization::ModelOpt } => {
                modelopt::stored_input(files, module)
            }
            _ => Ok(None),
        }
    }

    /// A tensor; its codes and scales together where the file keeps them apart.
    ///
    /// # Errors
    /// If there is no such tensor, or it has a type that cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        match self {
            Checkpoint::Safetensors { files, quantization } => quantization.tensor(files, name),
            Checkpoint::Gguf(file) => Ok(file.tensor(name)?),
        }
    }

    /// Names under which [`Self::tensor`] gives every tensor: those of the files, but one for the
    /// codes and scales of what is quantized.
    pub fn whole_names(&self) -> Vec<String> {
        let Checkpoint::Safetensors { files, quantization } = self else {
            return self.names().into_iter().map(str::to_owned).collect();
        };
        let naming = quantization.naming();
        files.names().filter_map(|name| naming.whole_name(files, name)).collect()
    }
}

fn found(dtype: Dtype, shape: &[usize]) -> String {
    format!("{dtype} {shape:?}")
}

/// `raw`, called `name`, is not what its encoding asks for.
fn unlike(name: &str, raw: &RawTensor, expected: impl Into<String>) -> CheckpointError {
    let (name, found) = (name.to_owned(), found(raw.dtype, &raw.shape));
    CheckpointError::Encoding { name, found, expected: expected.into() }
}

/// What does not fit in the tensor called `name`.
fn at(name: &str) -> impl Fn(TensorError) -> CheckpointError + '_ {
    |source| CheckpointError::Tensor { name: name.to_owned(), source }
}

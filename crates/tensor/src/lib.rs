//! Number formats as values, tensors in those formats, and the files that hold them.
//!
//! [`Format`] says how numbers are stored. [`Tensor`] is a shape with bytes in a format. [`codec`]
//! turns these into `f32` and back, and is the scalar oracle for every kernel. [`safetensors`] and
//! [`gguf`] read and write checkpoint files. This crate knows nothing of models.

#![deny(unsafe_code)]

pub mod activation;
pub mod bytes;
pub mod codec;
mod error;
pub mod format;
pub mod gguf;
pub mod hadamard;
#[allow(unsafe_code)]
mod mapping;
pub mod packed;
mod partial;
pub mod random;
pub mod safetensors;
pub mod suggest;
pub mod tensor;

pub use activation::ActivationFormat;
pub use bytes::Bytes;
pub use error::TensorError;
pub use format::{
    Block, Element, FloatType, Format, GgmlType, ScaleGrid, ScaleType, ScaledFormat, ZeroPoint,
};
pub use tensor::{GlobalScale, Tensor};

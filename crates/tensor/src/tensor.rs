//! `Tensor`: a shape, a format and the bytes.

use crate::bytes::Bytes;
use crate::format::Format;

/// A tensor in memory, read-only. The last dimension is contiguous; for weights it is the
/// input dimension, and every block format runs along it.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub format: Format,
    /// Plain floats or GGUF blocks, row-major; for `Format::Scaled` the codes, packed low bits
    /// first along a row, each row starting on a byte.
    pub codes: Bytes,
    /// Scales of `Format::Scaled`, `[rows, blocks]` in the scale's type; empty otherwise.
    pub scales: Bytes,
    /// Zero points of `ZeroPoint::Int` as `u8`/`i8`, `[rows, blocks]`; empty otherwise.
    pub zeros: Bytes,
    /// The multiplier of the whole tensor (`ScaleType::E4M3Global`); 1 otherwise.
    pub global_scale: f32,
}

/// Why a tensor could not be made or read.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum TensorError {
    /// The bytes do not fit the shape and format.
    #[error("tensor of shape {shape:?} in {format} needs {expected} bytes, found {found}")]
    Size {
        /// The shape asked for.
        shape: Vec<usize>,
        /// The format asked for.
        format: Format,
        /// Bytes that shape and format need.
        expected: usize,
        /// Bytes that were given.
        found: usize,
    },
    /// A row is not a whole number of blocks.
    #[error("{format} needs rows of a multiple of {block} elements, found {columns}")]
    Block {
        /// The format asked for.
        format: Format,
        /// Elements in a block.
        block: usize,
        /// Elements in a row.
        columns: usize,
    },
    /// The number of elements or bytes overflows.
    #[error("shape {shape:?} is too large")]
    Overflow {
        /// The shape asked for.
        shape: Vec<usize>,
    },
}

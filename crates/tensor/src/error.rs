//! Errors of tensors.

use std::ops::Range;

use crate::format::Format;

/// Why a tensor could not be made or read.
#[derive(Debug, Clone, thiserror::Error, PartialEq)]
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
    /// The scales or zero points do not fit the shape and format.
    #[error("tensor of shape {shape:?} in {format} needs {expected} {what}, found {found}")]
    Side {
        /// `scales`, `zero points` or the like.
        what: &'static str,
        /// The shape asked for.
        shape: Vec<usize>,
        /// The format asked for.
        format: Format,
        /// How many shape and format need.
        expected: usize,
        /// How many were given.
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
    /// Rows that the tensor does not have, or that its blocks do not let us separate.
    #[error("rows {rows:?} cannot be taken from shape {shape:?} in {format}: {reason}")]
    Rows {
        /// The rows asked for (first and last of a gather).
        rows: Range<usize>,
        /// The tensor's shape.
        shape: Vec<usize>,
        /// The tensor's format.
        format: Format,
        /// Why not.
        reason: &'static str,
    },
    /// No format has this name.
    #[error("unknown number format {name:?}")]
    UnknownFormat {
        /// What was asked for.
        name: String,
    },
}

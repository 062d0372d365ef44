//! Errors of GGUF files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::GgufType;
use crate::error::TensorError;

/// A problem and the file that has it.
#[derive(Debug)]
pub struct GgufError {
    /// Which file.
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Box<GgufProblem>,
}

impl GgufError {
    pub(super) fn new(path: &Path, problem: GgufProblem) -> Self {
        Self { path: path.to_owned(), problem: Box::new(problem) }
    }
}

impl fmt::Display for GgufError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.path.as_os_str().is_empty() {
            return write!(f, "{}", self.problem);
        }
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

impl std::error::Error for GgufError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.problem {
            GgufProblem::Io(source) => Some(source),
            GgufProblem::Tensor { source, .. } => Some(source),
            _ => None,
        }
    }
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum GgufProblem {
    /// The operating system refused.
    #[error("{0}")]
    Io(io::Error),
    /// Not a GGUF file at all.
    #[error("a GGUF file begins with \"GGUF\", found {found:?}")]
    Magic {
        /// The first bytes, as text.
        found: String,
    },
    /// Written on a big-endian machine.
    #[error("the file is big-endian, which is not supported")]
    BigEndian,
    /// A version that this reader does not know.
    #[error("GGUF version {found}, expected 2 or 3")]
    Version {
        /// What was found.
        found: u32,
    },
    /// The file ends in the middle of something.
    #[error("the file ends at byte {end} within {what}, which needs {needed} bytes from byte {at}")]
    Truncated {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        at: usize,
        /// Bytes that it needs.
        needed: u64,
        /// Where the file ends.
        end: usize,
    },
    /// More entries than the rest of the file can hold.
    #[error("the file claims {found} {what}; the rest of it can hold {limit}")]
    Count {
        /// `tensors`, `metadata entries` or `array elements`.
        what: &'static str,
        /// How many it claims.
        found: u64,
        /// How many are possible.
        limit: u64,
    },
    /// Text that is not UTF-8.
    #[error("{what} at byte {at} is not UTF-8")]
    Text {
        /// What was being read.
        what: &'static str,
        /// Where it begins.
        at: usize,
    },
    /// A metadata type that the format does not know.
    #[error("metadata {key:?} has the unknown type {found}")]
    MetaType {
        /// Which entry.
        key: String,
        /// What was found.
        found: u32,
    },
    /// A boolean that is neither 0 nor 1.
    #[error("metadata {key:?}: a boolean is 0 or 1, found {found}")]
    Boolean {
        /// Which entry.
        key: String,
        /// What was found.
        found: u8,
    },
    /// Arrays are nested too deeply.
    #[error("metadata {key:?} nests arrays more than {limit} deep")]
    Nesting {
        /// Which entry.
        key: String,
        /// How deep is allowed.
        limit: usize,
    },
    /// Two entries or two tensors have one name.
    #[error("{what} {name:?} occurs twice")]
    Duplicate {
        /// `metadata` or `tensor`.
        what: &'static str,
        /// Which.
        name: String,
    },
    /// An alignment that is no power of two, or too large.
    #[error("general.alignment is {found}, expected a power of two up to {limit}")]
    Alignment {
        /// What was found.
        found: u64,
        /// The largest accepted.
        limit: u64,
    },
    /// More dimensions than the format has.
    #[error("tensor {name:?} has {found} dimensions, at most 4 are possible")]
    Dimensions {
        /// Which tensor.
        name: String,
        /// What was found.
        found: u32,
    },
    /// A shape whose size overflows, or whose rows are no whole number of blocks.
    #[error("tensor {name:?} of {kind} cannot have the dimensions {dimensions:?}: {reason}")]
    Shape {
        /// Which tensor.
        name: String,
        /// Its type.
        kind: GgufType,
        /// As in the file, innermost first.
        dimensions: Vec<u64>,
        /// What is wrong with them.
        reason: &'static str,
    },
    /// A tensor that does not begin at a multiple of the alignment.
    #[error(
        "tensor {name:?} begins at byte {offset} of the data, which is no multiple of {alignment}"
    )]
    Unaligned {
        /// Which tensor.
        name: String,
        /// Where it begins.
        offset: u64,
        /// The file's alignment.
        alignment: u64,
    },
    /// A tensor that reaches past the end of the file.
    #[error("tensor {name:?} lies at bytes {begin}..{end} of {available} bytes of data")]
    Offsets {
        /// Which tensor.
        name: String,
        /// First byte.
        begin: u64,
        /// Byte after the last (saturating).
        end: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// Two tensors share bytes.
    #[error("tensors {first:?} and {second:?} overlap")]
    Overlap {
        /// The one that begins first.
        first: String,
        /// The other.
        second: String,
    },
    /// Another number of second scales than the tensor has matrices.
    #[error("tensor {name:?} has {found} scales, expected one for each of {expected} matrices")]
    Scales {
        /// The tensor with the scales.
        name: String,
        /// Scales that it has.
        found: usize,
        /// Matrices of the tensor that they are for.
        expected: usize,
    },
    /// No tensor of this name.
    #[error("there is no tensor {name:?}")]
    Missing {
        /// What was asked for.
        name: String,
    },
    /// A tensor whose type cannot be read.
    #[error("tensor {name:?} is {kind}, which is not supported")]
    Unsupported {
        /// Which tensor.
        name: String,
        /// Its type.
        kind: GgufType,
    },
    /// No metadata of this name.
    #[error("there is no metadata {key:?}")]
    MissingKey {
        /// What was asked for.
        key: String,
    },
    /// Metadata of another type than asked for.
    #[error("metadata {key:?}: found {found}, expected {expected}")]
    WrongType {
        /// Which entry.
        key: String,
        /// Its type (and value, where it does not fit).
        found: String,
        /// What was asked for.
        expected: &'static str,
    },
    /// A tensor that cannot be made.
    #[error("tensor {name:?}: {source}")]
    Tensor {
        /// Which tensor.
        name: String,
        /// Why.
        source: TensorError,
    },
    /// More or fewer bytes are written than were declared.
    #[error("tensor {name:?} was declared with {expected} bytes, {found} were written")]
    Written {
        /// Which tensor.
        name: String,
        /// Bytes declared.
        expected: u64,
        /// Bytes written.
        found: u64,
    },
}

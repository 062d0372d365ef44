//! Errors of safetensors files.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::Dtype;

/// A problem and the file that has it.
#[derive(Debug)]
pub struct SafetensorsError {
    /// Which file (or directory).
    pub path: PathBuf,
    /// What is wrong with it.
    pub problem: Box<SafetensorsProblem>,
}

impl SafetensorsError {
    pub(super) fn new(path: &Path, problem: SafetensorsProblem) -> Self {
        Self { path: path.to_owned(), problem: Box::new(problem) }
    }
}

impl fmt::Display for SafetensorsError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path.display(), self.problem)
    }
}

impl std::error::Error for SafetensorsError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        match &*self.problem {
            SafetensorsProblem::Io(source) => Some(source),
            _ => None,
        }
    }
}

/// What is wrong.
#[derive(Debug, thiserror::Error)]
pub enum SafetensorsProblem {
    /// The operating system refused.
    #[error("{0}")]
    Io(io::Error),
    /// Too short for the 8 bytes of the header's size.
    #[error("a safetensors file has at least 8 bytes, found {found}")]
    TooShort {
        /// Bytes of the file.
        found: usize,
    },
    /// The header reaches past the end of the file or past the largest accepted size.
    #[error("the header claims {found} bytes; at most {limit} are possible here")]
    HeaderSize {
        /// Bytes claimed.
        found: u64,
        /// Bytes possible: the rest of the file, at most 100 MB.
        limit: u64,
    },
    /// The header is not the JSON that the format asks for.
    #[error("the header is not valid: {reason}")]
    Json {
        /// The JSON reader's message.
        reason: String,
    },
    /// Two tensors have one name.
    #[error("the name {name:?} occurs twice")]
    DuplicateName {
        /// Which.
        name: String,
    },
    /// An element type that the format does not know.
    #[error("tensor {name:?} has the unknown dtype {dtype:?}")]
    UnknownDtype {
        /// Which tensor.
        name: String,
        /// What was found.
        dtype: String,
    },
    /// Shape and type need more or fewer bytes than the offsets span.
    #[error(
        "tensor {name:?} of {dtype} and shape {shape:?} needs {expected} bytes, its offsets span {found}"
    )]
    Size {
        /// Which tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
        /// Its shape.
        shape: Vec<u64>,
        /// Bytes needed (`u128`: it may be what overflows).
        expected: String,
        /// Bytes spanned.
        found: u64,
    },
    /// Offsets that run backwards or past the end of the data.
    #[error("tensor {name:?} lies at bytes {begin}..{end} of {available}")]
    Offsets {
        /// Which tensor.
        name: String,
        /// First byte.
        begin: u64,
        /// Byte after the last.
        end: u64,
        /// Bytes of data in the file.
        available: u64,
    },
    /// A tensor does not begin where the one before ends.
    #[error("tensor {name:?} begins at byte {found}, the one before ends at {expected}: {kind}")]
    NotContiguous {
        /// Which tensor.
        name: String,
        /// Where it should begin.
        expected: u64,
        /// Where it begins.
        found: u64,
        /// `overlap` or `hole`.
        kind: &'static str,
    },
    /// Data that belongs to no tensor.
    #[error("tensors take {expected} bytes, the file has {found}")]
    Trailing {
        /// Bytes that tensors take.
        expected: u64,
        /// Bytes of data in the file.
        found: u64,
    },
    /// No tensor of this name.
    #[error("there is no tensor {name:?}")]
    Missing {
        /// What was asked for.
        name: String,
    },
    /// A float was asked for and something else found.
    #[error("tensor {name:?} is {dtype}, expected F32, F16, BF16 or F64")]
    NotFloat {
        /// Which tensor.
        name: String,
        /// Its type.
        dtype: Dtype,
    },
    /// A directory without weights.
    #[error("neither model.safetensors nor model.safetensors.index.json is here")]
    NoWeights,
    /// The index of a sharded checkpoint is malformed.
    #[error("the index is not valid: {reason}")]
    Index {
        /// What is wrong with it.
        reason: String,
    },
    /// The index names a file that would lie elsewhere.
    #[error(
        "the index names the file {file:?}; only plain names in the same directory are allowed"
    )]
    ShardName {
        /// What was found.
        file: String,
    },
    /// The index names a file that is not there.
    #[error("the index names the file {file:?}, which is not here")]
    MissingShard {
        /// Which.
        file: String,
    },
    /// The index promises a tensor that the file does not have.
    #[error("the index says that {file:?} has the tensor {name:?}, and it does not")]
    NotInShard {
        /// Which tensor.
        name: String,
        /// Which file.
        file: String,
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

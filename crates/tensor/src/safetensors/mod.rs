//! Safetensors files: a JSON header with names, types, shapes and offsets, then the bytes.
//!
//! [`SafetensorsFile`] maps one file and checks its header once. [`Checkpoint`] is a directory of
//! one file or many. [`Writer`] streams tensors into new files.

mod checkpoint;
mod error;
mod header;
mod writer;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

pub use checkpoint::Checkpoint;
pub use error::{SafetensorsError, SafetensorsProblem};
pub use writer::{TensorDeclaration, Writer};

use crate::bytes::Bytes;
use crate::format::{FloatType, Format};
use crate::mapping::map_file;
use crate::tensor::Tensor;

/// The type of a tensor's elements, under the format's own names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)]
pub enum Dtype {
    BOOL,
    U8,
    I8,
    F8_E4M3,
    F8_E5M2,
    F8_E8M0,
    I16,
    U16,
    F16,
    BF16,
    I32,
    U32,
    F32,
    F64,
    I64,
    U64,
}

impl Dtype {
    /// Every type.
    pub const ALL: [Dtype; 16] = [
        Dtype::BOOL,
        Dtype::U8,
        Dtype::I8,
        Dtype::F8_E4M3,
        Dtype::F8_E5M2,
        Dtype::F8_E8M0,
        Dtype::I16,
        Dtype::U16,
        Dtype::F16,
        Dtype::BF16,
        Dtype::I32,
        Dtype::U32,
        Dtype::F32,
        Dtype::F64,
        Dtype::I64,
        Dtype::U64,
    ];

    /// Bytes of one element.
    pub const fn bytes(self) -> usize {
        match self {
            Dtype::BOOL | Dtype::U8 | Dtype::I8 => 1,
            Dtype::F8_E4M3 | Dtype::F8_E5M2 | Dtype::F8_E8M0 => 1,
            Dtype::I16 | Dtype::U16 | Dtype::F16 | Dtype::BF16 => 2,
            Dtype::I32 | Dtype::U32 | Dtype::F32 => 4,
            Dtype::F64 | Dtype::I64 | Dtype::U64 => 8,
        }
    }

    /// The type with this name in a header.
    pub fn from_name(name: &str) -> Option<Dtype> {
        Self::ALL.into_iter().find(|t| t.name() == name)
    }

    /// The name in a header.
    pub const fn name(self) -> &'static str {
        match self {
            Dtype::BOOL => "BOOL",
            Dtype::U8 => "U8",
            Dtype::I8 => "I8",
            Dtype::F8_E4M3 => "F8_E4M3",
            Dtype::F8_E5M2 => "F8_E5M2",
            Dtype::F8_E8M0 => "F8_E8M0",
            Dtype::I16 => "I16",
            Dtype::U16 => "U16",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I32 => "I32",
            Dtype::U32 => "U32",
            Dtype::F32 => "F32",
            Dtype::F64 => "F64",
            Dtype::I64 => "I64",
            Dtype::U64 => "U64",
        }
    }
}

impl std::fmt::Display for Dtype {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl From<FloatType> for Dtype {
    fn from(value: FloatType) -> Self {
        match value {
            FloatType::F32 => Dtype::F32,
            FloatType::F16 => Dtype::F16,
            FloatType::BF16 => Dtype::BF16,
        }
    }
}

/// What a header says of one tensor, and its bytes as they lie in the file.
#[derive(Debug, Clone)]
pub struct RawTensor {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// The elements, little-endian, row-major.
    pub bytes: Bytes,
}

/// One mapped file, its header checked.
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    metadata: BTreeMap<String, String>,
    /// In the order of the data.
    tensors: Vec<(String, RawTensor)>,
    index: HashMap<String, usize>,
}

impl SafetensorsFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// If the file cannot be read, or if its header breaks any rule of the format: see
    /// [`SafetensorsProblem`].
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        let at = |problem| SafetensorsError::new(path, problem);
        let file = map_file(path).map_err(|source| at(SafetensorsProblem::Io(source)))?;
        Self::from_bytes(path, file)
    }

    /// As [`Bytes::release`].
    pub fn release(&self) {
        // Every tensor shares the mapping of the whole file.
        if let Some((_, tensor)) = self.tensors.first() {
            tensor.bytes.release();
        }
    }

    /// As [`SafetensorsFile::open`], from bytes in memory. Messages name `path`.
    ///
    /// # Errors
    /// If the header breaks any rule of the format.
    pub fn from_bytes(path: &Path, file: Bytes) -> Result<Self, SafetensorsError> {
        let header =
            header::parse(&file).map_err(|problem| SafetensorsError::new(path, problem))?;
        let tensors: Vec<_> = header
            .tensors
            .into_iter()
            .map(|t| {
                let bytes = file.slice(t.bytes);
                (t.name, RawTensor { dtype: t.dtype, shape: t.shape, bytes })
            })
            .collect();
        let index = tensors.iter().enumerate().map(|(i, (name, _))| (name.clone(), i)).collect();
        Ok(Self { path: path.to_owned(), metadata: header.metadata, tensors, index })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Names in the order of the data.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.tensors.iter().map(|(name, _)| name.as_str())
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.index.contains_key(name)
    }

    /// A tensor of any type, without conversion or copy.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn raw(&self, name: &str) -> Result<&RawTensor, SafetensorsError> {
        match self.index.get(name) {
            Some(&i) => Ok(&self.tensors[i].1),
            None => Err(self.error(SafetensorsProblem::Missing { name: name.to_owned() })),
        }
    }

    /// A tensor of floats: F32, F16 and BF16 without a copy, F64 rounded to `f32`.
    ///
    /// # Errors
    /// If there is no such tensor or if it is of another type.
    pub fn tensor(&self, name: &str) -> Result<Tensor, SafetensorsError> {
        let raw = self.raw(name)?;
        let format = match raw.dtype {
            Dtype::F32 => Format::F32,
            Dtype::F16 => Format::F16,
            Dtype::BF16 => Format::BF16,
            Dtype::F64 => {
                let (numbers, _) = raw.bytes.as_chunks::<8>();
                let values = numbers.iter().map(|b| f64::from_le_bytes(*b) as f32).collect();
                return Ok(Tensor::from_f32_vec(raw.shape.clone(), values));
            }
            dtype => {
                let name = name.to_owned();
                return Err(self.error(SafetensorsProblem::NotFloat { name, dtype }));
            }
        };
        // The check of the header computed the same size.
        Ok(Tensor::new(raw.shape.clone(), format, raw.bytes.clone()).expect("checked at opening"))
    }

    fn error(&self, problem: SafetensorsProblem) -> SafetensorsError {
        SafetensorsError::new(&self.path, problem)
    }
}

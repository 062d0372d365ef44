//! GGUF files: metadata, tensor descriptions, then the data. Little-endian, versions 2 and 3.
//!
//! [`GgufFile`] maps a file and checks it once. [`Writer`] streams tensors into a new file. Shapes
//! are outermost first here. The file has them innermost first.

mod compact;
mod error;
mod metadata;
mod read;
mod types;
mod value;
mod writer;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use error::{GgufError, GgufProblem};
pub use metadata::{FromMeta, Metadata};
pub use types::GgufType;
pub use value::{MetaArray, MetaType, MetaValue};
pub use writer::{TensorDeclaration, Writer};

use crate::bytes::Bytes;
use crate::format::Format;
use crate::mapping::map_file;
use crate::tensor::Tensor;

/// What a file says of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GgufTensor {
    /// Its name.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// Its type, readable or not.
    pub kind: GgufType,
    /// The place of its bytes in the file. `None` if the type is unknown, because its size is
    /// unknown too.
    pub range: Option<Range<usize>>,
}

/// One mapped file, its header checked.
#[derive(Debug)]
pub struct GgufFile {
    /// Metadata in the order of the file.
    pub metadata: Metadata,
    /// Tensors in the order of the header.
    pub tensors: Vec<GgufTensor>,
    /// 2 or 3.
    pub version: u32,
    /// Every tensor begins at a multiple of this number of bytes.
    pub alignment: u64,
    path: PathBuf,
    file: Bytes,
    index: HashMap<String, usize>,
}

impl GgufFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// If the file cannot be read, or if its header breaks any rule of the format: see
    /// [`GgufProblem`].
    pub fn open(path: &Path) -> Result<Self, GgufError> {
        let file = map_file(path).map_err(|e| GgufError::new(path, GgufProblem::Io(e)))?;
        Self::from_bytes(path, file)
    }

    /// As [`Bytes::release`].
    pub fn release(&self) {
        self.file.release();
    }

    /// As [`GgufFile::open`], from bytes in memory. Messages name `path`.
    ///
    /// # Errors
    /// If the header breaks any rule of the format.
    pub fn from_bytes(path: &Path, file: Bytes) -> Result<Self, GgufError> {
        let header = read::parse(&file).map_err(|problem| GgufError::new(path, problem))?;
        let names = header.tensors.iter().enumerate();
        let index = names.map(|(i, tensor)| (tensor.name.clone(), i)).collect();
        Ok(Self {
            metadata: header.metadata,
            tensors: header.tensors,
            version: header.version,
            alignment: header.alignment,
            path: path.to_owned(),
            file,
            index,
        })
    }

    /// Where the file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says of a tensor.
    pub fn info(&self, name: &str) -> Option<&GgufTensor> {
        self.index.get(name).map(|&i| &self.tensors[i])
    }

    /// A tensor. There is no copy but of types that no kernel reads: F64 is rounded to `f32`, and
    /// those of [`GgufType::is_unpacked`] are unpacked.
    ///
    /// # Errors
    /// If there is no such tensor or if its type cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor, GgufError> {
        let missing = || self.error(GgufProblem::Missing { name: name.to_owned() });
        let info = self.info(name).ok_or_else(missing)?;
        let unsupported =
            || self.error(GgufProblem::Unsupported { name: name.to_owned(), kind: info.kind });
        let bytes = self.file.slice(info.range.clone().ok_or_else(unsupported)?);
        if info.kind == GgufType::F64 {
            let (numbers, _) = bytes.as_chunks::<8>();
            let values = numbers.iter().map(|b| f64::from_le_bytes(*b) as f32).collect();
            return Ok(Tensor::from_f32_vec(info.shape.clone(), values));
        }
        let global = self.scales_of(name, &info.shape)?;
        if let Some(tensor) = compact::unpack(info.kind, &info.shape, &bytes, global) {
            return tensor.map_err(|source| {
                self.error(GgufProblem::Tensor { name: name.to_owned(), source })
            });
        }
        let format: Format = info.kind.format().ok_or_else(unsupported)?;
        Tensor::new(info.shape.clone(), format, bytes)
            .map_err(|source| self.error(GgufProblem::Tensor { name: name.to_owned(), source }))
    }

    /// The tensor with the second scales of an NVFP4 tensor, by which llama.cpp multiplies its
    /// products: one for each matrix of a stack.
    pub fn scale_of(&self, name: &str) -> Option<&GgufTensor> {
        self.info(name).filter(|info| info.kind == GgufType::NVFP4)?;
        self.info(&format!("{}.scale", name.strip_suffix(".weight")?))
    }

    /// Those scales; 1 where the file has none.
    fn scales_of(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, GgufError> {
        let matrices = shape[..shape.len().saturating_sub(2)].iter().product();
        let Some(scale) = self.scale_of(name) else { return Ok(vec![1.0; matrices]) };
        let scales = self.tensor(&scale.name)?.to_f32();
        if scales.len() != matrices {
            let (name, found) = (scale.name.clone(), scales.len());
            return Err(self.error(GgufProblem::Scales { name, found, expected: matrices }));
        }
        Ok(scales)
    }

    fn error(&self, problem: GgufProblem) -> GgufError {
        GgufError::new(&self.path, problem)
    }
}

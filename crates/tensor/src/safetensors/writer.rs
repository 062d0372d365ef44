//! Writes files. Tensors are declared first. Then their bytes come in any order, piece by piece.
//! Files have temporary names until all are complete.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::checkpoint::{INDEX_NAME, SINGLE_NAME};
use super::header::METADATA_KEY;
use super::{Dtype, SafetensorsError, SafetensorsProblem};
use crate::partial::PartialFile;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDeclaration {
    /// Its name.
    pub name: String,
    /// Type of its elements.
    pub dtype: Dtype,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
}

impl TensorDeclaration {
    fn bytes(&self) -> Option<u64> {
        let mut dimensions = self.shape.iter();
        let bytes = dimensions.try_fold(self.dtype.bytes(), |n, &d| n.checked_mul(d))?;
        u64::try_from(bytes).ok()
    }
}

/// The place of a declared tensor, and how much of it is written.
#[derive(Debug)]
struct Slot {
    file: usize,
    /// The bytes within the file.
    range: Range<u64>,
    written: u64,
}

/// One or several files that are being written. If this is dropped before [`Writer::finish`],
/// nothing is left of them.
#[derive(Debug)]
pub struct Writer {
    files: Vec<PartialFile>,
    slots: HashMap<String, Slot>,
    index: Option<PartialFile>,
}

impl Writer {
    /// Starts the file `path`.
    ///
    /// # Errors
    /// If two tensors have one name, a size overflows, or the file cannot be written.
    pub fn create(
        path: &Path,
        tensors: &[TensorDeclaration],
        metadata: &BTreeMap<String, String>,
    ) -> Result<Self, SafetensorsError> {
        let sizes = check_declarations(path, tensors)?;
        let mut writer = Self { files: Vec::new(), slots: HashMap::new(), index: None };
        let all: Vec<usize> = (0..tensors.len()).collect();
        writer.start_file(path, tensors, &sizes, &all, metadata)?;
        Ok(writer)
    }

    /// Starts the files of a checkpoint in `directory`. If all fits in `shard_bytes_max`, the file
    /// is `model.safetensors`. Else there are shards of at most that many bytes of data and an
    /// index. A larger tensor has a shard of its own.
    ///
    /// # Errors
    /// As [`Writer::create`].
    pub fn create_sharded(
        directory: &Path,
        tensors: &[TensorDeclaration],
        metadata: &BTreeMap<String, String>,
        shard_bytes_max: u64,
    ) -> Result<Self, SafetensorsError> {
        let sizes = check_declarations(directory, tensors)?;
        let shards = divide(&sizes, shard_bytes_max);
        if shards.len() <= 1 {
            return Self::create(&directory.join(SINGLE_NAME), tensors, metadata);
        }
        let mut writer = Self { files: Vec::new(), slots: HashMap::new(), index: None };
        let mut weight_map = Map::new();
        for (i, shard) in shards.iter().enumerate() {
            let name = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
            writer.start_file(&directory.join(&name), tensors, &sizes, shard, metadata)?;
            for &tensor in shard {
                weight_map.insert(tensors[tensor].name.clone(), Value::String(name.clone()));
            }
        }
        let total: u64 = sizes.iter().sum();
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        let path = directory.join(INDEX_NAME);
        let io = |source| SafetensorsError::new(&path, SafetensorsProblem::Io(source));
        let mut file = PartialFile::create(&path).map_err(io)?;
        let text = serde_json::to_vec_pretty(&index).expect("JSON of strings and numbers");
        file.write_at(0, &text).map_err(io)?;
        writer.index = Some(file);
        Ok(writer)
    }

    /// Writes the header of one file and gives its tensors their places. Types of larger elements
    /// come first, so that every tensor is aligned to its elements.
    fn start_file(
        &mut self,
        path: &Path,
        tensors: &[TensorDeclaration],
        sizes: &[u64],
        members: &[usize],
        metadata: &BTreeMap<String, String>,
    ) -> Result<(), SafetensorsError> {
        let io = |source| SafetensorsError::new(path, SafetensorsProblem::Io(source));
        let mut order = members.to_vec();
        order.sort_by_key(|&i| std::cmp::Reverse(tensors[i].dtype.bytes()));
        let mut header = Map::new();
        if !metadata.is_empty() {
            header.insert(METADATA_KEY.to_owned(), json!(metadata));
        }
        let mut end = 0u64;
        let mut ranges = Vec::with_capacity(order.len());
        for &i in &order {
            let range = end..end + sizes[i];
            end = range.end;
            header.insert(
                tensors[i].name.clone(),
                json!({"dtype": tensors[i].dtype.name(), "shape": tensors[i].shape,
                       "data_offsets": [range.start, range.end]}),
            );
            ranges.push((i, range));
        }
        let mut text = serde_json::to_vec(&header).expect("JSON of strings and numbers");
        text.resize(text.len().next_multiple_of(8), b' ');
        let start = 8 + text.len() as u64;
        let mut file = PartialFile::create(path).map_err(io)?;
        file.write_at(0, &(text.len() as u64).to_le_bytes()).map_err(io)?;
        file.write_at(8, &text).map_err(io)?;
        for (i, range) in ranges {
            let range = start + range.start..start + range.end;
            let slot = Slot { file: self.files.len(), range, written: 0 };
            self.slots.insert(tensors[i].name.clone(), slot);
        }
        self.files.push(file);
        Ok(())
    }

    /// Adds the next bytes of a declared tensor. A large tensor may come in several pieces.
    ///
    /// # Errors
    /// If the tensor was not declared, if more comes than was declared, or if the disk is full.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), SafetensorsError> {
        let path = || self.files[0].path().to_owned();
        let Some(slot) = self.slots.get_mut(name) else {
            let problem = SafetensorsProblem::Missing { name: name.to_owned() };
            return Err(SafetensorsError::new(&path(), problem));
        };
        let file = &mut self.files[slot.file];
        let error = |file: &PartialFile, problem| SafetensorsError::new(file.path(), problem);
        let (expected, found) =
            (slot.range.end - slot.range.start, slot.written + bytes.len() as u64);
        if found > expected {
            let name = name.to_owned();
            return Err(error(file, SafetensorsProblem::Written { name, expected, found }));
        }
        let result = file.write_at(slot.range.start + slot.written, bytes);
        result.map_err(|source| error(file, SafetensorsProblem::Io(source)))?;
        slot.written = found;
        Ok(())
    }

    /// Checks that every tensor is complete, flushes the files to the disk and renames them, the
    /// index last. Returns their paths.
    ///
    /// # Errors
    /// If a tensor is not complete or the disk refuses. Temporary files are removed then.
    pub fn finish(self) -> Result<Vec<PathBuf>, SafetensorsError> {
        self.finish_by(PartialFile::finish)
    }

    /// As [`Self::finish`], but does not flush the files. It is for files that need not outlive a
    /// loss of power, and that may be removed before they are ever written to the disk.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn finish_cached(self) -> Result<Vec<PathBuf>, SafetensorsError> {
        self.finish_by(PartialFile::finish_cached)
    }

    fn finish_by(
        mut self,
        finish: impl Fn(PartialFile) -> std::io::Result<()>,
    ) -> Result<Vec<PathBuf>, SafetensorsError> {
        for (name, slot) in &self.slots {
            let expected = slot.range.end - slot.range.start;
            if slot.written != expected {
                let (name, found) = (name.clone(), slot.written);
                let problem = SafetensorsProblem::Written { name, expected, found };
                return Err(SafetensorsError::new(self.files[slot.file].path(), problem));
            }
        }
        let files = std::mem::take(&mut self.files).into_iter().chain(self.index.take());
        let mut paths = Vec::new();
        for file in files {
            let path = file.path().to_owned();
            finish(file)
                .map_err(|source| SafetensorsError::new(&path, SafetensorsProblem::Io(source)))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

/// Checks names and sizes. Returns the sizes in bytes.
fn check_declarations(
    path: &Path,
    tensors: &[TensorDeclaration],
) -> Result<Vec<u64>, SafetensorsError> {
    let mut names = std::collections::HashSet::new();
    let mut total = 0u64;
    let mut sizes = Vec::with_capacity(tensors.len());
    for tensor in tensors {
        if tensor.name == METADATA_KEY || !names.insert(tensor.name.as_str()) {
            let problem = SafetensorsProblem::DuplicateName { name: tensor.name.clone() };
            return Err(SafetensorsError::new(path, problem));
        }
        let size = tensor.bytes();
        match size.and_then(|size| total.checked_add(size)) {
            Some(sum) => total = sum,
            None => {
                let problem = SafetensorsProblem::Size {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype,
                    shape: tensor.shape.iter().map(|&d| d as u64).collect(),
                    expected: "too many".to_owned(),
                    found: 0,
                };
                return Err(SafetensorsError::new(path, problem));
            }
        }
        sizes.extend(size);
    }
    Ok(sizes)
}

/// Fills shards in the order of declaration.
fn divide(sizes: &[u64], shard_bytes_max: u64) -> Vec<Vec<usize>> {
    let mut shards: Vec<Vec<usize>> = Vec::new();
    let mut filled = 0u64;
    for (i, &size) in sizes.iter().enumerate() {
        match shards.last_mut() {
            Some(shard) if filled.saturating_add(size) <= shard_bytes_max => {
                shard.push(i);
                filled += size;
            }
            _ => {
                shards.push(vec![i]);
                filled = size;
            }
        }
    }
    shards
}

//! A directory of weights: one file, or shards and an index.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::header::HEADER_BYTES_MAX;
use super::{RawTensor, SafetensorsError, SafetensorsFile, SafetensorsProblem};
use crate::tensor::Tensor;

/// The index's name in a directory.
pub(super) const INDEX_NAME: &str = "model.safetensors.index.json";
/// The only file's name in a directory without an index.
pub(super) const SINGLE_NAME: &str = "model.safetensors";

/// All tensors of a checkpoint, in one file or several.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<SafetensorsFile>,
    /// In the order of the files and of the data in each.
    names: Vec<String>,
    owner: HashMap<String, usize>,
}

/// The index. Readers do not need its `metadata`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Checkpoint {
    /// As [`Bytes::release`](crate::Bytes::release), for all files.
    pub fn release(&self) {
        self.files.iter().for_each(SafetensorsFile::release);
    }

    /// Opens a `.safetensors` file, or a directory with `model.safetensors` or with
    /// `model.safetensors.index.json` and its shards. Every header is checked here.
    ///
    /// # Errors
    /// If there are no weights, if a file is malformed, if a shard is missing or lies in another
    /// directory, or if a shard lacks a tensor that the index names.
    pub fn open(path: &Path) -> Result<Self, SafetensorsError> {
        if !path.is_dir() {
            return Self::of_one(path, SafetensorsFile::open(path)?);
        }
        let single = path.join(SINGLE_NAME);
        if single.exists() {
            return Self::of_one(path, SafetensorsFile::open(&single)?);
        }
        let index = path.join(INDEX_NAME);
        if !index.exists() {
            return Err(SafetensorsError::new(path, SafetensorsProblem::NoWeights));
        }
        Self::of_shards(path, read_index(&index)?)
    }

    fn of_one(path: &Path, file: SafetensorsFile) -> Result<Self, SafetensorsError> {
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let owner = names.iter().map(|name| (name.clone(), 0)).collect();
        Ok(Self { path: path.to_owned(), files: vec![file], names, owner })
    }

    fn of_shards(path: &Path, index: Index) -> Result<Self, SafetensorsError> {
        let at_index = |problem| SafetensorsError::new(&path.join(INDEX_NAME), problem);
        let mut by_file: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for (name, file) in &index.weight_map {
            by_file.entry(file).or_default().push(name);
        }
        let (mut files, mut names, mut owner) = (Vec::new(), Vec::new(), HashMap::new());
        for (file, promised) in by_file {
            if !is_plain_name(file) {
                return Err(at_index(SafetensorsProblem::ShardName { file: file.to_owned() }));
            }
            let shard_path = path.join(file);
            if !shard_path.exists() {
                return Err(at_index(SafetensorsProblem::MissingShard { file: file.to_owned() }));
            }
            let shard = SafetensorsFile::open(&shard_path)?;
            if let Some(name) = promised.iter().find(|name| !shard.contains(name)) {
                let (name, file) = ((*name).to_owned(), file.to_owned());
                return Err(at_index(SafetensorsProblem::NotInShard { name, file }));
            }
            // Other readers load whole shards. So a tensor that the index does not name is there
            // too. A tensor that the index gives to another shard is read from that shard.
            for name in
                shard.names().filter(|name| index.weight_map.get(*name).is_none_or(|f| f == file))
            {
                if owner.contains_key(name) {
                    continue;
                }
                owner.insert(name.to_owned(), files.len());
                names.push(name.to_owned());
            }
            files.push(shard);
        }
        Ok(Self { path: path.to_owned(), files, names, owner })
    }

    /// Where the checkpoint lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The files, in the order of their names.
    pub fn files(&self) -> &[SafetensorsFile] {
        &self.files
    }

    /// Names of all tensors, file by file in the order of the data.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.owner.contains_key(name)
    }

    /// A tensor of any type, without conversion or copy.
    ///
    /// # Errors
    /// If there is no such tensor.
    pub fn raw(&self, name: &str) -> Result<&RawTensor, SafetensorsError> {
        self.file_of(name)?.raw(name)
    }

    /// A tensor of floats, as [`SafetensorsFile::tensor`].
    ///
    /// # Errors
    /// If there is no such tensor or if it is not of floats.
    pub fn tensor(&self, name: &str) -> Result<Tensor, SafetensorsError> {
        self.file_of(name)?.tensor(name)
    }

    fn file_of(&self, name: &str) -> Result<&SafetensorsFile, SafetensorsError> {
        let missing = || SafetensorsProblem::Missing { name: name.to_owned() };
        let owner = self.owner.get(name);
        owner.map(|&i| &self.files[i]).ok_or_else(|| SafetensorsError::new(&self.path, missing()))
    }
}

fn read_index(path: &Path) -> Result<Index, SafetensorsError> {
    let at = |problem| SafetensorsError::new(path, problem);
    let io = |source| at(SafetensorsProblem::Io(source));
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(io)?;
    file.take(HEADER_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(io)?;
    if bytes.len() as u64 > HEADER_BYTES_MAX {
        let reason = format!("it is larger than {HEADER_BYTES_MAX} bytes");
        return Err(at(SafetensorsProblem::Index { reason }));
    }
    serde_json::from_slice(&bytes)
        .map_err(|e| at(SafetensorsProblem::Index { reason: e.to_string() }))
}

/// Whether `name` is one plain component, which cannot lead out of the directory.
fn is_plain_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let first_is_plain = matches!(components.next(), Some(Component::Normal(part)) if part == name);
    first_is_plain && components.next().is_none() && !name.contains(['/', '\\', '\0'])
}

//! Writes files. Metadata and tensors are declared first. Then their bytes come in any order, piece
//! by piece. The file has a temporary name until it is complete.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use super::read::{ALIGNMENT_DEFAULT, ALIGNMENT_KEY};
use super::value::encode_string;
use super::{GgufError, GgufProblem, GgufType, Metadata};
use crate::format::Format;
use crate::partial::PartialFile;

/// A tensor that will be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorDeclaration {
    /// Its name.
    pub name: String,
    /// How its numbers are stored: plain floats or GGUF blocks.
    pub format: Format,
    /// Dimensions, outermost first, 1 to 4 of them.
    pub shape: Vec<usize>,
}

/// The place of a declared tensor, and how much of it is written.
#[derive(Debug)]
struct Slot {
    range: Range<u64>,
    written: u64,
}

/// A file that is being written. If it is dropped before [`Writer::finish`], nothing is left of it.
#[derive(Debug)]
pub struct Writer {
    file: PartialFile,
    slots: HashMap<String, Slot>,
    end: u64,
}

impl Writer {
    /// Starts the file `path`, with version 3 and alignment 32. A `general.alignment` in the
    /// metadata is left out, because it may come from another file.
    ///
    /// # Errors
    /// If a tensor cannot be stored, two have one name, or the file cannot be written.
    pub fn create(
        path: &Path,
        metadata: &Metadata,
        tensors: &[TensorDeclaration],
    ) -> Result<Self, GgufError> {
        let at = |problem| GgufError::new(path, problem);
        let entries: Vec<_> = metadata.iter().filter(|(key, _)| *key != ALIGNMENT_KEY).collect();
        let mut header = b"GGUF".to_vec();
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((entries.len() as u64).to_le_bytes());
        for (key, value) in entries {
            encode_string(key.as_bytes(), &mut header);
            header.extend((value.kind() as u32).to_le_bytes());
            value.encode(&mut header);
        }
        let mut slots = HashMap::new();
        let mut end = 0u64;
        for tensor in tensors {
            let range = declare(tensor, end, &mut header).map_err(at)?;
            end = range.end;
            if slots.insert(tensor.name.clone(), Slot { range, written: 0 }).is_some() {
                let name = tensor.name.clone();
                return Err(at(GgufProblem::Duplicate { what: "tensor", name }));
            }
        }
        header.resize(header.len().next_multiple_of(ALIGNMENT_DEFAULT as usize), 0);
        let start = header.len() as u64;
        for slot in slots.values_mut() {
            slot.range = start + slot.range.start..start + slot.range.end;
        }
        let io = |source| at(GgufProblem::Io(source));
        let mut file = PartialFile::create(path).map_err(io)?;
        file.write_at(0, &header).map_err(io)?;
        Ok(Self { file, slots, end: start + end.next_multiple_of(ALIGNMENT_DEFAULT) })
    }

    /// Adds the next bytes of a declared tensor. A large tensor may come in several pieces.
    ///
    /// # Errors
    /// If the tensor was not declared, if more comes than was declared, or if the disk is full.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), GgufError> {
        let path = self.file.path().to_owned();
        let at = |problem| GgufError::new(&path, problem);
        let missing = || at(GgufProblem::Missing { name: name.to_owned() });
        let slot = self.slots.get_mut(name).ok_or_else(missing)?;
        let (expected, found) =
            (slot.range.end - slot.range.start, slot.written + bytes.len() as u64);
        if found > expected {
            return Err(at(GgufProblem::Written { name: name.to_owned(), expected, found }));
        }
        let result = self.file.write_at(slot.range.start + slot.written, bytes);
        result.map_err(|source| at(GgufProblem::Io(source)))?;
        slot.written = found;
        Ok(())
    }

    /// Checks that every tensor is complete, flushes the file to the disk and renames it.
    ///
    /// # Errors
    /// If a tensor is not complete or the disk refuses. The temporary file is removed then.
    pub fn finish(mut self) -> Result<(), GgufError> {
        let path = self.file.path().to_owned();
        for (name, slot) in &self.slots {
            let expected = slot.range.end - slot.range.start;
            if slot.written != expected {
                let (name, found) = (name.clone(), slot.written);
                return Err(GgufError::new(&path, GgufProblem::Written { name, expected, found }));
            }
        }
        let result = self.file.set_len(self.end).and_then(|()| self.file.finish());
        result.map_err(|source| GgufError::new(&path, GgufProblem::Io(source)))
    }
}

/// Adds the description of one tensor to the header. Its place is the next aligned one after `end`.
fn declare(
    tensor: &TensorDeclaration,
    end: u64,
    header: &mut Vec<u8>,
) -> Result<Range<u64>, GgufProblem> {
    let name = tensor.name.clone();
    if tensor.shape.is_empty() || tensor.shape.len() > 4 {
        return Err(GgufProblem::Dimensions { name, found: tensor.shape.len() as u32 });
    }
    let size = tensor.format.bytes_for(&tensor.shape);
    let size = size.map_err(|source| GgufProblem::Tensor { name: name.clone(), source })?;
    let unknown = crate::error::TensorError::UnknownFormat { name: tensor.format.to_string() };
    let kind = GgufType::of(tensor.format)
        .ok_or(GgufProblem::Tensor { name: name.clone(), source: unknown })?;
    encode_string(name.as_bytes(), header);
    header.extend((tensor.shape.len() as u32).to_le_bytes());
    tensor.shape.iter().rev().for_each(|&d| header.extend((d as u64).to_le_bytes()));
    header.extend(kind.0.to_le_bytes());
    let start = end.next_multiple_of(ALIGNMENT_DEFAULT);
    header.extend(start.to_le_bytes());
    let overflow = || crate::error::TensorError::Overflow { shape: tensor.shape.clone() };
    // Half of the range stays free for the header and padding.
    let end = start.checked_add(size as u64).filter(|&end| end < 1 << 62);
    let end = end.ok_or_else(|| GgufProblem::Tensor { name, source: overflow() })?;
    Ok(start..end)
}

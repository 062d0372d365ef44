//! The header: 8 bytes of size, then JSON, and the rules that it must obey.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use super::{Dtype, SafetensorsProblem};

/// The largest header that the format's own reader accepts, in bytes.
pub(super) const HEADER_BYTES_MAX: u64 = 100_000_000;

/// The key under which a header keeps free text.
pub(super) const METADATA_KEY: &str = "__metadata__";

/// A checked header.
pub(super) struct Header {
    pub metadata: BTreeMap<String, String>,
    /// In the order of the data.
    pub tensors: Vec<HeaderTensor>,
}

/// One tensor of a checked header.
pub(super) struct HeaderTensor {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Within the file.
    pub bytes: Range<usize>,
}

/// One tensor as the JSON has it.
#[derive(Deserialize)]
struct Entry {
    dtype: String,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// Reads and checks the header of a whole file.
pub(super) fn parse(file: &[u8]) -> Result<Header, SafetensorsProblem> {
    let (size, rest) =
        file.split_first_chunk::<8>().ok_or(SafetensorsProblem::TooShort { found: file.len() })?;
    let found = u64::from_le_bytes(*size);
    let limit = (rest.len() as u64).min(HEADER_BYTES_MAX);
    if found > limit {
        return Err(SafetensorsProblem::HeaderSize { found, limit });
    }
    let (json, data) = rest.split_at(found as usize);
    if json.first() != Some(&b'{') {
        let reason = "it does not begin with '{'".to_owned();
        return Err(SafetensorsProblem::Json { reason });
    }
    let entries: Entries = serde_json::from_slice(json)
        .map_err(|e| SafetensorsProblem::Json { reason: e.to_string() })?;
    check(entries, 8 + json.len(), data.len() as u64)
}

/// Checks types, sizes and the order of offsets. Each tensor must begin where the one before ends.
fn check(entries: Entries, start: usize, available: u64) -> Result<Header, SafetensorsProblem> {
    let Entries { metadata, mut tensors } = entries;
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some((name, _)) = tensors.iter().find(|(name, _)| !names.insert(name.as_str())) {
        return Err(SafetensorsProblem::DuplicateName { name: name.clone() });
    }
    drop(names);
    tensors.sort_by_key(|(_, entry)| entry.data_offsets);
    let mut expected = 0;
    let mut checked = Vec::with_capacity(tensors.len());
    for (name, entry) in tensors {
        let (begin, end) = entry.data_offsets;
        if begin > end || end > available {
            return Err(SafetensorsProblem::Offsets { name, begin, end, available });
        }
        if begin != expected {
            let kind = if begin < expected { "overlap" } else { "hole" };
            return Err(SafetensorsProblem::NotContiguous { name, expected, found: begin, kind });
        }
        expected = end;
        let (dtype, shape) = check_size(&name, entry)?;
        let bytes = start + begin as usize..start + end as usize;
        checked.push(HeaderTensor { name, dtype, shape, bytes });
    }
    if expected != available {
        return Err(SafetensorsProblem::Trailing { expected, found: available });
    }
    Ok(Header { metadata, tensors: checked })
}

fn check_size(name: &str, entry: Entry) -> Result<(Dtype, Vec<usize>), SafetensorsProblem> {
    let dtype = Dtype::from_name(&entry.dtype).ok_or_else(|| SafetensorsProblem::UnknownDtype {
        name: name.to_owned(),
        dtype: entry.dtype.clone(),
    })?;
    let found = entry.data_offsets.1 - entry.data_offsets.0;
    let expected = entry.shape.iter().try_fold(dtype.bytes() as u64, |n, &d| n.checked_mul(d));
    // A file may have any dimensions beside a zero. But this crate multiplies shapes, so the
    // dimensions must fit by themselves.
    let shape: Option<Vec<usize>> =
        entry.shape.iter().map(|&d| usize::try_from(d).ok().filter(|&d| d <= 1 << 60)).collect();
    match shape {
        Some(shape) if expected == Some(found) => Ok((dtype, shape)),
        _ => Err(SafetensorsProblem::Size {
            name: name.to_owned(),
            dtype,
            shape: entry.shape,
            expected: expected.map_or("too many".to_owned(), |n| n.to_string()),
            found,
        }),
    }
}

/// The header's object in its own order, which shows a repeated name.
struct Entries {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, Entry)>,
}

impl<'de> Deserialize<'de> for Entries {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries, A::Error> {
                let mut entries = Entries { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA_KEY {
                        let metadata: Option<BTreeMap<String, String>> = map.next_value()?;
                        entries.metadata.extend(metadata.unwrap_or_default());
                    } else {
                        let entry = map.next_value()?;
                        entries.tensors.push((name, entry));
                    }
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}

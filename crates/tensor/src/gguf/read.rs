//! Reads a header. Every count and length is checked against the rest of the file before anything
//! is allocated for it.

use std::collections::HashSet;
use std::ops::Range;

use super::value::{MetaArray, MetaType, MetaValue};
use super::{GgufProblem, GgufTensor, GgufType, Metadata};
use crate::bytes::Bytes;

/// The deepest nesting of arrays that is accepted. No known file nests arrays at all.
const NESTING_MAX: usize = 4;
/// The largest alignment that is accepted, in bytes.
const ALIGNMENT_MAX: u64 = 1 << 20;
/// The alignment of files that do not say, in bytes.
pub(super) const ALIGNMENT_DEFAULT: u64 = 32;
/// The metadata key that says the alignment.
pub(super) const ALIGNMENT_KEY: &str = "general.alignment";
/// A name's length, 0 dimensions, a type and an offset.
const TENSOR_INFO_BYTES_MIN: u64 = 8 + 4 + 4 + 8;
/// A key's length, a type and one byte.
const METADATA_BYTES_MIN: u64 = 8 + 4 + 1;

/// What a file's header says, checked.
pub(super) struct Header {
    pub version: u32,
    pub alignment: u64,
    pub metadata: Metadata,
    /// In the order of the header.
    pub tensors: Vec<GgufTensor>,
}

/// Reads and checks the header of a whole file.
pub(super) fn parse(file: &Bytes) -> Result<Header, GgufProblem> {
    let mut cursor = Cursor { file, at: 0 };
    let version = read_version(&mut cursor)?;
    let tensor_count = cursor.u64("the tensor count")?;
    let metadata_count = cursor.u64("the metadata count")?;
    cursor.check_count("metadata entries", metadata_count, METADATA_BYTES_MIN)?;
    let mut metadata = Metadata::new();
    for _ in 0..metadata_count {
        let key = cursor.text("a metadata key")?;
        let value = read_value(&mut cursor, &key)?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(GgufProblem::Duplicate { what: "metadata", name: key });
        }
    }
    let alignment = read_alignment(&metadata)?;
    cursor.check_count("tensors", tensor_count, TENSOR_INFO_BYTES_MIN)?;
    let infos: Vec<Info> =
        (0..tensor_count).map(|_| read_info(&mut cursor)).collect::<Result<_, _>>()?;
    let start = (cursor.at as u64).next_multiple_of(alignment);
    let available = (file.len() as u64).saturating_sub(start);
    let tensors = infos
        .into_iter()
        .map(|info| check_info(info, alignment, start, available))
        .collect::<Result<Vec<_>, _>>()?;
    check_names_and_overlap(&tensors)?;
    Ok(Header { version, alignment, metadata, tensors })
}

fn read_version(cursor: &mut Cursor<'_>) -> Result<u32, GgufProblem> {
    let start = &cursor.file[..cursor.file.len().min(4)];
    if start != b"GGUF" {
        let found = String::from_utf8_lossy(start).into_owned();
        return Err(GgufProblem::Magic { found });
    }
    cursor.at = 4;
    match cursor.u32("the version")? {
        version @ (2 | 3) => Ok(version),
        // A small number in the other byte order has zeros in its lower half.
        found if found != 0 && found & 0xffff == 0 => Err(GgufProblem::BigEndian),
        found => Err(GgufProblem::Version { found }),
    }
}

fn read_alignment(metadata: &Metadata) -> Result<u64, GgufProblem> {
    let found = metadata.optional::<u64>(ALIGNMENT_KEY).map_err(|e| *e.problem)?;
    let found = found.unwrap_or(ALIGNMENT_DEFAULT);
    if !found.is_power_of_two() || found > ALIGNMENT_MAX {
        return Err(GgufProblem::Alignment { found, limit: ALIGNMENT_MAX });
    }
    Ok(found)
}

fn read_value(cursor: &mut Cursor<'_>, key: &str) -> Result<MetaValue, GgufProblem> {
    let kind = read_kind(cursor, key)?;
    let what = "a metadata value";
    Ok(match kind {
        MetaType::U8 => MetaValue::U8(u8::from_le_bytes(cursor.array(what)?)),
        MetaType::I8 => MetaValue::I8(i8::from_le_bytes(cursor.array(what)?)),
        MetaType::U16 => MetaValue::U16(u16::from_le_bytes(cursor.array(what)?)),
        MetaType::I16 => MetaValue::I16(i16::from_le_bytes(cursor.array(what)?)),
        MetaType::U32 => MetaValue::U32(u32::from_le_bytes(cursor.array(what)?)),
        MetaType::I32 => MetaValue::I32(i32::from_le_bytes(cursor.array(what)?)),
        MetaType::F32 => MetaValue::F32(f32::from_le_bytes(cursor.array(what)?)),
        MetaType::U64 => MetaValue::U64(u64::from_le_bytes(cursor.array(what)?)),
        MetaType::I64 => MetaValue::I64(i64::from_le_bytes(cursor.array(what)?)),
        MetaType::F64 => MetaValue::F64(f64::from_le_bytes(cursor.array(what)?)),
        MetaType::Bool => match cursor.array::<1>(what)? {
            [byte @ (0 | 1)] => MetaValue::Bool(byte == 1),
            [found] => return Err(GgufProblem::Boolean { key: key.to_owned(), found }),
        },
        MetaType::String => MetaValue::String(cursor.text(what)?),
        MetaType::Array => MetaValue::Array(read_array(cursor, key, 1)?),
    })
}

fn read_kind(cursor: &mut Cursor<'_>, key: &str) -> Result<MetaType, GgufProblem> {
    let found = cursor.u32("a metadata type")?;
    MetaType::from_id(found).ok_or_else(|| GgufProblem::MetaType { key: key.to_owned(), found })
}

/// Steps over the elements of an array, checks each length, and keeps their place.
fn read_array(cursor: &mut Cursor<'_>, key: &str, depth: usize) -> Result<MetaArray, GgufProblem> {
    let kind = read_kind(cursor, key)?;
    let count = cursor.u64("an array's length")?;
    let element_bytes_min = match kind {
        MetaType::String => 8,
        MetaType::Array => 12,
        scalar => scalar.bytes().unwrap_or(1) as u64,
    };
    cursor.check_count("array elements", count, element_bytes_min)?;
    let start = cursor.at;
    match kind {
        MetaType::String => {
            for _ in 0..count {
                cursor.string("an array's string")?;
            }
        }
        MetaType::Array if depth >= NESTING_MAX => {
            return Err(GgufProblem::Nesting { key: key.to_owned(), limit: NESTING_MAX });
        }
        MetaType::Array => {
            for _ in 0..count {
                read_array(cursor, key, depth + 1)?;
            }
        }
        _ => {
            cursor.take("an array", count * element_bytes_min)?;
        }
    }
    // The count fits, because the elements lie in the file.
    Ok(MetaArray { kind, len: count as usize, data: cursor.file.slice(start..cursor.at) })
}

impl MetaArray {
    /// The elements, if they are arrays themselves.
    pub fn arrays(&self) -> Option<Vec<MetaArray>> {
        if self.kind != MetaType::Array {
            return None;
        }
        let mut at = 0;
        let inner = (0..self.len).map(|_| inner_array(&self.data, &mut at));
        inner.collect()
    }
}

/// The array at `at` of an array of arrays, which was checked when the file was opened.
fn inner_array(data: &Bytes, at: &mut usize) -> Option<MetaArray> {
    let mut cursor = Cursor { file: data, at: *at };
    let array = read_array(&mut cursor, "", 1).ok()?;
    *at = cursor.at;
    Some(array)
}

/// A tensor's description in the header.
struct Info {
    name: String,
    dimensions: Vec<u64>,
    kind: GgufType,
    offset: u64,
}

fn read_info(cursor: &mut Cursor<'_>) -> Result<Info, GgufProblem> {
    let name = cursor.text("a tensor's name")?;
    let found = cursor.u32("a tensor's dimension count")?;
    if found > 4 {
        return Err(GgufProblem::Dimensions { name, found });
    }
    let dimensions =
        (0..found).map(|_| cursor.u64("a tensor's dimensions")).collect::<Result<_, _>>()?;
    let kind = GgufType(cursor.u32("a tensor's type")?);
    let offset = cursor.u64("a tensor's offset")?;
    Ok(Info { name, dimensions, kind, offset })
}

fn check_info(
    info: Info,
    alignment: u64,
    start: u64,
    available: u64,
) -> Result<GgufTensor, GgufProblem> {
    let Info { name, dimensions, kind, offset } = info;
    let shape: Option<Vec<usize>> = dimensions
        .iter()
        .rev()
        .map(|&d| usize::try_from(d).ok().filter(|&d| d <= 1 << 60))
        .collect();
    let (size, shape) = match (size_of(&dimensions, kind), shape) {
        (Ok(size), Some(shape)) => (size, shape),
        (size, _) => {
            let reason = size.err().unwrap_or("a dimension is too large");
            return Err(GgufProblem::Shape { name, kind, dimensions, reason });
        }
    };
    if !offset.is_multiple_of(alignment) {
        return Err(GgufProblem::Unaligned { name, offset, alignment });
    }
    // The size of an unknown type is unknown, but its beginning is checked.
    let end = offset.saturating_add(size.unwrap_or(0));
    if end > available {
        return Err(GgufProblem::Offsets { name, begin: offset, end, available });
    }
    let range = size.map(|size| match size {
        // A file without data may say that its data begins beyond its end.
        0 => 0..0,
        _ => (start + offset) as usize..(start + end) as usize,
    });
    Ok(GgufTensor { name, shape, kind, range })
}

/// Bytes that a tensor takes. `None` if its type is unknown.
fn size_of(dimensions: &[u64], kind: GgufType) -> Result<Option<u64>, &'static str> {
    let overflow = "their product is too large";
    let elements = dimensions.iter().try_fold(1u64, |n, &d| n.checked_mul(d)).ok_or(overflow)?;
    let Some((block_len, block_bytes)) = kind.block() else { return Ok(None) };
    if !dimensions.first().unwrap_or(&1).is_multiple_of(block_len) {
        return Err("a row is no whole number of blocks");
    }
    // `Format::bytes_for` wants room for 8 bytes an element.
    elements.checked_mul(8).ok_or(overflow)?;
    (elements / block_len).checked_mul(block_bytes).map(Some).ok_or(overflow)
}

fn check_names_and_overlap(tensors: &[GgufTensor]) -> Result<(), GgufProblem> {
    let mut names = HashSet::with_capacity(tensors.len());
    if let Some(tensor) = tensors.iter().find(|t| !names.insert(t.name.as_str())) {
        return Err(GgufProblem::Duplicate { what: "tensor", name: tensor.name.clone() });
    }
    let mut ranges: Vec<(Range<usize>, &str)> = tensors
        .iter()
        .filter_map(|t| t.range.clone().map(|range| (range, t.name.as_str())))
        .filter(|(range, _)| !range.is_empty())
        .collect();
    ranges.sort_by_key(|(range, _)| range.start);
    match ranges.windows(2).find(|pair| pair[0].0.end > pair[1].0.start) {
        Some(pair) => {
            let (first, second) = (pair[0].1.to_owned(), pair[1].1.to_owned());
            Err(GgufProblem::Overlap { first, second })
        }
        None => Ok(()),
    }
}

/// A position in the file. All reads check how much of the file is left.
struct Cursor<'a> {
    file: &'a Bytes,
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, what: &'static str, bytes: u64) -> Result<&'a [u8], GgufProblem> {
        let left = (self.file.len() - self.at) as u64;
        if bytes > left {
            let (at, end) = (self.at, self.file.len());
            return Err(GgufProblem::Truncated { what, at, needed: bytes, end });
        }
        let start = self.at;
        self.at += bytes as usize;
        Ok(&self.file[start..self.at])
    }

    fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], GgufProblem> {
        Ok(self.take(what, N as u64)?.try_into().expect("as many bytes as asked for"))
    }

    fn u32(&mut self, what: &'static str) -> Result<u32, GgufProblem> {
        self.array(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &'static str) -> Result<u64, GgufProblem> {
        self.array(what).map(u64::from_le_bytes)
    }

    fn string(&mut self, what: &'static str) -> Result<&'a [u8], GgufProblem> {
        let bytes = self.u64(what)?;
        self.take(what, bytes)
    }

    fn text(&mut self, what: &'static str) -> Result<String, GgufProblem> {
        let at = self.at;
        let text = std::str::from_utf8(self.string(what)?);
        text.map(str::to_owned).map_err(|_| GgufProblem::Text { what, at })
    }

    /// Refuses a count of entries of at least `bytes_min` bytes each, if the rest of the file
    /// cannot hold them.
    fn check_count(
        &self,
        what: &'static str,
        found: u64,
        bytes_min: u64,
    ) -> Result<(), GgufProblem> {
        let limit = (self.file.len() - self.at) as u64 / bytes_min;
        if found > limit { Err(GgufProblem::Count { what, found, limit }) } else { Ok(()) }
    }
}

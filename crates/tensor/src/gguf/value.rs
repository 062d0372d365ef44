//! Metadata values. Arrays stay in the file and are decoded when they are asked for. So opening a
//! file with a vocabulary of a quarter million tokens is fast.

use std::fmt;

use crate::bytes::Bytes;

/// The type of a metadata value, by the file format's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs)]
pub enum MetaType {
    U8 = 0,
    I8 = 1,
    U16 = 2,
    I16 = 3,
    U32 = 4,
    I32 = 5,
    F32 = 6,
    Bool = 7,
    String = 8,
    Array = 9,
    U64 = 10,
    I64 = 11,
    F64 = 12,
}

impl MetaType {
    /// The type of this number.
    pub fn from_id(id: u32) -> Option<MetaType> {
        use MetaType::*;
        const ALL: [MetaType; 13] =
            [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64];
        ALL.get(id as usize).copied()
    }

    /// Bytes of a value. `None` for strings and arrays, whose sizes vary.
    pub const fn bytes(self) -> Option<usize> {
        match self {
            MetaType::U8 | MetaType::I8 | MetaType::Bool => Some(1),
            MetaType::U16 | MetaType::I16 => Some(2),
            MetaType::U32 | MetaType::I32 | MetaType::F32 => Some(4),
            MetaType::U64 | MetaType::I64 | MetaType::F64 => Some(8),
            MetaType::String | MetaType::Array => None,
        }
    }
}

impl fmt::Display for MetaType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&format!("{self:?}").to_lowercase())
    }
}

/// One metadata value.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum MetaValue {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    F32(f32),
    Bool(bool),
    String(String),
    Array(MetaArray),
    U64(u64),
    I64(i64),
    F64(f64),
}

impl MetaValue {
    /// Its type.
    pub fn kind(&self) -> MetaType {
        match self {
            MetaValue::U8(_) => MetaType::U8,
            MetaValue::I8(_) => MetaType::I8,
            MetaValue::U16(_) => MetaType::U16,
            MetaValue::I16(_) => MetaType::I16,
            MetaValue::U32(_) => MetaType::U32,
            MetaValue::I32(_) => MetaType::I32,
            MetaValue::F32(_) => MetaType::F32,
            MetaValue::Bool(_) => MetaType::Bool,
            MetaValue::String(_) => MetaType::String,
            MetaValue::Array(_) => MetaType::Array,
            MetaValue::U64(_) => MetaType::U64,
            MetaValue::I64(_) => MetaType::I64,
            MetaValue::F64(_) => MetaType::F64,
        }
    }

    /// The value of any integer type.
    pub fn as_integer(&self) -> Option<i128> {
        match *self {
            MetaValue::U8(v) => Some(v.into()),
            MetaValue::I8(v) => Some(v.into()),
            MetaValue::U16(v) => Some(v.into()),
            MetaValue::I16(v) => Some(v.into()),
            MetaValue::U32(v) => Some(v.into()),
            MetaValue::I32(v) => Some(v.into()),
            MetaValue::U64(v) => Some(v.into()),
            MetaValue::I64(v) => Some(v.into()),
            _ => None,
        }
    }

    /// The value of either float type.
    pub fn as_float(&self) -> Option<f64> {
        match *self {
            MetaValue::F32(v) => Some(v.into()),
            MetaValue::F64(v) => Some(v),
            _ => None,
        }
    }

    /// A boolean.
    pub fn as_bool(&self) -> Option<bool> {
        if let MetaValue::Bool(v) = self { Some(*v) } else { None }
    }

    /// A string.
    pub fn as_str(&self) -> Option<&str> {
        if let MetaValue::String(v) = self { Some(v) } else { None }
    }

    /// An array.
    pub fn as_array(&self) -> Option<&MetaArray> {
        if let MetaValue::Array(v) = self { Some(v) } else { None }
    }

    /// The value's bytes as a file has them (without its type).
    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            MetaValue::U8(v) => out.extend(v.to_le_bytes()),
            MetaValue::I8(v) => out.extend(v.to_le_bytes()),
            MetaValue::U16(v) => out.extend(v.to_le_bytes()),
            MetaValue::I16(v) => out.extend(v.to_le_bytes()),
            MetaValue::U32(v) => out.extend(v.to_le_bytes()),
            MetaValue::I32(v) => out.extend(v.to_le_bytes()),
            MetaValue::F32(v) => out.extend(v.to_le_bytes()),
            MetaValue::U64(v) => out.extend(v.to_le_bytes()),
            MetaValue::I64(v) => out.extend(v.to_le_bytes()),
            MetaValue::F64(v) => out.extend(v.to_le_bytes()),
            MetaValue::Bool(v) => out.push(u8::from(*v)),
            MetaValue::String(v) => encode_string(v.as_bytes(), out),
            MetaValue::Array(v) => {
                out.extend((v.kind as u32).to_le_bytes());
                out.extend((v.len as u64).to_le_bytes());
                out.extend_from_slice(&v.data);
            }
        }
    }
}

pub(super) fn encode_string(text: &[u8], out: &mut Vec<u8>) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text);
}

/// An array of one element type, in the file's bytes.
#[derive(Clone)]
pub struct MetaArray {
    pub(super) kind: MetaType,
    pub(super) len: usize,
    /// The elements' bytes, checked when the file was opened.
    pub(super) data: Bytes,
}

impl PartialEq for MetaArray {
    fn eq(&self, other: &Self) -> bool {
        (self.kind, self.len, &*self.data) == (other.kind, other.len, &*other.data)
    }
}

impl fmt::Debug for MetaArray {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MetaArray({} x {})", self.len, self.kind)
    }
}

impl MetaArray {
    /// An array of strings.
    pub fn from_strings<S: AsRef<[u8]>>(strings: impl IntoIterator<Item = S>) -> Self {
        let (mut data, mut len) = (Vec::new(), 0);
        for text in strings {
            encode_string(text.as_ref(), &mut data);
            len += 1;
        }
        Self { kind: MetaType::String, len, data: Bytes::new(data) }
    }

    /// An array of scalars of one type.
    ///
    /// # Panics
    /// If the values are not all of type `kind`, or if they vary in size.
    pub fn from_values(kind: MetaType, values: impl IntoIterator<Item = MetaValue>) -> Self {
        assert!(kind.bytes().is_some(), "scalars");
        let (mut data, mut len) = (Vec::new(), 0);
        for value in values {
            assert_eq!(value.kind(), kind, "one type");
            value.encode(&mut data);
            len += 1;
        }
        Self { kind, len, data: Bytes::new(data) }
    }

    /// Type of the elements.
    pub fn kind(&self) -> MetaType {
        self.kind
    }

    /// Elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes of the strings, borrowed. `None` if the elements are no strings. GGUF demands
    /// UTF-8, but some vocabularies have broken characters, and a tokenizer can use them.
    pub fn byte_strings(&self) -> Option<impl Iterator<Item = &[u8]>> {
        (self.kind == MetaType::String).then(|| {
            let mut rest: &[u8] = &self.data;
            std::iter::from_fn(move || {
                let (len, after) = rest.split_first_chunk::<8>()?;
                let (text, next) = after.split_at(u64::from_le_bytes(*len) as usize);
                rest = next;
                Some(text)
            })
        })
    }

    /// The strings, borrowed. `None` if the elements are no strings or not UTF-8.
    pub fn strings(&self) -> Option<Vec<&str>> {
        self.byte_strings()?.map(|bytes| std::str::from_utf8(bytes).ok()).collect()
    }

    /// The elements of any integer type.
    pub fn integers(&self) -> Option<Vec<i64>> {
        Some(match self.kind {
            MetaType::U8 => self.numbers(|b| i64::from(u8::from_le_bytes(b))),
            MetaType::I8 => self.numbers(|b| i64::from(i8::from_le_bytes(b))),
            MetaType::U16 => self.numbers(|b| i64::from(u16::from_le_bytes(b))),
            MetaType::I16 => self.numbers(|b| i64::from(i16::from_le_bytes(b))),
            MetaType::U32 => self.numbers(|b| i64::from(u32::from_le_bytes(b))),
            MetaType::I32 => self.numbers(|b| i64::from(i32::from_le_bytes(b))),
            MetaType::I64 => self.numbers(i64::from_le_bytes),
            MetaType::U64 => {
                let values = self.numbers(u64::from_le_bytes).into_iter();
                return values.map(|v| i64::try_from(v).ok()).collect();
            }
            _ => return None,
        })
    }

    /// The elements of either float type.
    pub fn floats(&self) -> Option<Vec<f32>> {
        match self.kind {
            MetaType::F32 => Some(self.numbers(f32::from_le_bytes)),
            MetaType::F64 => Some(self.numbers(|b| f64::from_le_bytes(b) as f32)),
            _ => None,
        }
    }

    /// The elements, if they are booleans.
    pub fn booleans(&self) -> Option<Vec<bool>> {
        (self.kind == MetaType::Bool).then(|| self.data.iter().map(|&b| b != 0).collect())
    }

    fn numbers<const N: usize, T>(&self, decode: impl Fn([u8; N]) -> T) -> Vec<T> {
        self.data.as_chunks::<N>().0.iter().map(|bytes| decode(*bytes)).collect()
    }
}

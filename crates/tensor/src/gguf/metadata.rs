//! Metadata: an ordered map with typed access.

use std::collections::HashMap;

use super::{GgufError, GgufProblem, MetaArray, MetaValue};

/// Metadata in the order of the file.
#[derive(Debug, Clone, Default)]
pub struct Metadata {
    entries: Vec<(String, MetaValue)>,
    index: HashMap<String, usize>,
}

impl Metadata {
    /// No metadata.
    pub fn new() -> Self {
        Self::default()
    }

    /// Entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// All entries, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &MetaValue)> {
        self.entries.iter().map(|(key, value)| (key.as_str(), value))
    }

    /// The value of a key.
    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.index.get(key).map(|&i| &self.entries[i].1)
    }

    /// Sets a key. A new key goes to the end. Returns the old value.
    pub fn insert(&mut self, key: impl Into<String>, value: MetaValue) -> Option<MetaValue> {
        let key = key.into();
        match self.index.get(&key) {
            Some(&i) => Some(std::mem::replace(&mut self.entries[i].1, value)),
            None => {
                self.index.insert(key.clone(), self.entries.len());
                self.entries.push((key, value));
                None
            }
        }
    }

    /// The value of a key that must exist, as `T`. Integers may be stored in any integer type,
    /// floats in either float type.
    ///
    /// # Errors
    /// If it is not there or of another type.
    pub fn require<'a, T: FromMeta<'a>>(&'a self, key: &str) -> Result<T, GgufError> {
        let missing = || error(GgufProblem::MissingKey { key: key.to_owned() });
        self.optional(key)?.ok_or_else(missing)
    }

    /// As [`Metadata::require`], but `None` if the key does not exist.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional<'a, T: FromMeta<'a>>(&'a self, key: &str) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        T::from_meta(value).map(Some).ok_or_else(|| {
            let (key, expected) = (key.to_owned(), T::EXPECTED);
            error(GgufProblem::WrongType { key, found: describe(value), expected })
        })
    }
}

fn error(problem: GgufProblem) -> GgufError {
    GgufError::new(std::path::Path::new(""), problem)
}

fn describe(value: &MetaValue) -> String {
    match value {
        MetaValue::Array(array) => format!("array of {} {}", array.len(), array.kind()),
        other => match other.as_integer() {
            Some(number) => format!("{} {number}", other.kind()),
            None => other.kind().to_string(),
        },
    }
}

/// A Rust type that a metadata value can be read as.
pub trait FromMeta<'a>: Sized {
    /// What an error says was expected.
    const EXPECTED: &'static str;
    /// The value, if it is of a fitting type.
    fn from_meta(value: &'a MetaValue) -> Option<Self>;
}

macro_rules! from_meta {
    ($($t:ty, $expected:literal, $read:expr;)*) => {$(
        impl<'a> FromMeta<'a> for $t {
            const EXPECTED: &'static str = $expected;
            fn from_meta(value: &'a MetaValue) -> Option<Self> {
                #[allow(clippy::redundant_closure_call)]
                ($read)(value)
            }
        }
    )*};
}

from_meta! {
    u32, "an integer from 0 to 2^32 - 1", |v: &MetaValue| v.as_integer()?.try_into().ok();
    u64, "an integer from 0 to 2^64 - 1", |v: &MetaValue| v.as_integer()?.try_into().ok();
    usize, "an integer that is not negative", |v: &MetaValue| v.as_integer()?.try_into().ok();
    i64, "an integer", |v: &MetaValue| v.as_integer()?.try_into().ok();
    f32, "a float", |v: &MetaValue| Some(v.as_float()? as f32);
    f64, "a float", MetaValue::as_float;
    bool, "a boolean", MetaValue::as_bool;
    &'a str, "a string", MetaValue::as_str;
    String, "a string", |v: &MetaValue| Some(v.as_str()?.to_owned());
    &'a MetaArray, "an array", MetaValue::as_array;
    Vec<&'a str>, "an array of strings", |v: &'a MetaValue| v.as_array()?.strings();
    Vec<i64>, "an array of integers", |v: &MetaValue| v.as_array()?.integers();
    Vec<f32>, "an array of floats", |v: &MetaValue| v.as_array()?.floats();
    Vec<bool>, "an array of booleans", |v: &MetaValue| v.as_array()?.booleans();
}

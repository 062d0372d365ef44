//! Typed access to a `config.json`: absent, null, of the wrong type and out of range are told
//! apart.

use std::cell::RefCell;
use std::collections::HashSet;

use serde_json::{Map, Value};

use crate::spec::SpecError;

/// Fields of a JSON object.
#[derive(Debug, Clone, Copy)]
pub struct Config<'a> {
    fields: &'a Map<String, Value>,
    /// Goes before a field's name in errors: `text_config.`.
    path: &'a str,
    /// Notes what is read.
    seen: Option<&'a Seen>,
}

/// What reading one file left behind: the fields that were read, of all its objects, and what a
/// user should be told.
#[derive(Debug, Default)]
pub struct Seen {
    fields: RefCell<HashSet<(usize, String)>>,
    notes: RefCell<Vec<String>>,
}

impl Seen {
    fn mark(&self, fields: &Map<String, Value>, key: &str) {
        self.fields.borrow_mut().insert((address(fields), key.to_owned()));
    }

    /// Whether `key` of `fields` was read.
    pub fn contains(&self, fields: &Map<String, Value>, key: &str) -> bool {
        self.fields.borrow().contains(&(address(fields), key.to_owned()))
    }

    /// Notes what a user should be told.
    pub fn note(&self, text: String) {
        self.notes.borrow_mut().push(text);
    }

    /// What a user should be told, in the order in which it was found.
    pub fn into_notes(self) -> Vec<String> {
        let mut notes: Vec<String> = Vec::new();
        for note in self.notes.into_inner() {
            if !notes.contains(&note) {
                notes.push(note);
            }
        }
        notes
    }
}

/// Tells the objects of one file apart.
fn address(fields: &Map<String, Value>) -> usize {
    std::ptr::from_ref(fields) as usize
}

impl<'a> Config<'a> {
    /// The fields of `value`, which must be an object; `path` goes before names in errors.
    pub fn new(value: &'a Value, path: &'a str) -> Result<Self, SpecError> {
        match value {
            Value::Object(fields) => Ok(Config { fields, path, seen: None }),
            other => Err(SpecError::value(
                if path.is_empty() { "config.json" } else { path.trim_end_matches('.') },
                shorten(other),
                "an object",
            )),
        }
    }

    /// The same, noting in `seen` what is read.
    pub fn noting(self, seen: &'a Seen) -> Self {
        Config { seen: Some(seen), ..self }
    }

    /// Notes fields that need not be read, because others say that they do not count.
    pub fn idle(&self, keys: &[&str]) {
        if let Some(seen) = self.seen {
            keys.iter().for_each(|key| seen.mark(self.fields, key));
        }
    }

    /// Tells the user something about this file.
    pub fn note(&self, text: String) {
        if let Some(seen) = self.seen {
            seen.note(text);
        }
    }

    /// Names of the fields that are not null.
    pub fn given(&self) -> impl Iterator<Item = &'a str> {
        let given = self.fields.iter().filter(|(_, value)| !value.is_null());
        given.map(|(key, _)| key.as_str())
    }

    /// The value of `key`, if it is there and not null.
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.idle(&[key]);
        self.fields.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, be it null.
    pub fn has(&self, key: &str) -> bool {
        self.fields.contains_key(key)
    }

    /// The object under `key`, if it is there and not null.
    pub fn object(&self, key: &str) -> Result<Option<Config<'a>>, SpecError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(fields)) => Ok(Some(Config { fields, ..*self })),
            Some(other) => Err(self.wrong(key, other, "an object")),
        }
    }

    /// A size.
    pub fn size(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let size = match value.as_u64() {
            Some(size) => usize::try_from(size).ok(),
            // Some writers put whole numbers as `4096.0`.
            None => value
                .as_f64()
                .filter(|x| x.fract() == 0.0 && (0.0..=9e15).contains(x))
                .map(|x| x as usize),
        };
        size.map(Some).ok_or_else(|| self.wrong(key, value, "a whole number, not negative"))
    }

    /// A size that must be there.
    pub fn need(&self, key: &str) -> Result<usize, SpecError> {
        self.size(key)?.ok_or_else(|| SpecError::Missing(format!("{}{key}", self.path)))
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(self.wrong(key, value, "a number")),
        }
    }

    /// A truth value.
    pub fn flag(&self, key: &str) -> Result<Option<bool>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, value, "true or false"))
    }

    /// A string.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, value, "a string"))
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&'a str>>, SpecError> {
        self.list(key, "a list of strings", Value::as_str)
    }

    /// A list of sizes.
    pub fn sizes(&self, key: &str) -> Result<Option<Vec<usize>>, SpecError> {
        self.list(key, "a list of whole numbers", |value| value.as_u64().map(|n| n as usize))
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<f64>>, SpecError> {
        self.list(key, "a list of numbers", Value::as_f64)
    }

    fn list<T>(
        &self,
        key: &str,
        expected: &str,
        item: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let items = value.as_array().map(|items| items.iter().map(item).collect::<Option<_>>());
        items.flatten().map(Some).ok_or_else(|| self.wrong(key, value, expected))
    }

    fn wrong(&self, key: &str, found: &Value, expected: &str) -> SpecError {
        SpecError::value(format!("{}{key}", self.path), shorten(found), expected)
    }
}

/// A value as it stands in the file, cut to a length that fits a message.
pub(crate) fn shorten(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

//! Parameters of techniques. Each is declared once; recipes read them and the help shows them.

use std::collections::BTreeMap;
use std::fmt;

use crate::error::QuantError;
use lathe_tensor::suggest::one_of;

/// The type of a parameter, its range and its default.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Kind {
    /// A whole number from `least` to `most`.
    Whole {
        /// If not given.
        default: u64,
        /// The smallest one allowed.
        least: u64,
        /// The largest one allowed.
        most: u64,
    },
    /// A number from `least` to `most`.
    Number {
        /// If not given.
        default: f64,
        /// The smallest one allowed.
        least: f64,
        /// The largest one allowed.
        most: f64,
    },
    /// True or false.
    Flag {
        /// If not given.
        default: bool,
    },
    /// One of these words. The first is the default.
    Choice(&'static [&'static str]),
}

/// One parameter of a technique.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Parameter {
    /// Its key in a recipe.
    pub name: &'static str,
    /// Its type, range and default.
    pub kind: Kind,
    /// What it does, for help.
    pub meaning: &'static str,
}

/// A parameter's value.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Setting {
    Whole(u64),
    Number(f64),
    Flag(bool),
    Choice(&'static str),
}

/// The values of all parameters of one technique.
#[derive(Debug, Clone, PartialEq)]
pub struct Parameters(BTreeMap<&'static str, Setting>);

impl Parameters {
    /// All parameters with their defaults.
    pub fn defaults(declared: &[Parameter]) -> Self {
        let setting = |kind: &Kind| match *kind {
            Kind::Whole { default, .. } => Setting::Whole(default),
            Kind::Number { default, .. } => Setting::Number(default),
            Kind::Flag { default } => Setting::Flag(default),
            Kind::Choice(words) => Setting::Choice(words[0]),
        };
        Self(declared.iter().map(|it| (it.name, setting(&it.kind))).collect())
    }

    /// Sets `key` to the value of a recipe.
    ///
    /// # Errors
    /// If there is no such parameter, or the value has the wrong type or range.
    pub fn set(
        &mut self,
        declared: &[Parameter],
        key: &str,
        value: &toml::Value,
    ) -> Result<(), QuantError> {
        let Some(parameter) = declared.iter().find(|it| it.name == key) else {
            let known: Vec<&str> = declared.iter().map(|it| it.name).collect();
            let known = [&["use", "tensors"], known.as_slice()].concat();
            let message = format!("unknown key `{key}`, expected {}", one_of(key, &known));
            return Err(QuantError::Recipe(message));
        };
        let setting = read(&parameter.kind, value).ok_or_else(|| {
            QuantError::Recipe(format!("`{key}` is {value}, expected {}", parameter.kind))
        })?;
        self.0.insert(parameter.name, setting);
        Ok(())
    }

    /// All parameters with their values, as a recipe writes them.
    pub fn values(&self) -> impl Iterator<Item = (&'static str, toml::Value)> + '_ {
        self.0.iter().map(|(name, setting)| {
            let value = match *setting {
                Setting::Whole(value) => toml::Value::Integer(value as i64),
                Setting::Number(value) => toml::Value::Float(value),
                Setting::Flag(value) => toml::Value::Boolean(value),
                Setting::Choice(word) => toml::Value::String(word.to_owned()),
            };
            (*name, value)
        })
    }

    /// The value of a whole number.
    ///
    /// # Panics
    /// If the technique declares no whole number of this name.
    pub fn whole(&self, name: &str) -> usize {
        match self.0.get(name) {
            Some(Setting::Whole(value)) => *value as usize,
            other => panic!("{name} is no whole number: {other:?}"),
        }
    }

    /// The value of a number.
    ///
    /// # Panics
    /// As [`Self::whole`].
    pub fn number(&self, name: &str) -> f64 {
        match self.0.get(name) {
            Some(Setting::Number(value)) => *value,
            other => panic!("{name} is no number: {other:?}"),
        }
    }

    /// The value of a flag.
    ///
    /// # Panics
    /// As [`Self::whole`].
    pub fn flag(&self, name: &str) -> bool {
        match self.0.get(name) {
            Some(Setting::Flag(value)) => *value,
            other => panic!("{name} is no flag: {other:?}"),
        }
    }

    /// The chosen word.
    ///
    /// # Panics
    /// As [`Self::whole`].
    pub fn choice(&self, name: &str) -> &'static str {
        match self.0.get(name) {
            Some(Setting::Choice(word)) => word,
            other => panic!("{name} is no choice: {other:?}"),
        }
    }
}

fn read(kind: &Kind, value: &toml::Value) -> Option<Setting> {
    match *kind {
        Kind::Whole { least, most, .. } => {
            let number = u64::try_from(value.as_integer()?).ok()?;
            (least..=most).contains(&number).then_some(Setting::Whole(number))
        }
        Kind::Number { least, most, .. } => {
            let number = value.as_float().or(value.as_integer().map(|n| n as f64))?;
            (least..=most).contains(&number).then_some(Setting::Number(number))
        }
        Kind::Flag { .. } => value.as_bool().map(Setting::Flag),
        Kind::Choice(words) => {
            let found = value.as_str()?;
            words.iter().find(|word| **word == found).map(|word| Setting::Choice(word))
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Whole { least, most, .. } => write!(f, "a whole number from {least} to {most}"),
            Kind::Number { least, most, .. } => write!(f, "a number from {least} to {most}"),
            Kind::Flag { .. } => write!(f, "true or false"),
            Kind::Choice(words) => write!(f, "one of {}", words.join(", ")),
        }
    }
}

//! Which modules the groups of a compressed-tensors configuration are for. That library looks for a
//! module by name, then by pattern, then by class (`utils/match.py`).

use std::collections::{BTreeMap, HashMap};

use fancy_regex::Regex;

use super::scheme::refuse;
use crate::spec::SpecError;

/// Something for each target of a configuration.
#[derive(Debug, Clone)]
pub(super) struct Targets<T> {
    names: HashMap<String, T>,
    /// In the order of their texts, as that library tries them.
    patterns: BTreeMap<String, (Regex, T)>,
    classes: HashMap<String, T>,
}

impl<T> Default for Targets<T> {
    fn default() -> Self {
        let (names, patterns, classes) = Default::default();
        Targets { names, patterns, classes }
    }
}

impl<T: Copy + PartialEq> Targets<T> {
    /// The same value for each of `targets`.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub(super) fn of(targets: &[&str], value: T) -> Result<Self, SpecError> {
        let mut all = Self::default();
        for target in targets {
            all.add(target, value)?;
        }
        Ok(all)
    }

    /// Adds a module's name, `re:` and an expression, or a class.
    ///
    /// # Errors
    /// If the expression is none, or the target has another value already.
    pub(super) fn add(&mut self, target: &str, value: T) -> Result<(), SpecError> {
        let before = if let Some(pattern) = target.strip_prefix("re:") {
            // Python's `re.match`: from the start of the name, to any point of it.
            let regex = match Regex::new(&format!("^(?:{pattern})")) {
                Ok(regex) => regex,
                Err(error) => return refuse(format!("target `{target}`: {error}")),
            };
            self.patterns.insert(pattern.to_owned(), (regex, value)).map(|(_, before)| before)
        } else if target.starts_with(char::is_uppercase) && !target.contains('.') {
            self.classes.insert(target.to_owned(), value)
        } else {
            self.names.insert(target.to_owned(), value)
        };
        match before {
            Some(before) if before != value => {
                refuse(format!("config with two groups for target `{target}`"))
            }
            _ => Ok(()),
        }
    }

    /// Whether there is no target.
    pub(super) fn is_empty(&self) -> bool {
        self.values().next().is_none()
    }

    /// What the targets have.
    pub(super) fn values(&self) -> impl Iterator<Item = &T> {
        let patterns = self.patterns.values().map(|(_, value)| value);
        self.names.values().chain(patterns).chain(self.classes.values())
    }

    /// What is for the module called `module`.
    ///
    /// # Errors
    /// If an expression cannot be evaluated.
    pub(super) fn find(&self, module: &str) -> Result<Option<T>, SpecError> {
        if let Some(value) = self.names.get(module) {
            return Ok(Some(*value));
        }
        for (pattern, (regex, value)) in &self.patterns {
            match regex.is_match(module) {
                Ok(true) => return Ok(Some(*value)),
                Ok(false) => {}
                Err(error) => return refuse(format!("target `re:{pattern}`: {error}")),
            }
        }
        let class = if module.ends_with("embed_tokens") { "Embedding" } else { "Linear" };
        Ok(self.classes.get(class).copied())
    }
}

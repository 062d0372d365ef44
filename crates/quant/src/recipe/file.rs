//! A recipe as TOML text.

use lathe_tensor::Format;
use lathe_tensor::suggest::nearest;
use serde::{Deserialize, Serialize};
use toml::de::{DeTable, DeValue};

use super::{
    Budget, Prefix, Recipe, Sensitivity, TechniqueStep, activations_named, activations_of,
    format_named, wrong,
};
use crate::error::QuantError;
use crate::parameters::Parameters;
use crate::technique;

/// The keys of a recipe.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RecipeTable {
    format: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tensors: Option<Patterns>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    keep: Option<Patterns>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    prefix: Option<Prefix>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    activations: Option<String>,
    /// Patterns and formats, in the order of the file.
    #[serde(default, skip_serializing_if = "toml::Table::is_empty")]
    formats: toml::Table,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    budget: Option<BudgetTable>,
    #[serde(default)]
    technique: Vec<StepTable>,
}

/// The keys of `[budget]`.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct BudgetTable {
    bits: Bits,
    formats: Patterns,
    #[serde(default)]
    sensitivity: Sensitivity,
}

/// The keys of `[[technique]]`. Other keys are parameters, which the technique checks.
#[derive(Serialize, Deserialize)]
struct StepTable {
    #[serde(rename = "use")]
    technique: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tensors: Option<Patterns>,
    #[serde(flatten)]
    parameters: toml::Table,
}

/// A list that is not empty.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "Vec<String>")]
struct Patterns(Vec<String>);

impl TryFrom<Vec<String>> for Patterns {
    type Error = &'static str;

    fn try_from(list: Vec<String>) -> Result<Self, Self::Error> {
        if list.is_empty() { Err("the list is empty, expected names") } else { Ok(Self(list)) }
    }
}

/// A number of bits.
#[derive(Serialize, Deserialize)]
#[serde(try_from = "f64")]
struct Bits(f64);

impl TryFrom<f64> for Bits {
    type Error = String;

    fn try_from(bits: f64) -> Result<Self, Self::Error> {
        let good = bits > 0.0 && bits.is_finite();
        if good { Ok(Self(bits)) } else { Err(format!("{bits} bits, expected a number above 0")) }
    }
}

impl Recipe {
    /// Reads a recipe. `group` replaces the size of the groups of its format.
    ///
    /// # Errors
    /// [`QuantError::Recipe`] names the line, the key and what was expected.
    pub fn parse(text: &str, group: Option<u32>) -> Result<Recipe, QuantError> {
        let table: RecipeTable = toml::from_str(text).map_err(|error| explain(text, &error))?;
        let at = |path: &'static [&'static str]| {
            move |error| locate(text, path.iter().map(|key| Part::Key(key)), error)
        };
        let format = format_named(&table.format, group).map_err(at(&["format"]))?;
        let activations = table.activations.map(|name| activations_named(&name)).transpose();
        let activations = activations.map_err(at(&["activations"]))?;
        let activations = activations.or(activations_of(&table.format));
        let formats = table.formats.into_iter().map(|(pattern, value)| {
            let format = match value.as_str() {
                Some(name) => format_named(name, None),
                None => Err(wrong(format!("`{pattern}` is {value}, expected a format's name"))),
            };
            let path = [Part::Key("formats"), Part::Key(&pattern)];
            let format = format.map_err(|error| locate(text, path, error))?;
            Ok((pattern, format))
        });
        let formats = formats.collect::<Result<_, QuantError>>()?;
        let budget = table.budget.map(BudgetTable::read).transpose();
        let budget = budget.map_err(at(&["budget", "formats"]))?;
        let steps = table.technique.into_iter().enumerate();
        let steps = steps.map(|(index, step)| step.read(text, index));
        let steps = steps.collect::<Result<Vec<_>, _>>()?;
        let prefix = table.prefix.unwrap_or_else(|| Prefix::of(&steps));
        let tensors = table.tensors.map(|it| it.0);
        let keep = table.keep.map_or_else(Vec::new, |it| it.0);
        let recipe = Recipe { format, tensors, keep, prefix, formats, budget, activations, steps };
        recipe.check()?;
        Ok(recipe)
    }

    /// The recipe as TOML, with every parameter. Reading it gives the same recipe.
    pub fn to_toml(&self) -> String {
        let formats = self
            .formats
            .iter()
            .map(|(pattern, format)| (pattern.clone(), toml::Value::String(format.to_string())));
        let table = RecipeTable {
            format: self.format.to_string(),
            tensors: self.tensors.clone().map(Patterns),
            keep: Some(Patterns(self.keep.clone())).filter(|it| !it.0.is_empty()),
            prefix: self.needs_calibration().then_some(self.prefix),
            activations: self.activations.map(|it| it.to_string()),
            formats: formats.collect(),
            budget: self.budget.as_ref().map(BudgetTable::of),
            technique: self.steps.iter().map(StepTable::of).collect(),
        };
        toml::to_string(&table).expect("a recipe's values are all TOML's")
    }
}

impl BudgetTable {
    fn read(self) -> Result<Budget, QuantError> {
        let formats = self.formats.0.iter().map(|name| format_named(name, None));
        let formats = formats.collect::<Result<_, _>>()?;
        Ok(Budget { bits: self.bits.0, formats, sensitivity: self.sensitivity })
    }

    fn of(budget: &Budget) -> Self {
        let formats = Patterns(budget.formats.iter().map(Format::to_string).collect());
        Self { bits: Bits(budget.bits), formats, sensitivity: budget.sensitivity }
    }
}

impl StepTable {
    /// Reads step `index` of the recipe in `text`.
    fn read(self, text: &str, index: usize) -> Result<TechniqueStep, QuantError> {
        let at = |key, error| {
            locate(text, [Part::Key("technique"), Part::Index(index), Part::Key(key)], error)
        };
        let technique = technique::find(&self.technique).map_err(|error| at("use", error))?;
        let mut parameters = Parameters::defaults(technique.parameters);
        for (key, value) in &self.parameters {
            parameters.set(technique.parameters, key, value).map_err(|error| {
                let error = match error {
                    QuantError::Recipe(message) => {
                        wrong(format!("technique {}: {message}", technique.name))
                    }
                    other => other,
                };
                at(key, error)
            })?;
        }
        Ok(TechniqueStep { technique, parameters, tensors: self.tensors.map(|it| it.0) })
    }

    fn of(step: &TechniqueStep) -> Self {
        let parameters = step.parameters.values().map(|(name, value)| (name.to_owned(), value));
        Self {
            technique: step.technique.name.to_owned(),
            tensors: step.tensors.clone().map(Patterns),
            parameters: parameters.collect(),
        }
    }
}

/// The parser's error, with its line of `text`.
fn explain(text: &str, error: &toml::de::Error) -> QuantError {
    let mut message = error.message().to_owned();
    // The parser says "unknown field `a`, expected one of `b`, `c`" and suggests no nearest name.
    let mut words = message.split('`').skip(1).step_by(2);
    if let (true, Some(found)) = (message.starts_with("unknown field"), words.next())
        && let Some(name) = nearest(found, words)
    {
        message = format!("{message}; did you mean `{name}`?");
    }
    let whole = 0..text.trim_end().len();
    let at = error.span().filter(|span| !(span.start == 0 && span.end >= whole.end));
    match at {
        Some(at) => wrong(with_line(text, at.start, &message)),
        None => wrong(message),
    }
}

/// `message` with the line of `text` that contains byte `at`.
fn with_line(text: &str, at: usize, message: &str) -> String {
    let number = text[..at].matches('\n').count();
    let line = text.lines().nth(number).unwrap_or("").trim();
    format!("line {}, `{line}`: {message}", number + 1)
}

/// One step of a path to a value in a file.
enum Part<'a> {
    Key(&'a str),
    Index(usize),
}

/// `error` with the line of the value at `path`.
fn locate<'a>(
    text: &str,
    path: impl IntoIterator<Item = Part<'a>>,
    error: QuantError,
) -> QuantError {
    let QuantError::Recipe(message) = error else { return error };
    let Ok(table) = DeTable::parse(text) else { return wrong(message) };
    let (mut at, mut value) = (table.span().start, DeValue::Table(table.into_inner()));
    for part in path {
        let next = match part {
            Part::Key(key) => value.get(key),
            Part::Index(index) => value.get(index),
        };
        let Some(next) = next.cloned() else { return wrong(message) };
        (at, value) = (next.span().start, next.into_inner());
    }
    wrong(with_line(text, at, &message))
}

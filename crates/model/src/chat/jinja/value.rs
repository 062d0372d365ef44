//! What a template's names stand for: Python's values, without those that a template cannot make.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::rc::Rc;

use indexmap::IndexMap;

use super::error::{Failure, Outcome};
use super::limits::{Meter, VALUE_DEPTH};
use super::text::Text;

/// A value, cheap to clone.
#[derive(Clone, Debug)]
pub(super) enum Value {
    /// Nothing, and the words for an operation that needs something.
    Undefined(Rc<str>),
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Str(Text),
    List(Rc<List>),
    Tuple(Rc<List>),
    Dict(Rc<Dict>),
    Namespace(Rc<Namespace>),
    /// A macro, by its place in the run's list.
    Macro(usize),
    /// A global function, by its name.
    Function(&'static str),
    /// A method that is not called yet.
    Method(Rc<(Value, String)>),
    Loop(Rc<Loop>),
    Cycler(Rc<Cycler>),
    Joiner(Rc<Joiner>),
}

/// Items of a list or tuple.
#[derive(Debug)]
pub(super) struct List {
    pub(super) items: Vec<Value>,
    charge: Charge,
}

/// Entries in the order in which they came.
#[derive(Debug)]
pub(super) struct Dict {
    pub(super) entries: IndexMap<Key, (Value, Value)>,
    charge: Charge,
}

/// `namespace()`, the one value that changes.
#[derive(Debug)]
pub(super) struct Namespace {
    pub(super) fields: RefCell<IndexMap<String, Value>>,
}

/// Memory that is given back when its owner goes, and how deep the owner's values are nested.
#[derive(Debug)]
struct Charge {
    meter: Rc<Meter>,
    bytes: usize,
    depth: usize,
    holds_namespace: bool,
}

impl Charge {
    fn new<'v>(
        meter: &Rc<Meter>,
        bytes: usize,
        values: impl Iterator<Item = &'v Value>,
    ) -> Outcome<Self> {
        let (mut depth, mut holds_namespace) = (0, false);
        for value in values {
            depth = depth.max(value.depth());
            holds_namespace |= value.holds_namespace();
        }
        if depth >= VALUE_DEPTH {
            return Err(Failure::limit("levels of nested values", VALUE_DEPTH as u64));
        }
        meter.take(bytes)?;
        let meter = Rc::clone(meter);
        Ok(Self { meter, bytes, depth: depth + 1, holds_namespace })
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.meter.release(self.bytes);
    }
}

/// The state of a `for` loop.
#[derive(Debug)]
pub(super) struct Loop {
    pub(super) index: usize,
    pub(super) items: Rc<Vec<Value>>,
    /// Recursions into the same loop around this one.
    pub(super) depth: usize,
    /// The loop's place in the run's list, if it is recursive.
    pub(super) recursion: Option<usize>,
    /// What `changed` was last called with; shared by all passes.
    pub(super) last: Rc<RefCell<Option<Vec<Value>>>>,
}

/// `cycler(..)`
#[derive(Debug)]
pub(super) struct Cycler {
    pub(super) items: Vec<Value>,
    pub(super) at: RefCell<usize>,
}

/// `joiner(..)`
#[derive(Debug)]
pub(super) struct Joiner {
    pub(super) separator: Value,
    pub(super) used: RefCell<bool>,
}

/// What values are compared by in a dictionary.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    None,
    Int(i128),
    Float(u64),
    Str(String),
    Tuple(Vec<Key>),
}

/// Bytes that a value takes in a container, about.
const VALUE_BYTES: usize = 64;
const ENTRY_BYTES: usize = 160;

pub(super) fn list(meter: &Rc<Meter>, items: Vec<Value>) -> Outcome<Value> {
    let charge = Charge::new(meter, 64 + items.len() * VALUE_BYTES, items.iter())?;
    Ok(Value::List(Rc::new(List { items, charge })))
}

pub(super) fn tuple(meter: &Rc<Meter>, items: Vec<Value>) -> Outcome<Value> {
    let charge = Charge::new(meter, 64 + items.len() * VALUE_BYTES, items.iter())?;
    Ok(Value::Tuple(Rc::new(List { items, charge })))
}

pub(super) fn dict(
    meter: &Rc<Meter>,
    pairs: impl IntoIterator<Item = (Value, Value)>,
) -> Outcome<Value> {
    let mut entries = IndexMap::new();
    for (key, value) in pairs {
        meter.step(1)?;
        let found = key.key()?;
        // As in Python, a key that comes again keeps its first spelling.
        match entries.entry(found) {
            indexmap::map::Entry::Occupied(mut old) => {
                let first: &mut (Value, Value) = old.get_mut();
                first.1 = value;
            }
            indexmap::map::Entry::Vacant(new) => {
                new.insert((key, value));
            }
        }
    }
    let keys = entries.keys().map(|key| if let Key::Str(key) = key { key.len() } else { 0 });
    let bytes = 64 + entries.len() * ENTRY_BYTES + keys.sum::<usize>();
    let charge = Charge::new(meter, bytes, entries.values().map(|entry| &entry.1))?;
    Ok(Value::Dict(Rc::new(Dict { entries, charge })))
}

/// Values of a conversation; every string in it is typed.
pub(super) fn from_json(
    meter: &Rc<Meter>,
    json: &serde_json::Value,
    typed: bool,
) -> Outcome<Value> {
    use serde_json::Value as Json;
    let string = |text: &str| match typed {
        true => Text::typed(meter, text),
        false => Text::literal(meter, text),
    };
    Ok(match json {
        Json::Null => Value::None,
        Json::Bool(value) => Value::Bool(*value),
        Json::String(text) => Value::Str(string(text)?),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::Int(integer.into()),
            (None, Some(integer)) => Value::Int(integer.into()),
            (None, None) => Value::Float(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::Array(items) => {
            let items = items.iter().map(|item| from_json(meter, item, typed));
            list(meter, items.collect::<Outcome<_>>()?)?
        }
        Json::Object(fields) => {
            let pairs = fields.iter().map(|(name, field)| {
                Ok((Value::Str(string(name)?), from_json(meter, field, typed)?))
            });
            dict(meter, pairs.collect::<Outcome<Vec<_>>>()?)?
        }
    })
}

impl Value {
    pub(super) fn undefined(reason: impl AsRef<str>) -> Self {
        Self::Undefined(reason.as_ref().into())
    }

    fn depth(&self) -> usize {
        match self {
            Self::List(list) | Self::Tuple(list) => list.charge.depth,
            Self::Dict(dict) => dict.charge.depth,
            Self::Method(method) => method.0.depth(),
            _ => 0,
        }
    }

    /// Whether a namespace, or what may hold one, is inside.
    pub(super) fn holds_namespace(&self) -> bool {
        match self {
            Self::List(list) | Self::Tuple(list) => list.charge.holds_namespace,
            Self::Dict(dict) => dict.charge.holds_namespace,
            Self::Method(method) => method.0.holds_namespace(),
            Self::Namespace(_) | Self::Loop(_) | Self::Cycler(_) | Self::Joiner(_) => true,
            _ => false,
        }
    }

    /// Python's name of the type.
    pub(super) fn type_name(&self) -> &'static str {
        match self {
            Self::Undefined(_) => "Undefined",
            Self::None => "NoneType",
            Self::Bool(_) => "bool",
            Self::Int(_) => "int",
            Self::Float(_) => "float",
            Self::Str(_) => "str",
            Self::List(_) => "list",
            Self::Tuple(_) => "tuple",
            Self::Dict(_) => "dict",
            Self::Namespace(_) => "Namespace",
            Self::Macro(_) => "Macro",
            Self::Function(_) => "function",
            Self::Method(_) => "builtin_function_or_method",
            Self::Loop(_) => "LoopContext",
            Self::Cycler(_) => "Cycler",
            Self::Joiner(_) => "Joiner",
        }
    }

    pub(super) fn is_true(&self) -> bool {
        match self {
            Self::Undefined(_) | Self::None => false,
            Self::Bool(value) => *value,
            Self::Int(value) => *value != 0,
            Self::Float(value) => *value != 0.0,
            Self::Str(text) => !text.as_str().is_empty(),
            Self::List(list) | Self::Tuple(list) => !list.items.is_empty(),
            Self::Dict(dict) => !dict.entries.is_empty(),
            Self::Namespace(_)
            | Self::Macro(_)
            | Self::Function(_)
            | Self::Method(_)
            | Self::Loop(_)
            | Self::Cycler(_)
            | Self::Joiner(_) => true,
        }
    }

    pub(super) fn as_str(&self) -> Option<&str> {
        match self {
            Self::Str(text) => Some(text.as_str()),
            _ => None,
        }
    }

    /// An integer, or a bool as one.
    pub(super) fn as_int(&self) -> Option<i128> {
        match self {
            Self::Int(value) => Some(*value),
            Self::Bool(value) => Some((*value).into()),
            _ => None,
        }
    }

    /// Any number, or a bool as one.
    pub(super) fn as_float(&self) -> Option<f64> {
        match self {
            Self::Float(value) => Some(*value),
            other => other.as_int().map(|value| value as f64),
        }
    }

    pub(super) fn is_number(&self) -> bool {
        matches!(self, Self::Bool(_) | Self::Int(_) | Self::Float(_))
    }

    /// What the value is found by in a dictionary.
    pub(super) fn key(&self) -> Outcome<Key> {
        Ok(match self {
            Self::None => Key::None,
            Self::Bool(_) | Self::Int(_) => Key::Int(self.as_int().unwrap_or_default()),
            Self::Float(value) if value.fract() == 0.0 && value.abs() < 1e18 => {
                Key::Int(*value as i128)
            }
            Self::Float(value) => Key::Float(value.to_bits()),
            Self::Str(text) => Key::Str(text.as_str().to_owned()),
            Self::Tuple(list) => {
                Key::Tuple(list.items.iter().map(Self::key).collect::<Outcome<_>>()?)
            }
            Self::Undefined(reason) => return Err(Failure::failed(&**reason)),
            other => {
                return Err(Failure::failed(format!("unhashable type: {:?}", other.type_name())));
            }
        })
    }

    /// The entry `name` of a dictionary.
    pub(super) fn get(&self, name: &str) -> Option<&Value> {
        match self {
            Self::Dict(dict) => dict.entries.get(&Key::Str(name.to_owned())).map(|it| &it.1),
            _ => None,
        }
    }

    /// The items that a loop over this value has.
    pub(super) fn iterate(&self, meter: &Rc<Meter>) -> Outcome<Vec<Value>> {
        match self {
            Self::Undefined(_) => Ok(Vec::new()),
            Self::List(list) | Self::Tuple(list) => {
                meter.step(list.items.len() as u64 / 8)?;
                Ok(list.items.clone())
            }
            Self::Dict(dict) => {
                meter.step(dict.entries.len() as u64 / 8)?;
                Ok(dict.entries.values().map(|entry| entry.0.clone()).collect())
            }
            Self::Str(text) => {
                let string = text.as_str();
                meter.foresee(string.len().saturating_mul(2 * VALUE_BYTES))?;
                meter.step(string.len() as u64)?;
                let mut characters = Vec::new();
                for (at, character) in string.char_indices() {
                    characters.push(Self::Str(text.slice(at..at + character.len_utf8())?));
                }
                Ok(characters)
            }
            other => {
                Err(Failure::failed(format!("{:?} object is not iterable", other.type_name())))
            }
        }
    }

    pub(super) fn length(&self) -> Outcome<usize> {
        Ok(match self {
            Self::Undefined(_) => 0,
            Self::Str(text) => {
                text.meter().scan(text.as_str().len())?;
                text.as_str().chars().count()
            }
            Self::List(list) | Self::Tuple(list) => list.items.len(),
            Self::Dict(dict) => dict.entries.len(),
            Self::Loop(state) => state.items.len(),
            other => {
                let name = other.type_name();
                return Err(Failure::failed(format!("object of type {name:?} has no len()")));
            }
        })
    }

    /// Python's `==`. Depth is bounded where values are made.
    pub(super) fn equals(&self, other: &Self, meter: &Meter) -> Outcome<bool> {
        meter.step(1)?;
        let same = |a: &[Self], b: &[Self]| -> Outcome<bool> {
            if a.len() != b.len() {
                return Ok(false);
            }
            for (a, b) in a.iter().zip(b) {
                if !a.equals(b, meter)? {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        Ok(match (self, other) {
            (Self::Undefined(_), Self::Undefined(_)) | (Self::None, Self::None) => true,
            (Self::Str(a), Self::Str(b)) => a.as_str() == b.as_str(),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                Rc::ptr_eq(a, b) || same(&a.items, &b.items)?
            }
            (Self::Dict(a), Self::Dict(b)) => {
                if a.entries.len() != b.entries.len() {
                    return Ok(false);
                }
                for (key, (_, value)) in &a.entries {
                    match b.entries.get(key) {
                        Some((_, found)) if value.equals(found, meter)? => {}
                        _ => return Ok(false),
                    }
                }
                true
            }
            (Self::Namespace(a), Self::Namespace(b)) => Rc::ptr_eq(a, b),
            (Self::Macro(a), Self::Macro(b)) => a == b,
            (Self::Function(a), Self::Function(b)) => a == b,
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => a == b,
                _ => a.is_number() && b.is_number() && a.as_float() == b.as_float(),
            },
        })
    }

    /// Python's `<`, `<=`, `>` and `>=`, of which `operator` is one; `None` if one side is not a
    /// number (NaN).
    pub(super) fn order(
        &self,
        other: &Self,
        operator: &str,
        meter: &Meter,
    ) -> Outcome<Option<Ordering>> {
        meter.step(1)?;
        Ok(match (self, other) {
            (Self::Str(a), Self::Str(b)) => Some(a.as_str().cmp(b.as_str())),
            (Self::List(a), Self::List(b)) | (Self::Tuple(a), Self::Tuple(b)) => {
                for (a, b) in a.items.iter().zip(&b.items) {
                    if !a.equals(b, meter)? {
                        return a.order(b, operator, meter);
                    }
                }
                Some(a.items.len().cmp(&b.items.len()))
            }
            (Self::Undefined(reason), _) | (_, Self::Undefined(reason)) => {
                return Err(Failure::failed(&**reason));
            }
            (a, b) => match (a.as_int(), b.as_int()) {
                (Some(a), Some(b)) => Some(a.cmp(&b)),
                _ => match (a.as_float(), b.as_float()) {
                    (Some(a), Some(b)) => a.partial_cmp(&b),
                    _ => {
                        let (a, b) = (a.type_name(), b.type_name());
                        let reason = format!(
                            "{operator:?} not supported between instances of {a:?} and {b:?}"
                        );
                        return Err(Failure::failed(reason));
                    }
                },
            },
        })
    }

    /// Python's `in`: whether `item` is in `self`.
    pub(super) fn contains(&self, item: &Self, meter: &Meter) -> Outcome<bool> {
        match self {
            Self::Undefined(_) => Ok(false),
            Self::Str(text) => {
                meter.step(text.as_str().len() as u64 / 64)?;
                let item = item.as_str().ok_or_else(|| {
                    let found = item.type_name();
                    let reason = "requires string as left operand, not";
                    Failure::failed(format!("'in <string>' {reason} {found}"))
                })?;
                Ok(text.as_str().contains(item))
            }
            Self::List(list) | Self::Tuple(list) => {
                for each in &list.items {
                    if each.equals(item, meter)? {
                        return Ok(true);
                    }
                }
                Ok(false)
            }
            Self::Dict(dict) => Ok(dict.entries.contains_key(&item.key()?)),
            other => {
                let name = other.type_name();
                Err(Failure::failed(format!("argument of type {name:?} is not iterable")))
            }
        }
    }
}

//! Attributes, subscripts and slices, as Python finds them.

use std::rc::Rc;

use super::error::{Failure, Outcome};
use super::limits::Meter;
use super::names;
use super::text::{Builder, Text};
use super::value::{Key, Loop, Value, list, tuple};

/// `value[key]`; `None` if there is no such item.
pub(super) fn item(value: &Value, key: &Value) -> Outcome<Option<Value>> {
    let index = |length: usize| {
        let index = key.as_int()?;
        let index = if index < 0 { index + length as i128 } else { index };
        usize::try_from(index).ok().filter(|index| *index < length)
    };
    Ok(match value {
        Value::List(list) | Value::Tuple(list) => {
            index(list.items.len()).map(|index| list.items[index].clone())
        }
        Value::Dict(dict) => match key.key() {
            Ok(key) => dict.entries.get(&key).map(|entry| entry.1.clone()),
            Err(_) => None,
        },
        Value::Str(text) if key.as_int().is_some() => {
            text.meter().scan(text.as_str().len())?;
            let characters = text.as_str().chars().count();
            match index(characters) {
                Some(index) => Some(Value::Str(characters_of(text, index, index + 1)?)),
                None => None,
            }
        }
        Value::Undefined(reason) => return Err(Failure::failed(&**reason)),
        _ => None,
    })
}

/// The characters from `start` to `end`.
fn characters_of(text: &Text, start: usize, end: usize) -> Outcome<Text> {
    let string = text.as_str();
    if string.is_ascii() {
        return text.slice(start.min(string.len())..end.min(string.len()));
    }
    let mut offsets = string.char_indices().map(|it| it.0).chain([string.len()]);
    let first = offsets.nth(start).unwrap_or(string.len());
    let last = match end - start {
        0 => first,
        more => offsets.nth(more - 1).unwrap_or(string.len()),
    };
    text.slice(first..last)
}

/// `value[start:stop:step]`
pub(super) fn slice(meter: &Rc<Meter>, value: &Value, parts: [Value; 3]) -> Outcome<Value> {
    let number = |part: &Value| match part {
        Value::None => Ok(None),
        other => other.as_int().map(Some).ok_or_else(|| {
            let found = other.type_name();
            Failure::failed(format!("slice indices must be integers or None, not {found:?}"))
        }),
    };
    let [start, stop, step] = [number(&parts[0])?, number(&parts[1])?, number(&parts[2])?];
    let step = step.unwrap_or(1);
    if step == 0 {
        return Err(Failure::failed("slice step cannot be zero"));
    }
    let length = match value {
        Value::List(_) | Value::Tuple(_) | Value::Str(_) => value.length()? as i128,
        Value::Undefined(reason) => return Err(Failure::failed(&**reason)),
        other => {
            let found = other.type_name();
            return Err(Failure::failed(format!("{found:?} object cannot be sliced")));
        }
    };
    let (low, high) = if step > 0 { (0, length) } else { (-1, length - 1) };
    let bound = |part: Option<i128>, default: i128| match part {
        None => default,
        Some(index) if index < 0 => (index.saturating_add(length)).max(low),
        Some(index) => index.min(high),
    };
    let (first, last) = if step > 0 { (low, high) } else { (high, low) };
    let (start, stop) = (bound(start, first), bound(stop, last));
    if let Value::Str(text) = value
        && step == 1
    {
        let (start, stop) = (start as usize, stop.max(start) as usize);
        return Ok(Value::Str(characters_of(text, start, stop)?));
    }
    let mut indices = Vec::new();
    let mut at = start;
    while if step > 0 { at < stop } else { at > stop } {
        indices.push(at as usize);
        at = at.saturating_add(step);
    }
    meter.step(indices.len() as u64 / 8)?;
    match value {
        Value::List(items) => {
            list(meter, indices.iter().map(|at| items.items[*at].clone()).collect())
        }
        Value::Tuple(items) => {
            tuple(meter, indices.iter().map(|at| items.items[*at].clone()).collect())
        }
        Value::Str(text) => {
            meter.foresee(text.as_str().len().saturating_mul(4))?;
            let characters: Vec<(usize, char)> = text.as_str().char_indices().collect();
            let mut out = Builder::new(meter);
            for index in indices {
                let (at, character) = characters[index];
                out.push(character.encode_utf8(&mut [0; 4]), text.is_typed(at))?;
            }
            Ok(Value::Str(out.finish()))
        }
        _ => Ok(Value::None),
    }
}

/// `value.name`: a method or a field; `None` if there is neither. A dictionary's method hides its
/// entry of the same name, as in Python.
pub(super) fn attribute(value: &Value, name: &str) -> Outcome<Option<Value>> {
    if let Value::Undefined(reason) = value {
        return Err(Failure::failed(&**reason));
    }
    if names::is_method(value, name) {
        return Ok(Some(Value::Method(Rc::new((value.clone(), name.to_owned())))));
    }
    Ok(match value {
        Value::Dict(dict) => dict.entries.get(&Key::Str(name.to_owned())).map(|it| it.1.clone()),
        Value::Namespace(space) => space.fields.borrow().get(name).cloned(),
        Value::Loop(state) => loop_field(state, name),
        Value::Cycler(cycler) if name == "current" => {
            cycler.items.get(*cycler.at.borrow()).cloned()
        }
        _ => None,
    })
}

fn loop_field(state: &Loop, name: &str) -> Option<Value> {
    let (index, length) = (state.index, state.items.len());
    let number = |value: usize| Value::Int(value as i128);
    let neighbour = |index: Option<usize>, reason: &str| {
        let found = index.and_then(|index| state.items.get(index)).cloned();
        found.unwrap_or_else(|| Value::undefined(reason))
    };
    Some(match name {
        "index" => number(index + 1),
        "index0" => number(index),
        "revindex" => number(length - index),
        "revindex0" => number(length - index - 1),
        "first" => Value::Bool(index == 0),
        "last" => Value::Bool(index + 1 == length),
        "length" => number(length),
        "depth" => number(state.depth + 1),
        "depth0" => number(state.depth),
        "previtem" => neighbour(index.checked_sub(1), "there is no previous item"),
        "nextitem" => neighbour(Some(index + 1), "there is no next item"),
        _ => return None,
    })
}

/// `value.name`
pub(super) fn member(value: &Value, name: &str) -> Outcome<Value> {
    Ok(attribute(value, name)?.unwrap_or_else(|| {
        Value::undefined(match name.starts_with("__") {
            true => format!("access to attribute {name:?} is unsafe"),
            false => format!("'{} object' has no attribute {name:?}", value.type_name()),
        })
    }))
}

/// `value[key]`
pub(super) fn subscript(value: &Value, key: &Value) -> Outcome<Value> {
    if let Some(found) = item(value, key)? {
        return Ok(found);
    }
    match key.as_str() {
        Some(name) => member(value, name),
        None => Ok(Value::undefined(format!("'{} object' has no such item", value.type_name()))),
    }
}

//! Tests: what follows `is`.

use std::rc::Rc;

use super::arguments::Given;
use super::ast::Comparison;
use super::error::{Failure, Outcome};
use super::limits::Meter;
use super::names;
use super::operators::compare;
use super::value::Value;

/// The comparison that a test is.
fn comparison(name: &str) -> Option<Comparison> {
    match name {
        "eq" | "equalto" | "==" => Some(Comparison::Equal),
        "ne" | "!=" => Some(Comparison::NotEqual),
        "lt" | "lessthan" | "<" => Some(Comparison::Less),
        "le" | "<=" => Some(Comparison::LessEqual),
        "gt" | "greaterthan" | ">" => Some(Comparison::Greater),
        "ge" | ">=" => Some(Comparison::GreaterEqual),
        "in" => Some(Comparison::In),
        _ => None,
    }
}

/// Whether the test `name` holds.
pub(super) fn holds(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<bool> {
    let other = || {
        let [other] = given.bind(name, ["other"])?;
        other.ok_or_else(|| Failure::failed(format!("the test {name:?} needs an argument")))
    };
    if let Some(comparison) = comparison(name) {
        return compare(meter, comparison, value, &other()?);
    }
    let remainder = |by: i128| {
        let reason = || Failure::failed(format!("the test {name:?} needs an integer"));
        match value {
            Value::Undefined(reason) => Err(Failure::failed(&**reason)),
            value => value.as_int().map(|value| value.rem_euclid(by)).ok_or_else(reason),
        }
    };
    let text = || super::write::to_text(value, meter);
    Ok(match name {
        "defined" => !matches!(value, Value::Undefined(_)),
        "undefined" => matches!(value, Value::Undefined(_)),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => value.is_number(),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "sequence" => matches!(
            value,
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Undefined(_)
        ),
        "iterable" => matches!(
            value,
            Value::Str(_) | Value::List(_) | Value::Tuple(_) | Value::Dict(_) | Value::Undefined(_)
        ),
        "callable" => matches!(
            value,
            Value::Macro(_)
                | Value::Function(_)
                | Value::Method(_)
                | Value::Loop(_)
                | Value::Joiner(_)
                | Value::Undefined(_)
        ),
        "escaped" => matches!(value, Value::Str(text) if text.is_safe()),
        "even" => remainder(2)? == 0,
        "odd" => remainder(2)? == 1,
        "divisibleby" => match other()?.as_int() {
            Some(0) | None => return Err(Failure::failed("divisibleby needs a number, not 0")),
            Some(by) => remainder(by)? == 0,
        },
        "lower" => super::methods::is_lower(text()?.as_str()),
        "upper" => super::methods::is_upper(text()?.as_str()),
        "sameas" => match (value, &other()?) {
            (Value::Undefined(value), Value::Undefined(other)) => Rc::ptr_eq(value, other),
            (Value::Dict(value), Value::Dict(other)) => Rc::ptr_eq(value, other),
            (Value::List(value), Value::List(other))
            | (Value::Tuple(value), Value::Tuple(other)) => Rc::ptr_eq(value, other),
            (value, other) if value.type_name() != other.type_name() => false,
            (value, other) => value.equals(other, meter)?,
        },
        "filter" => names::is_filter(text()?.as_str()),
        "test" => names::is_test(text()?.as_str()),
        _ => return Err(Failure::failed(format!("no test named {name:?}"))),
    })
}

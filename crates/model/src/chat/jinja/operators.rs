//! Arithmetic, comparison, subscripts and slices, as Python does them.

use std::cmp::Ordering;
use std::rc::Rc;

use super::ast::{Comparison, Operator};
use super::error::{Failure, Outcome};
use super::format::percent;
use super::limits::Meter;
use super::text::{Builder, Text};
use super::value::{Value, list, tuple};

pub(super) fn compare(
    meter: &Meter,
    comparison: Comparison,
    left: &Value,
    right: &Value,
) -> Outcome<bool> {
    let order = |operator, holds: fn(Ordering) -> bool| {
        Ok(left.order(right, operator, meter)?.is_some_and(holds))
    };
    match comparison {
        Comparison::Equal => left.equals(right, meter),
        Comparison::NotEqual => Ok(!left.equals(right, meter)?),
        Comparison::Less => order("<", Ordering::is_lt),
        Comparison::LessEqual => order("<=", Ordering::is_le),
        Comparison::Greater => order(">", Ordering::is_gt),
        Comparison::GreaterEqual => order(">=", Ordering::is_ge),
        Comparison::In => right.contains(left, meter),
        Comparison::NotIn => Ok(!right.contains(left, meter)?),
    }
}

/// The sign that stands for an operator.
fn sign(operator: Operator) -> &'static str {
    match operator {
        Operator::Add => "+",
        Operator::Subtract => "-",
        Operator::Multiply => "*",
        Operator::Divide => "/",
        Operator::FloorDivide => "//",
        Operator::Remainder => "%",
        Operator::Power => "**",
    }
}

pub(super) fn arithmetic(
    meter: &Rc<Meter>,
    operator: Operator,
    left: &Value,
    right: &Value,
) -> Outcome<Value> {
    match (operator, left, right) {
        (Operator::Add, Value::Str(left), Value::Str(right)) => add_texts(left, right),
        (Operator::Add, Value::List(left), Value::List(right)) => {
            list(meter, joined(meter, &left.items, &right.items)?)
        }
        (Operator::Add, Value::Tuple(left), Value::Tuple(right)) => {
            tuple(meter, joined(meter, &left.items, &right.items)?)
        }
        (Operator::Remainder, Value::Str(format), _) => Ok(Value::Str(percent(format, right)?)),
        (Operator::Multiply, Value::Str(text), times)
        | (Operator::Multiply, times, Value::Str(text))
            if times.as_int().is_some() =>
        {
            Ok(Value::Str(text.repeat(count(times))?))
        }
        (Operator::Multiply, Value::List(items), times)
        | (Operator::Multiply, times, Value::List(items))
            if times.as_int().is_some() =>
        {
            list(meter, repeated(meter, &items.items, count(times))?)
        }
        (Operator::Multiply, Value::Tuple(items), times)
        | (Operator::Multiply, times, Value::Tuple(items))
            if times.as_int().is_some() =>
        {
            tuple(meter, repeated(meter, &items.items, count(times))?)
        }
        (_, Value::Undefined(reason), _) | (_, _, Value::Undefined(reason)) => {
            Err(Failure::failed(&**reason))
        }
        _ => numbers(operator, left, right),
    }
}

fn count(times: &Value) -> usize {
    usize::try_from(times.as_int().unwrap_or_default().max(0)).unwrap_or(usize::MAX)
}

fn joined(meter: &Meter, left: &[Value], right: &[Value]) -> Outcome<Vec<Value>> {
    meter.step((left.len() + right.len()) as u64 / 8)?;
    Ok([left, right].concat())
}

fn repeated(meter: &Meter, items: &[Value], times: usize) -> Outcome<Vec<Value>> {
    meter.foresee(items.len().saturating_mul(times).saturating_mul(size_of::<Value>()))?;
    meter.step(items.len().saturating_mul(times) as u64 / 8)?;
    Ok(std::iter::repeat_n(items, times).flatten().cloned().collect())
}

/// Markup that is added to text escapes it.
fn add_texts(left: &Text, right: &Text) -> Outcome<Value> {
    let mut out = Builder::new(left.meter());
    out.safe = left.is_safe() || right.is_safe();
    for text in [left, right] {
        match out.safe && !text.is_safe() {
            true => out.push_text(&escape(text)?)?,
            false => out.push_text(text)?,
        }
    }
    Ok(Value::Str(out.finish()))
}

/// Escaped for HTML, and marked so.
pub(super) fn escape(text: &Text) -> Outcome<Text> {
    if text.is_safe() {
        return Ok(text.clone());
    }
    let escaped = text.map(|character, out| match character {
        '&' => out.push_str("&amp;"),
        '<' => out.push_str("&lt;"),
        '>' => out.push_str("&gt;"),
        '\'' => out.push_str("&#39;"),
        '"' => out.push_str("&#34;"),
        other => out.push(other),
    })?;
    escaped.with_safe(true)
}

fn numbers(operator: Operator, left: &Value, right: &Value) -> Outcome<Value> {
    let unsupported = || {
        let (left, right) = (left.type_name(), right.type_name());
        let sign = sign(operator);
        let reason = format!("unsupported operand type(s) for {sign}: {left:?} and {right:?}");
        Failure::failed(reason)
    };
    let zero = || Failure::failed("division by zero");
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        if b == 0
            && matches!(operator, Operator::Divide | Operator::FloorDivide | Operator::Remainder)
        {
            return Err(zero());
        }
        let result = match operator {
            Operator::Add => a.checked_add(b),
            Operator::Subtract => a.checked_sub(b),
            Operator::Multiply => a.checked_mul(b),
            Operator::Divide => return Ok(Value::Float(a as f64 / b as f64)),
            Operator::FloorDivide => floor_divide(a, b),
            Operator::Remainder => a
                .checked_rem(b)
                .map(|rest| if rest != 0 && (rest < 0) != (b < 0) { rest + b } else { rest }),
            Operator::Power if b < 0 && a == 0 => return Err(zero()),
            Operator::Power if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
            Operator::Power => match a {
                0 | 1 => Some(if b == 0 { 1 } else { a }),
                -1 => Some(if b % 2 == 0 { 1 } else { -1 }),
                _ => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
            },
        };
        return result.map(Value::Int).ok_or_else(|| Failure::limit("bits of an integer", 127));
    }
    if !left.is_number() || !right.is_number() {
        return Err(unsupported());
    }
    let (a, b) = (left.as_float().unwrap_or_default(), right.as_float().unwrap_or_default());
    let floor = |a: f64, b: f64| ((a - remainder(a, b)) / b).round();
    Ok(Value::Float(match operator {
        Operator::Add => a + b,
        Operator::Subtract => a - b,
        Operator::Multiply => a * b,
        Operator::Divide | Operator::FloorDivide | Operator::Remainder if b == 0.0 => {
            return Err(zero());
        }
        Operator::Divide => a / b,
        Operator::FloorDivide => floor(a, b),
        Operator::Remainder => remainder(a, b),
        Operator::Power => a.powf(b),
    }))
}

fn floor_divide(a: i128, b: i128) -> Option<i128> {
    let quotient = a.checked_div(b)?;
    Some(if a % b != 0 && (a < 0) != (b < 0) { quotient - 1 } else { quotient })
}

/// The remainder with the sign of `b`.
fn remainder(a: f64, b: f64) -> f64 {
    let rest = a % b;
    if rest != 0.0 && (rest < 0.0) != (b < 0.0) { rest + b } else { rest }
}

pub(super) fn negative(value: &Value) -> Outcome<Value> {
    match value {
        Value::Float(value) => Ok(Value::Float(-value)),
        Value::Undefined(reason) => Err(Failure::failed(&**reason)),
        other => {
            let integer = other.as_int().and_then(i128::checked_neg);
            let name = other.type_name();
            let reason = || Failure::failed(format!("bad operand type for unary -: {name:?}"));
            integer.map(Value::Int).ok_or_else(reason)
        }
    }
}

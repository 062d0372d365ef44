//! Filters: what follows `|`. Those of Jinja's documentation, and transformers' own `tojson`.

use std::cmp::Ordering;
use std::rc::Rc;

use super::access::{member, subscript};
use super::arguments::Given;
use super::error::{Failure, Outcome};
use super::limits::Meter;
use super::methods::{self, lines, strip};
use super::names;
use super::operators::{arithmetic, escape};
use super::text::{Builder, Text};
use super::value::{Value, dict, list, tuple};
use super::write::{JsonStyle, json, repr, to_text};
use super::{ast, html, predicates};

pub(super) fn apply(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    if let Value::Str(text) = value {
        meter.scan(text.as_str().len())?;
    }
    match name {
        "map" | "select" | "reject" | "selectattr" | "rejectattr" => {
            chosen(meter, name, value, given)
        }
        "batch" | "slice" | "first" | "last" | "list" | "join" | "sum" | "max" | "min" | "sort"
        | "unique" | "groupby" | "dictsort" | "items" | "reverse" | "length" | "count" => {
            of_items(meter, name, value, given)
        }
        "abs" | "float" | "int" | "round" | "filesizeformat" => {
            of_numbers(meter, name, value, given)
        }
        "d" | "default" => {
            let [other, falsy] = given.bind(name, ["default_value", "boolean"])?;
            let falsy = falsy.is_some_and(|falsy| falsy.is_true());
            let missing = matches!(value, Value::Undefined(_)) || (falsy && !value.is_true());
            match (missing, other) {
                (false, _) => Ok(value.clone()),
                (true, Some(other)) => Ok(other),
                (true, None) => Ok(Value::Str(Text::literal(meter, "")?)),
            }
        }
        "attr" => {
            let [field] = given.bind(name, ["name"])?;
            let field = field.ok_or_else(|| lacks(name))?;
            let field = to_text(&field, meter)?;
            // Unlike a subscript, this sees no entries of dictionaries.
            match value {
                Value::Dict(_) if !names::is_method(value, field.as_str()) => {
                    Ok(Value::undefined(format!("no attribute {:?}", field.as_str())))
                }
                value => member(value, field.as_str()),
            }
        }
        "tojson" => to_json(meter, value, given),
        _ => of_text(meter, name, value, given),
    }
}

fn lacks(name: &str) -> Failure {
    Failure::failed(format!("the filter {name:?} lacks an argument"))
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of transformers.
fn to_json(meter: &Rc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let names = ["ensure_ascii", "indent", "separators", "sort_keys"];
    let [ensure_ascii, indent, separators, sort_keys] = given.bind("tojson", names)?;
    let literal = |text: &str| Text::literal(meter, text);
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(indent)) => Some(indent),
        Some(other) => {
            let spaces = other.as_int().unwrap_or(0).max(0);
            Some(literal(" ")?.repeat(usize::try_from(spaces).unwrap_or(usize::MAX))?)
        }
    };
    let (mut item, mut key) = (literal(if indent.is_some() { "," } else { ", " })?, literal(": ")?);
    if let Some(separators) = separators.filter(|it| !matches!(it, Value::None)) {
        match separators.iterate(meter)?.as_slice() {
            [Value::Str(first), Value::Str(second)] => {
                (item, key) = (first.clone(), second.clone());
            }
            _ => return Err(Failure::failed("separators are two strings")),
        }
    }
    let truth = |value: Option<Value>| value.is_some_and(|value| value.is_true());
    let style = JsonStyle {
        indent,
        item_separator: item,
        key_separator: key,
        ensure_ascii: truth(ensure_ascii),
        sort_keys: truth(sort_keys),
    };
    let mut out = Builder::new(meter);
    json(value, &style, 0, &mut out)?;
    Ok(Value::Str(out.finish()))
}

/// `value.a.b.0`, as the `attribute` of many filters says it.
fn path(value: &Value, attribute: &Value) -> Outcome<Value> {
    let Some(name) = attribute.as_str() else { return subscript(value, attribute) };
    let mut value = value.clone();
    for part in name.split('.') {
        value = match part.parse::<i128>() {
            Ok(index) => subscript(&value, &Value::Int(index))?,
            Err(_) => match value.get(part) {
                Some(found) => found.clone(),
                None => member(&value, part)?,
            },
        };
    }
    Ok(value)
}

/// Filters that run another filter or test on each item.
fn chosen(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    // As in Jinja, what is false has no items, whatever it is.
    let items = if value.is_true() { value.iterate(meter)? } else { Vec::new() };
    let mut rest = given.positional.iter().cloned();
    let mut results = Vec::new();
    if name == "map" {
        let attribute = given.named.iter().find(|it| it.0 == "attribute").map(|it| it.1.clone());
        if let Some(attribute) = attribute {
            let default = given.named.iter().find(|it| it.0 == "default").map(|it| &it.1);
            for item in &items {
                let found = path(item, &attribute)?;
                results.push(match (&found, default) {
                    (Value::Undefined(_), Some(default)) => default.clone(),
                    _ => found,
                });
            }
        } else {
            let filter = to_text(&rest.next().ok_or_else(|| lacks(name))?, meter)?;
            let inner = Given { positional: rest.collect(), named: given.named.clone() };
            for item in &items {
                meter.step(1)?;
                results.push(apply(meter, filter.as_str(), item, &inner)?);
            }
        }
        return list(meter, results);
    }
    let attribute = match name.ends_with("attr") {
        true => Some(rest.next().ok_or_else(|| lacks(name))?),
        false => None,
    };
    let test = rest.next();
    let inner = Given { positional: rest.collect(), named: given.named.clone() };
    for item in items {
        meter.step(1)?;
        let subject = match &attribute {
            Some(attribute) => path(&item, attribute)?,
            None => item.clone(),
        };
        let holds = match &test {
            Some(test) => {
                let test = to_text(test, meter)?;
                predicates::holds(meter, test.as_str(), &subject, &inner)?
            }
            None => subject.is_true(),
        };
        if holds == name.starts_with("select") {
            results.push(item);
        }
    }
    list(meter, results)
}

/// What a value is sorted and compared by: text without regard to case, unless asked.
fn sort_key(item: &Value, attribute: Option<&Value>, case_sensitive: bool) -> Outcome<Value> {
    let key = match attribute.filter(|it| !matches!(it, Value::None)) {
        Some(attribute) => match attribute.as_str().filter(|it| it.contains(',')) {
            Some(several) => {
                let mut keys = Vec::new();
                for one in several.split(',') {
                    let one = Text::literal(text_meter(attribute), one.trim())?;
                    keys.push(folded(path(item, &Value::Str(one))?, case_sensitive)?);
                }
                return list(text_meter(attribute), keys);
            }
            None => path(item, attribute)?,
        },
        None => item.clone(),
    };
    folded(key, case_sensitive)
}

fn text_meter(value: &Value) -> &Rc<Meter> {
    match value {
        Value::Str(text) => text.meter(),
        _ => unreachable!("called for strings alone"),
    }
}

fn folded(key: Value, case_sensitive: bool) -> Outcome<Value> {
    match key {
        Value::Str(text) if !case_sensitive => {
            text.map(|character, out| out.extend(character.to_lowercase())).map(Value::Str)
        }
        other => Ok(other),
    }
}

/// Items in the order of their keys. Equal ones keep their order.
fn sorted(
    meter: &Meter,
    mut items: Vec<(Value, Value)>,
    reverse: bool,
) -> Outcome<Vec<(Value, Value)>> {
    let mut failure = None;
    items.sort_by(|a, b| {
        let order = a.0.order(&b.0, "<", meter).unwrap_or_else(|error| {
            failure.get_or_insert(error);
            None
        });
        let order = order.unwrap_or(Ordering::Equal);
        if reverse { order.reverse() } else { order }
    });
    failure.map_or(Ok(items), Err)
}

fn keyed(
    items: Vec<Value>,
    attribute: Option<&Value>,
    case_sensitive: bool,
) -> Outcome<Vec<(Value, Value)>> {
    items.into_iter().map(|item| Ok((sort_key(&item, attribute, case_sensitive)?, item))).collect()
}

fn truth(value: Option<Value>) -> bool {
    value.is_some_and(|value| value.is_true())
}

/// Filters on a list and the like.
fn of_items(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let empty = || Value::undefined("the sequence is empty");
    match name {
        "length" | "count" => Ok(Value::Int(value.length()? as i128)),
        "first" => Ok(value.iterate(meter)?.first().cloned().unwrap_or_else(empty)),
        "last" => Ok(value.iterate(meter)?.last().cloned().unwrap_or_else(empty)),
        "list" => list(meter, value.iterate(meter)?),
        "items" => match value {
            Value::Undefined(_) => list(meter, Vec::new()),
            Value::Dict(_) => methods::call(meter, value, "items", &Given::default()),
            _ => Err(Failure::failed("Can only get item pairs from a mapping.")),
        },
        "reverse" => match value {
            Value::Str(text) => {
                let mut out = Builder::new(meter);
                for (at, character) in text.as_str().char_indices().rev() {
                    out.push(character.encode_utf8(&mut [0; 4]), text.is_typed(at))?;
                }
                Ok(Value::Str(out.finish()))
            }
            value => {
                let mut items = value.iterate(meter)?;
                items.reverse();
                list(meter, items)
            }
        },
        "join" => join(meter, value, given),
        "sum" => {
            let [attribute, start] = given.bind(name, ["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            for item in value.iterate(meter)? {
                let item = match attribute.as_ref().filter(|it| !matches!(it, Value::None)) {
                    Some(attribute) => path(&item, attribute)?,
                    None => item,
                };
                total = arithmetic(meter, ast::Operator::Add, &total, &item)?;
            }
            Ok(total)
        }
        "max" | "min" => {
            let [case, attribute] = given.bind(name, ["case_sensitive", "attribute"])?;
            let keyed = keyed(value.iterate(meter)?, attribute.as_ref(), truth(case))?;
            let found = sorted(meter, keyed, name == "max")?;
            Ok(found.into_iter().next().map_or_else(empty, |it| it.1))
        }
        "sort" => {
            let names = ["reverse", "case_sensitive", "attribute"];
            let [reverse, case, attribute] = given.bind(name, names)?;
            let keyed = keyed(value.iterate(meter)?, attribute.as_ref(), truth(case))?;
            let found = sorted(meter, keyed, truth(reverse))?;
            list(meter, found.into_iter().map(|it| it.1).collect())
        }
        "unique" => {
            let [case, attribute] = given.bind(name, ["case_sensitive", "attribute"])?;
            let mut seen = std::collections::HashSet::new();
            let mut items = Vec::new();
            for (key, item) in keyed(value.iterate(meter)?, attribute.as_ref(), truth(case))? {
                if seen.insert(key.key()?) {
                    items.push(item);
                }
            }
            list(meter, items)
        }
        "groupby" => group_by(meter, value, given),
        "dictsort" => dict_sort(meter, value, given),
        _ => cut(meter, name, value, given),
    }
}

fn join(meter: &Rc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let [separator, attribute] = given.bind("join", ["d", "attribute"])?;
    let separator = match separator {
        Some(separator) => to_text(&separator, meter)?,
        None => Text::literal(meter, "")?,
    };
    let mut out = Builder::new(meter);
    for (index, item) in value.iterate(meter)?.iter().enumerate() {
        if index > 0 {
            out.push_text(&separator)?;
        }
        let item = match attribute.as_ref().filter(|it| !matches!(it, Value::None)) {
            Some(attribute) => path(item, attribute)?,
            None => item.clone(),
        };
        super::write::print(&item, &mut out)?;
    }
    Ok(Value::Str(out.finish()))
}

fn group_by(meter: &Rc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let names = ["attribute", "default", "case_sensitive"];
    let [attribute, default, case] = given.bind("groupby", names)?;
    let (attribute, case) = (attribute.ok_or_else(|| lacks("groupby"))?, truth(case));
    let mut keyed = Vec::new();
    for item in value.iterate(meter)? {
        let found = path(&item, &attribute)?;
        let found = match (&found, &default) {
            (Value::Undefined(_), Some(default)) => default.clone(),
            _ => found,
        };
        keyed.push((folded(found.clone(), case)?, tuple(meter, vec![found, item])?));
    }
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for (key, pair) in sorted(meter, keyed, false)? {
        let pair = pair.iterate(meter)?;
        match groups.last_mut() {
            Some(last) if last.0.equals(&key, meter)? => last.2.push(pair[1].clone()),
            _ => groups.push((key, pair[0].clone(), vec![pair[1].clone()])),
        }
    }
    let groups = groups.into_iter().map(|(_, name, items)| {
        // Jinja's pairs have names, which a dictionary that is unpacked as a tuple cannot have.
        tuple(meter, vec![name, list(meter, items)?])
    });
    list(meter, groups.collect::<Outcome<_>>()?)
}

fn dict_sort(meter: &Rc<Meter>, value: &Value, given: &Given) -> Outcome<Value> {
    let [case, by, reverse] = given.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let Value::Dict(fields) = value else {
        return Err(Failure::failed("dictsort needs a mapping"));
    };
    let by_value = match by.as_ref().map(|by| by.as_str()) {
        None | Some(Some("key")) => false,
        Some(Some("value")) => true,
        _ => return Err(Failure::failed("You can only sort by either \"key\" or \"value\"")),
    };
    let case = truth(case);
    let mut keyed = Vec::new();
    for (key, value) in fields.entries.values() {
        let by = if by_value { value } else { key };
        let pair = tuple(meter, vec![key.clone(), value.clone()])?;
        keyed.push((folded(by.clone(), case)?, pair));
    }
    let found = sorted(meter, keyed, truth(reverse))?;
    list(meter, found.into_iter().map(|it| it.1).collect())
}

/// `batch` and `slice`: a list of lists.
fn cut(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let [count, fill] = given.bind(name, ["count", "fill_with"])?;
    let count = count.and_then(|count| count.as_int()).filter(|count| *count > 0);
    let count = count.ok_or_else(|| lacks(name))?;
    let count = usize::try_from(count).unwrap_or(usize::MAX);
    let fill = fill.filter(|fill| !matches!(fill, Value::None));
    let items = value.iterate(meter)?;
    meter.foresee(count.saturating_mul(if name == "slice" || fill.is_some() { 64 } else { 0 }))?;
    let mut lists: Vec<Vec<Value>> = Vec::new();
    if name == "batch" {
        lists.extend(items.chunks(count).map(<[Value]>::to_vec));
        if let (Some(last), Some(fill)) = (lists.last_mut(), fill) {
            last.resize(count, fill);
        }
    } else {
        let (each, extra) = (items.len() / count, items.len() % count);
        let mut start = 0;
        for index in 0..count {
            let end = start + each + usize::from(index < extra);
            let mut part = items[start..end].to_vec();
            if index >= extra {
                part.extend(fill.clone().filter(|_| extra > 0));
            }
            lists.push(part);
            start = end;
        }
    }
    let lists = lists.into_iter().map(|items| list(meter, items));
    list(meter, lists.collect::<Outcome<_>>()?)
}

/// Python's `float(text)`.
fn parse_float(text: &str) -> Option<f64> {
    let text = text.trim_matches(methods::is_space);
    let plain = text.trim_start_matches(['+', '-']).to_lowercase();
    let named = matches!(plain.as_str(), "inf" | "infinity" | "nan");
    let digits = plain.starts_with(|c: char| c.is_ascii_digit() || c == '.');
    if !(named || digits) || text.starts_with('_') || text.ends_with('_') || text.contains("__") {
        return None;
    }
    text.replace('_', "").parse().ok()
}

/// Python's `int(text, base)`.
fn parse_int(text: &str, base: u32) -> Option<i128> {
    let text = text.trim_matches(methods::is_space);
    let (sign, digits) = match text.strip_prefix(['-', '+']) {
        Some(digits) => (&text[..1], digits),
        None => ("", text),
    };
    let lower = digits.to_lowercase();
    let mark = match base {
        16 => "0x",
        8 => "0o",
        2 => "0b",
        _ => "",
    };
    let digits = lower.strip_prefix(mark).unwrap_or(&lower);
    if digits.is_empty() || digits.starts_with(['+', '-', '_']) || digits.ends_with('_') {
        return None;
    }
    if digits.contains("__") {
        return None;
    }
    i128::from_str_radix(&format!("{sign}{}", digits.replace('_', "")), base).ok()
}

/// Filters on a number.
fn of_numbers(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    if let Value::Undefined(reason) = value {
        return Err(Failure::failed(&**reason));
    }
    let truncated = |float: f64| (float.abs() < 1e38).then_some(float as i128);
    match name {
        "abs" => match value {
            Value::Float(value) => Ok(Value::Float(value.abs())),
            value => {
                let value = value.as_int().and_then(i128::checked_abs);
                value.map(Value::Int).ok_or_else(|| Failure::failed("abs() needs a number"))
            }
        },
        "float" => {
            let [default] = given.bind(name, ["default"])?;
            let found = match value {
                Value::Str(text) => parse_float(text.as_str()),
                value => value.as_float(),
            };
            Ok(found.map(Value::Float).or(default).unwrap_or(Value::Float(0.0)))
        }
        "int" => {
            let [default, base] = given.bind(name, ["default", "base"])?;
            let base = base.and_then(|base| base.as_int()).unwrap_or(10);
            let base = u32::try_from(base).ok().filter(|base| (2..=36).contains(base));
            let base = base.ok_or_else(|| Failure::failed("int() base must be 2 to 36"))?;
            let found = match value {
                Value::Str(text) => parse_int(text.as_str(), base)
                    .or_else(|| parse_float(text.as_str()).and_then(truncated)),
                Value::Float(float) => truncated(*float),
                value => value.as_int(),
            };
            Ok(found.map(Value::Int).or(default).unwrap_or(Value::Int(0)))
        }
        "round" => round(name, value, given),
        _ => {
            let [binary] = given.bind(name, ["binary"])?;
            let bytes = match value {
                Value::Str(text) => parse_float(text.as_str()),
                value => value.as_float(),
            };
            let bytes = bytes.ok_or_else(|| Failure::failed("filesizeformat needs a number"))?;
            Ok(Value::Str(Text::literal(meter, &file_size(bytes, truth(binary)))?))
        }
    }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let base = if binary { 1024.0_f64 } else { 1000.0 };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes.trunc());
    }
    let letters = ["k", "M", "G", "T", "P", "E", "Z", "Y"];
    let last = letters.len() - 1;
    let index = (0..last).find(|index| bytes < base.powi(*index as i32 + 2)).unwrap_or(last);
    let size = bytes / base.powi(index as i32 + 1);
    match binary {
        true => format!("{size:.1} {}iB", letters[index].to_uppercase()),
        false => format!("{size:.1} {}B", letters[index]),
    }
}

fn round(name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let [precision, method] = given.bind(name, ["precision", "method"])?;
    let precision = precision.and_then(|it| it.as_int()).unwrap_or(0).clamp(-300, 300) as i32;
    let method = method.as_ref().and_then(Value::as_str).unwrap_or("common");
    let float = value.as_float().ok_or_else(|| Failure::failed("round() needs a number"))?;
    let scale = 10_f64.powi(precision);
    Ok(match method {
        // Python rounds halves of the decimal value to even.
        "common" => {
            if let Value::Int(value) = value {
                return Ok(Value::Int(round_integer(*value, precision)));
            }
            let digits = precision.max(0) as usize;
            let text = match precision < 0 {
                true => ((float * scale).round_ties_even() / scale).to_string(),
                false => format!("{float:.digits$}"),
            };
            Value::Float(text.parse().unwrap_or(float))
        }
        "ceil" => Value::Float((float * scale).ceil() / scale),
        "floor" => Value::Float((float * scale).floor() / scale),
        _ => return Err(Failure::failed("method must be common, ceil or floor")),
    })
}

fn round_integer(value: i128, precision: i32) -> i128 {
    let Some(scale) = u32::try_from(-precision).ok().and_then(|it| 10_i128.checked_pow(it)) else {
        return if precision < 0 { 0 } else { value };
    };
    let (down, rest) = (value.div_euclid(scale), value.rem_euclid(scale));
    let up = rest * 2 > scale || (rest * 2 == scale && down % 2 != 0);
    (down + i128::from(up)) * scale
}

/// Filters on text.
fn of_text(meter: &Rc<Meter>, name: &str, value: &Value, given: &Given) -> Outcome<Value> {
    let text = to_text(value, meter)?;
    match name {
        "string" => Ok(Value::Str(text)),
        "lower" | "upper" | "capitalize" => methods::call(meter, &Value::Str(text), name, given),
        "center" => {
            let width = Value::Int(80);
            let [given_width] = given.bind(name, ["width"])?;
            let given = Given { positional: vec![given_width.unwrap_or(width)], named: vec![] };
            methods::call(meter, &Value::Str(text), name, &given)
        }
        "trim" => {
            let [characters] = given.bind(name, ["chars"])?;
            let characters = characters.filter(|it| !matches!(it, Value::None));
            strip(&text, "strip", characters.as_ref()).map(Value::Str)
        }
        "replace" => {
            let [old, new, count] = given.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else { return Err(lacks(name)) };
            let (old, new) = (to_text(&old, meter)?, to_text(&new, meter)?);
            let most = count.and_then(|count| count.as_int()).unwrap_or(-1);
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            text.replace(old.as_str(), &new, most).map(Value::Str)
        }
        "format" => {
            let arguments = match given.named.is_empty() {
                true => tuple(meter, given.positional.clone())?,
                false => {
                    let pairs = given.named.iter().map(|(name, value)| {
                        Ok((Value::Str(Text::literal(meter, name)?), value.clone()))
                    });
                    dict(meter, pairs.collect::<Outcome<Vec<_>>>()?)?
                }
            };
            super::format::percent(&text, &arguments).map(Value::Str)
        }
        "safe" => text.with_safe(true).map(Value::Str),
        "e" | "escape" => escape(&text).map(Value::Str),
        "forceescape" => escape(&text.with_safe(false)?).map(Value::Str),
        "indent" => indent(&text, given).map(Value::Str),
        "title" => title(&text).map(Value::Str),
        "truncate" => truncate(&text, given).map(Value::Str),
        "wordcount" => {
            let word = |c: &char| c.is_alphanumeric() || *c == '_';
            let words = text.as_str().split(|c: char| !word(&c)).filter(|it| !it.is_empty());
            Ok(Value::Int(words.count() as i128))
        }
        "pprint" => {
            let mut out = Builder::new(meter);
            repr(value, &mut out)?;
            if out.as_str().chars().count() > 80 {
                return Err(Failure::failed(
                    "pprint of values longer than a line is not supported",
                ));
            }
            Ok(Value::Str(out.finish()))
        }
        "wordwrap" => html::word_wrap(&text, given).map(Value::Str),
        "striptags" => html::strip_tags(&text).map(Value::Str),
        "urlencode" => html::url_encode(value, meter).map(Value::Str),
        "xmlattr" => html::attributes(value, given, meter).map(Value::Str),
        _ => Err(Failure::failed(format!("no filter named {name:?}"))),
    }
}

/// Every line but the first (and empty ones) begins with `width` spaces or text.
fn indent(text: &Text, given: &Given) -> Outcome<Text> {
    let [width, first, blank] = given.bind("indent", ["width", "first", "blank"])?;
    let meter = text.meter();
    let (first, blank) = (truth(first), truth(blank));
    let indention = match width {
        Some(Value::Str(width)) => width,
        width => {
            let width = width.and_then(|width| width.as_int()).unwrap_or(4).max(0);
            Text::literal(meter, " ")?.repeat(usize::try_from(width).unwrap_or(usize::MAX))?
        }
    };
    let mut out = Builder::new(meter);
    out.safe = text.is_safe();
    // Jinja adds a newline first, so that the last one of the text stays.
    let string = text.as_str();
    let all = lines(text, false)?;
    let ended = string.is_empty()
        || string.ends_with(|c: char| {
            matches!(
                c,
                '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                    ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
            )
        });
    let count = all.len() + usize::from(ended);
    for index in 0..count {
        let line = all.get(index).and_then(|line| match line {
            Value::Str(line) => Some(line),
            _ => None,
        });
        if index > 0 {
            out.push("\n", false)?;
        }
        let empty = line.is_none_or(|line| line.as_str().is_empty());
        if if index == 0 { first } else { blank || !empty } {
            out.push_text(&indention)?;
        }
        if let Some(line) = line {
            out.push_text(line)?;
        }
    }
    Ok(out.finish())
}

/// Words begin upper case, whatever quotes are inside.
fn title(text: &Text) -> Outcome<Text> {
    let inside = std::cell::Cell::new(false);
    text.map(|character, out| {
        let separates =
            methods::is_space(character) || matches!(character, '-' | '(' | '{' | '[' | '<');
        if separates {
            inside.set(false);
            out.push(character);
        } else if inside.replace(true) {
            out.extend(character.to_lowercase());
        } else {
            out.extend(character.to_uppercase());
        }
    })
}

fn truncate(text: &Text, given: &Given) -> Outcome<Text> {
    let names = ["length", "killwords", "end", "leeway"];
    let [length, kill, end, leeway] = given.bind("truncate", names)?;
    let number = |value: Option<Value>, default: i128| {
        value.and_then(|value| value.as_int()).unwrap_or(default)
    };
    let (length, leeway) = (number(length, 255), number(leeway, 5));
    let end = match end {
        Some(end) => to_text(&end, text.meter())?,
        None => Text::literal(text.meter(), "...")?,
    };
    let end_length = end.as_str().chars().count() as i128;
    if length < end_length || leeway < 0 {
        return Err(Failure::failed("truncate: the length is below that of the end"));
    }
    let string = text.as_str();
    if string.chars().count() as i128 <= length + leeway {
        return Ok(text.clone());
    }
    let keep = (length - end_length) as usize;
    let mut cut = string.char_indices().nth(keep).map_or(string.len(), |it| it.0);
    if !truth(kill) {
        cut = string[..cut].rfind(' ').unwrap_or(cut);
    }
    let mut out = Builder::new(text.meter());
    out.push_slice(text, 0..cut)?;
    out.push_text(&end)?;
    Ok(out.finish())
}

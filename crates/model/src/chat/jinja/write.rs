//! Values as text: Python's `str`, `repr` and `json.dumps`.

use std::fmt::Write as _;
use std::rc::Rc;

use super::error::{Failure, Outcome};
use super::text::{Builder, Text};
use super::value::Value;

/// Python's `str()` of `value`, appended.
pub(super) fn print(value: &Value, out: &mut Builder) -> Outcome<()> {
    match value {
        Value::Undefined(_) => Ok(()),
        Value::Str(text) => out.push_text(text),
        other => repr(other, out),
    }
}

/// Python's `str()`.
pub(super) fn to_text(value: &Value, meter: &Rc<super::limits::Meter>) -> Outcome<Text> {
    if let Value::Str(text) = value {
        return Ok(text.clone());
    }
    let mut out = Builder::new(meter);
    print(value, &mut out)?;
    Ok(out.finish())
}

/// Python's `repr()`, appended. Depth is bounded where values are made.
pub(super) fn repr(value: &Value, out: &mut Builder) -> Outcome<()> {
    out.meter().step(1)?;
    let items = |items: &[Value], out: &mut Builder| -> Outcome<()> {
        for (index, item) in items.iter().enumerate() {
            out.push(if index > 0 { ", " } else { "" }, false)?;
            repr(item, out)?;
        }
        Ok(())
    };
    match value {
        Value::Undefined(_) => out.push("Undefined", false),
        Value::None => out.push("None", false),
        Value::Bool(value) => out.push(if *value { "True" } else { "False" }, false),
        Value::Int(value) => out.push(&value.to_string(), false),
        Value::Float(value) => out.push(&float_repr(*value), false),
        Value::Str(text) => string_repr(text, out),
        Value::List(list) => {
            out.push("[", false)?;
            items(&list.items, out)?;
            out.push("]", false)
        }
        Value::Tuple(list) => {
            out.push("(", false)?;
            items(&list.items, out)?;
            out.push(if list.items.len() == 1 { ",)" } else { ")" }, false)
        }
        Value::Dict(dict) => {
            out.push("{", false)?;
            for (index, (key, value)) in dict.entries.values().enumerate() {
                out.push(if index > 0 { ", " } else { "" }, false)?;
                repr(key, out)?;
                out.push(": ", false)?;
                repr(value, out)?;
            }
            out.push("}", false)
        }
        Value::Namespace(space) => {
            out.push("<Namespace {", false)?;
            for (index, (name, value)) in space.fields.borrow().iter().enumerate() {
                let comma = if index > 0 { ", " } else { "" };
                out.push(&format!("{comma}'{name}': "), false)?;
                repr(value, out)?;
            }
            out.push("}>", false)
        }
        Value::Method(method) => {
            let (name, of) = (&method.1, method.0.type_name());
            out.push(&format!("<built-in method {name} of {of} object>"), false)
        }
        other => out.push(&format!("<{}>", other.type_name()), false),
    }
}

fn string_repr(text: &Text, out: &mut Builder) -> Outcome<()> {
    let string = text.as_str();
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    out.push(quote.encode_utf8(&mut [0; 4]), false)?;
    let mut buffer = String::new();
    for (at, character) in string.char_indices() {
        buffer.clear();
        match character {
            '\n' => buffer.push_str("\\n"),
            '\r' => buffer.push_str("\\r"),
            '\t' => buffer.push_str("\\t"),
            '\\' => buffer.push_str("\\\\"),
            character if character == quote => buffer.extend(['\\', character]),
            character if !is_printable(character) => {
                let code = character as u32;
                let _ = match code {
                    0..=0xff => write!(buffer, "\\x{code:02x}"),
                    0x100..=0xffff => write!(buffer, "\\u{code:04x}"),
                    _ => write!(buffer, "\\U{code:08x}"),
                };
            }
            character => buffer.push(character),
        }
        out.push(&buffer, text.is_typed(at))?;
    }
    out.push(quote.encode_utf8(&mut [0; 4]), false)
}

/// What Python prints as it is: no controls, no separators but the space, no noncharacters.
pub(super) fn is_printable(character: char) -> bool {
    let code = character as u32;
    let hidden = character.is_control()
        || (character.is_whitespace() && character != ' ')
        || matches!(code, 0xad | 0x600..=0x605 | 0x61c | 0x6dd | 0x70f | 0x180e)
        || matches!(code, 0x200b..=0x200f | 0x202a..=0x202e | 0x2060..=0x206f | 0xfeff)
        || matches!(code, 0xfff9..=0xfffb | 0xe000..=0xf8ff | 0xe0000..=0x10_ffff)
        || code & 0xfffe == 0xfffe
        || matches!(code, 0xfdd0..=0xfdef);
    !hidden
}

/// Python's `repr()` of a float: the shortest decimal that reads back as the same number, with an
/// exponent below 1e-4 and from 1e16 on.
pub(super) fn float_repr(float: f64) -> String {
    if float.is_nan() {
        return "nan".into();
    }
    if float.is_infinite() {
        return if float > 0.0 { "inf" } else { "-inf" }.into();
    }
    let scientific = format!("{float:e}");
    let exponent: i32 = scientific.split('e').nth(1).and_then(|e| e.parse().ok()).unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let mantissa = scientific.split('e').next().unwrap_or_default();
        let sign = if exponent < 0 { '-' } else { '+' };
        return format!("{mantissa}e{sign}{:02}", exponent.abs());
    }
    let plain = float.to_string();
    if plain.contains('.') { plain } else { plain + ".0" }
}

/// How `json.dumps` is asked to write.
pub(super) struct JsonStyle {
    /// What a level is indented by; `None` writes one line.
    pub(super) indent: Option<Text>,
    pub(super) item_separator: Text,
    pub(super) key_separator: Text,
    pub(super) ensure_ascii: bool,
    pub(super) sort_keys: bool,
}

/// Python's `json.dumps`, appended. Unlike Jinja's own filter it escapes nothing for HTML.
pub(super) fn json(
    value: &Value,
    style: &JsonStyle,
    depth: usize,
    out: &mut Builder,
) -> Outcome<()> {
    out.meter().step(1)?;
    match value {
        Value::None => out.push("null", false),
        Value::Bool(value) => out.push(if *value { "true" } else { "false" }, false),
        Value::Int(value) => out.push(&value.to_string(), false),
        Value::Float(value) => out.push(&json_float(*value), false),
        Value::Str(text) => json_string(text, style, out),
        Value::List(list) | Value::Tuple(list) => {
            json_items(["[", "]"], list.items.len(), style, depth, out, |index, out| {
                json(&list.items[index], style, depth + 1, out)
            })
        }
        Value::Dict(dict) => {
            let mut entries: Vec<&(Value, Value)> = dict.entries.values().collect();
            if style.sort_keys {
                sort_keys(&mut entries, out)?;
            }
            json_items(["{", "}"], entries.len(), style, depth, out, |index, out| {
                let (key, value) = entries[index];
                json_key(key, style, out)?;
                out.push_text(&style.key_separator)?;
                json(value, style, depth + 1, out)
            })
        }
        other => {
            let name = other.type_name();
            Err(Failure::failed(format!("Object of type {name} is not JSON serializable")))
        }
    }
}

fn sort_keys(entries: &mut [&(Value, Value)], out: &Builder) -> Outcome<()> {
    let mut failure = None;
    entries.sort_by(|a, b| match a.0.order(&b.0, "<", out.meter()) {
        Ok(order) => order.unwrap_or(std::cmp::Ordering::Equal),
        Err(error) => {
            failure = Some(error);
            std::cmp::Ordering::Equal
        }
    });
    failure.map_or(Ok(()), Err)
}

fn json_float(float: f64) -> String {
    match float_repr(float).as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        finite => finite.to_owned(),
    }
}

fn json_key(key: &Value, style: &JsonStyle, out: &mut Builder) -> Outcome<()> {
    let plain = match key {
        Value::Str(text) => return json_string(text, style, out),
        Value::None => "null".to_owned(),
        Value::Bool(value) => value.to_string(),
        Value::Int(value) => value.to_string(),
        Value::Float(value) => json_float(*value),
        other => {
            let name = other.type_name();
            let reason = "keys must be str, int, float, bool or None, not";
            return Err(Failure::failed(format!("{reason} {name}")));
        }
    };
    out.push(&format!("\"{plain}\""), false)
}

fn json_items(
    [open, close]: [&str; 2],
    count: usize,
    style: &JsonStyle,
    depth: usize,
    out: &mut Builder,
    mut write: impl FnMut(usize, &mut Builder) -> Outcome<()>,
) -> Outcome<()> {
    let break_line = |depth: usize, out: &mut Builder| -> Outcome<()> {
        if let Some(indent) = &style.indent {
            out.push("\n", false)?;
            for _ in 0..depth {
                out.push_text(indent)?;
            }
        }
        Ok(())
    };
    out.push(open, false)?;
    for index in 0..count {
        if index > 0 {
            out.push_text(&style.item_separator)?;
        }
        break_line(depth + 1, out)?;
        write(index, out)?;
    }
    if count > 0 {
        break_line(depth, out)?;
    }
    out.push(close, false)
}

fn json_string(text: &Text, style: &JsonStyle, out: &mut Builder) -> Outcome<()> {
    out.push("\"", false)?;
    let mut buffer = String::new();
    for (at, character) in text.as_str().char_indices() {
        buffer.clear();
        match character {
            '"' => buffer.push_str("\\\""),
            '\\' => buffer.push_str("\\\\"),
            '\n' => buffer.push_str("\\n"),
            '\r' => buffer.push_str("\\r"),
            '\t' => buffer.push_str("\\t"),
            '\u{8}' => buffer.push_str("\\b"),
            '\u{c}' => buffer.push_str("\\f"),
            character
                if character < ' '
                    || (style.ensure_ascii && (!character.is_ascii() || character == '\u{7f}')) =>
            {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(buffer, "\\u{unit:04x}");
                }
            }
            character => buffer.push(character),
        }
        out.push(&buffer, text.is_typed(at))?;
    }
    out.push("\"", false)
}

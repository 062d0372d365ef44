//! What chat templates take for granted because they run under Python.

use std::borrow::Cow;
use std::fmt::Write as _;

use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Environment, Error, ErrorKind, Output, State, Value};
use minijinja_contrib::pycompat::unknown_method_callback;

use super::clock::strftime_now;

/// What a template said when it refused a conversation.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Refusal(pub(super) String);

/// Adds the globals, filters, tests and methods that templates expect.
pub(super) fn install(environment: &mut Environment<'static>) {
    environment.set_unknown_method_callback(method);
    environment.set_formatter(format);
    environment.add_filter("tojson", to_json);
    environment.add_filter("string", |value: &Value| text_of(value));
    environment.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::String | ValueKind::Map)
    });
    environment.add_test("iterable", |value: &Value| {
        use ValueKind::{Iterable, Map, Seq, String, Undefined};
        matches!(value.kind(), Iterable | Map | Seq | String | Undefined)
    });
    environment.add_function("strftime_now", |format: &str| strftime_now(format));
    environment.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        let refusal = Refusal(message.to_string());
        Err(Error::new(ErrorKind::InvalidOperation, "refused").with_source(refusal))
    });
}

/// JSON to the interpreter's values; objects keep their order.
pub(super) fn to_jinja(value: &serde_json::Value) -> Value {
    match value {
        serde_json::Value::Null => Value::from(()),
        serde_json::Value::Bool(value) => Value::from(*value),
        serde_json::Value::String(text) => Value::from(text.as_str()),
        serde_json::Value::Array(items) => items.iter().map(to_jinja).collect(),
        serde_json::Value::Object(fields) => {
            Value::from_pairs(fields.iter().map(|(name, field)| (name.as_str(), to_jinja(field))))
        }
        serde_json::Value::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
    }
}

/// `{% generation %}` marks the assistant's words for training; for a prompt it means nothing. Its
/// tags become tags of an `if` that always holds, which treat the whitespace around them alike.
pub(super) fn without_generation_tags(source: &str) -> Cow<'_, str> {
    if !source.contains("generation") {
        return Cow::Borrowed(source);
    }
    let mut text = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else { break };
        let tag = &rest[start + 2..start + length];
        text.push_str(&rest[..start + 2]);
        let word = tag.trim_matches(|c: char| c == '-' || c == '+' || c.is_whitespace());
        match word {
            "generation" => text.push_str(&tag.replace(word, "if true")),
            "endgeneration" => text.push_str(&tag.replace(word, "endif")),
            _ => text.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    text.push_str(rest);
    Cow::Owned(text)
}

/// Python's `str()` for what a template prints.
fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable | ValueKind::Number => {
            out.write_str(&text_of(value)?).map_err(Error::from)
        }
        _ => minijinja::escape_formatter(out, state, value),
    }
}

fn text_of(value: &Value) -> Result<String, Error> {
    let mut text = String::new();
    match value.kind() {
        ValueKind::Seq | ValueKind::Map | ValueKind::Iterable => write_repr(value, &mut text)?,
        ValueKind::Number if !value.is_integer() => text = float_repr(value)?,
        _ => text = value.to_string(),
    }
    Ok(text)
}

/// Python's `repr()`.
fn write_repr(value: &Value, text: &mut String) -> Result<(), Error> {
    match value.kind() {
        ValueKind::String => write_string_repr(value.as_str().unwrap_or_default(), text),
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.downcast_object_ref::<Tuple>().is_some();
            let (open, close) = if tuple { ('(', ')') } else { ('[', ']') };
            text.push(open);
            for (index, item) in value.try_iter()?.enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(&item, text)?;
            }
            text.push_str(if tuple && value.len() == Some(1) { "," } else { "" });
            text.push(close);
        }
        ValueKind::Map => {
            text.push('{');
            for (index, key) in value.try_iter()?.enumerate() {
                text.push_str(if index > 0 { ", " } else { "" });
                write_repr(&key, text)?;
                text.push_str(": ");
                write_repr(&value.get_item(&key)?, text)?;
            }
            text.push('}');
        }
        ValueKind::Undefined => text.push_str("Undefined"),
        _ => text.push_str(&text_of(value)?),
    }
    Ok(())
}

fn write_string_repr(string: &str, text: &mut String) {
    let quote = if string.contains('\'') && !string.contains('"') { '"' } else { '\'' };
    text.push(quote);
    for character in string.chars() {
        match character {
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\\' => text.push_str("\\\\"),
            character if character == quote => text.extend(['\\', character]),
            character if character.is_ascii_control() => {
                let _ = write!(text, "\\x{:02x}", character as u32);
            }
            character => text.push(character),
        }
    }
    text.push(quote);
}

/// Python's `repr()` of a float: the shortest decimal that reads back as the same number, with an
/// exponent below 1e-4 and from 1e16 on.
fn float_repr(value: &Value) -> Result<String, Error> {
    let float = f64::try_from(value.clone())?;
    if float.is_nan() {
        return Ok("nan".into());
    }
    if float.is_infinite() {
        return Ok(if float > 0.0 { "inf" } else { "-inf" }.into());
    }
    let scientific = format!("{float:e}");
    let exponent: i32 = scientific.split('e').nth(1).and_then(|e| e.parse().ok()).unwrap_or(0);
    if float != 0.0 && !(-4..16).contains(&exponent) {
        let mantissa = scientific.split('e').next().unwrap_or_default();
        let sign = if exponent < 0 { '-' } else { '+' };
        return Ok(format!("{mantissa}e{sign}{:02}", exponent.abs()));
    }
    let plain = float.to_string();
    Ok(if plain.contains('.') { plain } else { plain + ".0" })
}

/// How `json.dumps` is asked to write.
struct JsonStyle {
    /// Spaces or text per level; `None` writes one line.
    indent: Option<String>,
    item_separator: String,
    key_separator: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

/// `tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)` of transformers,
/// which is `json.dumps` and, unlike Jinja's own, escapes nothing for HTML.
fn to_json(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        Some(indent) if indent.is_integer() => {
            Some(" ".repeat(usize::try_from(indent).unwrap_or(0).min(64)))
        }
        Some(indent) => indent.as_str().map(str::to_owned),
        None => None,
    };
    let separators = options.get::<Option<Vec<String>>>("separators")?.unwrap_or_default();
    let (item_separator, key_separator) = match separators.as_slice() {
        [item, key] => (item.clone(), key.clone()),
        _ => (if indent.is_some() { "," } else { ", " }.into(), ": ".into()),
    };
    let style = JsonStyle {
        indent,
        item_separator,
        key_separator,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = String::new();
    write_json(value, &style, 0, &mut text)?;
    Ok(Value::from(text))
}

fn write_json(
    value: &Value,
    style: &JsonStyle,
    depth: usize,
    text: &mut String,
) -> Result<(), Error> {
    match value.kind() {
        ValueKind::None => text.push_str("null"),
        ValueKind::Bool => text.push_str(if value.is_true() { "true" } else { "false" }),
        ValueKind::Number => text.push_str(&json_number(value)?),
        ValueKind::String => write_json_string(value.as_str().unwrap_or_default(), style, text),
        ValueKind::Seq | ValueKind::Iterable => {
            let items: Vec<Value> = value.try_iter()?.collect();
            write_json_items('[', ']', items.len(), style, depth, text, |index, text| {
                write_json(&items[index], style, depth + 1, text)
            })?;
        }
        ValueKind::Map => {
            let mut keys: Vec<Value> = value.try_iter()?.collect();
            if style.sort_keys {
                keys.sort_by_key(ToString::to_string);
            }
            write_json_items('{', '}', keys.len(), style, depth, text, |index, text| {
                let key = &keys[index];
                match key.as_str() {
                    Some(name) => write_json_string(name, style, text),
                    None => {
                        text.push('"');
                        write_json(key, style, depth + 1, text)?;
                        text.push('"');
                    }
                }
                text.push_str(&style.key_separator);
                write_json(&value.get_item(key)?, style, depth + 1, text)
            })?;
        }
        other => {
            let reason = format!("a value of type {other} is not JSON serializable");
            return Err(Error::new(ErrorKind::BadSerialization, reason));
        }
    }
    Ok(())
}

fn write_json_items(
    open: char,
    close: char,
    count: usize,
    style: &JsonStyle,
    depth: usize,
    text: &mut String,
    mut write: impl FnMut(usize, &mut String) -> Result<(), Error>,
) -> Result<(), Error> {
    let break_line = |depth: usize, text: &mut String| {
        if let Some(indent) = &style.indent {
            text.push('\n');
            (0..depth).for_each(|_| text.push_str(indent));
        }
    };
    text.push(open);
    for index in 0..count {
        text.push_str(if index > 0 { &style.item_separator } else { "" });
        break_line(depth + 1, text);
        write(index, text)?;
    }
    if count > 0 {
        break_line(depth, text);
    }
    text.push(close);
    Ok(())
}

fn json_number(value: &Value) -> Result<String, Error> {
    if value.is_integer() {
        return Ok(value.to_string());
    }
    Ok(match float_repr(value)?.as_str() {
        "nan" => "NaN".into(),
        "inf" => "Infinity".into(),
        "-inf" => "-Infinity".into(),
        finite => finite.to_owned(),
    })
}

fn write_json_string(string: &str, style: &JsonStyle, text: &mut String) {
    text.push('"');
    for character in string.chars() {
        match character {
            '"' => text.push_str("\\\""),
            '\\' => text.push_str("\\\\"),
            '\n' => text.push_str("\\n"),
            '\r' => text.push_str("\\r"),
            '\t' => text.push_str("\\t"),
            '\u{8}' => text.push_str("\\b"),
            '\u{c}' => text.push_str("\\f"),
            character if character < ' ' || (style.ensure_ascii && !character.is_ascii()) => {
                for unit in character.encode_utf16(&mut [0; 2]) {
                    let _ = write!(text, "\\u{unit:04x}");
                }
            }
            character => text.push(character),
        }
    }
    text.push('"');
}

/// Methods of Python's `str` and `dict` that minijinja's own list lacks or does otherwise.
fn method(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(string) = value.as_str() else {
        return unknown_method_callback(state, value, name, args);
    };
    let tuple = |parts: [&str; 3]| Value::from(Tuple::from(parts.map(Value::from).to_vec()));
    Ok(match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Value::from(string.strip_prefix(prefix).unwrap_or(string))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Value::from(string.strip_suffix(suffix).unwrap_or(string))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(args)?;
            match string.split_once(separator) {
                Some((before, after)) => tuple([before, separator, after]),
                None => tuple([string, "", ""]),
            }
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            match string.rsplit_once(separator) {
                Some((before, after)) => tuple([before, separator, after]),
                None => tuple(["", "", string]),
            }
        }
        "split" | "rsplit" => split(string, args, name == "rsplit")?,
        "casefold" => {
            let () = from_args(args)?;
            Value::from(string.to_lowercase())
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = match string.strip_prefix(['-', '+']) {
                Some(digits) => (&string[..1], digits),
                None => ("", string),
            };
            let missing = width.min(4096).saturating_sub(string.chars().count());
            Value::from(format!("{sign}{}{digits}", "0".repeat(missing)))
        }
        _ => return unknown_method_callback(state, value, name, args),
    })
}

/// `str.split` and `str.rsplit`, whose arguments may be named.
fn split(string: &str, args: &[Value], from_right: bool) -> Result<Value, Error> {
    let (separator, limit, named): (Option<Value>, Option<Value>, Kwargs) = from_args(args)?;
    let separator = separator.or(named.get::<Option<Value>>("sep")?).filter(|it| !it.is_none());
    let limit = limit.or(named.get::<Option<Value>>("maxsplit")?);
    named.assert_all_used()?;
    let limit = limit.and_then(|limit| usize::try_from(limit).ok()).map(|limit| limit + 1);
    let pieces = limit.unwrap_or(usize::MAX);
    let Some(separator) = &separator else {
        return Ok(split_whitespace(string, pieces, from_right));
    };
    let separator = separator.as_str().filter(|it| !it.is_empty()).ok_or_else(|| {
        Error::new(ErrorKind::InvalidOperation, "split() takes a separator that is not empty")
    })?;
    Ok(if from_right {
        let mut parts: Vec<&str> = string.rsplitn(pieces, separator).collect();
        parts.reverse();
        parts.into_iter().collect()
    } else {
        string.splitn(pieces, separator).collect()
    })
}

/// Runs of whitespace separate; the last piece (first, from the right) keeps what is left.
fn split_whitespace(string: &str, pieces: usize, from_right: bool) -> Value {
    let mut parts = Vec::new();
    let mut rest = if from_right { string.trim_end() } else { string.trim_start() };
    while !rest.is_empty() {
        let cut = if from_right {
            rest.rfind(char::is_whitespace).map(|at| {
                let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                (&rest[at + width..], rest[..at].trim_end())
            })
        } else {
            rest.find(char::is_whitespace).map(|at| (&rest[..at], rest[at..].trim_start()))
        };
        let (part, left) = match cut {
            Some(cut) if parts.len() + 1 < pieces => cut,
            _ => (rest, ""),
        };
        parts.push(part);
        rest = left;
    }
    if from_right {
        parts.reverse();
    }
    parts.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn render(source: &str) -> String {
        let mut environment = Environment::new();
        install(&mut environment);
        let data = to_jinja(&serde_json::json!({
            "d": {"b": [1, 2.5, null, true], "a": "é\u{1f600}<'\"\n"}, "s": " a  b c ", "f": 1e16
        }));
        environment.render_str(source, data).unwrap()
    }

    // Expected values are Python's.
    #[test]
    fn json_is_python_json() {
        assert_eq!(
            render("{{ d|tojson }}"),
            "{\"b\": [1, 2.5, null, true], \"a\": \"é\u{1f600}<'\\\"\\n\"}"
        );
        assert_eq!(
            render("{{ d|tojson(ensure_ascii=true, sort_keys=true) }}"),
            r#"{"a": "\u00e9\ud83d\ude00<'\"\n", "b": [1, 2.5, null, true]}"#
        );
        assert_eq!(
            render("{{ {'x': [], 'y': [1]}|tojson(indent=2) }}"),
            "{\n  \"x\": [],\n  \"y\": [\n    1\n  ]\n}"
        );
        assert_eq!(render("{{ [1, {'a': 2}]|tojson(separators=(',', ':')) }}"), "[1,{\"a\":2}]");
        assert_eq!(render("{{ [f, 0.00001, 1e22, 0.1]|tojson }}"), "[1e+16, 1e-05, 1e+22, 0.1]");
    }

    #[test]
    fn printing_is_python_printing() {
        assert_eq!(render("{{ [1, 'a', none, true, 0.5] }}"), "[1, 'a', None, True, 0.5]");
        assert_eq!(render("{{ {'k': 'it\\'s'} }}"), "{'k': \"it's\"}");
        assert_eq!(render("{{ true }} {{ none }} {{ 1.0 }} {{ missing }}"), "True None 1.0 ");
    }

    #[test]
    fn methods_are_python_methods() {
        assert_eq!(render("{{ s.split() }}"), "['a', 'b', 'c']");
        assert_eq!(render("{{ s.split(' ') }}"), "['', 'a', '', 'b', 'c', '']");
        assert_eq!(render("{{ s.split(None, 1) }}"), "['a', 'b c ']");
        assert_eq!(render("{{ s.rsplit(maxsplit=1) }}"), "[' a  b', 'c']");
        assert_eq!(render("{{ 'a,b,c'.split(',', 1)[-1] }}"), "b,c");
        assert_eq!(render("{{ 'a,b,c'.rsplit(',', 1)[0] }}"), "a,b");
        assert_eq!(render("{{ 'abc'.removeprefix('a').removesuffix('c') }}"), "b");
        assert_eq!(render("{{ 'k=v=w'.partition('=')[2] }}"), "v=w");
        assert_eq!(render("{{ '-7'.zfill(4) }}"), "-007");
        assert_eq!(render("{% for k, v in d.items() %}{{ k }};{% endfor %}"), "b;a;");
        assert_eq!(
            render("{{ d is sequence }} {{ s is sequence }} {{ 1 is iterable }}"),
            "True True False"
        );
    }

    #[test]
    fn generation_tags_vanish() {
        let source = "a {%- generation -%} b {%+ endgeneration %} {% if generation %}{% endif %}";
        let expected = "a {%- if true -%} b {%+ endif %} {% if generation %}{% endif %}";
        assert_eq!(without_generation_tags(source), expected);
    }
}

//! The filters that are about HTML, addresses and line lengths.

use std::rc::Rc;

use super::arguments::Given;
use super::error::{Failure, Outcome};
use super::limits::Meter;
use super::methods::lines;
use super::operators::escape;
use super::text::{Builder, Text};
use super::value::Value;
use super::write::to_text;

/// Without tags and comments, entities read, whitespace as single spaces.
pub(super) fn strip_tags(text: &Text) -> Outcome<Text> {
    let mut out = Builder::new(text.meter());
    let string = text.as_str();
    let mut at = 0;
    while let Some(start) = string[at..].find('<').map(|start| start + at) {
        let rest = &string[start..];
        let end = match rest.starts_with("<!--") {
            true => rest.find("-->").map(|end| end + 3),
            false => rest.find('>').map(|end| end + 1),
        };
        let Some(end) = end else { break };
        out.push_slice(text, at..start)?;
        at = start + end;
    }
    out.push_slice(text, at..string.len())?;
    let plain = out.finish();
    let mut spaced = Builder::new(text.meter());
    for (index, word) in plain.as_str().split_whitespace().enumerate() {
        spaced.push(if index > 0 { " " } else { "" }, false)?;
        spaced.push_text(&plain.part(word)?)?;
    }
    let mut text = spaced.finish();
    for (name, character) in [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&quot;", "\""),
        ("&amp;", "&"),
    ] {
        text = text.replace(name, &Text::literal(text.meter(), character)?, usize::MAX)?;
    }
    Ok(text)
}

/// Lines of at most `width` characters.
pub(super) fn word_wrap(text: &Text, given: &Given) -> Outcome<Text> {
    let names = ["width", "break_long_words", "wrapstring", "break_on_hyphens"];
    let [width, break_long, separator, break_hyphens] = given.bind("wordwrap", names)?;
    let width = width.and_then(|width| width.as_int()).unwrap_or(79);
    let width = usize::try_from(width).ok().filter(|width| *width > 0);
    let width = width.ok_or_else(|| Failure::failed("wordwrap needs a width above 0"))?;
    let break_long = break_long.is_none_or(|it| it.is_true());
    let break_hyphens = break_hyphens.is_none_or(|it| it.is_true());
    let separator = match separator.filter(|it| !matches!(it, Value::None)) {
        Some(separator) => to_text(&separator, text.meter())?,
        None => Text::literal(text.meter(), "\n")?,
    };
    let mut out = Builder::new(text.meter());
    for (index, line) in lines(text, false)?.iter().enumerate() {
        let Value::Str(line) = line else { continue };
        if index > 0 {
            out.push_text(&separator)?;
        }
        wrap_line(line, width, break_long, break_hyphens, &separator, &mut out)?;
    }
    Ok(out.finish())
}

/// The words of a line and the runs of spaces between them; a word may end after its hyphens.
fn chunks(line: &str, break_hyphens: bool) -> Vec<&str> {
    let mut chunks = Vec::new();
    let (mut start, mut before) = (0, None::<char>);
    for (at, character) in line.char_indices() {
        let parts = before.is_some_and(|before| {
            before.is_whitespace() != character.is_whitespace()
                || (break_hyphens && before == '-' && character.is_alphabetic())
        });
        if parts {
            chunks.push(&line[start..at]);
            start = at;
        }
        before = Some(character);
    }
    chunks.push(&line[start..]);
    chunks
}

/// Python's `textwrap.wrap`.
fn wrap_line(
    line: &Text,
    width: usize,
    break_long: bool,
    break_hyphens: bool,
    separator: &Text,
    out: &mut Builder,
) -> Outcome<()> {
    let mut chunks = chunks(line.as_str(), break_hyphens);
    chunks.reverse();
    let blank = |chunk: &&str| chunk.trim().is_empty();
    let mut first = true;
    while let Some(chunk) = chunks.last() {
        if blank(chunk) && !first {
            chunks.pop();
            continue;
        }
        let (mut shown, mut column) = (Vec::new(), 0);
        while let Some(chunk) = chunks.last() {
            let length = chunk.chars().count();
            if column + length > width {
                break;
            }
            column += length;
            shown.extend(chunks.pop());
        }
        if let Some(chunk) = chunks.last_mut().filter(|chunk| chunk.chars().count() > width) {
            if break_long {
                let cut = chunk.char_indices().nth(width - column).map_or(chunk.len(), |it| it.0);
                shown.push(&chunk[..cut]);
                *chunk = &chunk[cut..];
            } else if shown.is_empty() {
                shown.extend(chunks.pop());
            }
        }
        if shown.last().is_some_and(blank) {
            shown.pop();
        }
        if shown.is_empty() {
            continue;
        }
        if !first {
            out.push_text(separator)?;
        }
        first = false;
        for chunk in shown {
            out.push_text(&line.part(chunk)?)?;
        }
    }
    Ok(())
}

/// Percent-encodes. In a query (`in_query`) a slash is encoded too and a space is a plus.
fn quote(text: &Text, in_query: bool, out: &mut Builder) -> Outcome<()> {
    let mut at = 0;
    for character in text.as_str().chars() {
        let typed = text.is_typed(at);
        let kept = character.is_ascii_alphanumeric() || "_.-~".contains(character);
        if in_query && character == ' ' {
            out.push("+", typed)?;
        } else if kept || (!in_query && character == '/') {
            out.push(character.encode_utf8(&mut [0; 4]), typed)?;
        } else {
            for byte in character.encode_utf8(&mut [0; 4]).bytes() {
                out.push(&format!("%{byte:02X}"), typed)?;
            }
        }
        at += character.len_utf8();
    }
    Ok(())
}

/// Text, or pairs as a query.
pub(super) fn url_encode(value: &Value, meter: &Rc<Meter>) -> Outcome<Text> {
    let mut out = Builder::new(meter);
    let pairs: Vec<(Value, Value)> = match value {
        Value::Dict(fields) => fields.entries.values().cloned().collect(),
        Value::List(_) | Value::Tuple(_) => {
            let mut pairs = Vec::new();
            for pair in value.iterate(meter)? {
                match pair.iterate(meter)?.as_slice() {
                    [key, value] => pairs.push((key.clone(), value.clone())),
                    _ => return Err(Failure::failed("urlencode needs pairs")),
                }
            }
            pairs
        }
        other => {
            quote(&to_text(other, meter)?, false, &mut out)?;
            return Ok(out.finish());
        }
    };
    for (index, (key, value)) in pairs.iter().enumerate() {
        out.push(if index > 0 { "&" } else { "" }, false)?;
        quote(&to_text(key, meter)?, true, &mut out)?;
        out.push("=", false)?;
        quote(&to_text(value, meter)?, true, &mut out)?;
    }
    Ok(out.finish())
}

/// A dictionary as the attributes of a tag.
pub(super) fn attributes(value: &Value, given: &Given, meter: &Rc<Meter>) -> Outcome<Text> {
    let [space] = given.bind("xmlattr", ["autospace"])?;
    let Value::Dict(fields) = value else { return Err(Failure::failed("xmlattr needs a mapping")) };
    let mut out = Builder::new(meter);
    let space = space.is_none_or(|it| it.is_true());
    for (key, value) in fields.entries.values() {
        if matches!(value, Value::None | Value::Undefined(_)) {
            continue;
        }
        let key = to_text(key, meter)?;
        let bad = |c: char| c.is_whitespace() || matches!(c, '/' | '>' | '=');
        if key.as_str().contains(bad) {
            return Err(Failure::failed(format!("invalid attribute name {:?}", key.as_str())));
        }
        let first = out.as_str().is_empty() && !space;
        out.push(if first { "" } else { " " }, false)?;
        out.push_text(&escape(&key)?)?;
        out.push("=\"", false)?;
        out.push_text(&escape(&to_text(value, meter)?)?)?;
        out.push("\"", false)?;
    }
    Ok(out.finish())
}

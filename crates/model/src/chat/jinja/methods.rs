//! Methods of Python's strings, dictionaries and lists.

use std::rc::Rc;

use super::access::slice;
use super::arguments::Given;
use super::error::{Failure, Outcome};
use super::format::{all_printable, braces};
use super::limits::Meter;
use super::text::{Builder, Text};
use super::value::{Value, list, tuple};

pub(super) fn call(meter: &Rc<Meter>, value: &Value, name: &str, given: &Given) -> Outcome<Value> {
    match value {
        Value::Str(text) => {
            text.meter().scan(text.as_str().len())?;
            of_string(meter, text, name, given)
        }
        Value::Dict(_) => of_dict(meter, value, name, given),
        Value::List(items) | Value::Tuple(items) => {
            if name == "copy" {
                return Ok(value.clone());
            }
            let [item] = given.bind(name, ["value"])?;
            let item = item.ok_or_else(|| needs(name))?;
            let mut found = Vec::new();
            for (index, each) in items.items.iter().enumerate() {
                if each.equals(&item, meter)? {
                    found.push(index);
                }
            }
            match (name, found.first()) {
                ("count", _) => Ok(Value::Int(found.len() as i128)),
                (_, Some(index)) => Ok(Value::Int(*index as i128)),
                (_, None) => Err(Failure::failed("the value is not in the list")),
            }
        }
        Value::Float(value) => Ok(Value::Bool(value.fract() == 0.0)),
        Value::Loop(state) if name == "cycle" => {
            let items = &given.positional;
            let index = state.index.checked_rem(items.len());
            Ok(items[index.ok_or_else(|| Failure::failed("no items for cycling given"))?].clone())
        }
        Value::Loop(state) => {
            let mut last = state.last.borrow_mut();
            let mut same = last.as_ref().is_some_and(|last| last.len() == given.positional.len());
            for (old, new) in last.iter().flatten().zip(&given.positional) {
                same = same && old.equals(new, meter)?;
            }
            if given.positional.iter().any(Value::holds_namespace) {
                return Err(Failure::failed("changed() compares values that do not change"));
            }
            *last = Some(given.positional.clone());
            Ok(Value::Bool(!same))
        }
        Value::Cycler(cycler) => {
            let mut at = cycler.at.borrow_mut();
            let current = cycler.items[*at].clone();
            *at = if name == "reset" { 0 } else { (*at + 1) % cycler.items.len() };
            Ok(if name == "reset" { Value::None } else { current })
        }
        other => {
            let found = other.type_name();
            Err(Failure::failed(format!("{found:?} object has no method {name:?}")))
        }
    }
}

fn needs(name: &str) -> Failure {
    Failure::failed(format!("{name}() lacks an argument"))
}

fn of_dict(meter: &Rc<Meter>, value: &Value, name: &str, given: &Given) -> Outcome<Value> {
    let Value::Dict(dict) = value else { return Ok(Value::None) };
    if name == "get" {
        let [key, default] = given.bind(name, ["key", "default"])?;
        let key = key.ok_or_else(|| needs(name))?.key()?;
        let found = dict.entries.get(&key).map(|entry| entry.1.clone());
        return Ok(found.or(default).unwrap_or(Value::None));
    }
    let [] = given.bind(name, [])?;
    let entries = dict.entries.values();
    meter.step(dict.entries.len() as u64 / 8)?;
    match name {
        "keys" => list(meter, entries.map(|entry| entry.0.clone()).collect()),
        "values" => list(meter, entries.map(|entry| entry.1.clone()).collect()),
        "items" => {
            let pairs = entries.map(|(key, value)| tuple(meter, vec![key.clone(), value.clone()]));
            list(meter, pairs.collect::<Outcome<_>>()?)
        }
        _ => Ok(value.clone()),
    }
}

pub(super) fn is_lower(text: &str) -> bool {
    text.chars().any(char::is_lowercase) && !text.chars().any(char::is_uppercase)
}

pub(super) fn is_upper(text: &str) -> bool {
    text.chars().any(char::is_uppercase) && !text.chars().any(char::is_lowercase)
}

/// Python's whitespace is Unicode's and four separators.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || matches!(character, '\u{1c}'..='\u{1f}')
}

fn of_string(meter: &Rc<Meter>, text: &Text, name: &str, given: &Given) -> Outcome<Value> {
    let string = text.as_str();
    if let Some(holds) = of_characters(string, name) {
        let [] = given.bind(name, [])?;
        return Ok(Value::Bool(holds));
    }
    if let Some(result) = recased(text, name) {
        let [] = given.bind(name, [])?;
        return result.map(Value::Str);
    }
    match name {
        "strip" | "lstrip" | "rstrip" => {
            let [characters] = given.bind(name, ["chars"])?;
            let characters = characters.filter(|it| !matches!(it, Value::None));
            strip(text, name, characters.as_ref()).map(Value::Str)
        }
        "removeprefix" | "removesuffix" => {
            let affix = one_string(name, given)?;
            let part = match name {
                "removeprefix" => string.strip_prefix(affix.as_str()),
                _ => string.strip_suffix(affix.as_str()),
            };
            text.part(part.unwrap_or(string)).map(Value::Str)
        }
        "startswith" | "endswith" => affixed(meter, text, name, given),
        "find" | "rfind" | "index" | "rindex" | "count" => find(meter, text, name, given),
        "replace" => {
            let [old, new, count] = given.bind(name, ["old", "new", "count"])?;
            let (Some(Value::Str(old)), Some(Value::Str(new))) = (old, new) else {
                return Err(Failure::failed("replace() needs two strings"));
            };
            let most = count.and_then(|count| count.as_int()).unwrap_or(-1);
            let most = usize::try_from(most).unwrap_or(usize::MAX);
            text.replace(old.as_str(), &new, most).map(Value::Str)
        }
        "split" | "rsplit" => split(meter, text, name == "rsplit", given),
        "splitlines" => splitlines(meter, text, given),
        "partition" | "rpartition" => partition(text, name, given),
        "join" => join(text, given),
        "center" | "ljust" | "rjust" | "zfill" => justify(text, name, given),
        "expandtabs" => expand_tabs(text, given),
        "format" => braces(text, &given.positional, &given.named).map(Value::Str),
        "format_map" => {
            let [Some(Value::Dict(fields))] = given.bind(name, ["mapping"])? else {
                return Err(needs(name));
            };
            let named = fields
                .entries
                .values()
                .filter_map(|(key, value)| Some((key.as_str()?.to_owned(), value.clone())));
            braces(text, &[], &named.collect::<Vec<_>>()).map(Value::Str)
        }
        _ => Err(Failure::failed(format!("'str' object has no method {name:?}"))),
    }
}

fn partition(text: &Text, name: &str, given: &Given) -> Outcome<Value> {
    let separator = one_string(name, given)?;
    let (string, separator) = (text.as_str(), separator.as_str());
    let found = match name {
        "partition" => string.find(separator),
        _ => string.rfind(separator),
    };
    let cuts = match (found, name) {
        (Some(at), _) => [at, at + separator.len()],
        (None, "partition") => [string.len(), string.len()],
        (None, _) => [0, 0],
    };
    let parts = [0..cuts[0], cuts[0]..cuts[1], cuts[1]..string.len()];
    let parts = parts.map(|part| text.slice(part).map(Value::Str));
    tuple(text.meter(), parts.into_iter().collect::<Outcome<_>>()?)
}

fn join(text: &Text, given: &Given) -> Outcome<Value> {
    let [items] = given.bind("join", ["iterable"])?;
    let items = items.ok_or_else(|| needs("join"))?.iterate(text.meter())?;
    let mut out = Builder::new(text.meter());
    for (index, item) in items.iter().enumerate() {
        if index > 0 {
            out.push_text(text)?;
        }
        let Value::Str(item) = item else {
            let found = item.type_name();
            let reason = format!("sequence item {index}: expected str, {found} found");
            return Err(Failure::failed(reason));
        };
        out.push_text(item)?;
    }
    Ok(Value::Str(out.finish()))
}

/// Methods that ask something of all characters.
fn of_characters(string: &str, name: &str) -> Option<bool> {
    let all = |holds: fn(char) -> bool| !string.is_empty() && string.chars().all(holds);
    Some(match name {
        "isalpha" => all(char::is_alphabetic),
        "isalnum" => all(char::is_alphanumeric),
        "isdigit" => {
            all(|c| c.is_ascii_digit() || superscript(c) || (c.is_numeric() && decimal(c)))
        }
        "isdecimal" => all(decimal),
        "isnumeric" => all(char::is_numeric),
        "isspace" => all(is_space),
        "isascii" => string.is_ascii(),
        "isprintable" => all_printable(string),
        "islower" => is_lower(string),
        "isupper" => is_upper(string),
        "isidentifier" => {
            let begins = |c: char| c.is_alphabetic() || c == '_';
            string.starts_with(begins) && string.chars().all(|c| c.is_alphanumeric() || c == '_')
        }
        "istitle" => {
            let (mut cased, mut found) = (false, false);
            for character in string.chars() {
                if character.is_uppercase() && cased || character.is_lowercase() && !cased {
                    return Some(false);
                }
                cased = character.is_uppercase() || character.is_lowercase();
                found |= cased;
            }
            found
        }
        _ => return None,
    })
}

/// Digits that numbers are written with: ASCII's, and blocks of ten of other scripts.
fn decimal(character: char) -> bool {
    character.is_ascii_digit()
        || (character.is_numeric()
            && matches!(character as u32,
                0x660..=0x669 | 0x6f0..=0x6f9 | 0x7c0..=0x7c9 | 0x966..=0x96f | 0x9e6..=0x9ef
                | 0xa66..=0xa6f | 0xae6..=0xaef | 0xb66..=0xb6f | 0xbe6..=0xbef | 0xc66..=0xc6f
                | 0xce6..=0xcef | 0xd66..=0xd6f | 0xe50..=0xe59 | 0xed0..=0xed9 | 0xf20..=0xf29
                | 0x1040..=0x1049 | 0x17e0..=0x17e9 | 0x1810..=0x1819 | 0xff10..=0xff19))
}

fn superscript(character: char) -> bool {
    matches!(character, '\u{b2}' | '\u{b3}' | '\u{b9}' | '\u{2070}' | '\u{2074}'..='\u{2079}'
        | '\u{2080}'..='\u{2089}')
}

/// Methods that change the case.
fn recased(text: &Text, name: &str) -> Option<Outcome<Text>> {
    Some(match name {
        "lower" | "casefold" => lower(text, name == "casefold"),
        "upper" => text.map(|character, out| out.extend(character.to_uppercase())),
        "swapcase" => text.map(|character, out| match character.is_uppercase() {
            true => out.extend(character.to_lowercase()),
            false => out.extend(character.to_uppercase()),
        }),
        "capitalize" => {
            let first = std::cell::Cell::new(true);
            text.map(|character, out| match first.replace(false) {
                true => out.extend(character.to_uppercase()),
                false => out.extend(character.to_lowercase()),
            })
        }
        "title" => {
            let cased = std::cell::Cell::new(false);
            text.map(|character, out| match cased.replace(character.is_alphabetic()) {
                true => out.extend(character.to_lowercase()),
                false => out.extend(character.to_uppercase()),
            })
        }
        _ => return None,
    })
}

fn lower(text: &Text, fold: bool) -> Outcome<Text> {
    text.map(|character, out| match character {
        'ß' | 'ẞ' if fold => out.push_str("ss"),
        'ς' if fold => out.push('σ'),
        other => out.extend(other.to_lowercase()),
    })
}

/// Without the characters at the ends: those given, else whitespace.
pub(super) fn strip(text: &Text, name: &str, characters: Option<&Value>) -> Outcome<Text> {
    let set: Option<Vec<char>> = match characters {
        None => None,
        Some(Value::Str(set)) => Some(set.as_str().chars().collect()),
        Some(_) => return Err(Failure::failed(format!("{name}() takes a string or None"))),
    };
    text.meter().scan(text.as_str().len().saturating_mul(set.as_ref().map_or(1, Vec::len)))?;
    let drop = |c: char| set.as_ref().map_or_else(|| is_space(c), |set| set.contains(&c));
    let mut part = text.as_str();
    if name != "rstrip" {
        part = part.trim_start_matches(drop);
    }
    if name != "lstrip" {
        part = part.trim_end_matches(drop);
    }
    text.part(part)
}

fn one_string(name: &str, given: &Given) -> Outcome<Text> {
    match given.bind(name, ["value"])? {
        [Some(Value::Str(text))] if !(text.as_str().is_empty() && name.ends_with("partition")) => {
            Ok(text)
        }
        _ => Err(Failure::failed(format!("{name}() needs a string that is not empty"))),
    }
}

/// The part of `text` that Python's `start` and `end` arguments leave, and where it begins, in
/// characters.
fn window(text: &Text, start: Option<Value>, end: Option<Value>) -> Outcome<Option<(Text, usize)>> {
    let number = |value: Option<Value>| value.and_then(|value| value.as_int());
    let (start, end) = (number(start), number(end));
    if start.is_none() && end.is_none() {
        return Ok(Some((text.clone(), 0)));
    }
    let length = text.as_str().chars().count() as i128;
    let place = |index: i128| (if index < 0 { index + length } else { index }).clamp(0, length);
    if start.is_some_and(|start| start > length) {
        return Ok(None);
    }
    let (start, end) = (place(start.unwrap_or(0)), place(end.unwrap_or(length)));
    if start > end {
        return Ok(None);
    }
    let value = |index: i128| Value::Int(index);
    let bounds = [value(start), value(end), Value::None];
    match slice(text.meter(), &Value::Str(text.clone()), bounds)? {
        Value::Str(part) => Ok(Some((part, start as usize))),
        _ => Ok(None),
    }
}

fn affixed(meter: &Rc<Meter>, text: &Text, name: &str, given: &Given) -> Outcome<Value> {
    let [affixes, start, end] = given.bind(name, ["affix", "start", "end"])?;
    let affixes = match affixes {
        Some(Value::Str(affix)) => vec![Value::Str(affix)],
        Some(Value::Tuple(affixes)) => affixes.items.clone(),
        _ => return Err(Failure::failed(format!("{name}() needs a string or a tuple of strings"))),
    };
    let Some((part, _)) = window(text, start, end)? else { return Ok(Value::Bool(false)) };
    meter.step(affixes.len() as u64)?;
    let part = part.as_str();
    let holds = affixes.iter().any(|affix| {
        let affix = affix.as_str();
        affix.is_some_and(|affix| match name {
            "startswith" => part.starts_with(affix),
            _ => part.ends_with(affix),
        })
    });
    Ok(Value::Bool(holds))
}

fn find(meter: &Rc<Meter>, text: &Text, name: &str, given: &Given) -> Outcome<Value> {
    let [what, start, end] = given.bind(name, ["sub", "start", "end"])?;
    let what = what.ok_or_else(|| needs(name))?;
    let what = what.as_str().ok_or_else(|| Failure::failed(format!("{name}() needs a string")))?;
    let window = window(text, start, end)?;
    if name == "count" {
        let count = window.map_or(0, |(part, _)| match what.is_empty() {
            true => part.as_str().chars().count() + 1,
            false => part.as_str().matches(what).count(),
        });
        return Ok(Value::Int(count as i128));
    }
    let found = window.and_then(|(part, start)| {
        let part = part.as_str();
        let at = if name.starts_with('r') { part.rfind(what) } else { part.find(what) }?;
        Some((part[..at].chars().count() + start) as i128)
    });
    meter.step(1)?;
    match found {
        Some(at) => Ok(Value::Int(at)),
        None if name.ends_with("index") => Err(Failure::failed("substring not found")),
        None => Ok(Value::Int(-1)),
    }
}

/// `str.split` and `str.rsplit`.
fn split(meter: &Rc<Meter>, text: &Text, from_right: bool, given: &Given) -> Outcome<Value> {
    let [separator, limit] = given.bind("split", ["sep", "maxsplit"])?;
    let limit = limit.and_then(|limit| limit.as_int()).unwrap_or(-1);
    let pieces = usize::try_from(limit).map_or(usize::MAX, |limit| limit.saturating_add(1));
    let string = text.as_str();
    let separator = separator.filter(|it| !matches!(it, Value::None));
    let parts: Vec<&str> = match &separator {
        None => split_whitespace(string, pieces, from_right),
        Some(separator) => {
            let separator = separator.as_str().filter(|it| !it.is_empty());
            let reason = || Failure::failed("split() takes a separator that is not empty");
            let separator = separator.ok_or_else(reason)?;
            if from_right {
                let mut parts: Vec<&str> = string.rsplitn(pieces, separator).collect();
                parts.reverse();
                parts
            } else {
                string.splitn(pieces, separator).collect()
            }
        }
    };
    let parts = parts.into_iter().map(|part| text.part(part).map(Value::Str));
    list(meter, parts.collect::<Outcome<_>>()?)
}

/// Runs of whitespace separate; the last piece (first, from the right) keeps what is left.
fn split_whitespace(string: &str, pieces: usize, from_right: bool) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = match from_right {
        true => string.trim_end_matches(is_space),
        false => string.trim_start_matches(is_space),
    };
    while !rest.is_empty() {
        let cut = if from_right {
            rest.rfind(is_space).map(|at| {
                let width = rest[at..].chars().next().map_or(0, char::len_utf8);
                (&rest[at + width..], rest[..at].trim_end_matches(is_space))
            })
        } else {
            rest.find(is_space).map(|at| (&rest[..at], rest[at..].trim_start_matches(is_space)))
        };
        let (part, left) = match cut {
            Some(cut) if parts.len() + 1 < pieces => cut,
            _ => (rest, &rest[..0]),
        };
        parts.push(part);
        rest = left;
    }
    if from_right {
        parts.reverse();
    }
    parts
}

fn splitlines(meter: &Rc<Meter>, text: &Text, given: &Given) -> Outcome<Value> {
    let [keep] = given.bind("splitlines", ["keepends"])?;
    let keep = keep.is_some_and(|keep| keep.is_true());
    list(meter, lines(text, keep)?)
}

/// The lines of a text as Python counts them.
pub(super) fn lines(text: &Text, keep_ends: bool) -> Outcome<Vec<Value>> {
    let ends = |c: char| {
        matches!(
            c,
            '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'
                ..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
        )
    };
    let (string, mut parts, mut start) = (text.as_str(), Vec::new(), 0);
    while start < string.len() {
        let rest = &string[start..];
        let end = rest.find(ends).unwrap_or(rest.len());
        let width = match rest[end..].chars().next() {
            Some('\r') if rest[end..].starts_with("\r\n") => 2,
            Some(character) => character.len_utf8(),
            None => 0,
        };
        let shown = if keep_ends { end + width } else { end };
        parts.push(Value::Str(text.slice(start..start + shown)?));
        start += end + width;
    }
    Ok(parts)
}

fn justify(text: &Text, name: &str, given: &Given) -> Outcome<Value> {
    let [width, fill] = given.bind(name, ["width", "fillchar"])?;
    let width = width.and_then(|width| width.as_int()).ok_or_else(|| needs(name))?;
    let fill = match fill {
        None => ' ',
        Some(fill) => match fill.as_str().map(|it| it.chars().collect::<Vec<_>>()).as_deref() {
            Some([fill]) => *fill,
            _ => return Err(Failure::failed("the fill character must be one character")),
        },
    };
    let length = text.as_str().chars().count() as i128;
    let missing = usize::try_from((width - length).max(0)).unwrap_or(usize::MAX);
    text.meter().foresee(missing.saturating_mul(4))?;
    let mut out = Builder::new(text.meter());
    out.safe = text.is_safe();
    if name == "zfill" {
        let sign = usize::from(text.as_str().starts_with(['-', '+']));
        out.push_slice(text, 0..sign)?;
        out.push(&"0".repeat(missing), false)?;
        out.push_slice(text, sign..text.as_str().len())?;
        return Ok(Value::Str(out.finish()));
    }
    // Python's `center` puts the odd character on the left if the width is odd.
    let width = usize::try_from(width.max(0)).unwrap_or(usize::MAX);
    let before = match name {
        "center" => missing / 2 + (missing & width & 1),
        "rjust" => missing,
        _ => 0,
    };
    let fill = fill.to_string();
    out.push(&fill.repeat(before), false)?;
    out.push_text(text)?;
    out.push(&fill.repeat(missing - before), false)?;
    Ok(Value::Str(out.finish()))
}

fn expand_tabs(text: &Text, given: &Given) -> Outcome<Value> {
    let [size] = given.bind("expandtabs", ["tabsize"])?;
    let size = size.and_then(|size| size.as_int()).unwrap_or(8).clamp(0, 1 << 16) as usize;
    let mut out = Builder::new(text.meter());
    let mut column = 0;
    for (at, character) in text.as_str().char_indices() {
        match character {
            '\t' if size > 0 => {
                let missing = size - column % size;
                out.push(&" ".repeat(missing), text.is_typed(at))?;
                column += missing;
            }
            '\t' => {}
            character => {
                out.push(character.encode_utf8(&mut [0; 4]), text.is_typed(at))?;
                column = if matches!(character, '\n' | '\r') { 0 } else { column + 1 };
            }
        }
    }
    Ok(Value::Str(out.finish()))
}

//! Python's two ways to format: `'%s' % x` and `'{}'.format(x)`.

use std::rc::Rc;

use super::access::{attribute, item};
use super::error::{Failure, Outcome};
use super::limits::Meter;
use super::text::{Builder, Text};
use super::value::Value;
use super::write::{float_repr, is_printable, repr, to_text};

/// Characters that one field may be padded to.
const WIDTH: usize = 1 << 16;

/// How one field is laid out.
#[derive(Clone, Default)]
struct Layout {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    zero: bool,
    width: usize,
    grouping: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
}

fn number(digits: &str) -> Outcome<usize> {
    let value = digits.parse().ok().filter(|value| *value <= WIDTH);
    value.ok_or_else(|| Failure::limit("characters of a field", WIDTH as u64))
}

/// The number that `text` begins with, and what follows.
fn leading_number(text: &str) -> Outcome<(Option<usize>, &str)> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let value = if end > 0 { Some(number(&text[..end])?) } else { None };
    Ok((value, &text[end..]))
}

/// Pads `text` to the layout's width, where `align` says.
fn padded(text: &Text, layout: &Layout, align: char, out: &mut Builder) -> Outcome<()> {
    let length = text.as_str().chars().count();
    let missing = layout.width.saturating_sub(length);
    let fill = layout.fill.unwrap_or(' ').to_string();
    let (before, after) = match align {
        '<' => (0, missing),
        '^' => (missing / 2, missing - missing / 2),
        _ => (missing, 0),
    };
    out.push(&fill.repeat(before), false)?;
    out.push_text(text)?;
    out.push(&fill.repeat(after), false)
}

fn truncated(text: &Text, precision: Option<usize>) -> Outcome<Text> {
    let Some(most) = precision else { return Ok(text.clone()) };
    let end = text.as_str().char_indices().nth(most).map_or(text.as_str().len(), |it| it.0);
    text.slice(0..end)
}

/// `format % values`
pub(super) fn percent(format: &Text, values: &Value) -> Outcome<Text> {
    let mut out = Builder::new(format.meter());
    out.safe = format.is_safe();
    let arguments: &[Value] = match values {
        Value::Tuple(list) => &list.items,
        other => std::slice::from_ref(other),
    };
    let mut next = arguments.iter();
    let missing = || Failure::failed("not enough arguments for format string");
    let mut rest = format.as_str();
    while let Some(at) = rest.find('%') {
        out.push_text(&format.part(&rest[..at])?)?;
        rest = &rest[at + 1..];
        let mut named = None;
        if let Some((name, after)) = rest.strip_prefix('(').and_then(|it| it.split_once(')')) {
            let found = values.get(name).cloned();
            named = Some(found.ok_or_else(|| Failure::failed(format!("no entry {name:?}")))?);
            rest = after;
        }
        let mut layout = Layout::default();
        let mut left = false;
        while let Some(flag) = rest.chars().next().filter(|flag| "-+ 0#".contains(*flag)) {
            match flag {
                '-' => left = true,
                '0' => layout.zero = true,
                '#' => layout.alternate = true,
                _ if layout.sign == Some('+') => {}
                sign => layout.sign = Some(sign),
            }
            rest = &rest[1..];
        }
        let mut size = |rest: &mut &str| -> Outcome<Option<usize>> {
            if let Some(after) = rest.strip_prefix('*') {
                *rest = after;
                let value = next.next().ok_or_else(missing)?.as_int();
                let value = value.ok_or_else(|| Failure::failed("* wants int"))?;
                left |= value < 0;
                return number(&value.unsigned_abs().to_string()).map(Some);
            }
            let (value, after) = leading_number(rest)?;
            *rest = after;
            Ok(value)
        };
        layout.width = size(&mut rest)?.unwrap_or_default();
        if let Some(after) = rest.strip_prefix('.') {
            rest = after;
            layout.precision = Some(size(&mut rest)?.unwrap_or_default());
        }
        rest = rest.trim_start_matches(['h', 'l', 'L']);
        let kind = rest.chars().next().ok_or_else(|| Failure::failed("incomplete format"))?;
        rest = &rest[kind.len_utf8()..];
        if kind == '%' {
            out.push("%", false)?;
            continue;
        }
        let value = match &named {
            Some(value) => value,
            None => next.next().ok_or_else(missing)?,
        };
        percent_field(value, kind, &layout, left, &mut out)?;
    }
    out.push_text(&format.part(rest)?)?;
    if next.next().is_some() && !matches!(values, Value::Dict(_)) {
        return Err(Failure::failed("not all arguments converted during string formatting"));
    }
    Ok(out.finish())
}

fn percent_field(
    value: &Value,
    kind: char,
    layout: &Layout,
    left: bool,
    out: &mut Builder,
) -> Outcome<()> {
    let meter = Rc::clone(out.meter());
    let text = match kind {
        's' => truncated(&to_text(value, &meter)?, layout.precision)?,
        'r' | 'a' => {
            let mut text = Builder::new(&meter);
            repr(value, &mut text)?;
            truncated(&text.finish(), layout.precision)?
        }
        'c' => character(value, &meter)?,
        'd' | 'i' | 'u' | 'x' | 'X' | 'o' => {
            let integer = match value {
                Value::Float(value) if matches!(kind, 'd' | 'i' | 'u') => Some(*value as i128),
                other => other.as_int(),
            };
            let found = value.type_name();
            let reason = || format!("%{kind} format: a real number is required, not {found}");
            let integer = integer.ok_or_else(|| Failure::failed(reason()))?;
            let mut digits = magnitude(integer, kind);
            let least = layout.precision.unwrap_or_default();
            digits = "0".repeat(least.saturating_sub(digits.len())) + &digits;
            return finish_number(integer < 0, prefix(kind, layout), &digits, layout, left, out);
        }
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => {
            let float = value.as_float().ok_or_else(|| {
                Failure::failed(format!("must be real number, not {}", value.type_name()))
            })?;
            let digits = float_digits(float.abs(), kind, layout.precision, layout.alternate);
            return finish_number(float.is_sign_negative(), "", &digits, layout, left, out);
        }
        other => {
            return Err(Failure::failed(format!("unsupported format character {other:?}")));
        }
    };
    padded(&text, layout, if left { '<' } else { '>' }, out)
}

fn finish_number(
    negative: bool,
    prefix: &str,
    digits: &str,
    layout: &Layout,
    left: bool,
    out: &mut Builder,
) -> Outcome<()> {
    let sign = match (negative, layout.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let length = sign.len() + prefix.len() + digits.len();
    let missing = layout.width.saturating_sub(length);
    let zeros = if layout.zero && !left { "0".repeat(missing) } else { String::new() };
    let text = Text::literal(out.meter(), &format!("{sign}{prefix}{zeros}{digits}"))?;
    padded(&text, layout, if left { '<' } else { '>' }, out)
}

fn prefix(kind: char, layout: &Layout) -> &'static str {
    match kind {
        _ if !layout.alternate => "",
        'x' => "0x",
        'X' => "0X",
        'o' => "0o",
        'b' => "0b",
        _ => "",
    }
}

fn character(value: &Value, meter: &Rc<Meter>) -> Outcome<Text> {
    match value {
        Value::Str(text) if text.as_str().chars().count() == 1 => Ok(text.clone()),
        other => {
            let code = other.as_int().and_then(|code| u32::try_from(code).ok());
            let found = code.and_then(char::from_u32);
            let found = found.ok_or_else(|| Failure::failed("%c requires an int or a char"))?;
            Text::literal(meter, found.encode_utf8(&mut [0; 4]))
        }
    }
}

/// The digits of an integer without its sign.
fn magnitude(integer: i128, kind: char) -> String {
    let value = integer.unsigned_abs();
    match kind {
        'x' => format!("{value:x}"),
        'X' => format!("{value:X}"),
        'o' => format!("{value:o}"),
        'b' => format!("{value:b}"),
        _ => value.to_string(),
    }
}

/// C's `%e`, `%f` and `%g` of a number that is not negative.
fn float_digits(float: f64, kind: char, precision: Option<usize>, alternate: bool) -> String {
    let upper = kind.is_ascii_uppercase();
    let text = if float.is_nan() {
        "nan".to_owned()
    } else if float.is_infinite() {
        "inf".to_owned()
    } else {
        let digits = precision.unwrap_or(6).min(1000);
        match kind.to_ascii_lowercase() {
            'f' => format!("{float:.digits$}"),
            'e' => with_exponent(&format!("{float:.digits$e}")),
            _ => general(float, digits.max(1), alternate),
        }
    };
    if upper { text.to_uppercase() } else { text }
}

/// `1.5e-7` as C writes it: `1.5e-07`.
fn with_exponent(text: &str) -> String {
    let Some((mantissa, exponent)) = text.split_once('e') else { return text.to_owned() };
    let (sign, digits) = match exponent.strip_prefix('-') {
        Some(digits) => ('-', digits),
        None => ('+', exponent),
    };
    format!("{mantissa}e{sign}{digits:0>2}")
}

fn general(float: f64, digits: usize, alternate: bool) -> String {
    let scientific = format!("{float:.*e}", digits - 1);
    let exponent: i32 = scientific.split('e').nth(1).and_then(|e| e.parse().ok()).unwrap_or(0);
    let trim = |text: String| match text.contains('.') && !alternate {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    if exponent < -4 || exponent >= digits as i32 {
        let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
        return with_exponent(&format!("{}e{exponent}", trim(mantissa.to_owned())));
    }
    let after_point = (digits as i32 - 1 - exponent).max(0) as usize;
    trim(format!("{float:.after_point$}"))
}

/// `format.format(*positional, **named)`
pub(super) fn braces(
    format: &Text,
    positional: &[Value],
    named: &[(String, Value)],
) -> Outcome<Text> {
    let mut out = Builder::new(format.meter());
    out.safe = format.is_safe();
    let mut automatic = 0;
    expand(format, format.as_str(), positional, named, &mut automatic, 0, &mut out)?;
    Ok(out.finish())
}

fn expand(
    format: &Text,
    text: &str,
    positional: &[Value],
    named: &[(String, Value)],
    automatic: &mut usize,
    depth: usize,
    out: &mut Builder,
) -> Outcome<()> {
    let mut rest = text;
    while let Some(at) = rest.find(['{', '}']) {
        push_piece(format, &rest[..at], depth, out)?;
        let brace = &rest[at..=at];
        rest = &rest[at + 1..];
        if rest.starts_with(brace) {
            out.push(brace, false)?;
            rest = &rest[1..];
            continue;
        }
        if brace == "}" {
            return Err(Failure::failed("single '}' encountered in format string"));
        }
        if depth == 2 {
            return Err(Failure::failed("max string recursion exceeded"));
        }
        let end =
            closing(rest).ok_or_else(|| Failure::failed("expected '}' before end of string"))?;
        let field = &rest[..end];
        rest = &rest[end + 1..];
        let (field, spec) = field.split_once(':').unwrap_or((field, ""));
        let (field, conversion) = match field.split_once('!') {
            Some((field, conversion)) => (field, Some(conversion)),
            None => (field, None),
        };
        let mut value = field_value(field, positional, named, automatic)?;
        match conversion {
            Some("s") => value = Value::Str(to_text(&value, out.meter())?),
            Some("r" | "a") => {
                let mut text = Builder::new(out.meter());
                repr(&value, &mut text)?;
                value = Value::Str(text.finish());
            }
            None => {}
            Some(_) => return Err(Failure::failed("unknown conversion in format string")),
        }
        let mut inner = Builder::new(out.meter());
        expand(format, spec, positional, named, automatic, depth + 1, &mut inner)?;
        brace_field(&value, inner.as_str(), out)?;
    }
    push_piece(format, rest, depth, out)
}

/// Text of the format itself keeps where it came from; a specification inside is not printed.
fn push_piece(format: &Text, piece: &str, depth: usize, out: &mut Builder) -> Outcome<()> {
    match depth {
        0 => out.push_text(&format.part(piece)?),
        _ => out.push(piece, false),
    }
}

/// Where the brace that closes the field is.
fn closing(text: &str) -> Option<usize> {
    let mut open = 0;
    for (at, character) in text.char_indices() {
        match character {
            '{' => open += 1,
            '}' if open == 0 => return Some(at),
            '}' => open -= 1,
            _ => {}
        }
    }
    None
}

fn field_value(
    field: &str,
    positional: &[Value],
    named: &[(String, Value)],
    automatic: &mut usize,
) -> Outcome<Value> {
    let end = field.find(['.', '[']).unwrap_or(field.len());
    let (name, mut rest) = field.split_at(end);
    let missing = || Failure::failed(format!("no argument {name:?} for the format string"));
    let mut value = if name.is_empty() {
        *automatic += 1;
        positional.get(*automatic - 1).cloned()
    } else if let Ok(index) = name.parse::<usize>() {
        positional.get(index).cloned()
    } else {
        named.iter().find(|argument| argument.0 == name).map(|argument| argument.1.clone())
    }
    .ok_or_else(missing)?;
    while !rest.is_empty() {
        let found = if let Some(inside) = rest.strip_prefix('[') {
            let (key, after) = inside.split_once(']').ok_or_else(missing)?;
            rest = after;
            match key.parse::<i128>() {
                Ok(index) => item(&value, &Value::Int(index))?,
                Err(_) => value.get(key).cloned(),
            }
        } else {
            let inside = &rest[1..];
            let end = inside.find(['.', '[']).unwrap_or(inside.len());
            rest = &inside[end..];
            let name = &inside[..end];
            if name.starts_with('_') {
                return Err(Failure::failed(format!("access to attribute {name:?} is unsafe")));
            }
            attribute(&value, name)?
        };
        value = found.ok_or_else(missing)?;
    }
    Ok(value)
}

fn layout(spec: &str) -> Outcome<Layout> {
    let mut layout = Layout::default();
    let mut rest = spec;
    let mut characters = spec.chars();
    let (first, second) = (characters.next(), characters.next());
    let is_align = |c: Option<char>| c.is_some_and(|c| "<>=^".contains(c));
    if is_align(second) {
        (layout.fill, layout.align) = (first, second);
        rest = characters.as_str();
    } else if is_align(first) {
        layout.align = first;
        rest = &rest[1..];
    }
    if let Some(sign) = rest.chars().next().filter(|sign| "+- ".contains(*sign)) {
        layout.sign = Some(sign);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('#') {
        layout.alternate = true;
        rest = after;
    }
    if let Some(after) = rest.strip_prefix('0') {
        layout.zero = true;
        rest = after;
    }
    let (width, after) = leading_number(rest)?;
    layout.width = width.unwrap_or_default();
    rest = after;
    if let Some(mark) = rest.chars().next().filter(|mark| ",_".contains(*mark)) {
        layout.grouping = Some(mark);
        rest = &rest[1..];
    }
    if let Some(after) = rest.strip_prefix('.') {
        let (precision, after) = leading_number(after)?;
        layout.precision =
            Some(precision.ok_or_else(|| Failure::failed("format without precision"))?);
        rest = after;
    }
    let mut kinds = rest.chars();
    layout.kind = kinds.next();
    match kinds.next() {
        Some(_) => Err(Failure::failed(format!("invalid format specifier {spec:?}"))),
        None => Ok(layout),
    }
}

fn brace_field(value: &Value, spec: &str, out: &mut Builder) -> Outcome<()> {
    if spec.is_empty() {
        return super::write::print(value, out);
    }
    let mut layout = layout(spec)?;
    let unknown = |kind: char| {
        let found = value.type_name();
        Failure::failed(format!("unknown format code {kind:?} for object of type {found:?}"))
    };
    match value {
        Value::Int(_) | Value::Bool(_) | Value::Float(_) => {
            let kind =
                layout.kind.unwrap_or(if matches!(value, Value::Float(_)) { 'r' } else { 'd' });
            let integer = value.as_int();
            let float = value.as_float().unwrap_or_default();
            let negative = integer.map_or(float.is_sign_negative(), |integer| integer < 0);
            let digits = match (kind, integer) {
                ('d' | 'n', Some(integer)) => magnitude(integer, 'd'),
                ('x' | 'X' | 'o' | 'b', Some(integer)) => magnitude(integer, kind),
                ('c', Some(_)) => {
                    let text = character(value, out.meter())?;
                    return padded(&text, &layout, layout.align.unwrap_or('<'), out);
                }
                ('e' | 'E' | 'f' | 'F' | 'g' | 'G', _) => {
                    float_digits(float.abs(), kind, layout.precision, layout.alternate)
                }
                ('%', _) => float_digits(float.abs() * 100.0, 'f', layout.precision, false) + "%",
                ('r', None) => match layout.precision {
                    None => float_repr(float.abs()),
                    Some(precision) => {
                        let text = general(float.abs(), precision.max(1), false);
                        if text.contains(['.', 'e', 'n', 'i']) { text } else { text + ".0" }
                    }
                },
                (kind, _) => return Err(unknown(kind)),
            };
            number_field(negative, kind, &grouped(&digits, layout.grouping), &mut layout, out)
        }
        Value::Str(text) => match layout.kind {
            None | Some('s') => {
                if layout.zero {
                    layout.fill.get_or_insert('0');
                }
                let text = truncated(text, layout.precision)?;
                padded(&text, &layout, layout.align.unwrap_or('<'), out)
            }
            Some(kind) => Err(unknown(kind)),
        },
        other => {
            let found = other.type_name();
            let reason = format!("unsupported format string passed to {found}.__format__");
            Err(Failure::failed(reason))
        }
    }
}

fn number_field(
    negative: bool,
    kind: char,
    digits: &str,
    layout: &mut Layout,
    out: &mut Builder,
) -> Outcome<()> {
    if layout.zero && layout.align.is_none() {
        layout.align = Some('=');
        layout.fill.get_or_insert('0');
    }
    let sign = match (negative, layout.sign) {
        (true, _) => "-",
        (false, Some('+')) => "+",
        (false, Some(' ')) => " ",
        _ => "",
    };
    let prefix = prefix(kind, layout);
    let mut text = format!("{sign}{prefix}{digits}");
    if layout.align == Some('=') {
        let missing = layout.width.saturating_sub(text.len());
        let fill = layout.fill.unwrap_or(' ').to_string().repeat(missing);
        text = format!("{sign}{prefix}{fill}{digits}");
    }
    let text = Text::literal(out.meter(), &text)?;
    padded(&text, layout, layout.align.unwrap_or('>'), out)
}

/// `1234567.5` as `1,234,567.5`.
fn grouped(digits: &str, mark: Option<char>) -> String {
    let Some(mark) = mark else { return digits.to_owned() };
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    let mut text = String::new();
    for (at, digit) in digits[..end].chars().enumerate() {
        if at > 0 && (end - at) % 3 == 0 {
            text.push(mark);
        }
        text.push(digit);
    }
    text + &digits[end..]
}

/// Whether Python's `str.isprintable` holds.
pub(super) fn all_printable(text: &str) -> bool {
    text.chars().all(is_printable)
}

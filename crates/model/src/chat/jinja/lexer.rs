//! A template's source as tokens, by Jinja's rules of whitespace (`trim_blocks` and
//! `lstrip_blocks` are on, as in transformers).

use super::error::{Failure, Outcome};

#[derive(Clone, Debug, PartialEq)]
pub(super) enum Token {
    /// Text outside of tags.
    Raw(String),
    PrintBegin,
    PrintEnd,
    BlockBegin,
    BlockEnd,
    Name(String),
    Str(String),
    Int(i128),
    Float(f64),
    Operator(&'static str),
}

/// Longest first.
const OPERATORS: [&str; 26] = [
    "//", "**", "==", "!=", ">=", "<=", "+", "-", "/", "*", "%", "~", "[", "]", "(", ")", "{", "}",
    ">", "<", "=", ".", ":", "|", ",", ";",
];

struct Lexer<'s> {
    source: &'s str,
    at: usize,
    line: usize,
    tokens: Vec<(Token, usize)>,
    /// Whether the last tag ended a line.
    line_starting: bool,
}

/// All tokens with their lines (from 1).
pub(super) fn tokens(source: &str) -> Outcome<Vec<(Token, usize)>> {
    let mut source = source.replace("\r\n", "\n").replace('\r', "\n");
    // One newline at the end is not part of a template.
    if source.ends_with('\n') {
        source.pop();
    }
    let mut lexer =
        Lexer { source: &source, at: 0, line: 1, tokens: Vec::new(), line_starting: true };
    lexer.run()?;
    Ok(lexer.tokens)
}

impl<'s> Lexer<'s> {
    fn rest(&self) -> &'s str {
        &self.source[self.at..]
    }

    fn advance(&mut self, bytes: usize) {
        let passed = &self.source[self.at..self.at + bytes];
        self.line += passed.matches('\n').count();
        if let Some(last) = passed.bytes().last() {
            self.line_starting = last == b'\n';
        }
        self.at += bytes;
    }

    fn push(&mut self, token: Token) {
        self.tokens.push((token, self.line));
    }

    fn error(&self, reason: impl Into<String>) -> Failure {
        Failure::syntax(reason, self.line)
    }

    fn run(&mut self) -> Outcome<()> {
        while !self.rest().is_empty() {
            let rest = self.rest();
            let tag =
                rest.match_indices('{').find(|(at, _)| rest[at + 1..].starts_with(['{', '%', '#']));
            let Some((start, _)) = tag else {
                self.raw(rest, 0, false);
                return Ok(());
            };
            let kind = rest.as_bytes()[start + 1];
            let sign = rest[start + 2..].chars().next().filter(|sign| matches!(sign, '-' | '+'));
            self.raw(&rest[..start], 2 + usize::from(sign.is_some()), true);
            self.tokens_left_strip(sign, kind == b'{');
            match kind {
                b'#' => self.comment()?,
                b'%' if self.begins_raw() => self.raw_block()?,
                b'%' => self.tag("%}", Token::BlockBegin, Token::BlockEnd)?,
                _ => self.tag("}}", Token::PrintBegin, Token::PrintEnd)?,
            }
        }
        Ok(())
    }

    /// Adds the text before a tag as a token and passes the tag's opening of `opening` bytes.
    fn raw(&mut self, text: &str, opening: usize, before_tag: bool) {
        let starting = self.line_starting;
        self.push(Token::Raw(text.to_owned()));
        self.advance(text.len());
        // `tokens_left_strip` wants to know whether this text began a line.
        self.line_starting = starting;
        if before_tag {
            self.at += opening;
        }
    }

    /// Strips the end of the text before a tag.
    fn tokens_left_strip(&mut self, sign: Option<char>, print: bool) {
        let starting = self.line_starting;
        let Some((Token::Raw(text), _)) = self.tokens.last_mut() else { return };
        if sign == Some('-') {
            text.truncate(text.trim_end().len());
        } else if sign.is_none() && !print {
            let line = text.rfind('\n').map_or(0, |at| at + 1);
            if (line > 0 || starting) && text[line..].chars().all(char::is_whitespace) {
                text.truncate(line);
            }
        }
        if text.is_empty() {
            self.tokens.pop();
        }
    }

    /// Passes the end of a tag that `rest` begins with; a newline after it goes with it if `trim`.
    fn close(&mut self, end: &str, trim: bool) -> bool {
        let rest = self.rest();
        let stripped = |sign: char| rest.strip_prefix(sign).and_then(|it| it.strip_prefix(end));
        if let Some(after) = stripped('-') {
            self.advance(rest.len() - after.trim_start().len());
        } else if let Some(after) = stripped('+').filter(|_| trim) {
            self.advance(rest.len() - after.len());
        } else if let Some(after) = rest.strip_prefix(end) {
            let newline = usize::from(trim && after.starts_with('\n'));
            self.advance(rest.len() - after.len() + newline);
        } else {
            return false;
        }
        true
    }

    fn comment(&mut self) -> Outcome<()> {
        let Some(end) = self.rest().find("#}") else {
            return Err(self.error("a comment has no end"));
        };
        let signed = self.rest()[..end].ends_with(['-', '+']);
        self.advance(end - usize::from(signed));
        self.close("#}", true);
        Ok(())
    }

    fn begins_raw(&self) -> bool {
        let word = self.rest().trim_start().strip_prefix("raw").map(str::trim_start);
        word.is_some_and(|rest| rest.starts_with("%}") || rest.starts_with("-%}"))
    }

    fn raw_block(&mut self) -> Outcome<()> {
        let inside = self.rest().find("raw").unwrap_or(0) + 3;
        self.advance(inside);
        self.skip_space();
        self.close("%}", false);
        let rest = self.rest();
        let end = rest.match_indices("{%").find_map(|(at, _)| {
            let tag = &rest[at + 2..];
            let sign = tag.chars().next().filter(|sign| matches!(sign, '-' | '+'));
            let word = tag[usize::from(sign.is_some())..].trim_start().strip_prefix("endraw")?;
            let closing = word.trim_start().trim_start_matches(['-', '+']);
            closing.starts_with("%}").then(|| (at, sign, rest.len() - word.trim_start().len()))
        });
        let Some((at, sign, closing)) = end else {
            return Err(self.error("a raw block has no end"));
        };
        self.raw(&rest[..at], 0, false);
        self.tokens_left_strip(sign, false);
        self.advance(closing - at);
        self.close("%}", true);
        Ok(())
    }

    fn skip_space(&mut self) {
        let rest = self.rest();
        self.advance(rest.len() - rest.trim_start().len());
    }

    fn tag(&mut self, end: &str, begin: Token, finish: Token) -> Outcome<()> {
        self.push(begin);
        let mut brackets: Vec<char> = Vec::new();
        loop {
            self.skip_space();
            if self.rest().is_empty() {
                return Err(self.error(format!("a tag has no {end:?}")));
            }
            if brackets.is_empty() {
                let line = self.line;
                if self.close(end, end == "%}") {
                    self.tokens.push((finish, line));
                    return Ok(());
                }
            }
            self.token(&mut brackets)?;
        }
    }

    fn token(&mut self, brackets: &mut Vec<char>) -> Outcome<()> {
        let rest = self.rest();
        let first = rest.chars().next().unwrap_or_default();
        if first == '"' || first == '\'' {
            return self.string(first);
        }
        if first.is_ascii_digit() {
            return self.number();
        }
        if first.is_alphanumeric() || first == '_' {
            let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            self.push(Token::Name(rest[..end].to_owned()));
            self.advance(end);
            return Ok(());
        }
        let Some(operator) = OPERATORS.iter().find(|operator| rest.starts_with(**operator)) else {
            return Err(self.error(format!("unexpected character {first:?}")));
        };
        match first {
            '(' | '[' | '{' => brackets.push(first),
            ')' | ']' | '}' => {
                let open = match first {
                    ')' => '(',
                    ']' => '[',
                    _ => '{',
                };
                if brackets.pop() != Some(open) {
                    return Err(self.error(format!("unexpected {first:?}")));
                }
            }
            _ => {}
        }
        self.push(Token::Operator(operator));
        self.advance(operator.len());
        Ok(())
    }

    fn number(&mut self) -> Outcome<()> {
        let rest = self.rest();
        let bytes = rest.as_bytes();
        let digits = |from: usize| {
            let digit = |c: char| c.is_ascii_digit() || c == '_';
            from + rest[from..].find(|c| !digit(c)).unwrap_or(rest.len() - from)
        };
        let radix = match rest.get(..2) {
            Some("0x" | "0X") => 16,
            Some("0o" | "0O") => 8,
            Some("0b" | "0B") => 2,
            _ => 10,
        };
        let too_large = |lexer: &Self| lexer.error("a number is too large");
        if radix != 10 {
            let end = rest[2..].find(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            let end = end.map_or(rest.len(), |end| end + 2);
            let value = i128::from_str_radix(&rest[2..end].replace('_', ""), radix);
            self.push(Token::Int(value.map_err(|_| too_large(self))?));
            self.advance(end);
            return Ok(());
        }
        let after_dot = matches!(self.tokens.last(), Some((Token::Operator("."), _)));
        let whole = digits(0);
        let mut end = whole;
        if !after_dot {
            if bytes.get(end) == Some(&b'.') && bytes.get(end + 1).is_some_and(u8::is_ascii_digit) {
                end = digits(end + 1);
            }
            if matches!(bytes.get(end), Some(b'e' | b'E')) {
                let sign = usize::from(matches!(bytes.get(end + 1), Some(b'+' | b'-')));
                if bytes.get(end + 1 + sign).is_some_and(u8::is_ascii_digit) {
                    end = digits(end + 1 + sign);
                }
            }
        }
        let text = rest[..end].replace('_', "");
        let token = if end == whole {
            Token::Int(text.parse().map_err(|_| too_large(self))?)
        } else {
            Token::Float(text.parse().map_err(|_| too_large(self))?)
        };
        self.push(token);
        self.advance(end);
        Ok(())
    }

    /// A string, its escapes read as Python reads them.
    fn string(&mut self, quote: char) -> Outcome<()> {
        let body = &self.rest()[1..];
        let mut text = String::new();
        let mut characters = body.char_indices();
        while let Some((at, character)) = characters.next() {
            if character == quote {
                self.push(Token::Str(text));
                self.advance(at + 2);
                return Ok(());
            }
            if character != '\\' {
                text.push(character);
                continue;
            }
            let escape = &body[at + 1..];
            let used = unescape(escape, &mut text).map_err(|reason| self.error(reason))?;
            while characters.as_str().len() > escape.len() - used {
                characters.next();
            }
        }
        Err(self.error("a string has no end"))
    }
}

/// Appends what the escape (without its backslash) stands for, and says how many bytes it has.
fn unescape(escape: &str, text: &mut String) -> Result<usize, String> {
    let first = escape.chars().next().ok_or("a string has no end")?;
    let simple = match first {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'a' => '\u{7}',
        'b' => '\u{8}',
        'f' => '\u{c}',
        'v' => '\u{b}',
        '\\' | '\'' | '"' => first,
        '\n' => return Ok(1),
        'x' => return code(escape, 2, text),
        'u' => return code(escape, 4, text),
        'U' => return code(escape, 8, text),
        'N' => return named(escape, text),
        '0'..='7' => {
            let digits = escape.bytes().take(3).take_while(|b| (b'0'..=b'7').contains(b)).count();
            let value = u32::from_str_radix(&escape[..digits], 8).unwrap_or_default();
            text.extend(char::from_u32(value));
            return Ok(digits);
        }
        // Python keeps what it does not know.
        _ => {
            text.extend(['\\', first]);
            return Ok(first.len_utf8());
        }
    };
    text.push(simple);
    Ok(first.len_utf8())
}

fn code(escape: &str, digits: usize, text: &mut String) -> Result<usize, String> {
    let bad = || format!("\\{} needs {digits} hexadecimal digits", &escape[..1]);
    let hexadecimal = escape.get(1..=digits).filter(|it| it.bytes().all(|b| b.is_ascii_hexdigit()));
    let value = hexadecimal.and_then(|it| u32::from_str_radix(it, 16).ok()).ok_or_else(bad)?;
    // Python would keep half of a surrogate pair; it has no UTF-8.
    text.push(char::from_u32(value).unwrap_or(char::REPLACEMENT_CHARACTER));
    Ok(1 + digits)
}

fn named(escape: &str, text: &mut String) -> Result<usize, String> {
    let name = escape[1..].strip_prefix('{').and_then(|it| it.split_once('}')).map(|it| it.0);
    let name = name.ok_or("\\N needs a name in braces")?;
    let character = unicode_names2::character(name);
    text.push(character.ok_or_else(|| format!("no character is named {name:?}"))?);
    Ok(name.len() + 3)
}

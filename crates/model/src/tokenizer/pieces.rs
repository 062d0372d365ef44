//! What each token id stands for in bytes, and how ids become text again.
//!
//! Byte-level vocabularies spell bytes as printable characters (GPT-2's table); SentencePiece
//! vocabularies spell a space as `▁` and rare bytes as `<0xNN>`. Both are undone once, at load, so
//! that decoding is a concatenation of bytes.

use serde_json::Value;

use super::TokenizerError;

/// How the text of a token spells bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Spelling {
    pub(super) alphabet: Alphabet,
    /// How many spaces are dropped at the very start of a decoded text, because encoding added
    /// them.
    pub(super) leading_spaces: usize,
}

/// The characters that a vocabulary writes its bytes in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Alphabet {
    /// GPT-2's printable stand-ins, one character a byte.
    ByteLevel,
    /// UTF-8 in which `space` (if any) stands for a space, and, where `byte_pieces`, `<0xNN>` for a
    /// byte.
    Plain { space: Option<String>, byte_pieces: bool },
}

impl Spelling {
    /// SentencePiece's: `▁` and `<0xNN>`.
    pub(super) fn sentence_piece(leading_spaces: usize) -> Self {
        let alphabet = Alphabet::Plain { space: Some("▁".into()), byte_pieces: true };
        Self { alphabet, leading_spaces }
    }

    /// Reads the `decoder` of a `tokenizer.json`.
    pub(super) fn from_decoder(decoder: &Value) -> Result<Self, TokenizerError> {
        let mut spelling = Spelling {
            alphabet: Alphabet::Plain { space: None, byte_pieces: false },
            leading_spaces: 0,
        };
        spelling.apply(decoder)?;
        Ok(spelling)
    }

    fn apply(&mut self, decoder: &Value) -> Result<(), TokenizerError> {
        let unsupported = || TokenizerError::UnsupportedDecoder { found: decoder.to_string() };
        match (decoder["type"].as_str(), &mut self.alphabet) {
            (Some("Sequence"), _) => {
                for inner in decoder["decoders"].as_array().ok_or_else(unsupported)? {
                    self.apply(inner)?;
                }
            }
            (Some("ByteLevel"), alphabet) => *alphabet = Alphabet::ByteLevel,
            (Some("ByteFallback"), Alphabet::Plain { byte_pieces, .. }) => *byte_pieces = true,
            (Some("Fuse"), _) => {}
            (Some("Replace"), Alphabet::Plain { space, .. }) if decoder["content"] == " " => {
                let pattern = decoder["pattern"]["String"].as_str().ok_or_else(unsupported)?;
                *space = Some(pattern.to_owned());
            }
            (Some("Metaspace"), Alphabet::Plain { space, .. }) => {
                *space = Some(decoder["replacement"].as_str().unwrap_or("▁").to_owned());
                let prefixed = match decoder["prepend_scheme"].as_str() {
                    Some(scheme) => scheme != "never",
                    None => decoder["add_prefix_space"].as_bool().unwrap_or(true),
                };
                self.leading_spaces = usize::from(prefixed);
            }
            (Some("Strip"), _) if decoder["content"] == " " && decoder["stop"] == 0 => {
                self.leading_spaces = decoder["start"].as_u64().ok_or_else(unsupported)? as usize;
            }
            _ => return Err(unsupported()),
        }
        Ok(())
    }

    /// Appends the bytes that the vocabulary entry `token` stands for.
    pub(super) fn append(&self, token: &str, bytes: &mut Vec<u8>) {
        match &self.alphabet {
            Alphabet::ByteLevel => {
                let start = bytes.len();
                for character in token.chars() {
                    let Some(byte) = byte_level_byte(character) else {
                        // A token that is not spelled in the byte alphabet stands for itself.
                        bytes.truncate(start);
                        bytes.extend_from_slice(token.as_bytes());
                        return;
                    };
                    bytes.push(byte);
                }
            }
            Alphabet::Plain { space, byte_pieces } => {
                if let Some(byte) = byte_piece(token).filter(|_| *byte_pieces) {
                    bytes.push(byte);
                    return;
                }
                match space {
                    Some(space) => bytes.extend_from_slice(token.replace(space, " ").as_bytes()),
                    None => bytes.extend_from_slice(token.as_bytes()),
                }
            }
        }
    }
}

/// The byte of a piece spelled `<0xNN>`.
pub(super) fn byte_piece(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    hexadecimal.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// The byte that a character of GPT-2's byte alphabet stands for: printable Latin-1 stands for
/// itself, and the 68 other bytes are, in order, the characters from U+0100 on.
fn byte_level_byte(character: char) -> Option<u8> {
    let printable = |byte: u32| {
        (0x21..=0x7e).contains(&byte)
            || (0xa1..=0xac).contains(&byte)
            || (0xae..=0xff).contains(&byte)
    };
    match character as u32 {
        code if printable(code) => Some(code as u8),
        code @ 0x100..=0x120 => Some((code - 0x100) as u8),
        code @ 0x121..=0x142 => Some((code - 0x121 + 0x7f) as u8),
        0x143 => Some(0xad),
        _ => None,
    }
}

/// What a token id is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// No token has this id (a hole in the vocabulary).
    Missing,
    /// A piece of text.
    Text,
    /// A control token, such as the end of a turn: skipped where special tokens are skipped.
    Special,
}

/// The bytes of every token, in one arena.
#[derive(Debug)]
pub(super) struct Pieces {
    bytes: Vec<u8>,
    /// Exclusive end of each token's bytes; its start is the end of the one before.
    ends: Vec<u32>,
    kinds: Vec<Kind>,
    pub(super) leading_spaces: usize,
}

impl Pieces {
    pub(super) fn new(tokens: usize, leading_spaces: usize) -> Self {
        let (ends, kinds) = (Vec::with_capacity(tokens), Vec::with_capacity(tokens));
        Self { bytes: Vec::with_capacity(tokens * 8), ends, kinds, leading_spaces }
    }

    /// Adds the next id; `write` appends its bytes.
    pub(super) fn push(&mut self, kind: Kind, write: impl FnOnce(&mut Vec<u8>)) {
        write(&mut self.bytes);
        self.ends.push(self.bytes.len() as u32);
        self.kinds.push(kind);
    }

    pub(super) fn len(&self) -> usize {
        self.kinds.len()
    }

    pub(super) fn kind(&self, id: u32) -> Kind {
        self.kinds.get(id as usize).copied().unwrap_or(Kind::Missing)
    }

    /// The bytes of `id`; empty for an id that has no token.
    pub(super) fn bytes(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else { return &[] };
        let start = if id == 0 { 0 } else { self.ends[id - 1] };
        &self.bytes[start as usize..end as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn byte_alphabet_covers_every_byte_once() {
        let mut seen = [0; 256];
        for code in 0..0x300 {
            if let Some(byte) = char::from_u32(code).and_then(byte_level_byte) {
                seen[usize::from(byte)] += 1;
            }
        }
        assert_eq!(seen, [1; 256]);
        assert_eq!(byte_level_byte('Ġ'), Some(b' '));
        assert_eq!(byte_level_byte('Ċ'), Some(b'\n'));
    }

    #[test]
    fn byte_pieces() {
        assert_eq!(byte_piece("<0x0A>"), Some(10));
        assert_eq!(byte_piece("<0xA>"), None);
        assert_eq!(byte_piece("<0x+1>"), None);
        assert_eq!(byte_piece("0x0A"), None);
    }
}

//! Token ids to text as they arrive.

use std::sync::Arc;

use super::pieces::{Kind, Pieces};

/// Turns token ids into text one by one: each piece of text is given out as soon as its characters
/// are complete, and all pieces together equal [`super::Tokenizer::decode`] of all the ids.
///
/// Bytes that are not UTF-8 become U+FFFD, as in [`String::from_utf8_lossy`].
#[derive(Clone, Debug)]
pub struct DecodeStream {
    pieces: Arc<Pieces>,
    skip_special: bool,
    /// Spaces at the start of the text that still have to be dropped.
    leading_spaces: usize,
    /// The bytes of a character that is not complete yet: at most 3.
    pending: Vec<u8>,
}

impl DecodeStream {
    pub(super) fn new(pieces: Arc<Pieces>, skip_special: bool) -> Self {
        let leading_spaces = pieces.leading_spaces;
        Self { pieces, skip_special, leading_spaces, pending: Vec::new() }
    }

    /// The same stream for text that follows other text: the space before its first word stays.
    #[must_use]
    pub fn continuing(mut self) -> Self {
        self.leading_spaces = 0;
        self
    }

    /// Takes the next token; returns the text that it completes, if any.
    pub fn push(&mut self, token: u32) -> Option<String> {
        if self.skip_special && self.pieces.kind(token) == Kind::Special {
            return None;
        }
        let mut bytes = self.pieces.bytes(token);
        while self.leading_spaces > 0 && !bytes.is_empty() {
            match bytes.strip_prefix(b" ") {
                Some(rest) => {
                    bytes = rest;
                    self.leading_spaces -= 1;
                }
                None => self.leading_spaces = 0,
            }
        }
        self.pending.extend_from_slice(bytes);
        let text = self.take_complete();
        (!text.is_empty()).then_some(text)
    }

    /// Ends the stream: a character that stayed incomplete is given out as U+FFFD. The stream then
    /// starts anew, as one that continues.
    pub fn flush(&mut self) -> Option<String> {
        self.leading_spaces = 0;
        let rest = std::mem::take(&mut self.pending);
        (!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned())
    }

    /// Removes all complete (or hopeless) characters from `pending` and returns them.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let mut taken = 0;
        loop {
            let rest = &self.pending[taken..];
            let error = match std::str::from_utf8(rest) {
                Ok(valid) => {
                    text.push_str(valid);
                    taken = self.pending.len();
                    break;
                }
                Err(error) => error,
            };
            let valid = error.valid_up_to();
            text.push_str(std::str::from_utf8(&rest[..valid]).unwrap_or_default());
            taken += valid;
            let Some(invalid) = error.error_len() else { break };
            text.push(char::REPLACEMENT_CHARACTER);
            taken += invalid;
        }
        self.pending.drain(..taken);
        text
    }
}

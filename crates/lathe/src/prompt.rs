//! What the caller typed, as token ids.

use anyhow::Error;
use lathe_model::Model;
use lathe_model::chat::Message;
use lathe_model::tokenizer::Tokenizer;

use crate::conversation::template_of;
use crate::output::{InputContext, bad_input};
use crate::session::tokenizer_of;

/// The ids of `1,2,3`.
pub fn parse_ids(text: &str) -> Result<Vec<u32>, Error> {
    let parts = text.split(',').map(str::trim);
    let ids: Result<Vec<u32>, Error> = parts
        .map(|part| {
            part.parse().map_err(|_| {
                bad_input(format!("--prompt-ids: {part:?} found, expected token ids as in 1,2,3"))
            })
        })
        .collect();
    ids
}

/// The conversation as the model wants it: its chat template, up to where its answer begins.
/// Control tokens that a user typed stay text.
pub fn encode_chat(model: &Model, messages: &[Message]) -> Result<Vec<u32>, Error> {
    let tokenizer = tokenizer_of(model)?;
    template_of(model)?.encode(tokenizer, messages, true, serde_json::Value::Null).bad_input()
}

/// A text for the model to continue. It is the caller's own prompt, so names of control tokens in
/// it are those tokens; what begins every sequence of this model is added unless it is there.
pub fn encode_raw(model: &Model, text: &str) -> Result<Vec<u32>, Error> {
    let tokenizer = tokenizer_of(model)?;
    let mut tokens = tokenizer.encode_rendered(text).bad_input()?;
    let beginning = tokenizer.frame().beginning;
    let added = tokenizer.encode("", true).bad_input()?.first().copied();
    if added.is_some() && added == beginning && tokens.first().copied() != beginning {
        tokens.splice(0..0, beginning);
    }
    Ok(tokens)
}

/// The tokens of a text to score. Nothing is added, and names of control tokens in the text are
/// those tokens, as with Hugging Face's `tokenizer(text, add_special_tokens=False)`.
pub fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, Error> {
    tokenizer.encode_rendered(text).bad_input()
}

/// The conversation of one question.
pub fn question(system: Option<&str>, text: &str) -> Vec<Message> {
    let system = system.map(|system| Message::new("system", system));
    system.into_iter().chain([Message::new("user", text)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids() {
        assert_eq!(parse_ids("1, 2,3").expect("ids"), [1, 2, 3]);
        for bad in ["", "1,", "a", "-1", "4294967296", "1.5"] {
            assert!(parse_ids(bad).is_err(), "{bad}");
        }
    }
}

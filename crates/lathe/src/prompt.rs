//! What the caller typed, as token ids.

use anyhow::Error;
use lathe_model::Model;
use lathe_model::chat::Message;

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

/// A text for the model to continue, framed as its tokenizer frames texts.
pub fn encode_raw(model: &Model, text: &str) -> Result<Vec<u32>, Error> {
    tokenizer_of(model)?.encode(text, true).bad_input()
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

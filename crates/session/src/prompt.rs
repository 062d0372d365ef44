//! Texts and conversations as token ids.

use lathe_model::Model;
use lathe_model::chat::Message;
use lathe_model::tokenizer::Tokenizer;

use crate::error::SessionError;
use crate::text::{template_of, tokenizer_of};

/// The conversation in the model's chat template, up to the point where the answer begins. Control
/// tokens in a user's text stay text.
///
/// # Errors
/// If the model has no tokenizer or template, or the template refuses the conversation.
pub fn encode_chat(model: &Model, messages: &[Message]) -> Result<Vec<u32>, SessionError> {
    let tokenizer = tokenizer_of(model)?;
    Ok(template_of(model)?.encode(tokenizer, messages, true, serde_json::Value::Null)?)
}

/// The ids of a text for the model to continue. It is the caller's own prompt, so names of control
/// tokens in it become those tokens. The model's beginning-of-sequence token is added, unless the
/// text has it.
///
/// # Errors
/// If the model has no tokenizer, or the text cannot be encoded.
pub fn encode_raw(model: &Model, text: &str) -> Result<Vec<u32>, SessionError> {
    let tokenizer = tokenizer_of(model)?;
    let mut tokens = tokenizer.encode_rendered(text)?;
    let beginning = tokenizer.added_beginning()?;
    if beginning.is_some() && tokens.first().copied() != beginning {
        tokens.splice(0..0, beginning);
    }
    Ok(tokens)
}

/// Whether a text for scoring or calibration begins with the beginning-of-sequence token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Bos {
    /// If the tokenizer adds it to texts by default.
    #[default]
    Auto,
    /// Always.
    Yes,
    /// Never.
    No,
}

/// The token to put before a text, by `bos`.
///
/// # Errors
/// If a token is asked for and the tokenizer has none.
pub fn text_beginning(tokenizer: &Tokenizer, bos: Bos) -> Result<Option<u32>, SessionError> {
    match (bos, tokenizer.frame().beginning) {
        (Bos::No, _) => Ok(None),
        (Bos::Auto, _) => Ok(tokenizer.added_beginning()?),
        (Bos::Yes, None) => Err(SessionError::NoBeginning),
        (Bos::Yes, beginning) => Ok(beginning),
    }
}

/// The tokens of a text to score. Nothing is added. Names of control tokens in the text become
/// those tokens, as with Hugging Face's `tokenizer(text, add_special_tokens=False)`.
///
/// # Errors
/// If the text cannot be encoded.
pub fn encode_text(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>, SessionError> {
    Ok(tokenizer.encode_rendered(text)?)
}

/// A conversation of one question.
pub fn question(system: Option<&str>, text: &str) -> Vec<Message> {
    let system = system.map(|system| Message::new("system", system));
    system.into_iter().chain([Message::new("user", text)]).collect()
}

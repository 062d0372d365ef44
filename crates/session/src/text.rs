//! The tokenizer and the chat template of a model, with typed errors if it has none.

use lathe_engine::TextDecoder;
use lathe_model::Model;
use lathe_model::chat::ChatTemplate;
use lathe_model::tokenizer::Tokenizer;

use crate::error::SessionError;

/// The model's tokenizer.
///
/// # Errors
/// [`SessionError::NoTokenizer`], or [`SessionError::Text`] if it is damaged.
pub fn tokenizer_of(model: &Model) -> Result<&Tokenizer, SessionError> {
    let missing = || SessionError::NoTokenizer { name: model.name.clone() };
    model.tokenizer.as_ref().ok_or_else(|| damaged(model).unwrap_or_else(missing))
}

/// The model's chat template.
///
/// # Errors
/// [`SessionError::NoChatTemplate`], or [`SessionError::Text`] if it is damaged.
pub fn template_of(model: &Model) -> Result<&ChatTemplate, SessionError> {
    let missing = || SessionError::NoChatTemplate { name: model.name.clone() };
    model.chat_template.as_ref().ok_or_else(|| damaged(model).unwrap_or_else(missing))
}

/// Turns the tokens of one answer into text, without control tokens.
pub fn decoder(tokenizer: &Tokenizer) -> Box<dyn TextDecoder> {
    Box::new(tokenizer.decode_stream(true))
}

fn damaged(model: &Model) -> Option<SessionError> {
    let problem = model.text_problem.as_ref()?.to_string();
    Some(SessionError::Text { name: model.name.clone(), problem })
}

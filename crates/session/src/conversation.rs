//! A conversation, as messages and as the token ids that the KV cache holds.
//!
//! Each turn's prompt is the whole conversation. The ids of its beginning are kept as they were
//! computed before, because the tokenizer may encode an answer's text differently. So the engine
//! finds them in its cache and computes only the new words.

use lathe_model::Model;
use lathe_model::chat::{self, ChatTemplate, Message};
use lathe_model::tokenizer::Tokenizer;
use serde_json::Value;

use crate::error::SessionError;
use crate::text::{template_of, tokenizer_of};

/// The messages, and the part of them that the cache holds.
#[derive(Debug, Default)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
    /// The text of the last prompt with its answer.
    known_text: String,
    known_ids: Vec<u32>,
}

/// A prompt that waits for its answer.
#[derive(Debug)]
pub struct Prompt {
    /// Token ids of the whole conversation, up to where the answer begins.
    pub ids: Vec<u32>,
    /// Turns that were dropped to make room.
    pub dropped: usize,
    text: String,
}

impl Conversation {
    /// A conversation without turns.
    pub fn new(system: Option<String>) -> Self {
        Self { system, ..Self::default() }
    }

    /// Drops everything but the system message.
    pub fn clear(&mut self) {
        *self = Self::new(self.system.take());
    }

    /// Changes the system message, which starts a new conversation.
    pub fn set_system(&mut self, system: Option<String>) {
        *self = Self::new(system);
    }

    /// The system message.
    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    /// All messages in order.
    pub fn messages(&self) -> Vec<Message> {
        let system = self.system.iter().map(|text| Message::new("system", text.as_str()));
        system.chain(self.turns.iter().cloned()).collect()
    }

    /// Messages other than the system message.
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Adds the user's message and makes the prompt. Drops the oldest turns until the prompt leaves
    /// `answer_tokens` of `context` free. After an error the conversation is unchanged.
    ///
    /// # Errors
    /// If the model has no tokenizer or template, the template refuses the conversation, or the
    /// message alone does not fit.
    pub fn ask(
        &mut self,
        model: &Model,
        text: &str,
        context: usize,
        answer_tokens: usize,
    ) -> Result<Prompt, SessionError> {
        let tokenizer = tokenizer_of(model)?;
        let template = template_of(model)?;
        let room = context.saturating_sub(answer_tokens.min(context / 4).max(1));
        let before = self.turns.len();
        self.turns.push(Message::new("user", text));
        let mut dropped = 0;
        loop {
            match self.prompt(tokenizer, template, dropped) {
                Ok(prompt) if prompt.ids.len() <= room => {
                    self.turns.drain(..dropped);
                    return Ok(prompt);
                }
                // A question and its answer are dropped together.
                Ok(_) if dropped + 2 < self.turns.len() => dropped += 2,
                Ok(prompt) => {
                    self.turns.truncate(before);
                    let tokens = prompt.ids.len();
                    return Err(SessionError::MessageTooLong { tokens, context });
                }
                Err(error) => {
                    self.turns.truncate(before);
                    return Err(error);
                }
            }
        }
    }

    fn prompt(
        &self,
        tokenizer: &Tokenizer,
        template: &ChatTemplate,
        dropped: usize,
    ) -> Result<Prompt, SessionError> {
        let mut messages = self.messages();
        let first = messages.len() - self.turns.len();
        messages.drain(first..first + dropped);
        // Text that a user types never becomes a control token.
        let prompt = template.prompt(&messages, true, Value::Null)?;
        let whole = prompt.encode(tokenizer)?;
        let ids = self.continued(tokenizer, &prompt, &whole).unwrap_or(whole);
        Ok(Prompt { ids, dropped, text: prompt.text().to_owned() })
    }

    /// The ids that the cache holds, followed by those of the new text in `prompt`. `None` if
    /// `prompt` does not continue the known text, or if the ids decode to another text than
    /// `whole`, the encoding of the whole prompt.
    fn continued(
        &self,
        tokenizer: &Tokenizer,
        prompt: &chat::Prompt,
        whole: &[u32],
    ) -> Option<Vec<u32>> {
        let rest = prompt.after(&self.known_text).filter(|_| !self.known_ids.is_empty())?;
        let rest = rest.encode(tokenizer).ok()?;
        let ids = [self.known_ids.as_slice(), &rest].concat();
        let same = tokenizer.decode(&ids, false).ok()? == tokenizer.decode(whole, false).ok()?;
        same.then_some(ids)
    }

    /// Adds the answer to `prompt`: its text, and its ids without the token that ended it. An empty
    /// answer removes the question.
    pub fn answer(&mut self, prompt: Prompt, text: &str, ids: &[u32]) {
        if ids.is_empty() {
            self.turns.pop();
            return;
        }
        self.turns.push(Message::new("assistant", text));
        self.known_text = prompt.text + text;
        self.known_ids = prompt.ids;
        self.known_ids.extend_from_slice(ids);
    }
}

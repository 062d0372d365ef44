//! A conversation as messages and as the token ids that the KV cache knows it by.
//!
//! Each turn's prompt is the whole conversation. Its beginning is kept as the very ids that were
//! computed before (an answer need not be spelt as the tokenizer would spell it), so that the
//! engine finds them in its cache and only the new words are computed.

use lathe_model::Model;
use lathe_model::chat::{self, ChatTemplate, Message};
use lathe_model::tokenizer::Tokenizer;
use serde_json::Value;

use crate::error::SessionError;
use crate::text::{template_of, tokenizer_of};

/// What was said, and what of it the cache holds.
#[derive(Debug, Default)]
pub struct Conversation {
    system: Option<String>,
    turns: Vec<Message>,
    /// The last prompt with its answer, as text and as ids.
    known_text: String,
    known_ids: Vec<u32>,
}

/// A prompt that waits for its answer.
#[derive(Debug)]
pub struct Prompt {
    /// Token ids of the whole conversation, up to where the answer begins.
    pub ids: Vec<u32>,
    /// Turns that were forgotten to make room.
    pub dropped: usize,
    text: String,
}

impl Conversation {
    /// A new one.
    pub fn new(system: Option<String>) -> Self {
        Self { system, ..Self::default() }
    }

    /// Forgets everything but the system message.
    pub fn clear(&mut self) {
        *self = Self::new(self.system.take());
    }

    /// Changes the system message, which begins the conversation anew.
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

    /// Messages besides the system's.
    pub fn turns(&self) -> usize {
        self.turns.len()
    }

    /// Adds what the user said and makes the prompt. The oldest turns are forgotten until the
    /// prompt leaves `answer_tokens` of `context` free. If it fails the conversation is as before.
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
                // A question and its answer go together.
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
        // What people type never becomes a control token.
        let prompt = template.prompt(&messages, true, Value::Null)?;
        let whole = prompt.encode(tokenizer)?;
        let ids = self.continued(tokenizer, &prompt, &whole).unwrap_or(whole);
        Ok(Prompt { ids, dropped, text: prompt.text().to_owned() })
    }

    /// The ids that the cache knows, followed by those of what is new in `prompt`; `None` if it
    /// does not continue what is known, or would be spelt otherwise.
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

    /// Adds the answer to `prompt`: its text, and its ids without the token that ended it. An
    /// answer that has not begun takes the question back.
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

//! One answer: a request through the engine, its text while it comes, and its times.

use std::time::Instant;

use lathe_engine::{Engine, Event, FinishReason, Request, TextDecoder};

use crate::error::SessionError;
use crate::startup::milliseconds;

/// The result of a request.
#[derive(Debug, Clone)]
pub struct Generation {
    /// The whole text.
    pub text: String,
    /// All tokens, a stop token included.
    pub tokens: Vec<u32>,
    /// The reason why it ended.
    pub reason: FinishReason,
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Prompt tokens that were in the cache already.
    pub cached_tokens: usize,
    /// Milliseconds from the request to the first token.
    pub ttft_ms: f64,
    /// Milliseconds from the first token to the last.
    pub decode_ms: f64,
}

impl Generation {
    /// Tokens per second after the first; `None` with fewer than two tokens.
    pub fn decode_tokens_per_s(&self) -> Option<f64> {
        let steps = self.tokens.len().checked_sub(1).filter(|steps| *steps > 0)?;
        Some(steps as f64 / (self.decode_ms / 1000.0))
    }

    /// The reason as the API spells it.
    pub fn reason_name(&self) -> &'static str {
        match self.reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
            FinishReason::InvalidLogits => "invalid_logits",
        }
    }
}

/// Runs one request to its end, or until `stopped` returns true. `on_text` gets the text as soon as
/// it is final. If `on_text` fails, the request is cancelled.
///
/// # Errors
/// If the engine refuses the request or fails, or `on_text` fails.
pub fn generate<E: From<SessionError>>(
    engine: &mut Engine,
    request: Request,
    decoder: Option<Box<dyn TextDecoder>>,
    stopped: impl Fn() -> bool,
    mut on_text: impl FnMut(&str) -> Result<(), E>,
) -> Result<Generation, E> {
    let start = Instant::now();
    let prompt_tokens = request.prompt.len();
    let id = engine.add(request, decoder).map_err(SessionError::from)?;
    let mut generation = Generation {
        text: String::new(),
        tokens: Vec::new(),
        reason: FinishReason::Cancelled,
        prompt_tokens,
        cached_tokens: 0,
        ttft_ms: 0.0,
        decode_ms: 0.0,
    };
    let mut running = true;
    while running {
        if stopped() {
            engine.cancel(id);
        }
        let events = engine.step().map_err(|error| {
            engine.cancel(id);
            SessionError::from(error)
        })?;
        // Requests of other callers may run at the same time.
        for event in events.into_iter().filter(|event| event.request() == id) {
            match event {
                Event::Token { token, text, .. } => {
                    if generation.tokens.is_empty() {
                        generation.ttft_ms = milliseconds(start);
                    }
                    generation.decode_ms = milliseconds(start) - generation.ttft_ms;
                    generation.tokens.push(token);
                    generation.text.push_str(&text);
                    if let Err(error) = on_text(&text) {
                        engine.cancel(id);
                        let _ = engine.step();
                        return Err(error);
                    }
                }
                Event::Finished { reason, cached_tokens, .. } => {
                    running = false;
                    generation.reason = reason;
                    generation.cached_tokens = cached_tokens;
                }
            }
        }
    }
    Ok(generation)
}

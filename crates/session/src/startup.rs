//! Where the time from the process's start to the first token goes.

use std::time::Instant;

use serde::Serialize;

/// Times of the steps to the first token, in milliseconds. Their sum is a little less than the
/// total, which has the command line and the prompt's encoding too.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Startup {
    /// The files mapped and checked, and what the model is.
    pub open_ms: f64,
    /// The tokenizer built.
    pub tokenizer_ms: f64,
    /// The weights laid out for the device; cache and buffers.
    pub pack_ms: f64,
    /// From the request to the first token.
    pub first_token_ms: f64,
    /// From the process's start (the loader, a millisecond, not counted) to the first token.
    pub total_ms: f64,
}

impl Startup {
    /// The first token came `ttft_ms` after the request, which was made `before_ms` after the
    /// process's start.
    pub fn first_token(&mut self, before_ms: f64, ttft_ms: f64) {
        self.first_token_ms = ttft_ms;
        self.total_ms = before_ms + ttft_ms;
    }
}

/// Milliseconds since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

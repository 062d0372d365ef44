//! The parts of the time from the process's start to the first token.

use std::time::Instant;

use serde::Serialize;

/// The times of the steps to the first token, in milliseconds. Their sum is a little less than the
/// total, which also contains the command line and the encoding of the prompt.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Startup {
    /// Mapping and checking the files, and reading the model's description.
    pub open_ms: f64,
    /// Building the tokenizer.
    pub tokenizer_ms: f64,
    /// Packing the weights for the device, and allocating cache and buffers.
    pub pack_ms: f64,
    /// From the request to the first token.
    pub first_token_ms: f64,
    /// From the process's start to the first token. The loader's time (about a millisecond) is not
    /// included.
    pub total_ms: f64,
}

impl Startup {
    /// Sets the times of the first token. It came `ttft_ms` after the request, and the request came
    /// `before_ms` after the process's start.
    pub fn first_token(&mut self, before_ms: f64, ttft_ms: f64) {
        self.first_token_ms = ttft_ms;
        self.total_ms = before_ms + ttft_ms;
    }
}

/// Milliseconds since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

//! What callers give to and get from the engine. Knows nothing of blocks or steps.

use lathe_program::{Sampling, SamplingError, TokenLogprobs};

/// Names a request; numbers grow in order of arrival, so comparing them compares arrivals.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RequestId(pub u64);

/// A prompt and how to continue it.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Request {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// How tokens are chosen; the default is greedy.
    pub sampling: Sampling,
    /// Added to the logits of these tokens; minus infinity forbids one.
    pub logit_bias: Vec<(u32, f32)>,
    /// Tokens to generate at most; `None` goes on until the context or the cache is full.
    pub max_tokens: Option<usize>,
    /// Tokens that end the text. The stop token itself is reported, but adds nothing to the text.
    pub stop_tokens: Vec<u32>,
    /// Strings that end the text; they are not part of it.
    pub stop_strings: Vec<String>,
    /// Generate `max_tokens` tokens whatever they are (benchmarks).
    pub ignore_stop: bool,
    /// Report each token's log-probability and those of this many best tokens.
    pub logprobs: Option<usize>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FinishReason {
    /// A stop token or a stop string.
    Stop,
    /// `max_tokens`, or the context or cache is full.
    Length,
    /// [`crate::Engine::cancel`].
    Cancelled,
    /// The model gave no logit that is a number, so that nothing could be chosen.
    InvalidLogits,
}

/// Something that happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was generated.
    Token {
        /// Whose.
        request: RequestId,
        /// Which.
        token: u32,
        /// Text that is now certain. The deltas of a request joined are its text; a delta may be
        /// empty (half a character, or the possible start of a stop string) or span tokens.
        text: String,
        /// As [`Request::logprobs`] asked.
        logprobs: Option<TokenLogprobs>,
    },
    /// The request is over; no event of it follows.
    Finished {
        /// Which.
        request: RequestId,
        /// Why.
        reason: FinishReason,
        /// Length of the prompt.
        prompt_tokens: usize,
        /// Prompt tokens whose keys and values were found in the cache when the request started.
        cached_tokens: usize,
        /// Tokens generated, a stop token included.
        generated_tokens: usize,
    },
}

impl Event {
    /// The request that it is about.
    pub fn request(&self) -> RequestId {
        match self {
            Event::Token { request, .. } | Event::Finished { request, .. } => *request,
        }
    }
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum AddError {
    /// Nothing to continue.
    #[error("the prompt is empty")]
    EmptyPrompt,
    /// Nothing to do.
    #[error("max_tokens is 0, expected at least 1")]
    NothingToGenerate,
    /// A token id that the model does not have.
    #[error(
        "prompt token {token} at position {position} is outside the vocabulary of {vocabulary}"
    )]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Where in the prompt.
        position: usize,
        /// Ids that exist: `0..vocabulary`.
        vocabulary: usize,
    },
    /// No room for even one new token.
    #[error(
        "the prompt has {tokens} tokens, the context holds {context_max} with at least one to generate"
    )]
    PromptTooLong {
        /// Length of the prompt.
        tokens: usize,
        /// [`lathe_program::Program::context_max`].
        context_max: usize,
    },
    /// Even alone, the request would not fit the KV cache.
    #[error("the request may need {needed} cache blocks, {available} exist")]
    TooFewBlocks {
        /// Blocks for the prompt and `max_tokens`.
        needed: usize,
        /// Blocks of the pool.
        available: usize,
    },
    /// Come back later.
    #[error("{waiting} requests are waiting, the limit is {waiting_max}")]
    QueueFull {
        /// Requests that wait.
        waiting: usize,
        /// [`crate::EngineConfig::waiting_max`].
        waiting_max: usize,
    },
    /// Sampling parameters out of range.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The empty string would stop everything.
    #[error("stop string {index} is empty")]
    EmptyStopString {
        /// Which.
        index: usize,
    },
    /// Stop strings are looked for in text.
    #[error("{stop_strings} stop strings were given, but no text decoder")]
    StopStringsNeedText {
        /// How many.
        stop_strings: usize,
    },
}

//! The engine: requests in, text out.
//!
//! [`Engine::step`] is the whole loop: the [`Scheduler`] turns waiting and running sequences into
//! one [`Step`](lathe_program::Step), an [`Executor`](lathe_program::Executor) runs it and chooses
//! tokens, and the [`TextOutput`] of each request turns tokens into text deltas. Everything but the
//! executor is deterministic and touches no device: [`BlockPool`](kv::BlockPool) hands out pages,
//! [`KvCache`](kv::KvCache) keeps each sequence's block tables and the prefixes that later requests
//! may share.
//!
//! What this crate does not know: files, HTTP, number formats, model families.
#![forbid(unsafe_code)]

pub mod draft;
pub mod engine;
pub mod eval;
pub mod kv;
pub mod request;
pub mod scheduler;
pub mod score;
pub mod text;

#[cfg(test)]
mod tests;

pub use draft::{
    DraftText, DraftTree, Drafter, EagleDrafter, LookupDrafter, ModelDrafter, StackedDrafter,
};
pub use engine::{Engine, EngineConfig, EngineError, Stats};
pub use eval::{Comparison, Perplexity, Windows, compare, perplexity};
pub use lathe_program::{Sampling, SamplingError, TokenLogprobs};
pub use request::{AddError, Event, FinishReason, Request, RequestId};
pub use scheduler::Scheduler;
pub use score::{Score, ScoreError, score};
pub use text::{TextDecoder, TextOutput};

//! The program of one step of a decoder, and the interpreters that need no device.
//!
//! A [`Program`] is a flat list of decoder-sized [`Op`]s over [`Value`]s (`[rows, width]`
//! activations) and [`Weight`]s. One [`Step`] is the data that it runs on: rows of tokens, each
//! with a position and a sequence, each sequence with its block tables. A [`Backend`] prepares a
//! program once and runs steps. This crate knows nothing of scheduling or of files.

pub mod backend;
pub mod cost;
pub mod kv;
pub mod op;
pub mod reference;
pub mod step;

pub use backend::{Backend, BackendError, Executor, ExecutorOptions, StepOutput, WeightSource};
pub use kv::{KvFormat, KvGroup, KvLayerShape, KvLayout};
pub use op::*;
pub use step::{BlockTable, Step, StepError, StepSequence};

//! The program of one step of a decoder, and the interpreters that need no device.
//!
//! A [`Program`] is a flat list of decoder-sized [`Op`]s over [`Value`]s (`[rows, width]`
//! activations) and [`Weight`]s. One [`Step`] is the data that it runs on: rows of tokens, each
//! with a position and a sequence, each sequence with its block tables. A [`Backend`] prepares a
//! program once and runs steps. This crate knows nothing of scheduling or of files.

#![forbid(unsafe_code)]

pub mod backend;
pub mod builder;
pub mod collective;
pub mod conformance;
pub mod cost;
pub mod kv;
pub mod kv_codec;
pub mod observe;
pub mod op;
pub mod program;
pub mod reference;
pub mod shard;
pub mod step;
mod transform;
mod validate;

pub use backend::{Backend, BackendError, Executor, ExecutorOptions, StepOutput, WeightSource};
pub use builder::{LinearSpec, ProgramBuilder};
pub use collective::{Collective, CollectiveError, SingleRank, ThreadRank, check_program};
pub use kv::{INT4_GROUP, KvFormat, KvGroup, KvLayerDecl, KvLayerShape, KvLayout};
pub use observe::{ObservedExpert, ObservedInput, ObservedRouting, Observer};
pub use op::*;
pub use program::{BufferPlan, Lifetime, Program};
pub use step::{BlockTable, Step, StepError, StepSequence, TREE_ROWS_MAX};
pub use transform::InputTransform;
pub use validate::ProgramError;

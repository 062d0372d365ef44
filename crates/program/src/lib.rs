//! The program of one step of a decoder, and the interpreters that need no device.
//!
//! A [`Program`] is a flat list of decoder-sized [`Op`]s over [`Value`]s (`[rows, width]`
//! activations) and [`Weight`]s. One [`Step`] is the data that it runs on: rows of tokens, each
//! with a position and a sequence, what changes in the block tables, and how tokens are chosen. A
//! [`Backend`] prepares a program once; its [`Executor`] runs steps. This crate knows nothing of
//! scheduling or of files.

#![forbid(unsafe_code)]

pub mod backend;
pub mod builder;
pub mod collective;
pub mod conformance;
pub mod cost;
pub mod kv;
pub mod kv_codec;
pub mod logits;
pub mod op;
pub mod program;
pub mod reference;
pub mod sampling;
pub mod shard;
pub mod step;
pub mod tables;
mod transform;
mod validate;

pub use backend::{
    Backend, BackendError, DeviceMemory, Executor, ExecutorLimits, ExecutorOptions, Missing,
    RoutedExperts, STEP_ROWS, StepOutput, WeightSource,
};
pub use builder::{LinearSpec, ProgramBuilder};
pub use collective::{
    Collective, CollectiveError, HostCollective, SingleRank, ThreadRank, check_program,
};
pub use kv::{INT4_GROUP, KvFormat, KvGroup, KvLayerDecl, KvLayerShape, KvLayout};
pub use op::*;
pub use program::{BufferPlan, Lifetime, Program};
pub use sampling::{
    Chooser, Sampler, Sampling, SamplingError, TokenCounts, TokenLogprobs, TokenMask,
};
pub use step::{
    Choice, Report, SequenceId, SlotMove, Step, StepError, StepInput, StepSequence, TREE_ROWS_MAX,
    TableChange, TokenSource,
};
pub use tables::{BlockTable, SequenceTables, replace_tables};
pub use transform::{InputTransform, StaticScale};
pub use validate::ProgramError;

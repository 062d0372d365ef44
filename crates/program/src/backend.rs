//! `Backend` and `Executor`: who runs programs.

use std::sync::Arc;

use lathe_tensor::Tensor;

use crate::kv::KvFormat;
use crate::observe::{ObservedRouting, Observer};
use crate::op::{Routing, Weight};
use crate::program::Program;
use crate::step::Step;

/// Where a program's weights come from.
pub trait WeightSource: Sync {
    /// The tensor of `weight`, in the shape that the program declares, in whatever format the
    /// checkpoint has it. Called once for each weight, possibly from several threads.
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError>;
}

/// What the caller chooses when a program is prepared.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutorOptions {
    /// Pages of the KV cache.
    pub kv_blocks: usize,
    /// How the cache stores numbers; `None` lets the backend choose.
    pub kv_format: Option<KvFormat>,
    /// Rows that a step may have.
    pub rows_max: usize,
    /// Worker threads; `None` means every core that this process may use.
    pub threads: Option<usize>,
    /// No activation quantization, `f32` accumulation, `f32` cache.
    pub exact: bool,
}

/// Why a program could not be prepared or a step not be run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// The weights could not be had.
    #[error("weight {name}: {reason}")]
    Weight {
        /// Canonical name.
        name: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The backend lacks a feature.
    #[error("the {backend} backend does not support {feature}")]
    Unsupported {
        /// Which backend.
        backend: &'static str,
        /// Which feature.
        feature: String,
    },
    /// Not enough memory.
    #[error("out of memory: {what} needs {bytes} bytes")]
    Memory {
        /// For what.
        what: &'static str,
        /// How many.
        bytes: usize,
    },
    /// The step is malformed.
    #[error(transparent)]
    Step(#[from] crate::step::StepError),
    /// Another rank failed, or the program is not this rank's.
    #[error(transparent)]
    Collective(#[from] crate::collective::CollectiveError),
    /// The program cannot be divided as asked.
    #[error(transparent)]
    Shard(#[from] crate::shard::ShardError),
    /// The device failed.
    #[error("device: {0}")]
    Device(String),
}

/// What a step produced; valid until the next step.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// `[logits_rows, vocabulary]`.
    pub logits: &'a [f32],
    /// By tap, `[rows, width]`.
    pub captures: Vec<&'a [f32]>,
}

/// A way to run programs.
pub trait Backend {
    /// `reference`, `cpu`, `cuda`.
    fn name(&self) -> &'static str;
    /// Loads weights, lays them out, and allocates the cache.
    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError>;
}

/// A prepared program.
pub trait Executor: Send {
    /// The program.
    fn program(&self) -> &Arc<Program>;
    /// How the cache stores numbers.
    fn kv_format(&self) -> KvFormat;
    /// The [`crate::StepSequence::expanded`] of a request with `given` tokens. A function of the
    /// program, the backend and that number alone, so that no schedule changes a row's arithmetic.
    fn expanded_until(&self, given: usize) -> usize {
        self.program().expanded_until(given)
    }
    /// Runs one step: writes its rows into the cache and makes the logits asked for.
    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError>;
    /// As [`Self::run`], and hands what goes into each op to `observer`, in the order of the
    /// program's ops, on this thread, as `f32` and before any quantization of activations. The
    /// result is the same as without an observer; fusions that would hide an op's input are off.
    ///
    /// # Errors
    /// As [`Self::run`]; [`BackendError::Unsupported`] where a backend cannot be observed (the
    /// default).
    fn run_observed(
        &mut self,
        step: &Step,
        observer: &mut dyn Observer,
    ) -> Result<StepOutput<'_>, BackendError> {
        let _ = (step, observer);
        Err(BackendError::Unsupported { backend: "chosen", feature: "observers".to_owned() })
    }
    /// What a router chose for the rows of the last step, for statistics: it is read where the
    /// step left it, so that nobody pays who does not ask. `None` before the first step, and (the
    /// default) where a backend does not keep it in this process's memory.
    fn routing(&self, routing: Routing) -> Option<ObservedRouting<'_>> {
        let _ = routing;
        None
    }
    /// Bytes of weights as laid out.
    fn weight_bytes(&self) -> usize;
    /// Bytes of the cache.
    fn kv_bytes(&self) -> usize;
}

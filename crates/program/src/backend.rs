//! `Backend` and `Executor`: the traits of a device that runs programs.

use std::sync::Arc;

use lathe_tensor::{Format, Tensor};

use crate::kv::KvFormat;
use crate::op::{Routing, Weight};
use crate::program::Program;
use crate::sampling::TokenLogprobs;
use crate::step::{SlotMove, Step};

/// The source of a program's weights.
pub trait WeightSource: Sync {
    /// The tensor of `weight`, in the declared shape and in the checkpoint's format. Called once
    /// for each weight, possibly from several threads.
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError>;
}

/// The options of preparing a program. [`Executor::limits`] tells what the executor then provides.
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutorOptions {
    /// Pages of the KV cache.
    pub kv_blocks: usize,
    /// The format of the cache. `None` means [`Backend::default_kv_format`].
    pub kv_format: Option<KvFormat>,
    /// The most rows of a step.
    pub rows_max: usize,
    /// Worker threads. `None` means every core that this process may use.
    pub threads: Option<usize>,
    /// No rounding of activations, `f32` sums, and an `f32` cache by default.
    pub exact: bool,
}

/// A program could not be prepared, or a step could not be run.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    /// A weight could not be read.
    #[error("weight {name}: {reason}")]
    Weight {
        /// Canonical name.
        name: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The backend does not support a feature.
    #[error("the {backend} backend does not support {feature}")]
    Unsupported {
        /// The backend's name.
        backend: &'static str,
        /// The feature.
        feature: String,
    },
    /// Not enough memory.
    #[error("out of memory: {what} needs {bytes} bytes")]
    Memory {
        /// The purpose of the memory.
        what: &'static str,
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// The step is malformed.
    #[error(transparent)]
    Step(#[from] crate::step::StepError),
    /// Another rank failed, or the program belongs to another rank.
    #[error(transparent)]
    Collective(#[from] crate::collective::CollectiveError),
    /// The program cannot be divided in this way.
    #[error(transparent)]
    Shard(#[from] crate::shard::ShardError),
    /// The device failed.
    #[error("device: {0}")]
    Device(String),
}

/// The limits of an executor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecutorLimits {
    /// The most rows of a step.
    pub rows_max: usize,
    /// The most sequences with tables at the same time. Ids of sequences are below it.
    pub sequences_max: usize,
    /// Pages of the KV cache. Page numbers are below it.
    pub kv_blocks: usize,
    /// Steps that may be submitted before the first is collected; at least 1.
    pub steps_in_flight: usize,
}

/// The memory that holds a backend's weights and cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes of the device.
    pub total_bytes: u64,
    /// Bytes that are free now.
    pub free_bytes: u64,
}

impl DeviceMemory {
    /// The memory of this computer that is available without swapping, as Linux reports it. If a
    /// control group (a container) allows less, `free_bytes` is what the group may still take.
    ///
    /// # Errors
    /// [`BackendError::Device`] if `/proc/meminfo` cannot be read.
    pub fn of_host() -> Result<DeviceMemory, BackendError> {
        let path = "/proc/meminfo";
        let text = std::fs::read_to_string(path)
            .map_err(|error| BackendError::Device(format!("{path}: {error}")))?;
        let machine = Self::parse_meminfo(&text)
            .ok_or_else(|| BackendError::Device(format!("{path}: no MemTotal or MemAvailable")))?;
        let free_bytes = group_bytes().map_or(machine.free_bytes, |it| it.min(machine.free_bytes));
        Ok(DeviceMemory { free_bytes, ..machine })
    }

    fn parse_meminfo(text: &str) -> Option<DeviceMemory> {
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
            line.trim().strip_suffix(" kB")?.parse::<u64>().ok()?.checked_mul(1024)
        };
        let (total_bytes, free_bytes) = (bytes("MemTotal")?, bytes("MemAvailable")?);
        Some(DeviceMemory { total_bytes, free_bytes })
    }
}

/// Bytes that the control group (container) of this process may still take.
fn group_bytes() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"))?;
    let used = number("/sys/fs/cgroup/memory.current")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.usage_in_bytes"))?;
    Some(limit.saturating_sub(used))
}

/// The result of a step. It is valid until the executor is used again.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// For each choice the token. `None` if no token was asked for, or if all logits are minus
    /// infinity.
    pub tokens: &'a [Option<u32>],
    /// For each choice the log-probabilities, if they were asked for and a token was chosen.
    pub logprobs: &'a [Option<TokenLogprobs>],
    /// `[choices that ask for logits, vocabulary]`, in the order of the choices.
    pub logits: &'a [f32],
    /// For each tap, `[rows, width]`.
    pub captures: Vec<&'a [f32]>,
}

/// A router's choices for the rows of a step.
#[derive(Debug, Clone, Copy)]
pub struct RoutedExperts<'a> {
    /// `[rows, experts_per_token]`, the best first.
    pub experts: &'a [u32],
    /// The routing weights, in the shape of `experts`.
    pub weights: &'a [f32],
    /// Experts of a row.
    pub experts_per_token: usize,
}

/// The features that a backend lacks to run a program, as in [`BackendError::Unsupported`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not supported: {}", .0.join(", "))]
pub struct Missing(pub Vec<String>);

/// The default of [`Backend::step_rows`], which suits processors.
pub const STEP_ROWS: usize = 512;

/// A way to run programs.
pub trait Backend {
    /// `reference`, `cpu`, `cuda`.
    fn name(&self) -> &'static str;
    /// Checks whether the backend can run `program` with `options`. [`Backend::prepare`] may still
    /// refuse the format of a weight.
    ///
    /// # Errors
    /// [`Missing`] names every feature that it lacks.
    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing>;
    /// The memory that will hold weights and cache.
    ///
    /// # Errors
    /// [`BackendError::Device`] if it is unknown.
    fn memory(&self) -> Result<DeviceMemory, BackendError>;
    /// The default for the most rows of a step. It is large enough for matrix products to be bound
    /// by arithmetic, and small enough for activations to stay small.
    fn step_rows(&self) -> usize {
        STEP_ROWS
    }
    /// The format of the cache if [`ExecutorOptions::kv_format`] is `None`. `exact` is
    /// [`ExecutorOptions::exact`].
    fn default_kv_format(&self, program: &Program, exact: bool) -> KvFormat;
    /// Checks whether a matrix of `columns` columns can have its numbers in `format`.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] or [`BackendError::Weight`] say what the backend supports.
    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError>;
    /// Loads and packs the weights, and allocates the cache.
    ///
    /// # Errors
    /// [`BackendError`] says what is missing, does not fit or cannot be read.
    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError>;
}

/// A prepared program, with the cache and the block tables of its sequences.
///
/// Steps run and are collected in the order in which they are submitted. A device need not wait for
/// the host: up to [`ExecutorLimits::steps_in_flight`] steps may be submitted before the first of
/// them is collected.
pub trait Executor: Send {
    /// The program.
    fn program(&self) -> &Arc<Program>;
    /// Its limits.
    fn limits(&self) -> ExecutorLimits;
    /// The format of the cache.
    fn kv_format(&self) -> KvFormat;
    /// The [`crate::StepSequence::expanded`] of a request with `given` tokens. It depends on the
    /// program, the backend and that number alone, so that no schedule changes a row's arithmetic.
    fn expanded_until(&self, given: usize) -> usize {
        self.program().expanded_until(given)
    }
    /// Applies the step's table changes and begins to run its rows.
    ///
    /// # Errors
    /// [`BackendError::Step`] if the step is malformed or too many are in flight. Nothing of the
    /// step was then applied, not even its table changes. Any other error is one that
    /// [`Executor::collect`] would return later: the table changes are applied, and the step counts
    /// as collected.
    fn submit(&mut self, step: &Step) -> Result<(), BackendError>;
    /// Waits for the oldest step that is not collected yet, and returns its result.
    ///
    /// # Errors
    /// If the step failed. Its table changes are applied, and its rows may or may not be in the
    /// cache. Steps that were submitted after it fail as well. [`BackendError::Step`] if no step is
    /// in flight.
    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError>;
    /// [`Executor::submit`] and then [`Executor::collect`], with no other step in flight.
    ///
    /// # Errors
    /// As those.
    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        self.submit(step)?;
        self.collect()
    }
    /// Copies slots of the cache, one after the other. The copies happen after all steps submitted
    /// so far and before any later one. The stored codes are copied; nothing is computed again.
    ///
    /// # Errors
    /// [`BackendError::Step`] if a slot is not in its sequence's tables. Nothing is moved then.
    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError>;
    /// A router's choices for the rows of the step that was collected last, for statistics. They
    /// are read where the step left them, so they cost nothing if nobody asks. `None` before the
    /// first step, and (by default) if a backend does not keep them in this process's memory.
    fn routing(&self, routing: Routing) -> Option<RoutedExperts<'_>> {
        let _ = routing;
        None
    }
    /// Bytes of the packed weights.
    fn weight_bytes(&self) -> usize;
    /// Bytes of the cache.
    fn kv_bytes(&self) -> usize;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_in_kilobytes() {
        let text = "MemTotal:       24620000 kB\nMemFree: 1 kB\nMemAvailable:   23000000 kB\n";
        let memory = DeviceMemory::parse_meminfo(text);
        let expected =
            DeviceMemory { total_bytes: 24_620_000 * 1024, free_bytes: 23_000_000 * 1024 };
        assert_eq!(memory, Some(expected));
        assert_eq!(DeviceMemory::parse_meminfo("MemTotal: 5 kB"), None);
        assert_eq!(DeviceMemory::parse_meminfo("MemTotal: x kB\nMemAvailable: 5 kB"), None);
    }
}

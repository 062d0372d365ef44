//! `Backend` and `Executor`: who runs programs.

use std::sync::Arc;

use lathe_tensor::{Format, Tensor};

use crate::kv::KvFormat;
use crate::op::{Routing, Weight};
use crate::program::Program;
use crate::sampling::TokenLogprobs;
use crate::step::{SlotMove, Step};

/// Where a program's weights come from.
pub trait WeightSource: Sync {
    /// The tensor of `weight`, in the shape that the program declares, in whatever format the
    /// checkpoint has it. Called once for each weight, possibly from several threads.
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError>;
}

/// What the caller asks for when a program is prepared. What the executor then grants is
/// [`Executor::limits`].
#[derive(Debug, Clone, PartialEq)]
pub struct ExecutorOptions {
    /// Pages of the KV cache.
    pub kv_blocks: usize,
    /// How the cache stores numbers; `None`: [`Backend::default_kv_format`].
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

/// What an executor holds and takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExecutorLimits {
    /// Rows of a step.
    pub rows_max: usize,
    /// Sequences that have tables at a time: ids of sequences are below it.
    pub sequences_max: usize,
    /// Pages of the KV cache: page numbers are below it.
    pub kv_blocks: usize,
    /// Steps that may be submitted and not yet collected, at least 1.
    pub steps_in_flight: usize,
}

/// The memory that a backend's weights and cache live in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// Bytes that the device has.
    pub total_bytes: u64,
    /// Bytes that nobody uses now.
    pub free_bytes: u64,
}

impl DeviceMemory {
    /// The memory of this computer that can be had without swapping, as Linux reports it. Where a
    /// control group (a container) may take less than that, what it may still take is free.
    ///
    /// # Errors
    /// [`BackendError::Device`] where `/proc/meminfo` cannot be read.
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

/// What a control group (a container) may still take.
fn group_bytes() -> Option<u64> {
    let number = |path: &str| std::fs::read_to_string(path).ok()?.trim().parse::<u64>().ok();
    let limit = number("/sys/fs/cgroup/memory.max")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.limit_in_bytes"))?;
    let used = number("/sys/fs/cgroup/memory.current")
        .or_else(|| number("/sys/fs/cgroup/memory/memory.usage_in_bytes"))?;
    Some(limit.saturating_sub(used))
}

/// What a step produced; valid until the executor is used again.
#[derive(Debug)]
pub struct StepOutput<'a> {
    /// By choice: the token, where one was asked for and some logit is above minus infinity.
    pub tokens: &'a [Option<u32>],
    /// By choice: log-probabilities, where they were asked for and a token was chosen.
    pub logprobs: &'a [Option<TokenLogprobs>],
    /// `[choices that ask for logits, vocabulary]`, in the order of the choices.
    pub logits: &'a [f32],
    /// By tap, `[rows, width]`.
    pub captures: Vec<&'a [f32]>,
}

/// What a router chose for the rows of a step.
#[derive(Debug, Clone, Copy)]
pub struct RoutedExperts<'a> {
    /// `[rows, experts_per_token]`, best first.
    pub experts: &'a [u32],
    /// As `experts`: the weights.
    pub weights: &'a [f32],
    /// Choices of a row.
    pub experts_per_token: usize,
}

/// What a backend lacks to run a program: features as in [`BackendError::Unsupported`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not supported: {}", .0.join(", "))]
pub struct Missing(pub Vec<String>);

/// [`Backend::step_rows`] of processors.
pub const STEP_ROWS: usize = 512;

/// A way to run programs.
pub trait Backend {
    /// `reference`, `cpu`, `cuda`.
    fn name(&self) -> &'static str;
    /// Whether the backend can run `program` with `options`. Weights may still be in a format that
    /// [`Backend::prepare`] refuses.
    ///
    /// # Errors
    /// [`Missing`] names all that it lacks.
    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing>;
    /// The memory that weights and cache will live in.
    ///
    /// # Errors
    /// [`BackendError::Device`] where it cannot be known.
    fn memory(&self) -> Result<DeviceMemory, BackendError>;
    /// Rows of a step at most if nobody has a reason for another number: enough for the matrix
    /// products to be bound by arithmetic, few enough that activations stay small.
    fn step_rows(&self) -> usize {
        STEP_ROWS
    }
    /// How the cache stores numbers if [`ExecutorOptions::kv_format`] does not say; `exact` as
    /// there.
    fn default_kv_format(&self, program: &Program, exact: bool) -> KvFormat;
    /// Whether a matrix of `columns` columns may have its numbers in `format`.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] or [`BackendError::Weight`] say what the backend takes.
    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError>;
    /// Loads weights, lays them out, and allocates the cache.
    ///
    /// # Errors
    /// [`BackendError`] says what is missing, does not fit or could not be had.
    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError>;
}

/// A prepared program, with the cache and the block tables of its sequences.
///
/// Steps run in the order in which they are submitted, and are collected in that order. A device
/// need not wait for the host: up to [`ExecutorLimits::steps_in_flight`] steps may be submitted
/// before the first of them is collected.
pub trait Executor: Send {
    /// The program.
    fn program(&self) -> &Arc<Program>;
    /// What it holds and takes.
    fn limits(&self) -> ExecutorLimits;
    /// How the cache stores numbers.
    fn kv_format(&self) -> KvFormat;
    /// The [`crate::StepSequence::expanded`] of a request with `given` tokens. A function of the
    /// program, the backend and that number alone, so that no schedule changes a row's arithmetic.
    fn expanded_until(&self, given: usize) -> usize {
        self.program().expanded_until(given)
    }
    /// Applies the step's table changes and begins to run its rows.
    ///
    /// # Errors
    /// [`BackendError::Step`] if the step is malformed or too many are in flight: then nothing of
    /// it happened, its table changes included. Any other error is that of [`Executor::collect`],
    /// come early: the tables have changed, the step counts as collected.
    fn submit(&mut self, step: &Step) -> Result<(), BackendError>;
    /// Waits for the oldest step that is not collected yet, and hands out what it made.
    ///
    /// # Errors
    /// If the step failed. Its table changes have been applied, its rows may or may not be in the
    /// cache; steps that were submitted after it fail as well. [`BackendError::Step`] if no step is
    /// in flight.
    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError>;
    /// [`Executor::submit`] and [`Executor::collect`], where nothing else is in flight.
    ///
    /// # Errors
    /// As those.
    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        self.submit(step)?;
        self.collect()
    }
    /// Copies tokens' places in the cache, one after the other, after all steps submitted so far
    /// and before any later one. The stored codes are copied; nothing is computed again.
    ///
    /// # Errors
    /// [`BackendError::Step`] if a slot is not in its sequence's tables: then nothing is moved.
    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError>;
    /// What a router chose for the rows of the step collected last, for statistics: it is read
    /// where the step left it, so that nobody pays who does not ask. `None` before the first step,
    /// and (the default) where a backend does not keep it in this process's memory.
    fn routing(&self, routing: Routing) -> Option<RoutedExperts<'_>> {
        let _ = routing;
        None
    }
    /// Bytes of weights as laid out.
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

//! Ranks that are threads of this process, as one backend.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use lathe_tensor::Format;

use super::crew::Crew;
use super::{RankProgram, RankWeights, ShardOptions, shard_fitting};
use crate::backend::{
    Backend, BackendError, DeviceMemory, Executor, ExecutorLimits, ExecutorOptions, Missing,
    StepOutput, WeightSource,
};
use crate::collective::{HostCollective, SingleRank, ThreadRank};
use crate::kv::KvFormat;
use crate::program::Program;
use crate::step::{SlotMove, Step, StepError};
use crate::tables::SequenceTables;

/// Runs a program over several ranks. Each is a backend of its own with an equal share of the
/// threads, at least one. If there are fewer threads than ranks, the ranks take turns on the cores.
pub struct ShardedBackend<F> {
    options: ShardOptions,
    rank_backend: F,
}

impl<F: Fn(Arc<HostCollective>) -> Box<dyn Backend>> ShardedBackend<F> {
    /// `rank_backend` makes the backend of one rank from its member of the group.
    pub fn new(options: ShardOptions, rank_backend: F) -> Self {
        Self { options, rank_backend }
    }

    /// The backend of a single rank.
    fn alone(&self) -> Box<dyn Backend> {
        (self.rank_backend)(Arc::new(SingleRank))
    }
}

impl<F: Fn(Arc<HostCollective>) -> Box<dyn Backend>> Backend for ShardedBackend<F> {
    fn name(&self) -> &'static str {
        "sharded"
    }

    /// Asks a rank's backend about the whole program, because a rank's program has the same ops.
    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing> {
        self.alone().supports(program, options)
    }

    fn memory(&self) -> Result<DeviceMemory, BackendError> {
        self.alone().memory()
    }

    fn default_kv_format(&self, program: &Program, exact: bool) -> KvFormat {
        self.alone().default_kv_format(program, exact)
    }

    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError> {
        self.alone().runs_format(format, columns)
    }

    /// As [`Backend::prepare`]; also [`BackendError::Shard`] if the program or the blocks of its
    /// weights cannot be divided.
    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        let format_of = |weight| Ok(weights.tensor(weight)?.format);
        let programs = shard_fitting(&program, &self.options, &format_of)?;
        let ranks = self.options.ranks;
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = (options.threads.unwrap_or_else(available) / ranks).max(1);
        let options = ExecutorOptions { threads: Some(threads), ..options.clone() };
        let mut crew = Vec::new();
        for (end, rank) in ThreadRank::group(ranks, threads * ranks).into_iter().zip(programs) {
            let end: Arc<HostCollective> = Arc::new(end);
            let backend = (self.rank_backend)(Arc::clone(&end));
            let executor = prepare_rank(&*backend, &rank, weights, &options)?;
            crew.push(Rank { end, executor });
        }
        Ok(Box::new(ShardedExecutor::new(program, crew)?))
    }
}

fn prepare_rank(
    backend: &dyn Backend,
    rank: &RankProgram,
    source: &dyn WeightSource,
    options: &ExecutorOptions,
) -> Result<Box<dyn Executor>, BackendError> {
    backend.prepare(Arc::new(rank.program.clone()), &RankWeights { source, rank }, options)
}

/// One rank: its member of the group and its executor.
pub(super) struct Rank {
    end: Arc<HostCollective>,
    executor: Box<dyn Executor>,
}

impl Rank {
    /// Runs its part of a step to the end.
    pub(super) fn run(&mut self, step: &Step) -> Result<(), BackendError> {
        self.attempt(|executor| executor.run(step).map(drop))
    }

    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        self.attempt(|executor| executor.submit(step))
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        self.attempt(|executor| executor.collect())
    }

    pub(super) fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        self.attempt(|executor| executor.move_slots(moves))
    }

    /// Calls `work`. If it fails or panics, the rank leaves its group, so that the others do not
    /// wait for it.
    fn attempt<'a, T>(
        &'a mut self,
        work: impl FnOnce(&'a mut dyn Executor) -> Result<T, BackendError>,
    ) -> Result<T, BackendError> {
        let Self { end, executor } = self;
        let executor = &mut **executor;
        let result = catch_unwind(AssertUnwindSafe(move || work(executor)))
            .unwrap_or_else(|_| Err(BackendError::Device("a rank panicked".to_owned())));
        if result.is_err() {
            end.leave();
        }
        result
    }
}

/// A program over several ranks. A step runs on all of them at once, rank 0 on the caller's thread.
/// The result is that of rank 0. After a rank has failed, every further step fails.
pub struct ShardedExecutor {
    program: Arc<Program>,
    first: Rank,
    others: Crew,
    limits: ExecutorLimits,
    /// Checks steps before any rank sees them.
    tables: SequenceTables,
    /// The choices of the last step. The other ranks make no choices of their own.
    chosen: Vec<Option<u32>>,
    in_flight: bool,
    kv_format: KvFormat,
    weight_bytes: usize,
    kv_bytes: usize,
}

impl ShardedExecutor {
    fn new(program: Arc<Program>, mut ranks: Vec<Rank>) -> Result<Self, BackendError> {
        let sum = |of: fn(&dyn Executor) -> usize| ranks.iter().map(|r| of(&*r.executor)).sum();
        let (weight_bytes, kv_bytes) = (sum(|e| e.weight_bytes()), sum(|e| e.kv_bytes()));
        let kv_format = ranks[0].executor.kv_format();
        let limits = ExecutorLimits { steps_in_flight: 1, ..ranks[0].executor.limits() };
        let tables = SequenceTables::new(&program.kv, limits.sequences_max);
        let first = ranks.remove(0);
        let others = Crew::new(ranks)?;
        let (chosen, in_flight) = (Vec::new(), false);
        Ok(Self {
            program,
            first,
            others,
            limits,
            tables,
            chosen,
            in_flight,
            kv_format,
            weight_bytes,
            kv_bytes,
        })
    }
}

/// The error of all ranks together. A rank's own error says more than the others' error that the
/// rank is gone.
fn cause(own: Option<BackendError>, others: Option<BackendError>) -> Option<BackendError> {
    let is_cause = |error: &BackendError| !matches!(error, BackendError::Collective(_));
    match (own, others) {
        (Some(own), Some(other)) if is_cause(&other) && !is_cause(&own) => Some(other),
        (Some(own), _) => Some(own),
        (None, other) => other,
    }
}

impl Executor for ShardedExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn kv_format(&self) -> KvFormat {
        self.kv_format
    }

    fn expanded_until(&self, given: usize) -> usize {
        self.first.executor.expanded_until(given)
    }

    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        if self.in_flight {
            return Err(StepError("a step is in flight already".to_owned()).into());
        }
        // A malformed step is refused before any rank runs, and changes nothing.
        self.tables.accept(step, &self.program, &self.limits)?;
        self.others.start(step, &self.chosen);
        match self.first.submit(step) {
            Ok(()) => {
                self.in_flight = true;
                Ok(())
            }
            Err(own) => Err(cause(Some(own), self.others.finish()).expect("there is one")),
        }
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        if !std::mem::take(&mut self.in_flight) {
            return Err(StepError("no step is in flight".to_owned()).into());
        }
        let Self { first, others, chosen, .. } = self;
        let output = first.collect();
        match (output, others.finish()) {
            (Ok(output), None) => {
                chosen.clear();
                chosen.extend_from_slice(output.tokens);
                Ok(output)
            }
            (output, other) => Err(cause(output.err(), other).expect("one of them failed")),
        }
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        self.tables.check_moves(moves, &self.program.kv)?;
        self.others.start_moves(moves);
        let own = self.first.move_slots(moves).err();
        cause(own, self.others.finish()).map_or(Ok(()), Err)
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn kv_bytes(&self) -> usize {
        self.kv_bytes
    }
}

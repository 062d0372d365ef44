//! Ranks that are threads of this process, seen from outside as one backend.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use super::crew::Crew;
use super::{RankProgram, RankWeights, ShardOptions, shard_fitting};
use crate::backend::{Backend, BackendError, Executor, ExecutorOptions, StepOutput, WeightSource};
use crate::collective::{Collective, ThreadRank};
use crate::kv::KvFormat;
use crate::program::Program;
use crate::step::Step;

/// Runs a program over several ranks, each a backend of its own with an equal share of the
/// threads, at least one: fewer threads than ranks take turns on the cores.
pub struct ShardedBackend<F> {
    options: ShardOptions,
    rank_backend: F,
}

impl<F: Fn(Arc<dyn Collective>) -> Box<dyn Backend>> ShardedBackend<F> {
    /// `rank_backend` makes the backend of one rank from its end of the group.
    pub fn new(options: ShardOptions, rank_backend: F) -> Self {
        Self { options, rank_backend }
    }
}

impl<F: Fn(Arc<dyn Collective>) -> Box<dyn Backend>> Backend for ShardedBackend<F> {
    fn name(&self) -> &'static str {
        "sharded"
    }

    /// As [`Backend::prepare`]; also [`BackendError::Shard`] where the program or its weights'
    /// blocks cannot be divided.
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
            let end: Arc<dyn Collective> = Arc::new(end);
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

/// One rank: its end of the group, and what runs its program.
pub(super) struct Rank {
    end: Arc<dyn Collective>,
    executor: Box<dyn Executor>,
}

impl Rank {
    /// Runs its part of a step. If that does not end well, be it by a panic, the rank leaves its
    /// group, so that the others do not wait for it.
    pub(super) fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        let Self { end, executor } = self;
        let run = move || {
            let executor = executor;
            executor.run(step)
        };
        let output = catch_unwind(AssertUnwindSafe(run))
            .unwrap_or_else(|_| Err(BackendError::Device("a rank panicked".to_owned())));
        if output.is_err() {
            end.leave();
        }
        output
    }
}

/// A program over several ranks. A step runs on all of them at once, rank 0 on the caller's
/// thread; what rank 0 makes is the result. After a rank has failed, every further step fails.
pub struct ShardedExecutor {
    program: Arc<Program>,
    first: Rank,
    others: Crew,
    kv_format: KvFormat,
    weight_bytes: usize,
    kv_bytes: usize,
}

impl ShardedExecutor {
    fn new(program: Arc<Program>, mut ranks: Vec<Rank>) -> Result<Self, BackendError> {
        let sum = |of: fn(&dyn Executor) -> usize| ranks.iter().map(|r| of(&*r.executor)).sum();
        let (weight_bytes, kv_bytes) = (sum(|e| e.weight_bytes()), sum(|e| e.kv_bytes()));
        let kv_format = ranks[0].executor.kv_format();
        let first = ranks.remove(0);
        let others = Crew::new(ranks)?;
        Ok(Self { program, first, others, kv_format, weight_bytes, kv_bytes })
    }
}

impl Executor for ShardedExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn kv_format(&self) -> KvFormat {
        self.kv_format
    }

    fn expanded_until(&self, given: usize) -> usize {
        self.first.executor.expanded_until(given)
    }

    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        // A malformed step is refused before any rank runs, and harms none.
        step.validate(&self.program)?;
        self.others.start(step);
        let output = self.first.run(step);
        // A rank's own error says more than the others' complaint that it has gone.
        let is_cause = |error: &BackendError| !matches!(error, BackendError::Collective(_));
        match (output, self.others.finish()) {
            (Err(own), Some(other)) if is_cause(&other) && !is_cause(&own) => Err(other),
            (Err(own), _) => Err(own),
            (Ok(_), Some(other)) => Err(other),
            (Ok(output), None) => Ok(output),
        }
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn kv_bytes(&self) -> usize {
        self.kv_bytes
    }
}

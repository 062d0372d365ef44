//! Ranks that are threads of this process, seen from outside as one backend.

use std::sync::Arc;

use super::{RankProgram, RankWeights, ShardOptions, shard};
use crate::backend::{Backend, BackendError, Executor, ExecutorOptions, StepOutput, WeightSource};
use crate::collective::{Collective, ThreadRank};
use crate::kv::KvFormat;
use crate::program::Program;
use crate::step::Step;

/// Runs a program over several ranks, each a backend of its own.
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

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        let programs = shard(&program, &self.options)
            .map_err(|error| BackendError::Device(error.to_string()))?;
        // Each rank gets its share of the threads.
        let available = || std::thread::available_parallelism().map_or(1, usize::from);
        let threads = options.threads.unwrap_or_else(available);
        let threads = Some((threads / self.options.ranks).max(1));
        let options = ExecutorOptions { threads, ..options.clone() };
        let mut ranks = Vec::new();
        for (end, rank) in ThreadRank::group(self.options.ranks).into_iter().zip(programs) {
            let end = Arc::new(end);
            let backend = (self.rank_backend)(Arc::clone(&end) as Arc<dyn Collective>);
            let executor = prepare_rank(&*backend, &rank, weights, &options)?;
            ranks.push((end, executor));
        }
        Ok(Box::new(ShardedExecutor { program, ranks }))
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

/// A program over several ranks. A step runs on all of them at once; what rank 0 makes is the
/// result. After a rank has failed, every further step fails.
pub struct ShardedExecutor {
    program: Arc<Program>,
    ranks: Vec<(Arc<ThreadRank>, Box<dyn Executor>)>,
}

/// Takes a rank out of its group when its step does not end well, be it by a panic, so that the
/// others do not wait for it.
struct LeaveOnFailure<'a> {
    end: &'a ThreadRank,
    done: bool,
}

impl Drop for LeaveOnFailure<'_> {
    fn drop(&mut self) {
        if !self.done {
            self.end.leave();
        }
    }
}

fn run_rank<'a>(
    end: &ThreadRank,
    executor: &'a mut dyn Executor,
    step: &Step,
) -> Result<StepOutput<'a>, BackendError> {
    let mut guard = LeaveOnFailure { end, done: false };
    let output = executor.run(step)?;
    guard.done = true;
    Ok(output)
}

impl Executor for ShardedExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn kv_format(&self) -> KvFormat {
        self.ranks[0].1.kv_format()
    }

    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        // A malformed step is refused before any rank runs, and harms none.
        step.validate(&self.program)?;
        let mut outputs = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .ranks
                .iter_mut()
                .map(|(end, executor)| scope.spawn(move || run_rank(end, &mut **executor, step)))
                .collect();
            let failed = |_| Err(BackendError::Device("a rank panicked".to_owned()));
            threads
                .into_iter()
                .map(|thread| thread.join().unwrap_or_else(failed))
                .collect::<Vec<_>>()
        });
        // A rank's own error says more than the others' complaint that it has gone.
        let is_cause = |output: &Result<StepOutput<'_>, BackendError>| matches!(output, Err(error) if !matches!(error, BackendError::Collective(_)));
        let cause = outputs.iter().position(is_cause).or(outputs.iter().position(Result::is_err));
        outputs.swap_remove(cause.unwrap_or(0))
    }

    fn weight_bytes(&self) -> usize {
        self.ranks.iter().map(|(_, executor)| executor.weight_bytes()).sum()
    }

    fn kv_bytes(&self) -> usize {
        self.ranks.iter().map(|(_, executor)| executor.kv_bytes()).sum()
    }
}

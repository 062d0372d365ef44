//! One model divided over ranks, which are threads of this process. Impossible divisions are
//! refused before anything is loaded.

use std::num::NonZeroUsize;

use lathe_cpu::gang::available_cores;
use lathe_program::shard::{ExpertSplit, ShardOptions, ShardedBackend, shard};
use lathe_program::{Backend, BackendError, KvLayout, Op, Program};

use crate::error::{RanksReason, SessionError};
use crate::options::{Device, Options, backend, rank_backend};

/// How a model is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ranks {
    /// The number of ranks. Heads, hidden elements and the vocabulary are divided over them.
    pub count: NonZeroUsize,
    /// Whether each rank has some whole experts. Otherwise it has some columns of each expert.
    pub by_expert: bool,
}

impl Default for Ranks {
    fn default() -> Self {
        Self { count: NonZeroUsize::MIN, by_expert: false }
    }
}

impl Ranks {
    /// The options of the division.
    pub fn options(&self) -> ShardOptions {
        let experts = match self.by_expert {
            true => ExpertSplit::ByExpert,
            false => ExpertSplit::ByColumn,
        };
        ShardOptions { experts, ..ShardOptions::new(self.count.get()) }
    }

    /// Refuses divisions that are impossible in any weight format.
    ///
    /// # Errors
    /// [`SessionError::Ranks`].
    pub fn check(&self, program: &Program) -> Result<(), SessionError> {
        if self.by_expert && !has_experts(program) {
            return Err(self.error(RanksReason::NoExperts));
        }
        if self.by_expert && self.count.get() == 1 {
            return Err(self.error(RanksReason::OneRank));
        }
        if self.count.get() > 1 {
            shard(program, &self.options()).map_err(|error| self.error(error.into()))?;
        }
        Ok(())
    }

    /// The sum of `of` over the caches of all ranks. Ranks divide the KV heads, or each keeps the
    /// whole latents. For a program that cannot be divided (see [`Self::check`]) it is the value of
    /// the whole program.
    pub fn kv_total(&self, program: &Program, of: impl Fn(&KvLayout) -> usize) -> usize {
        match shard(program, &self.options()) {
            Ok(ranks) if self.count.get() > 1 => ranks.iter().map(|it| of(&it.program.kv)).sum(),
            _ => of(&program.kv),
        }
    }

    /// Worker threads of all ranks together. `None` leaves the choice to the backend. The ranks
    /// share the physical cores that a single rank would use.
    pub fn threads(&self, options: &Options) -> Option<usize> {
        let cores = || (self.count.get() > 1).then(|| available_cores().count);
        options.threads.map(NonZeroUsize::get).or_else(cores)
    }

    /// The backend of `device` over these ranks.
    ///
    /// # Errors
    /// As [`backend`]; [`SessionError::Ranks`] if the device runs on one rank only.
    pub fn backend(&self, device: Device) -> Result<Box<dyn Backend>, SessionError> {
        if self.count.get() == 1 {
            return backend(device);
        }
        let make = rank_backend(device).ok_or_else(|| self.error(RanksReason::Device("CUDA")))?;
        Ok(Box::new(ShardedBackend::new(self.options(), make)))
    }

    /// Turns an error of preparing into the caller's error if the weights do not allow the
    /// division.
    pub fn explain(&self, error: BackendError) -> SessionError {
        match error {
            BackendError::Shard(reason) => self.error(reason.into()),
            other => SessionError::Prepare(other),
        }
    }

    fn error(&self, reason: RanksReason) -> SessionError {
        SessionError::Ranks { ranks: self.count.get(), by_expert: self.by_expert, reason }
    }
}

/// Whether some layer has experts.
pub fn has_experts(program: &Program) -> bool {
    program.ops.iter().any(|op| matches!(op, Op::Experts { .. }))
}

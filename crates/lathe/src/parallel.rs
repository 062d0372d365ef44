//! `--tensor-parallel` and `--expert-parallel`: one model divided over ranks that are threads of
//! this process, and what of it is impossible, said before anything is loaded.

use std::num::NonZeroUsize;
use std::sync::Arc;

use anyhow::Error;
use clap::Args;
use lathe_cpu::CpuBackend;
use lathe_cpu::gang::available_cores;
use lathe_program::reference::ReferenceBackend;
use lathe_program::shard::{ExpertSplit, ShardOptions, ShardedBackend, shard};
use lathe_program::{Backend, BackendError, HostCollective, KvLayout, Op, Program};

use crate::arguments::{Device, Global};
use crate::output::{InputContext, bad_input};
use crate::session;

/// How a model is divided.
#[derive(Debug, Clone, Copy, Args)]
pub struct ParallelArguments {
    /// Divide the model over N ranks: heads, hidden elements and the vocabulary. On the CPU a rank
    /// has an equal share of --threads, at least one: with fewer threads than ranks there is one a
    /// rank, and they take turns on the cores
    #[arg(long, value_name = "N", default_value = "1", help_heading = "Ranks")]
    pub tensor_parallel: NonZeroUsize,
    /// Give each rank some experts whole, not some columns of each; needs --tensor-parallel
    #[arg(long, help_heading = "Ranks")]
    pub expert_parallel: bool,
}

impl Default for ParallelArguments {
    fn default() -> Self {
        Self { tensor_parallel: NonZeroUsize::MIN, expert_parallel: false }
    }
}

impl ParallelArguments {
    /// Ranks.
    pub fn ranks(&self) -> usize {
        self.tensor_parallel.get()
    }

    /// The division.
    pub fn options(&self) -> ShardOptions {
        let experts = match self.expert_parallel {
            true => ExpertSplit::ByExpert,
            false => ExpertSplit::ByColumn,
        };
        ShardOptions { experts, ..ShardOptions::new(self.ranks()) }
    }

    /// Refuses what cannot be, whatever the weights' formats are.
    pub fn check(&self, program: &Program) -> Result<(), Error> {
        if self.expert_parallel && !has_experts(program) {
            return Err(bad_input("--expert-parallel: the model has no experts"));
        }
        if self.expert_parallel && self.ranks() == 1 {
            let message = "--expert-parallel needs --tensor-parallel with at least 2 ranks";
            return Err(bad_input(message));
        }
        if self.ranks() > 1 {
            shard(program, &self.options()).bad_input_in(self.flags())?;
        }
        Ok(())
    }

    /// The sum of `of` over the caches of all ranks, which share KV heads or keep whole latents
    /// each; of the program's own where it cannot be divided, which [`Self::check`] refuses.
    pub fn kv_total(&self, program: &Program, of: impl Fn(&KvLayout) -> usize) -> usize {
        match shard(program, &self.options()) {
            Ok(ranks) if self.ranks() > 1 => ranks.iter().map(|rank| of(&rank.program.kv)).sum(),
            _ => of(&program.kv),
        }
    }

    /// Worker threads of all ranks together; `None` leaves the choice to the backend. Ranks share
    /// the physical cores, as a single rank would have them.
    pub fn threads(&self, global: &Global) -> Option<usize> {
        let cores = || (self.ranks() > 1).then(|| available_cores().count);
        global.threads.map(NonZeroUsize::get).or_else(cores)
    }

    /// The backend that `--device` asks for, over as many ranks as there are to be.
    pub fn backend(&self, device: Device) -> Result<Box<dyn Backend>, Error> {
        if self.ranks() == 1 {
            return session::backend(device);
        }
        let reference = |end: Arc<HostCollective>| -> Box<dyn Backend> {
            Box::new(ReferenceBackend::new().collective(end))
        };
        let cpu = |end: Arc<HostCollective>| -> Box<dyn Backend> {
            Box::new(CpuBackend::new(Default::default()).collective(end))
        };
        match device {
            Device::Reference => Ok(Box::new(ShardedBackend::new(self.options(), reference))),
            Device::Cpu | Device::Auto => Ok(Box::new(ShardedBackend::new(self.options(), cpu))),
            Device::Cuda => Err(session::backend(device).err().unwrap_or_else(|| {
                bad_input(format!("{}: only on --device cpu and reference", self.flags()))
            })),
        }
    }

    /// What preparing a model found: a division that its weights do not allow is bad input.
    pub fn explain(&self, error: BackendError) -> Error {
        match error {
            BackendError::Shard(reason) => bad_input(format!("{}: {reason}", self.flags())),
            other => Error::from(other).context("cannot prepare the model"),
        }
    }

    fn flags(&self) -> String {
        let experts = if self.expert_parallel { " --expert-parallel" } else { "" };
        format!("--tensor-parallel {}{experts}", self.ranks())
    }
}

/// Whether some layer has experts.
pub fn has_experts(program: &Program) -> bool {
    program.ops.iter().any(|op| matches!(op, Op::Experts { .. }))
}

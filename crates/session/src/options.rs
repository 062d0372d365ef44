//! What a caller chooses about the device. Only this file and what measures the machine
//! ([`crate::measure::roofs`]) name a backend.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lathe_cpu::{CpuBackend, Isa};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, HostCollective, KvFormat, Program, SingleRank};
use lathe_tensor::Format;

use crate::error::SessionError;

/// What computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// Scalar `f32`. Slow, and what every other device is compared with.
    Reference,
    /// The processor, with its vector instructions and threads.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The best that this machine and build have.
    #[default]
    Auto,
}

/// How a model is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// What computes.
    pub device: Device,
    /// No rounding of activations, `f32` accumulation, `f32` cache unless `kv_format` is given.
    pub exact: bool,
    /// Worker threads. `None` takes every core that this process may use.
    pub threads: Option<NonZeroUsize>,
    /// How keys and values are kept. `None` takes the device's own choice.
    pub kv_format: Option<KvFormat>,
}

impl Options {
    /// The format of the cache of `program`: the one that was asked for, or the backend's own
    /// choice.
    ///
    /// # Errors
    /// [`SessionError::NoDevice`] if this build lacks the device.
    pub fn cache_format(&self, program: &Program) -> Result<KvFormat, SessionError> {
        let own = backend(self.device)?.default_kv_format(program, self.exact);
        Ok(self.kv_format.unwrap_or(own))
    }
}

/// Makes the backend of one rank from its end of the group.
pub(crate) type RankBackend = fn(Arc<HostCollective>) -> Box<dyn Backend>;

/// How the backend of a rank on `device` is made.
///
/// # Errors
/// [`SessionError::NoDevice`] if this build lacks it.
pub(crate) fn rank_backend(device: Device) -> Result<RankBackend, SessionError> {
    match device {
        Device::Reference => Ok(|end| Box::new(ReferenceBackend::new().collective(end))),
        Device::Cpu | Device::Auto => {
            Ok(|end| Box::new(CpuBackend::new(Default::default()).collective(end)))
        }
        Device::Cuda => Err(SessionError::NoDevice("CUDA")),
    }
}

/// The backend of `device`, on one rank.
///
/// # Errors
/// [`SessionError::NoDevice`] if this build lacks it.
pub fn backend(device: Device) -> Result<Box<dyn Backend>, SessionError> {
    Ok(rank_backend(device)?(Arc::new(SingleRank)))
}

/// Refuses a number format that `device` could not run in a matrix of `columns` columns.
///
/// # Errors
/// [`SessionError::NotRun`] says what the device takes.
pub fn check_format(device: Device, format: Format, columns: usize) -> Result<(), SessionError> {
    backend(device)?.runs_format(format, columns).map_err(SessionError::NotRun)
}

/// The name of the instruction set that the CPU backend's kernels use: the best that this machine
/// has, or the one that `LATHE_ISA` names.
///
/// # Errors
/// [`SessionError::NotRun`] if `LATHE_ISA` names one that this machine lacks.
pub fn instruction_set() -> Result<String, SessionError> {
    Ok(Isa::select(None).map_err(SessionError::NotRun)?.to_string())
}

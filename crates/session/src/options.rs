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
    /// The format of the cache of `program` on `backend`: the one that was asked for, or the
    /// backend's own choice.
    pub fn cache_format(&self, backend: &dyn Backend, program: &Program) -> KvFormat {
        self.kv_format.unwrap_or_else(|| backend.default_kv_format(program, self.exact))
    }
}

/// Makes the backend of one rank from its end of the group.
pub(crate) type RankBackend = fn(Arc<HostCollective>) -> Box<dyn Backend>;

/// How the backend of a rank on `device` is made. `None` where ranks cannot be divided over
/// threads of this process.
pub(crate) fn rank_backend(device: Device) -> Option<RankBackend> {
    match device {
        Device::Reference => Some(|end| Box::new(ReferenceBackend::new().collective(end))),
        Device::Cpu | Device::Auto => {
            Some(|end| Box::new(CpuBackend::new(Default::default()).collective(end)))
        }
        Device::Cuda => None,
    }
}

/// The backend of `device`, on one rank.
///
/// # Errors
/// [`SessionError::NoDevice`] if this build lacks it, [`SessionError::Prepare`] if this machine
/// does.
pub fn backend(device: Device) -> Result<Box<dyn Backend>, SessionError> {
    match rank_backend(device) {
        Some(make) => Ok(make(Arc::new(SingleRank))),
        None => cuda(),
    }
}

#[cfg(feature = "cuda")]
fn cuda() -> Result<Box<dyn Backend>, SessionError> {
    let opened = lathe_cuda::CudaBackend::open(0);
    Ok(Box::new(opened.map_err(|error| SessionError::Prepare(error.into()))?))
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Result<Box<dyn Backend>, SessionError> {
    Err(SessionError::NoDevice("CUDA"))
}

/// Refuses a number format that `device` could not run in a matrix of `columns` columns.
///
/// # Errors
/// As [`backend`]; [`SessionError::NotRun`] says what the device takes.
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

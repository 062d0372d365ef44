//! The caller's choices about the device. Only this file and the measurement of the machine
//! ([`crate::measure::roofs`]) name a backend.

use std::num::NonZeroUsize;
use std::sync::Arc;

use lathe_cpu::{CpuBackend, Isa};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, HostCollective, KvFormat, Program, SingleRank};
use lathe_tensor::Format;

use crate::error::SessionError;

/// The device that computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Device {
    /// Scalar `f32`: slow, and the reference for every other device.
    Reference,
    /// The processor, with its vector instructions and threads.
    Cpu,
    /// An NVIDIA GPU.
    Cuda,
    /// The best that this machine and this build have.
    #[default]
    Auto,
}

/// How to run a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// The device that computes.
    pub device: Device,
    /// Activations are not rounded, sums are `f32`, and the cache is `f32` unless `kv_format` is
    /// given.
    pub exact: bool,
    /// Worker threads. `None` means every core that this process may use.
    pub threads: Option<NonZeroUsize>,
    /// The format of keys and values. `None` means the device's default.
    pub kv_format: Option<KvFormat>,
}

impl Options {
    /// The format of the cache of `program` on `backend`: the given one, or the backend's default.
    pub fn cache_format(&self, backend: &dyn Backend, program: &Program) -> KvFormat {
        self.kv_format.unwrap_or_else(|| backend.default_kv_format(program, self.exact))
    }
}

/// Makes the backend of one rank from its member of the group.
pub(crate) type RankBackend = fn(Arc<HostCollective>) -> Box<dyn Backend>;

/// The constructor for the backend of a rank on `device`. `None` if threads of this process cannot
/// be its ranks.
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
/// [`SessionError::NoDevice`] if this build lacks the device, [`SessionError::Prepare`] if this
/// machine does.
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

/// Checks that `device` can run a number format in a matrix of `columns` columns.
///
/// # Errors
/// As [`backend`]; [`SessionError::NotRun`] says what the device can run.
pub fn check_format(device: Device, format: Format, columns: usize) -> Result<(), SessionError> {
    backend(device)?.runs_format(format, columns).map_err(SessionError::NotRun)
}

/// The instruction set of the CPU backend's kernels: the best that this machine has, or the one in
/// `LATHE_ISA`.
///
/// # Errors
/// [`SessionError::NotRun`] if this machine lacks the one in `LATHE_ISA`.
pub fn instruction_set() -> Result<String, SessionError> {
    Ok(Isa::select(None).map_err(SessionError::NotRun)?.to_string())
}

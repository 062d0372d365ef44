//! `CudaBackend`: what the CUDA backend runs, and how a program is prepared for it.

use std::sync::Arc;

use lathe_program::{
    Backend, BackendError, DeviceMemory, Executor, ExecutorOptions, InputTransform, KvFormat,
    Missing, Op, Program, SingleRank, WeightSource, check_program,
};
use lathe_tensor::Format;

use crate::cache;
use crate::device::{Device, DeviceError};
use crate::executor::CudaExecutor;
use crate::packed::PackedFormat;
use crate::weights::unsupported;

/// Rows at which the products come near the device's arithmetic.
const STEP_ROWS: usize = 2048;

/// The backend of one GPU.
#[derive(Clone)]
pub struct CudaBackend {
    device: Arc<Device>,
}

impl CudaBackend {
    /// The backend of GPU number `ordinal`.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open(ordinal: usize) -> Result<Self, DeviceError> {
        Ok(Self { device: Device::open(ordinal)? })
    }
}

/// What the kernels lack for an op, by name.
fn missing(op: &Op) -> Option<String> {
    let rounding = |transform: &InputTransform| {
        let format = transform.format?;
        Some(format!("activations rounded to {format}"))
    };
    match op {
        Op::Transform { transform, .. } => rounding(transform),
        Op::Experts { spec, .. } => rounding(&spec.hidden_transform),
        _ => None,
    }
}

fn default_format(exact: bool) -> KvFormat {
    if exact { KvFormat::F32 } else { KvFormat::BF16 }
}

impl Backend for CudaBackend {
    fn name(&self) -> &'static str {
        "cuda"
    }

    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing> {
        let format = options.kv_format.unwrap_or(default_format(options.exact));
        let mut features: Vec<String> = program.ops.iter().filter_map(missing).collect();
        if cache::suffix(format).is_none() {
            features.push(format!("a KV cache in {}", format.name()));
        }
        features.dedup();
        if features.is_empty() { Ok(()) } else { Err(Missing(features)) }
    }

    fn memory(&self) -> Result<DeviceMemory, BackendError> {
        self.device.memory()
    }

    fn step_rows(&self) -> usize {
        STEP_ROWS
    }

    fn default_kv_format(&self, _: &Program, exact: bool) -> KvFormat {
        default_format(exact)
    }

    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError> {
        match format {
            Format::Float(_) => Ok(()),
            other if PackedFormat::of(other, columns).is_some() => Ok(()),
            other => Err(unsupported(format!("rows of {columns} weights in {other}"))),
        }
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        check_program(&program, &SingleRank)?;
        self.supports(&program, options)
            .map_err(|Missing(features)| unsupported(features.join(", ")))?;
        let format = options.kv_format.unwrap_or(default_format(options.exact));
        let device = Arc::clone(&self.device);
        Ok(Box::new(CudaExecutor::new(device, program, weights, options, format)?))
    }
}

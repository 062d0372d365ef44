//! The scalar `f32` reference: the oracle for every backend.
//!
//! It dequantizes all weights to `f32` when a program is prepared. Its paged cache is `f32`; other
//! cache formats are rounded when they are written. It computes every row separately, so that
//! nothing depends on the batch. It has plain loops, and threads divide rows and outputs.

mod attention;
mod cache;
mod execute;
mod experts;
mod math;
mod router;
mod weights;

use std::sync::Arc;

use lathe_tensor::Format;

use crate::backend::{
    Backend, BackendError, DeviceMemory, Executor, ExecutorLimits, ExecutorOptions, Missing,
    WeightSource,
};
use crate::collective::{HostCollective, SingleRank, check_program};
use crate::kv::KvFormat;
use crate::program::Program;

pub use execute::ReferenceExecutor;

/// How the reference computes multi-head latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LatentForm {
    /// Makes keys and values of every head from the latents.
    #[default]
    Expanded,
    /// Projects queries into the latent space, where they attend to the latents.
    Absorbed,
}

/// The reference backend.
#[derive(Clone)]
pub struct ReferenceBackend {
    latent_form: LatentForm,
    collective: Arc<HostCollective>,
    steps_in_flight: usize,
}

impl Default for ReferenceBackend {
    fn default() -> Self {
        let latent_form = LatentForm::default();
        Self { latent_form, collective: Arc::new(SingleRank), steps_in_flight: 1 }
    }
}

impl ReferenceBackend {
    /// The backend of a single rank.
    pub fn new() -> Self {
        Self::default()
    }

    /// The same with another form of latent attention.
    pub fn latent_form(self, latent_form: LatentForm) -> Self {
        Self { latent_form, ..self }
    }

    /// The same as one rank of several. It runs one rank's programs.
    pub fn collective(self, collective: Arc<HostCollective>) -> Self {
        Self { collective, ..self }
    }

    /// The same with executors that accept `steps` steps before the first is collected, like a
    /// device. For tests of the layers above an executor.
    ///
    /// # Panics
    /// If `steps` is 0.
    pub fn steps_in_flight(self, steps: usize) -> Self {
        assert!(steps > 0, "an executor takes at least one step");
        Self { steps_in_flight: steps, ..self }
    }

    /// As [`Backend::prepare`], and returns the concrete executor type.
    ///
    /// # Errors
    /// As [`Backend::prepare`].
    pub fn prepare_reference(
        &self,
        program: Arc<Program>,
        source: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<ReferenceExecutor, BackendError> {
        check_program(&program, &*self.collective)?;
        let default_format = self.default_kv_format(&program, options.exact);
        let format = options.kv_format.unwrap_or(default_format);
        let weights = weights::Weights::load(&program, source)?;
        let cache = cache::Cache::new(&program.kv, options.kv_blocks, format)?;
        let pool = execute::pool(options.threads)?;
        let limits = ExecutorLimits {
            rows_max: options.rows_max,
            sequences_max: options.rows_max,
            kv_blocks: options.kv_blocks,
            steps_in_flight: self.steps_in_flight,
        };
        Ok(ReferenceExecutor::new(program, weights, cache, limits, pool, self.clone()))
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> &'static str {
        "reference"
    }

    /// The reference defines every op, so it supports all.
    fn supports(&self, _: &Program, _: &ExecutorOptions) -> Result<(), Missing> {
        Ok(())
    }

    fn memory(&self) -> Result<DeviceMemory, BackendError> {
        DeviceMemory::of_host()
    }

    fn default_kv_format(&self, _: &Program, _exact: bool) -> KvFormat {
        KvFormat::F32
    }

    /// The scalar codecs decode every format.
    fn runs_format(&self, _: Format, _columns: usize) -> Result<(), BackendError> {
        Ok(())
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        Ok(Box::new(self.prepare_reference(program, weights, options)?))
    }
}

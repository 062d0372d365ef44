//! The scalar `f32` reference: the oracle that every backend is compared with.
//!
//! It dequantizes all weights to `f32` when a program is prepared, keeps an `f32` paged cache
//! (other cache formats as round trips at the write), and computes every row by itself, so that
//! nothing depends on how rows are batched. Plain loops; threads share out rows and outputs.

mod attention;
mod cache;
mod execute;
mod experts;
mod math;
mod router;
mod weights;

use std::sync::Arc;

use crate::backend::{Backend, BackendError, Executor, ExecutorOptions, WeightSource};
use crate::collective::{Collective, SingleRank, check_program};
use crate::kv::KvFormat;
use crate::program::Program;

pub use execute::ReferenceExecutor;

/// How the reference computes multi-head latent attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LatentForm {
    /// Keys and values of every head are made from the latents.
    #[default]
    Expanded,
    /// Queries are turned into latent space and attend to the latents themselves.
    Absorbed,
}

/// The reference backend.
#[derive(Clone)]
pub struct ReferenceBackend {
    latent_form: LatentForm,
    collective: Arc<dyn Collective>,
}

impl Default for ReferenceBackend {
    fn default() -> Self {
        Self { latent_form: LatentForm::default(), collective: Arc::new(SingleRank) }
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

    /// The same as one rank of several; its programs are one rank's programs.
    pub fn collective(self, collective: Arc<dyn Collective>) -> Self {
        Self { collective, ..self }
    }

    /// As [`Backend::prepare`], with the executor's own type.
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
        let format = options.kv_format.unwrap_or(KvFormat::F32);
        let weights = weights::Weights::load(&program, source)?;
        let cache = cache::Cache::new(&program.kv, options.kv_blocks, format)?;
        let pool = execute::pool(options.threads)?;
        Ok(ReferenceExecutor::new(program, weights, cache, options.rows_max, pool, self.clone()))
    }
}

impl Backend for ReferenceBackend {
    fn name(&self) -> &'static str {
        "reference"
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

//! From a model's name to an engine: files, program, executor, engine.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use lathe_engine::{Engine, EngineConfig};
use lathe_model::adapter::Adapter;
use lathe_model::eagle::EagleTaps;
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::tokenizer::Tokenizer;
use lathe_model::{DecoderSpec, Model, OpenOptions};
use lathe_program::{Backend, Executor, ExecutorOptions, KvLayout, Program, WeightSource};

use crate::catalogue::{Catalogue, Origin};
use crate::error::SessionError;
use crate::memory;
use crate::options::Options;
use crate::ranks::Ranks;
use crate::startup::{Startup, milliseconds};
use crate::text::tokenizer_of;
use crate::units::human_bytes;

/// The share of the available memory that a cache may take if its size is not given.
const KV_MEMORY_SHARE: f64 = 0.5;

/// A model whose files are open.
pub struct Opened {
    /// Its description, tokenizer and mapped weights.
    pub model: Model,
    /// Bytes of the weight files.
    pub bytes: u64,
    /// The time when opening began.
    pub started: Instant,
    /// The times of opening.
    pub startup: Startup,
    /// How the model is to be divided.
    pub ranks: Ranks,
    /// What it hands out for drafters.
    pub taps: Option<EagleTaps>,
}

/// The size of the cache that is needed.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// The most tokens of a sequence.
    pub context: usize,
    /// Sequences of that length at the same time.
    pub sequences: usize,
    /// The most rows of a step. `None` means [`Backend::step_rows`].
    pub rows_max: Option<usize>,
}

/// A model that is ready to run.
pub struct Session {
    /// The model.
    pub model: Model,
    /// The executor of its steps.
    pub executor: Box<dyn Executor>,
    /// Milliseconds from the start of opening until the session is ready.
    pub load_ms: f64,
    /// The parts of that time.
    pub startup: Startup,
}

/// Finds the model called `name`, fetches it if necessary, and opens its files and its adapter. The
/// catalogue's reporter hears of the adapter and of notices for the user.
///
/// # Errors
/// If the model is not found, cannot be fetched, or its files are not valid.
pub fn open(
    catalogue: &Catalogue<'_>,
    name: &str,
    options: &OpenOptions,
) -> Result<Opened, SessionError> {
    let located = catalogue.locate(name)?;
    let started = Instant::now();
    let mut model = Model::open_with(&located.path, options)?;
    if located.origin != Origin::Local {
        // Paths in the cache are checksums and commits, so the model takes its given name.
        model.name = located.name;
    }
    let tell = |text: &str| catalogue.reporter.line(&format!("{}: {text}", model.name));
    if let Some(adapter) = &model.adapter {
        tell(&format!("with {}", describe_adapter(adapter)));
    }
    model.notes.iter().for_each(|note| tell(note));
    let tokenizer_ms = model.tokenizer_time.as_secs_f64() * 1000.0;
    let open_ms = milliseconds(started) - tokenizer_ms;
    let startup = Startup { open_ms, tokenizer_ms, ..Startup::default() };
    let adapter_bytes = model.adapter.as_ref().map_or(0, Adapter::bytes);
    let bytes = weight_file_bytes(&located.path) + adapter_bytes;
    Ok(Opened { model, bytes, started, startup, ranks: Ranks::default(), taps: None })
}

/// One line that describes an adapter.
pub fn describe_adapter(adapter: &Adapter) -> String {
    let ranks = adapter.matrices().values().map(|low_rank| low_rank.rank);
    let (least, most) = (ranks.clone().min().unwrap_or(0), ranks.max().unwrap_or(0));
    let ranks = if least == most { most.to_string() } else { format!("{least} to {most}") };
    format!(
        "adapter {}: rank {ranks} beside {} matrices, {}",
        adapter.path().display(),
        adapter.matrices().len(),
        human_bytes(adapter.bytes())
    )
}

impl Opened {
    /// The tokenizer.
    ///
    /// # Errors
    /// If the model has no tokenizer, or a damaged one.
    pub fn tokenizer(&self) -> Result<&Tokenizer, SessionError> {
        tokenizer_of(&self.model)
    }

    /// Refuses a model with an adapter, because `what` does not write adapters.
    ///
    /// # Errors
    /// [`SessionError::AdapterLost`].
    pub fn refuse_adapter(&self, what: &str) -> Result<(), SessionError> {
        match &self.model.adapter {
            None => Ok(()),
            Some(adapter) => Err(SessionError::AdapterLost {
                what: what.to_owned(),
                path: adapter.path().to_owned(),
            }),
        }
    }

    /// The same model, divided over `ranks`.
    pub fn over(self, ranks: Ranks) -> Self {
        Self { ranks, ..self }
    }

    /// The same model, which hands out what drafters read.
    pub fn tapped(self, taps: Option<&EagleTaps>) -> Self {
        Self { taps: taps.cloned(), ..self }
    }

    /// Prepares the weights for the device and allocates the cache that `need` describes.
    ///
    /// # Errors
    /// If the model does not fit its context, the memory, the ranks or the device.
    pub fn prepare(self, options: &Options, need: Need) -> Result<Session, SessionError> {
        let Opened { model, bytes, started, mut startup, ranks, taps } = self;
        let prepared = Instant::now();
        let mut lowering = LowerOptions::new(need.context);
        if let Some(taps) = &taps {
            lowering = taps.into_options(lowering);
        }
        let program = program_with(&model.spec, &lowering)?;
        let weights = model.weights(&program)?;
        let backend = ranks.backend(options.device)?;
        check_memory(&*backend, &program, bytes, options, need, ranks)?;
        let executor = prepare_program(&*backend, &program, &weights, options, need, ranks)?;
        startup.pack_ms = milliseconds(prepared);
        let load_ms = milliseconds(started);
        Ok(Session { model, executor, load_ms, startup })
    }
}

/// The program of a model of `spec` for up to `context` tokens of a sequence.
///
/// # Errors
/// If the model's context is shorter, or the spec cannot be lowered.
pub fn program_for(spec: &DecoderSpec, context: usize) -> Result<Arc<Program>, SessionError> {
    program_with(spec, &LowerOptions::new(context))
}

fn program_with(spec: &DecoderSpec, options: &LowerOptions) -> Result<Arc<Program>, SessionError> {
    let (needed, limit) = (options.context_max, spec.context_max);
    if needed > limit {
        return Err(SessionError::Context { needed, limit });
    }
    Ok(Arc::new(lower(spec, options)?))
}

/// An executor of `program` on `backend`, the backend of `ranks`, with the cache that `need`
/// describes.
///
/// # Errors
/// If the device lacks something that the program needs, or the weights cannot be read.
pub fn prepare_program(
    backend: &dyn Backend,
    program: &Arc<Program>,
    weights: &dyn WeightSource,
    options: &Options,
    need: Need,
    ranks: Ranks,
) -> Result<Box<dyn Executor>, SessionError> {
    let rows_max = need.rows(program, backend);
    let prepared = ExecutorOptions {
        kv_blocks: kv_blocks(&program.kv, need, rows_max),
        kv_format: options.kv_format,
        rows_max,
        threads: ranks.threads(options),
        exact: options.exact,
    };
    backend.prepare(Arc::clone(program), weights, &prepared).map_err(|error| ranks.explain(error))
}

/// Checks, before anything is loaded, that the program can be divided and fits the memory of
/// `backend`.
///
/// # Errors
/// [`SessionError::Ranks`], or [`SessionError::Memory`] with the bytes that are needed.
pub fn check_memory(
    backend: &dyn Backend,
    program: &Program,
    weight_bytes: u64,
    options: &Options,
    need: Need,
    ranks: Ranks,
) -> Result<(), SessionError> {
    ranks.check(program)?;
    let blocks = kv_blocks(&program.kv, need, need.rows(program, backend)) as u64;
    let format = options.cache_format(backend, program);
    let page_bytes = ranks.kv_total(program, |kv| kv.page_bytes(format));
    let kv_bytes = blocks.saturating_mul(page_bytes as u64);
    let Some(available_bytes) = memory::available_bytes(backend) else { return Ok(()) };
    if weight_bytes.saturating_add(kv_bytes) <= available_bytes {
        return Ok(());
    }
    let Need { sequences, context, .. } = need;
    Err(SessionError::Memory { weight_bytes, kv_bytes, available_bytes, sequences, context })
}

impl Need {
    /// Rows of a step, no more than the sequences can have.
    fn rows(&self, program: &Program, backend: &dyn Backend) -> usize {
        let all = self.context.min(program.context_max).saturating_mul(self.sequences);
        self.rows_max.unwrap_or(backend.step_rows()).clamp(1, all.max(1))
    }
}

/// The most pages that `need.sequences` sequences of `need.context` tokens hold, in any order of
/// steps of `rows_max` rows.
fn kv_blocks(layout: &KvLayout, need: Need, rows_max: usize) -> usize {
    let whole = need.context.div_ceil(layout.block_tokens);
    let group = |window: Option<usize>| match window {
        // The window, the rows of a step, and a partly filled block at each end.
        Some(window) => whole.min((window + rows_max).div_ceil(layout.block_tokens) + 2),
        None => whole,
    };
    let sequence: usize = layout.groups.iter().map(|kv_group| group(kv_group.window)).sum();
    sequence.saturating_mul(need.sequences).max(1)
}

/// The longest context, up to the model's own, whose cache takes at most half of the available
/// memory.
///
/// # Errors
/// If the model cannot be lowered.
pub fn context_that_fits(
    model: &Model,
    options: &Options,
    ranks: Ranks,
) -> Result<usize, SessionError> {
    let limit = model.spec.context_max;
    let program = lower(&model.spec, &LowerOptions::new(limit))?;
    let backend = ranks.backend(options.device)?;
    let Some(available) = memory::available_bytes(&*backend) else { return Ok(limit) };
    let bytes = (available as f64 * KV_MEMORY_SHARE) as u64;
    let format = options.cache_format(&*backend, &program);
    let fits =
        |tokens: usize| ranks.kv_total(&program, |kv| kv.bytes_for(tokens, format)) as u64 <= bytes;
    Ok(largest(limit, fits).unwrap_or(1))
}

/// The largest of `1..=limit` that fits, or `None` if 1 does not. If a number fits, all smaller
/// ones must fit.
pub fn largest(limit: usize, fits: impl Fn(usize) -> bool) -> Option<usize> {
    let (mut good, mut bad) = (0, limit + 1);
    while bad - good > 1 {
        let middle = good + (bad - good) / 2;
        if fits(middle) {
            good = middle;
        } else {
            bad = middle;
        }
    }
    (good > 0).then_some(good)
}

impl Session {
    /// Starts an engine around the executor. Returns it with the model.
    ///
    /// # Errors
    /// If `sequences` is 0.
    pub fn into_engine(
        self,
        kv_cache: bool,
        sequences: usize,
    ) -> Result<(Engine, Model), SessionError> {
        let config = EngineConfig { sequences_max: sequences, kv_cache, ..EngineConfig::default() };
        Ok((Engine::new(self.executor, config)?, self.model))
    }
}

/// Bytes of a GGUF file, or of the safetensors files in a folder. Other files do not count.
fn weight_file_bytes(path: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(path) else { return bytes_under(path) };
    let paths = entries.flatten().map(|entry| entry.path());
    let weights = paths.filter(|path| path.extension().is_some_and(|kind| kind == "safetensors"));
    weights.map(|path| bytes_under(&path)).sum()
}

/// Bytes of a file, or of all files in a folder.
pub fn bytes_under(path: &Path) -> u64 {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => meta.len(),
        Ok(_) => {
            let Ok(entries) = fs::read_dir(path) else { return 0 };
            entries.flatten().map(|entry| bytes_under(&entry.path())).sum()
        }
        Err(_) => 0,
    }
}

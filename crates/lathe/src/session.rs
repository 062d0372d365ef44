//! From the word MODEL to something that runs: model, program, backend, executor, engine. The only
//! place that names a backend.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Error;
use lathe_cpu::CpuBackend;
use lathe_engine::{Engine, EngineConfig, ScoreError, TextDecoder};
use lathe_model::adapter::{Adapter, AdapterChoice};
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::tokenizer::Tokenizer;
use lathe_model::{DecoderSpec, Model};
use lathe_program::reference::ReferenceBackend;
use lathe_program::{
    Backend, Executor, ExecutorOptions, KvFormat, KvLayout, Program, WeightSource,
};

use crate::arguments::{Device, Global};
use crate::catalogue::Origin;
use crate::commands::locate;
use crate::memory;
use crate::output::{InputContext, bad_input, human_bytes};
use crate::parallel::ParallelArguments;
use crate::startup::Startup;

/// Rows of a step at most, unless a command has a reason for another number: enough for the
/// matrix products to be compute-bound, few enough that activations stay small.
pub const ROWS_MAX: usize = 512;
/// Part of the available memory that a cache may take if its size is not given.
const KV_MEMORY_SHARE: f64 = 0.5;

/// A model whose files are open.
pub struct Opened {
    /// The model.
    pub model: Model,
    /// Bytes of the files that hold its weights.
    pub bytes: u64,
    /// When opening began.
    pub started: Instant,
    /// What opening took.
    pub startup: Startup,
    /// How it is to be divided.
    pub parallel: ParallelArguments,
}

/// What a command needs to run.
#[derive(Debug, Clone, Copy)]
pub struct Need {
    /// Tokens that a sequence may reach.
    pub context: usize,
    /// Sequences that hold so many at once.
    pub sequences: usize,
    /// Rows of a step at most.
    pub rows_max: usize,
}

/// A prepared model.
pub struct Session {
    /// The model.
    pub model: Model,
    /// Runs steps.
    pub executor: Box<dyn Executor>,
    /// From the start of opening to ready.
    pub load_ms: f64,
    /// What that time went to.
    pub startup: Startup,
}

/// Opens the files that MODEL names and those of its adapter, and tells of the latter.
pub fn open(name: &str, adapter: &AdapterChoice) -> Result<Opened, Error> {
    let located = locate(name)?;
    let started = Instant::now();
    let mut model = Model::open_with(&located.path, adapter).bad_input()?;
    if located.origin != Origin::Local {
        // The cache names files by checksums and commits.
        model.name = located.name;
    }
    if let Some(adapter) = &model.adapter {
        eprintln!("{}: with {}", model.name, describe_adapter(adapter));
    }
    for note in &model.notes {
        eprintln!("{}: {note}", model.name);
    }
    let parallel = ParallelArguments::default();
    let tokenizer_ms = model.tokenizer_time.as_secs_f64() * 1000.0;
    let open_ms = milliseconds(started) - tokenizer_ms;
    let startup = Startup { open_ms, tokenizer_ms, ..Startup::default() };
    let adapter_bytes = model.adapter.as_ref().map_or(0, Adapter::bytes);
    let bytes = weight_file_bytes(&located.path) + adapter_bytes;
    Ok(Opened { model, bytes, started, startup, parallel })
}

/// An adapter in a line.
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

/// The backend that `--device` asks for.
pub fn backend(device: Device) -> Result<Box<dyn Backend>, Error> {
    match device {
        Device::Reference => Ok(Box::new(ReferenceBackend::new())),
        Device::Cpu | Device::Auto => Ok(Box::new(CpuBackend::new(Default::default()))),
        Device::Cuda => Err(bad_input("--device cuda: this build of lathe has no CUDA backend")),
    }
}

impl Opened {
    /// The tokenizer, or why the command cannot do without.
    pub fn tokenizer(&self) -> Result<&Tokenizer, Error> {
        tokenizer_of(&self.model)
    }

    /// Refuses a model with an adapter, which `command` writes nowhere.
    pub fn refuse_adapter(&self, command: &str) -> Result<(), Error> {
        match &self.model.adapter {
            None => Ok(()),
            Some(adapter) => Err(bad_input(format!(
                "{command} would lose the adapter {}, expected --adapter none",
                adapter.path().display()
            ))),
        }
    }

    /// The same, to be divided over ranks.
    pub fn over(self, parallel: ParallelArguments) -> Self {
        Self { parallel, ..self }
    }

    /// Lays the weights out for the device and makes a cache as large as `need` says.
    pub fn prepare(self, global: &Global, need: Need) -> Result<Session, Error> {
        let Opened { model, bytes, started, mut startup, parallel } = self;
        let prepared = Instant::now();
        let program = program_for(&model.spec, need.context)?;
        let weights = model.weights(&program).bad_input()?;
        check_memory(&program, bytes, global, need, parallel)?;
        let executor = prepare_program(&program, &weights, global, need, parallel)?;
        startup.pack_ms = milliseconds(prepared);
        let load_ms = milliseconds(started);
        Ok(Session { model, executor, load_ms, startup })
    }
}

/// The program that serves a model of `spec` for up to `context` tokens a sequence.
pub fn program_for(spec: &DecoderSpec, context: usize) -> Result<Arc<Program>, Error> {
    let limit = spec.context_max;
    if context > limit {
        let message = format!("{context} tokens are needed, the model's context holds {limit}");
        return Err(bad_input(message));
    }
    Ok(Arc::new(lower(spec, &LowerOptions::new(context)).bad_input()?))
}

/// An executor of `program`, with a cache as large as `need` says.
pub fn prepare_program(
    program: &Arc<Program>,
    weights: &dyn WeightSource,
    global: &Global,
    need: Need,
    parallel: ParallelArguments,
) -> Result<Box<dyn Executor>, Error> {
    let rows_max = need.rows(program);
    let options = ExecutorOptions {
        kv_blocks: kv_blocks(&program.kv, need, rows_max),
        kv_format: global.kv_format,
        rows_max,
        threads: parallel.threads(global),
        exact: global.exact,
    };
    let executor = parallel
        .backend(global.device)?
        .prepare(Arc::clone(program), weights, &options)
        .map_err(|error| parallel.explain(error))?;
    Ok(executor)
}

/// Refuses what cannot be divided or cannot fit before anything is loaded, and says what it would
/// take.
pub fn check_memory(
    program: &Program,
    weight_bytes: u64,
    global: &Global,
    need: Need,
    parallel: ParallelArguments,
) -> Result<(), Error> {
    parallel.check(program)?;
    let blocks = kv_blocks(&program.kv, need, need.rows(program)) as u64;
    let page_bytes = parallel.kv_total(program, |kv| kv.page_bytes(kv_format(global)));
    let kv_bytes = blocks.saturating_mul(page_bytes as u64);
    let Some(available) = memory::available_bytes() else { return Ok(()) };
    if weight_bytes.saturating_add(kv_bytes) <= available {
        return Ok(());
    }
    anyhow::bail!(
        "not enough memory: the weights take {} and the KV cache for {} x {} tokens {}, {} are \
         available",
        human_bytes(weight_bytes),
        need.sequences,
        need.context,
        human_bytes(kv_bytes),
        human_bytes(available)
    )
}

impl Need {
    /// Rows of a step: no more than there can be.
    fn rows(&self, program: &Program) -> usize {
        let all = self.context.min(program.context_max).saturating_mul(self.sequences);
        self.rows_max.clamp(1, all.max(1))
    }
}

/// The format of the cache: what was asked for, or what the backend chooses by itself.
pub fn kv_format(global: &Global) -> KvFormat {
    let wide = global.exact || global.device == Device::Reference;
    global.kv_format.unwrap_or(if wide { KvFormat::F32 } else { KvFormat::Int16 })
}

/// Pages that `need.sequences` sequences of `need.context` tokens hold at most, in any order of
/// steps of `rows_max` rows.
fn kv_blocks(layout: &KvLayout, need: Need, rows_max: usize) -> usize {
    let whole = need.context.div_ceil(layout.block_tokens);
    let group = |window: Option<usize>| match window {
        // A window's blocks, a step's rows, and a block at either end that is not full.
        Some(window) => whole.min((window + rows_max).div_ceil(layout.block_tokens) + 2),
        None => whole,
    };
    let sequence: usize = layout.groups.iter().map(|kv_group| group(kv_group.window)).sum();
    sequence.saturating_mul(need.sequences).max(1)
}

/// The longest context, up to the model's own, whose cache takes no more than half of the memory
/// that is available.
pub fn context_that_fits(
    model: &Model,
    global: &Global,
    parallel: ParallelArguments,
) -> Result<usize, Error> {
    let limit = model.spec.context_max;
    let program = lower(&model.spec, &LowerOptions::new(limit)).bad_input()?;
    let Some(available) = memory::available_bytes() else { return Ok(limit) };
    let bytes = (available as f64 * KV_MEMORY_SHARE) as u64;
    let format = kv_format(global);
    let fits = |tokens: usize| {
        parallel.kv_total(&program, |kv| kv.bytes_for(tokens, format)) as u64 <= bytes
    };
    Ok(largest(limit, fits).unwrap_or(1))
}

/// The largest of `1..=limit` that fits, if 1 does; fitting gets harder as the number grows.
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
    /// An engine around the executor, and the rest of the session.
    pub fn into_engine(self, kv_cache: bool, sequences: usize) -> Result<(Engine, Model), Error> {
        let config = EngineConfig { sequences_max: sequences, kv_cache, ..EngineConfig::default() };
        Ok((Engine::new(self.executor, config)?, self.model))
    }
}

/// The model's tokenizer, or why a command cannot do without.
pub fn tokenizer_of(model: &Model) -> Result<&Tokenizer, Error> {
    model.tokenizer.as_ref().ok_or_else(|| match &model.text_problem {
        Some(problem) => bad_input(format!("{}: {problem}", model.name)),
        None => bad_input(format!("{} has no tokenizer; give token ids instead", model.name)),
    })
}

/// Since `start`.
pub fn milliseconds(start: Instant) -> f64 {
    start.elapsed().as_secs_f64() * 1000.0
}

/// Turns the tokens of one answer into text, without control tokens.
pub fn decoder(tokenizer: &Tokenizer) -> Box<dyn TextDecoder> {
    Box::new(tokenizer.decode_stream(true))
}

/// Tokens that cannot be scored are bad input; a device that fails is not.
pub fn score_result<T>(result: Result<T, ScoreError>) -> Result<T, Error> {
    result.map_err(|error| match error {
        ScoreError::Backend(_) | ScoreError::Logits { .. } => error.into(),
        _ => bad_input(error),
    })
}

/// Bytes of a GGUF file, or of the safetensors in a folder, which may hold much else.
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

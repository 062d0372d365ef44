//! `Model`: a Hugging Face directory or a GGUF file, opened: what it is, its weights, its text.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use lathe_program::Program;
use lathe_tensor::gguf::{GgufError, GgufFile};
use serde_json::Value;

use crate::adapter::{Adapter, AdapterChoice, AdapterError, OWN_FOLDER};
use crate::chat::ChatTemplate;
use crate::checkpoint::{Checkpoint, CheckpointError, InputScheme, Quantization};
use crate::families::{Family, GgufFamily};
use crate::generation::{GenerationDefaults, read_json};
use crate::inputs::inputs_of;
use crate::names::{Rules, hugging_face};
use crate::spec::{DecoderSpec, SpecError};
use crate::tokenizer::Tokenizer;
use crate::weights::{ModelWeights, WeightsError, has_own_head};

/// Why a model could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file cannot be read or is not what its name says.
    #[error("{}: {source}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// There is no model at the path.
    #[error("{}: {reason}", .path.display())]
    NotAModel {
        /// Which path.
        path: PathBuf,
        /// What is there instead.
        reason: &'static str,
    },
    /// What it computes is malformed or not supported.
    #[error("{}: {source}", .path.display())]
    Spec {
        /// The file that says so.
        path: PathBuf,
        /// What is wrong.
        source: SpecError,
    },
    /// Its weights cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Its GGUF file cannot be read.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// Its weights are not what its description says.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// Its adapter cannot be used.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
}

/// The files that a model came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileLayout {
    /// A directory with `config.json` and safetensors.
    HuggingFace,
    /// One GGUF file.
    Gguf,
}

/// What the caller chooses about a model.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// The adapter that the model is run with.
    pub adapter: AdapterChoice,
    /// Fields of `config.json` that are ignored where they would be refused.
    pub allow_unknown: Vec<String>,
    /// Positions that the model is to have, in place of what its files say.
    pub context: Option<usize>,
}

impl From<AdapterChoice> for OpenOptions {
    fn from(adapter: AdapterChoice) -> Self {
        OpenOptions { adapter, ..OpenOptions::default() }
    }
}

/// An opened model.
#[derive(Debug)]
pub struct Model {
    /// What it is.
    pub spec: DecoderSpec,
    /// Its tensors.
    pub checkpoint: Checkpoint,
    /// Text to tokens and back; `None` if there is none, or none that can be read (see
    /// [`Self::text_problem`]).
    pub tokenizer: Option<Tokenizer>,
    /// What building the tokenizer took.
    pub tokenizer_time: Duration,
    /// Conversations to text, if the model has a template.
    pub chat_template: Option<ChatTemplate>,
    /// Why tokenizer or template are missing although files for them are there.
    pub text_problem: Option<String>,
    /// When to stop and how to sample.
    pub generation: GenerationDefaults,
    /// The name of the directory or file.
    pub name: String,
    /// What files it came in.
    pub layout: FileLayout,
    /// What is added to the products of its matrices; [`DecoderSpec::adapters`] says to which.
    pub adapter: Option<Adapter>,
    /// What a user should be told about the files, a line each.
    pub notes: Vec<String>,
    rules: &'static [Rules],
}

impl Model {
    /// Opens a Hugging Face directory or a `.gguf` file, with the adapter that the directory holds,
    /// if any. Files are mapped, not read.
    ///
    /// # Errors
    /// If the path holds no model, a file is malformed, or the model needs a feature that is not
    /// supported (the error names it).
    pub fn open(path: &Path) -> Result<Model, ModelError> {
        Self::open_with(path, &OpenOptions::default())
    }

    /// As [`Self::open`], with what `options` say.
    ///
    /// # Errors
    /// As [`Self::open`], and if the adapter is not one for this model or needs a feature that is
    /// not supported, or the model cannot have so many positions.
    pub fn open_with(path: &Path, options: &OpenOptions) -> Result<Model, ModelError> {
        let mut model = Self::open_base(path, options)?;
        if let Some(context) = options.context {
            let at = |source| ModelError::Spec { path: path.to_owned(), source };
            let note = model.spec.set_context(context).map_err(at)?;
            model.notes.extend(note);
        }
        let folder = match &options.adapter {
            AdapterChoice::None => None,
            AdapterChoice::Own => Adapter::is_in(path).then(|| path.join(OWN_FOLDER)),
            AdapterChoice::Folder(folder) => Some(folder.clone()),
        };
        if let Some(folder) = folder {
            // Adapters have the names of Hugging Face's classes; GGUF has its own.
            let rules = match model.layout {
                FileLayout::HuggingFace => model.rules,
                FileLayout::Gguf => hugging_face::ALL,
            };
            let adapter = Adapter::open(&folder, &model.spec, rules)?;
            model.spec.adapters = adapter.matrices().clone();
            model.adapter = Some(adapter);
        }
        Ok(model)
    }

    fn open_base(path: &Path, options: &OpenOptions) -> Result<Model, ModelError> {
        if path.is_dir() {
            return Self::open_directory(path, options);
        }
        if path.is_file() {
            return Self::open_gguf(path);
        }
        Err(ModelError::NotAModel { path: path.to_owned(), reason: "no such file or directory" })
    }

    fn open_directory(path: &Path, options: &OpenOptions) -> Result<Model, ModelError> {
        let config = read_config(path)?;
        let at = |source| ModelError::Spec { path: path.join("config.json"), source };
        let family = Family::of_config(&config).map_err(at)?;
        let (mut spec, mut notes) =
            family.spec_with_notes(&config, &options.allow_unknown).map_err(at)?;
        let beside = path.join("hf_quant_config.json");
        let beside =
            read_json(&beside).map_err(|source| ModelError::Read { path: beside, source })?;
        let gptq = path.join("quantize_config.json");
        let gptq = read_json(&gptq).map_err(|source| ModelError::Read { path: gptq, source })?;
        let quantization =
            Quantization::of_folder(&config, beside.as_ref(), gptq.as_ref()).map_err(at)?;
        if Quantization::scales_a_cache(&config) {
            notes.push("the scales of `kv_cache_scheme` are not used: --kv-format chooses".into());
        }
        let mut problem = None;
        let tokenizer_path = path.join("tokenizer.json");
        let started = Instant::now();
        let tokenizer = match tokenizer_path.is_file() {
            true => keep(Tokenizer::from_file(&tokenizer_path), &mut problem),
            false => None,
        };
        let tokenizer_time = started.elapsed();
        let chat_template = keep(ChatTemplate::from_directory(path), &mut problem).flatten();
        let generation_path = path.join("generation_config.json");
        let generation = read_json(&generation_path)
            .map_err(|source| ModelError::Read { path: generation_path, source })?;
        let generation =
            GenerationDefaults::from_hf(generation.as_ref(), &config, tokenizer.as_ref())
                .map_err(at)?;
        let told = |it: &String| format!("generation_config.json: `{it}` is not followed");
        notes.extend(generation.not_followed.iter().map(told));
        let checkpoint = Checkpoint::open_safetensors(path, quantization)?;
        if spec.tied_head && has_own_head(&checkpoint, family.rules())? {
            spec.tied_head = false;
            notes.push("the file's head differs from its embedding and is used".to_owned());
        }
        let scheme = InputScheme::from_hf_config(&config).map_err(at)?;
        if !scheme.is_empty() || checkpoint.may_store_inputs() {
            spec.inputs = inputs_of(&spec, &checkpoint, family.rules(), &scheme, &at)?;
        }
        Ok(Model {
            spec,
            checkpoint,
            tokenizer,
            tokenizer_time,
            chat_template,
            text_problem: problem,
            generation,
            name: name_of(path),
            layout: FileLayout::HuggingFace,
            adapter: None,
            notes,
            rules: family.rules(),
        })
    }

    fn open_gguf(path: &Path) -> Result<Model, ModelError> {
        let file = GgufFile::open(path)?;
        let at = |source| ModelError::Spec { path: path.to_owned(), source };
        let family = GgufFamily::of(&file).map_err(at)?;
        let spec = family.spec(&file).map_err(at)?;
        let mut problem = None;
        let has_tokens = file.metadata.get("tokenizer.ggml.model").is_some();
        let started = Instant::now();
        let tokenizer = match has_tokens {
            true => keep(Tokenizer::from_gguf(&file), &mut problem),
            false => None,
        };
        let tokenizer_time = started.elapsed();
        let template = file.metadata.optional::<&str>("tokenizer.chat_template").unwrap_or(None);
        let chat_template = template.and_then(|source| {
            let named = tokenizer.as_ref().map(Tokenizer::named_tokens).unwrap_or_default();
            keep(ChatTemplate::new(source, named), &mut problem)
        });
        Ok(Model {
            spec,
            generation: GenerationDefaults::from_gguf(&file, tokenizer.as_ref()),
            tokenizer,
            tokenizer_time,
            chat_template,
            text_problem: problem,
            name: name_of(path),
            layout: FileLayout::Gguf,
            adapter: None,
            notes: unpacked_note(&file).into_iter().collect(),
            rules: family.rules(),
            checkpoint: Checkpoint::Gguf(file),
        })
    }

    /// The weights of `program`, which must be lowered from this model's spec.
    ///
    /// # Errors
    /// If the checkpoint lacks one or has it in another shape.
    pub fn weights<'a>(&'a self, program: &'a Program) -> Result<ModelWeights<'a>, ModelError> {
        let adapter = self.adapter.as_ref();
        Ok(ModelWeights::new(&self.checkpoint, &self.spec, self.rules, adapter, program)?)
    }
}

/// Says which types of a file are unpacked when they are read, to what, and what that costs.
fn unpacked_note(file: &GgufFile) -> Option<String> {
    let mut kinds = BTreeMap::new();
    let (mut before, mut after) = (0u64, 0u64);
    for info in file.tensors.iter().filter(|info| info.kind.is_unpacked()) {
        let (Some(format), Some(range)) = (info.kind.format(), &info.range) else { continue };
        *kinds.entry(format!("{} as {format}", info.kind)).or_insert(0usize) += 1;
        before += range.len() as u64;
        let elements = info.shape.iter().product::<usize>() as f64;
        after += (elements * format.bits_per_weight() / 8.0) as u64;
    }
    let kinds: Vec<String> =
        kinds.into_iter().map(|(kind, tensors)| format!("{kind} ({tensors})")).collect();
    (!kinds.is_empty()).then(|| {
        let megabytes = [before, after].map(|bytes| bytes as f64 / 1e6);
        format!(
            "types without a kernel are unpacked, without loss (tensors of each): {}; {:.1} MB become \
             {:.1} MB",
            kinds.join(", "),
            megabytes[0],
            megabytes[1]
        )
    })
}

/// The spec of a model whose weights may be absent (a directory with a `config.json`, or a GGUF
/// file), with what a user should be told about it.
///
/// # Errors
/// As [`Model::open_with`].
pub fn read_spec(
    path: &Path,
    options: &OpenOptions,
) -> Result<(DecoderSpec, Vec<String>), ModelError> {
    let file = if path.is_dir() { path.join("config.json") } else { path.to_owned() };
    let at = |source| ModelError::Spec { path: file.clone(), source };
    let (mut spec, mut notes) = if path.is_dir() {
        let config = read_config(path)?;
        let family = Family::of_config(&config).map_err(at)?;
        family.spec_with_notes(&config, &options.allow_unknown).map_err(at)?
    } else {
        (DecoderSpec::from_gguf(&GgufFile::open(path)?).map_err(at)?, Vec::new())
    };
    if let Some(context) = options.context {
        notes.extend(spec.set_context(context).map_err(at)?);
    }
    Ok((spec, notes))
}

fn read_config(directory: &Path) -> Result<Value, ModelError> {
    let path = directory.join("config.json");
    let config = read_json(&path).map_err(|source| ModelError::Read { path, source })?;
    let reason = "the directory has no config.json";
    config.ok_or_else(|| ModelError::NotAModel { path: directory.to_owned(), reason })
}

/// The value, or `None` with the reason noted.
fn keep<T, E: std::fmt::Display>(result: Result<T, E>, problem: &mut Option<String>) -> Option<T> {
    result.map_err(|error| problem.get_or_insert(error.to_string()).len()).ok()
}

fn name_of(path: &Path) -> String {
    let full = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = if path.is_dir() { full.file_name() } else { full.file_stem() };
    name.map_or_else(|| path.display().to_string(), |name| name.to_string_lossy().into_owned())
}

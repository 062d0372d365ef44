//! Low-rank adapters: the folder that PEFT writes, read for a model that is open.
//!
//! An adapter adds `scale * B (A x)` to the product `W x` of some matrices, with `A` `[rank, in]`
//! and `B` `[out, rank]` (LoRA, Hu et al. 2021, section 4.1); the corrections of quantized weights
//! are the same thing (LQER, Zhang et al. 2024, equation 9). What is read here ends as rows of
//! [`DecoderSpec::adapters`]; the numbers stay in the file. What an adapter asks for beyond that is
//! refused by name.

mod config;
mod targets;

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use lathe_program::{Program, Weight};
use lathe_tensor::Tensor;
use lathe_tensor::safetensors::{Dtype, SafetensorsError, SafetensorsFile};

use crate::generation::read_json;
use crate::lower::{LowerOptions, lower};
use crate::names::Rules;
use crate::spec::{DecoderSpec, LowRank, SpecError};
use config::AdapterConfig;
use targets::{Target, Targets};

/// The folder within a model's in which its own adapter lies.
pub const OWN_FOLDER: &str = "adapter";
/// What an adapter's folder must hold.
pub const CONFIG_NAME: &str = "adapter_config.json";
/// The other file of an adapter's folder.
pub const WEIGHTS_NAME: &str = "adapter_model.safetensors";

/// Before the path of a module in the names of tensors.
pub(crate) const PREFIX: &str = "base_model.model.";
/// Behind a module's path in the name of `A`.
pub(crate) const DOWN: &str = ".lora_A.weight";
/// The same of `B`.
pub(crate) const UP: &str = ".lora_B.weight";

/// Which adapter a model is opened with. Never two at once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AdapterChoice {
    /// The one that the model's folder holds in [`OWN_FOLDER`], if there is one.
    #[default]
    Own,
    /// None, whatever the folder holds.
    None,
    /// The one in this folder, in place of the model's own.
    Folder(PathBuf),
}

/// Why an adapter cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AdapterError {
    /// The folder holds no adapter.
    #[error("{}: {reason}", .path.display())]
    NotAnAdapter {
        /// The folder.
        path: PathBuf,
        /// What is there instead.
        reason: &'static str,
    },
    /// A file cannot be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// Its description is malformed, or asks for what is not supported.
    #[error("{}: {source}", .path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: SpecError,
    },
    /// Its file of weights is malformed.
    #[error(transparent)]
    File(#[from] SafetensorsError),
    /// A tensor is not what the model and the adapter's description ask for.
    #[error("{}: tensor {tensor} is {found}, expected {expected}", .path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in it.
        tensor: String,
        /// What it is.
        found: String,
        /// What it should be.
        expected: String,
    },
}

/// An opened adapter of one model.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    file: SafetensorsFile,
    /// By the matrix whose product they are added to.
    matrices: BTreeMap<String, LowRank>,
    /// Where the canonical weights are: of a tensor, these rows.
    places: BTreeMap<String, (String, Range<usize>)>,
}

impl Adapter {
    /// The adapter in the folder `path` for a model of `spec`, whose modules have the names of
    /// `rules` (Hugging Face's). The file is mapped, not read.
    ///
    /// # Errors
    /// [`AdapterError`]: whatever would not be computed as PEFT computes it, and any tensor that
    /// has no place.
    pub fn open(path: &Path, spec: &DecoderSpec, rules: &[Rules]) -> Result<Self, AdapterError> {
        let config_path = path.join(CONFIG_NAME);
        let config = read_json(&config_path)
            .map_err(|source| AdapterError::Read { path: config_path.clone(), source })?;
        let at = |source| AdapterError::Config { path: config_path.clone(), source };
        let not = |reason| AdapterError::NotAnAdapter { path: path.to_owned(), reason };
        let config = config.ok_or_else(|| not("the directory has no adapter_config.json"))?;
        let config = AdapterConfig::new(&config).map_err(at)?;
        let weights_path = path.join(WEIGHTS_NAME);
        if !weights_path.exists() {
            return Err(not(match path.join("adapter_model.bin").exists() {
                true => "the weights are pickled, expected adapter_model.safetensors",
                false => "the directory has no adapter_model.safetensors",
            }));
        }
        let file = SafetensorsFile::open(&weights_path)?;
        let plain = DecoderSpec { adapters: BTreeMap::new(), ..spec.clone() };
        let program = lower(&plain, &LowerOptions::new(spec.context_max)).map_err(at)?;
        let targets = Targets::new(&program, rules);
        let (matrices, places) = (BTreeMap::new(), BTreeMap::new());
        let mut adapter = Adapter { path: path.to_owned(), file, matrices, places };
        for module in adapter.modules()? {
            let (rank, scale) = config.of_module(&module).map_err(at)?;
            adapter.add(&module, rank, scale, &program, &targets)?;
        }
        Ok(adapter)
    }

    /// Whether the folder of a model holds an adapter of its own, whole or not.
    pub fn is_in(model: &Path) -> bool {
        let folder = model.join(OWN_FOLDER);
        [CONFIG_NAME, WEIGHTS_NAME].iter().any(|name| folder.join(name).exists())
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What is added, by the matrix's canonical name.
    pub fn matrices(&self) -> &BTreeMap<String, LowRank> {
        &self.matrices
    }

    /// Bytes of all its tensors.
    pub fn bytes(&self) -> u64 {
        let bytes = |name: &str| self.file.raw(name).map_or(0, |raw| raw.bytes.len() as u64);
        self.file.names().map(bytes).sum()
    }

    /// The name in the file of the tensor that holds the canonical weight `name`, if it is one of
    /// the adapter's.
    pub fn tensor_of(&self, name: &str) -> Option<&String> {
        self.places.get(name).map(|(tensor, _)| tensor)
    }

    /// The canonical weight `name`, in the file's own numbers.
    ///
    /// # Errors
    /// If the adapter has no such weight.
    pub fn tensor(&self, name: &str) -> Result<Tensor, AdapterError> {
        let Some((tensor, rows)) = self.places.get(name) else {
            return Err(self.unlike(name, "absent", "a weight of the adapter"));
        };
        let whole = self.file.tensor(tensor)?;
        match rows.len() == whole.rows() {
            true => Ok(whole),
            false => whole
                .slice_rows(rows.clone())
                .map_err(|error| self.unlike(tensor, error, "rows of a matrix")),
        }
    }

    /// The modules that have a pair, each once, as paths from the base model's root.
    fn modules(&self) -> Result<Vec<String>, AdapterError> {
        let mut modules = Vec::new();
        for name in self.file.names() {
            let module = |end: &str| name.strip_prefix(PREFIX)?.strip_suffix(end);
            let (module, end) = match (module(DOWN), module(UP)) {
                (Some(module), _) => (module, UP),
                (_, Some(module)) => (module, DOWN),
                _ => {
                    let expected = format!("{PREFIX}MODULE{DOWN} or {PREFIX}MODULE{UP}");
                    return Err(self.unlike(name, "not supported", expected));
                }
            };
            let half = format!("{PREFIX}{module}{end}");
            if !self.file.contains(&half) {
                return Err(self.unlike(&half, "absent", format!("the other half of {name}")));
            }
            if end == UP {
                modules.push(module.to_owned());
            }
        }
        if modules.is_empty() {
            let path = self.path.clone();
            return Err(AdapterError::NotAnAdapter { path, reason: "the adapter has no tensors" });
        }
        Ok(modules)
    }

    /// Gives the matrices of `module` their pair.
    fn add(
        &mut self,
        module: &str,
        rank: usize,
        scale: f32,
        program: &Program,
        targets: &Targets,
    ) -> Result<(), AdapterError> {
        let (down, up) = (format!("{PREFIX}{module}{DOWN}"), format!("{PREFIX}{module}{UP}"));
        let matrices = match targets.find(module) {
            Target::Matrices(matrices) => matrices,
            Target::Refused(found) => {
                let found = format!("for {module} ({found})");
                return Err(self.unlike(&down, found, "for a matrix of a linear layer"));
            }
        };
        let shape = |weight: &Weight| program.weight(*weight).shape.as_slice();
        let columns = shape(&matrices[0])[1];
        let rows = matrices.iter().map(|weight| shape(weight)[0]).sum();
        self.check(&down, [rank, columns])?;
        self.check(&up, [rows, rank])?;
        let name = |weight: &Weight| &program.weight(*weight).name;
        let down_name = LowRank::down_of(name(&matrices[0]));
        self.places.insert(down_name.clone(), (down.clone(), 0..rank));
        let mut first = 0;
        for weight in &matrices {
            let low_rank = LowRank { rank, scale, down: down_name.clone() };
            if self.matrices.insert(name(weight).clone(), low_rank).is_some() {
                let found = format!("a second pair for {}", name(weight));
                return Err(self.unlike(&down, found, "one pair for a matrix"));
            }
            let rows = first..first + shape(weight)[0];
            first = rows.end;
            self.places.insert(LowRank::up_of(name(weight)), (up.clone(), rows));
        }
        Ok(())
    }

    fn check(&self, tensor: &str, shape: [usize; 2]) -> Result<(), AdapterError> {
        let raw = self.file.raw(tensor)?;
        let is_float = matches!(raw.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16);
        if is_float && raw.shape == shape {
            return Ok(());
        }
        let found = format!("{} {:?}", raw.dtype, raw.shape);
        Err(self.unlike(tensor, found, format!("F32, F16 or BF16 {shape:?}")))
    }

    fn unlike(
        &self,
        tensor: &str,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> AdapterError {
        AdapterError::Tensor {
            path: self.path.join(WEIGHTS_NAME),
            tensor: tensor.to_owned(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

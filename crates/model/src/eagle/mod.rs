//! EAGLE drafters: heads that draft from the features of the model that they draft for
//! (EAGLE-1 arXiv 2401.15077, EAGLE-2 arXiv 2406.16858, EAGLE-3 arXiv 2503.01840).
//!
//! A folder in the layout of SafeAILab, SGLang and SpecForge, or of vLLM's speculators, becomes an
//! [`EagleSpec`], a program and its weights. Every tensor of the folder has a place, or opening it
//! is an error: no weight is ever left as it happens to be.

mod config;
mod vocabulary;
mod weights;

use std::path::{Path, PathBuf};

use lathe_program::Program;
use lathe_tensor::Tensor;
use lathe_tensor::safetensors::Checkpoint as SafetensorsFiles;

use crate::Model;
use crate::checkpoint::{Checkpoint, CheckpointError, InputScheme, Quantization};
use crate::generation::read_json;
use crate::lower::{LowerOptions, eagle};
use crate::model::ModelError;
use crate::spec::{DecoderSpec, SpecError};
pub use crate::spec::{EagleSpec, FeatureNorm, Fusion};
use crate::weights::WeightsError;
use config::Described;
pub use weights::EagleWeights;

/// Why a folder is no drafter, or none for the model.
#[derive(Debug, thiserror::Error)]
pub enum EagleError {
    /// A file cannot be read.
    #[error("{}: {source}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// What went wrong.
        source: std::io::Error,
    },
    /// There is no `config.json`.
    #[error("{}: the folder has no config.json", .path.display())]
    NoConfig {
        /// The folder.
        path: PathBuf,
    },
    /// What it computes is malformed or not supported.
    #[error("{}: {source}", .path.display())]
    Spec {
        /// The file that says so.
        path: PathBuf,
        /// What is wrong.
        source: SpecError,
    },
    /// A feature is read from a layer that the model does not have.
    #[error("`{field}` asks for layer {found}, expected 0 to {layers} of the model's layers")]
    Tap {
        /// The field of `config.json`, or the rule that stands in for it.
        field: &'static str,
        /// The layer whose input is asked for.
        found: i64,
        /// Layers of the model.
        layers: usize,
    },
    /// The drafter is made for a model with another size.
    #[error("the drafter's {what} is {found}, the model's is {expected}")]
    Target {
        /// Which size.
        what: &'static str,
        /// That of the drafter.
        found: usize,
        /// That of the model.
        expected: usize,
    },
    /// The drafter knows some tokens only, and does not say which.
    #[error("tensor d2t is missing, expected one for {draft} of {vocabulary} tokens")]
    MapMissing {
        /// Tokens of the drafter.
        draft: usize,
        /// Tokens of the model.
        vocabulary: usize,
    },
    /// The map from the drafter's tokens to the model's is wrong.
    #[error("tensor {tensor}: {reason}")]
    Map {
        /// `d2t` or `t2d`.
        tensor: &'static str,
        /// What was found and what was expected.
        reason: String,
    },
    /// The columns of one matrix cannot be divided between the two values that it reads.
    #[error("tensor {tensor}: {reason}")]
    Columns {
        /// Its name in the file.
        tensor: String,
        /// What stands in the way.
        reason: String,
    },
    /// Tensors cannot be read.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// Tensors are not what the configuration says.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// The model's own embedding or head, which the drafter shares, cannot be had.
    #[error(transparent)]
    Model(#[from] Box<ModelError>),
}

/// A drafter's folder, opened for a model.
#[derive(Debug)]
pub struct Eagle {
    /// What it is.
    pub spec: EagleSpec,
    taps: EagleTaps,
    /// By token of the drafter: the model's.
    tokens: Vec<u32>,
    checkpoint: Checkpoint,
}

/// What the model has to hand out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EagleTaps {
    /// The streams after so many layers, side by side.
    Layers(Vec<usize>),
    /// The row that the head reads.
    HeadInput,
}

impl EagleTaps {
    /// `options`, with the taps.
    pub fn into_options(&self, options: LowerOptions) -> LowerOptions {
        match self {
            EagleTaps::Layers(layers) => LowerOptions { captures: layers.clone(), ..options },
            EagleTaps::HeadInput => LowerOptions { capture_head_input: true, ..options },
        }
    }
}

impl Eagle {
    /// Whether the folder holds a drafter and not a model: its configuration says so, or its
    /// tensors have a matrix that fuses features.
    pub fn is_in(path: &Path) -> bool {
        let config = read_json(&path.join("config.json")).ok().flatten();
        config.is_some_and(|config| {
            config::names_eagle(&config)
                || SafetensorsFiles::open(path).is_ok_and(|files| files.contains("fc.weight"))
        })
    }

    /// Opens the drafter in the folder `path` for `target`.
    ///
    /// # Errors
    /// If a file is malformed, a tensor is missing, has another shape or no place, or the drafter
    /// is not one for the model.
    pub fn open(path: &Path, target: &DecoderSpec) -> Result<Eagle, EagleError> {
        let file = path.join("config.json");
        let config = read_json(&file)
            .map_err(|source| EagleError::Read { path: file.clone(), source })?
            .ok_or_else(|| EagleError::NoConfig { path: path.to_owned() })?;
        let at = |source| EagleError::Spec { path: file.clone(), source };
        let quantization = Quantization::of_folder(&config, None, None).map_err(at)?;
        if !InputScheme::from_hf_config(&config).map_err(at)?.is_empty() {
            return Err(at(SpecError::feature("rounded inputs of an EAGLE drafter")));
        }
        let checkpoint = Checkpoint::open_safetensors(path, quantization)?;
        let Described { mut spec, taps, vocabulary } =
            config::read(&config, &checkpoint, target.width).map_err(at)?;
        let taps = match spec.fusion {
            Fusion::Hidden { .. } => EagleTaps::HeadInput,
            Fusion::Features { .. } => EagleTaps::Layers(taps.layers(target.layers.len())?),
        };
        for (what, found, expected) in [
            ("vocabulary", vocabulary, target.vocabulary),
            ("target_hidden_size", spec.feature_width, target.width),
        ] {
            if found != expected {
                return Err(EagleError::Target { what, found, expected });
            }
        }
        spec.decoder.context_max = target.context_max;
        let tokens = vocabulary::read(&checkpoint, spec.decoder.vocabulary, vocabulary)?;
        let eagle = Eagle { spec, taps, tokens, checkpoint };
        // Finds every tensor, so that a wrong folder is told before anything is loaded.
        let program = eagle.program(&LowerOptions::new(1)).map_err(at)?;
        eagle.places(&program, target)?;
        Ok(eagle)
    }

    /// What the model has to hand out for it.
    pub fn taps(&self) -> &EagleTaps {
        &self.taps
    }

    /// By token of the drafter: the model's.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The program of a drafting step; see `lower::eagle` for its inputs. Its tokens are the
    /// drafter's. What a row's token is does not matter: its embedding is an input.
    ///
    /// # Errors
    /// If the configuration breaks a limit.
    pub fn program(&self, options: &LowerOptions) -> Result<Program, SpecError> {
        eagle::lower(&self.spec, options)
    }

    /// The weights of `program`, which must be this drafter's, for `target`.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn weights<'a>(
        &'a self,
        program: &'a Program,
        target: &'a Model,
    ) -> Result<EagleWeights<'a>, EagleError> {
        EagleWeights::new(self, program, target)
    }

    /// The embedding of the model's tokens `[vocabulary, width]`: the drafter's own, or that of
    /// `target`.
    ///
    /// # Errors
    /// If the tensor cannot be read.
    pub fn embedding(&self, target: &Model) -> Result<Tensor, EagleError> {
        match self.checkpoint.contains(weights::EMBEDDING) {
            true => Ok(self.checkpoint.tensor(weights::EMBEDDING)?),
            false => weights::of_target(target, "embedding"),
        }
    }
}

//! Why a model could not be opened, prepared or run.

use std::path::PathBuf;

use lathe_engine::{AddError, EngineError, ScoreError};
use lathe_model::chat::ChatError;
use lathe_model::eagle::EagleError;
use lathe_model::tokenizer::TokenizerError;
use lathe_model::{ModelError, SpecError};
use lathe_program::BackendError;
use lathe_program::shard::ShardError;
use lathe_tensor::TensorError;

use crate::catalogue::CatalogueError;
use crate::units::human_bytes;

/// A failure of this library. [`SessionError::is_input`] tells bad input from a failure of the
/// machine.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The model was not found, or could not be fetched.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The model's files are not what they should be.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// The configuration of a model without weights is not what it should be.
    #[error("{name}: {source}")]
    Shape {
        /// What was to be opened.
        name: String,
        /// What is wrong.
        source: Box<ModelError>,
    },
    /// A weight could not be read.
    #[error(transparent)]
    Weights(BackendError),
    /// The model cannot become a program.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A number format that does not exist.
    #[error(transparent)]
    Format(TensorError),
    /// A weight is too large to count.
    #[error("{weight}: {source}")]
    Weight {
        /// Canonical name.
        weight: String,
        /// What is wrong.
        source: TensorError,
    },
    /// More tokens than the model's context holds.
    #[error("{needed} tokens are needed, the model's context holds {limit}")]
    Context {
        /// Tokens that were asked for.
        needed: usize,
        /// Tokens of the context.
        limit: usize,
    },
    /// A text was to begin with the token that begins a sequence.
    #[error("the tokenizer names no `bos_token`")]
    NoBeginning,
    /// A message does not fit the context.
    #[error("this message makes a prompt of {tokens} tokens, the context holds {context}")]
    MessageTooLong {
        /// Tokens of the prompt, all that may be forgotten being forgotten.
        tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// Weights and cache do not fit the machine.
    #[error(
        "not enough memory: the weights take {} and the KV cache for {sequences} x {context} \
         tokens {}, {} are available",
        human_bytes(*.weight_bytes), human_bytes(*.kv_bytes), human_bytes(*.available_bytes)
    )]
    Memory {
        /// Bytes of the weights' files.
        weight_bytes: u64,
        /// Bytes of the cache.
        kv_bytes: u64,
        /// Bytes that the machine has left.
        available_bytes: u64,
        /// Sequences that were asked for.
        sequences: usize,
        /// Tokens of each.
        context: usize,
    },
    /// This build lacks the device.
    #[error("this build of lathe has no {0} backend")]
    NoDevice(&'static str),
    /// The program cannot be divided over ranks as asked.
    #[error("{ranks} ranks: {reason}")]
    Ranks {
        /// Ranks that were asked for.
        ranks: usize,
        /// Whether whole experts were asked for.
        by_expert: bool,
        /// What was found and what was expected.
        reason: RanksReason,
    },
    /// The executor could not be made.
    #[error("cannot prepare the model: {0}")]
    Prepare(BackendError),
    /// The device could not run a number format.
    #[error(transparent)]
    NotRun(BackendError),
    /// The machine could not be measured.
    #[error(transparent)]
    Measure(BackendError),
    /// The number of processors is not known.
    #[error("the number of processors: {0}")]
    Processors(std::io::Error),
    /// The model comes without a tokenizer.
    #[error("{name} has no tokenizer")]
    NoTokenizer {
        /// The model.
        name: String,
    },
    /// The model comes without a chat template.
    #[error("{name} has no chat template")]
    NoChatTemplate {
        /// The model.
        name: String,
    },
    /// The model's tokenizer or template is damaged.
    #[error("{name}: {problem}")]
    Text {
        /// The model.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// A text could not become tokens.
    #[error(transparent)]
    Tokenize(#[from] TokenizerError),
    /// A conversation could not become a prompt.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The model has an adapter, which would be lost.
    #[error("{what} would lose the adapter {}", .path.display())]
    AdapterLost {
        /// Who would lose it.
        what: String,
        /// Its folder.
        path: PathBuf,
    },
    /// An adapter was given for weights that are made up.
    #[error(
        "adapter {}: an adapter is for a model's own weights, and these are made up",
        .0.display()
    )]
    AdapterOfDummy(PathBuf),
    /// A folder that fuses features is no drafter for the model.
    #[error(transparent)]
    Eagle(#[from] EagleError),
    /// Two drafters want features of the model.
    #[error("two EAGLE drafters were named, expected at most one")]
    TwoEagles,
    /// A draft model's tokens are not the model's.
    #[error("{draft} cannot draft for {model}: {reason}")]
    DraftVocabulary {
        /// The draft model.
        draft: String,
        /// The model.
        model: String,
        /// What was found and what was expected.
        reason: String,
    },
    /// The engine refused a request.
    #[error(transparent)]
    Add(#[from] AddError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// Tokens could not be scored.
    #[error(transparent)]
    Score(#[from] ScoreError),
    /// A weight is no number.
    #[error("tensor {tensor} has NaN or infinite numbers, expected finite ones")]
    NotFinite {
        /// Its name in the file.
        tensor: String,
    },
    /// A measured sequence ended before its time.
    #[error("a sequence ended after {generated} tokens: {reason}")]
    EndedEarly {
        /// Tokens that it had.
        generated: usize,
        /// Why it ended.
        reason: String,
    },
}

/// Why a program cannot be divided.
#[derive(Debug, thiserror::Error)]
pub enum RanksReason {
    /// Experts were to be divided.
    #[error("the model has no experts")]
    NoExperts,
    /// One rank has all experts.
    #[error("whole experts need at least 2 ranks")]
    OneRank,
    /// The device runs on one rank only.
    #[error("the {0} backend runs on one rank only")]
    Device(&'static str),
    /// Its shapes or formats do not allow it.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

impl From<ModelError> for SessionError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}

impl SessionError {
    /// Whether the caller's input is at fault, and not the machine.
    pub fn is_input(&self) -> bool {
        match self {
            Self::Catalogue(error) => error.is_input(),
            Self::Score(error) => {
                !matches!(error, ScoreError::Backend(_) | ScoreError::Logits { .. })
            }
            // A file that is not what it should be, not a machine that fails.
            Self::Prepare(BackendError::Weight { .. }) => true,
            Self::Memory { .. }
            | Self::Prepare(_)
            | Self::Measure(_)
            | Self::Processors(_)
            | Self::Weight { .. }
            | Self::Engine(_)
            | Self::EndedEarly { .. } => false,
            Self::Model(_)
            | Self::Shape { .. }
            | Self::NotFinite { .. }
            | Self::Spec(_)
            | Self::Weights(_)
            | Self::Format(_)
            | Self::Context { .. }
            | Self::MessageTooLong { .. }
            | Self::NoBeginning
            | Self::NoDevice(..)
            | Self::Ranks { .. }
            | Self::NotRun(_)
            | Self::NoTokenizer { .. }
            | Self::NoChatTemplate { .. }
            | Self::Text { .. }
            | Self::Tokenize(_)
            | Self::Chat(_)
            | Self::AdapterLost { .. }
            | Self::AdapterOfDummy(_)
            | Self::Eagle(_)
            | Self::TwoEagles
            | Self::DraftVocabulary { .. }
            | Self::Add(_) => true,
        }
    }
}

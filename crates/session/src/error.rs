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

/// An error of this library. [`SessionError::is_input`] tells bad input from a failure of the
/// machine.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The model was not found or could not be fetched.
    #[error(transparent)]
    Catalogue(#[from] CatalogueError),
    /// The model's files are not valid.
    #[error(transparent)]
    Model(Box<ModelError>),
    /// The configuration of a model without weights is not valid.
    #[error("{name}: {source}")]
    Shape {
        /// The name that was to be opened.
        name: String,
        /// The error in it.
        source: Box<ModelError>,
    },
    /// A weight could not be read.
    #[error(transparent)]
    Weights(BackendError),
    /// The model cannot be lowered to a program.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A number format does not exist.
    #[error(transparent)]
    Format(TensorError),
    /// The size of a weight overflows.
    #[error("{weight}: {source}")]
    Weight {
        /// Canonical name.
        weight: String,
        /// The error in its shape.
        source: TensorError,
    },
    /// The request needs more tokens than the model's context holds.
    #[error("{needed} tokens are needed, the model's context holds {limit}")]
    Context {
        /// Tokens that are needed.
        needed: usize,
        /// Tokens of the context.
        limit: usize,
    },
    /// A text should begin with a beginning-of-sequence token, and the tokenizer has none.
    #[error("the tokenizer names no `bos_token`")]
    NoBeginning,
    /// A message does not fit the context.
    #[error("this message makes a prompt of {tokens} tokens, the context holds {context}")]
    MessageTooLong {
        /// Tokens of the prompt after every older turn was dropped.
        tokens: usize,
        /// Tokens of the context.
        context: usize,
    },
    /// Weights and cache do not fit in memory.
    #[error(
        "not enough memory: the weights take {} and the KV cache for {sequences} x {context} \
         tokens {}, {} are available",
        human_bytes(*.weight_bytes), human_bytes(*.kv_bytes), human_bytes(*.available_bytes)
    )]
    Memory {
        /// Bytes of the weight files.
        weight_bytes: u64,
        /// Bytes of the cache.
        kv_bytes: u64,
        /// Bytes that are free.
        available_bytes: u64,
        /// Sequences that were asked for.
        sequences: usize,
        /// Tokens of each sequence.
        context: usize,
    },
    /// This build does not include the device.
    #[error("this build of lathe has no {0} backend")]
    NoDevice(&'static str),
    /// The program cannot be divided over ranks in this way.
    #[error("{ranks} ranks: {reason}")]
    Ranks {
        /// Ranks that were asked for.
        ranks: usize,
        /// Whether whole experts were asked for.
        by_expert: bool,
        /// What was found and what was expected.
        reason: RanksReason,
    },
    /// The executor could not be prepared.
    #[error("cannot prepare the model: {0}")]
    Prepare(BackendError),
    /// The device cannot run a number format.
    #[error(transparent)]
    NotRun(BackendError),
    /// The machine could not be measured.
    #[error(transparent)]
    Measure(BackendError),
    /// The number of processors is unknown.
    #[error("the number of processors: {0}")]
    Processors(std::io::Error),
    /// The model has no tokenizer.
    #[error("{name} has no tokenizer")]
    NoTokenizer {
        /// The model's name.
        name: String,
    },
    /// The model has no chat template.
    #[error("{name} has no chat template")]
    NoChatTemplate {
        /// The model's name.
        name: String,
    },
    /// The model's tokenizer or template is not valid.
    #[error("{name}: {problem}")]
    Text {
        /// The model's name.
        name: String,
        /// The error in it.
        problem: String,
    },
    /// A text could not be tokenized.
    #[error(transparent)]
    Tokenize(#[from] TokenizerError),
    /// A conversation could not be made into a prompt.
    #[error(transparent)]
    Chat(#[from] ChatError),
    /// The model has an adapter, which the command would lose.
    #[error("{what} would lose the adapter {}", .path.display())]
    AdapterLost {
        /// The command.
        what: String,
        /// Its folder.
        path: PathBuf,
    },
    /// An adapter was given together with random weights.
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
    /// A draft model's tokens differ from the model's.
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
        /// Tokens that it generated.
        generated: usize,
        /// Why it ended.
        reason: String,
    },
}

/// The reason why a program cannot be divided.
#[derive(Debug, thiserror::Error)]
pub enum RanksReason {
    /// Experts were to be divided, and the model has none.
    #[error("the model has no experts")]
    NoExperts,
    /// Experts were to be divided over a single rank.
    #[error("whole experts need at least 2 ranks")]
    OneRank,
    /// The device runs on one rank only.
    #[error("the {0} backend runs on one rank only")]
    Device(&'static str),
    /// Its shapes or formats cannot be divided.
    #[error(transparent)]
    Shard(#[from] ShardError),
}

impl From<ModelError> for SessionError {
    fn from(error: ModelError) -> Self {
        Self::Model(Box::new(error))
    }
}

impl SessionError {
    /// Whether the error is the caller's input, and not the machine.
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

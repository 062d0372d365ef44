//! The sub-word model behind a tokenizer, shared by its pipelines.
//!
//! A [`super::Tokenizer`] runs up to three pipelines that differ only in how they treat the names
//! of special tokens; the vocabulary, which is the large part, exists once.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tokenizers::models::{ModelWrapper, TrainerWrapper, bpe::BpeTrainer};
use tokenizers::{Model, Token};

use super::ranked::RankedMerges;
use super::scored::ScoredMerges;

/// A sub-word model behind a reference count, so that pipelines can share it.
#[derive(Clone, Debug)]
pub(super) enum SharedModel {
    /// A model of the `tokenizers` crate.
    Library(Arc<ModelWrapper>),
    /// SentencePiece's BPE: merges ordered by the score of the merged piece.
    Scored(Arc<ScoredMerges>),
    /// Byte-level BPE: merges ordered by rank.
    Ranked(Arc<RankedMerges>),
}

impl Model for SharedModel {
    type Trainer = TrainerWrapper;

    fn tokenize(&self, sequence: &str) -> tokenizers::Result<Vec<Token>> {
        match self {
            Self::Library(model) => model.tokenize(sequence),
            Self::Scored(model) => Ok(model.tokenize(sequence)),
            Self::Ranked(model) => Ok(model.tokenize(sequence)),
        }
    }

    fn token_to_id(&self, token: &str) -> Option<u32> {
        match self {
            Self::Library(model) => model.token_to_id(token),
            Self::Scored(model) => model.id(token),
            Self::Ranked(model) => model.id(token),
        }
    }

    fn id_to_token(&self, id: u32) -> Option<String> {
        match self {
            Self::Library(model) => model.id_to_token(id),
            Self::Scored(model) => model.token(id).map(str::to_owned),
            Self::Ranked(model) => model.token(id).map(str::to_owned),
        }
    }

    fn get_vocab(&self) -> HashMap<String, u32> {
        match self {
            Self::Library(model) => model.get_vocab(),
            Self::Scored(model) => model.vocabulary(),
            Self::Ranked(model) => model.vocabulary(),
        }
    }

    fn get_vocab_size(&self) -> usize {
        match self {
            Self::Library(model) => model.get_vocab_size(),
            Self::Scored(model) => model.len(),
            Self::Ranked(model) => model.len(),
        }
    }

    fn save(&self, _: &Path, _: Option<&str>) -> tokenizers::Result<Vec<PathBuf>> {
        Err("a shared model is not written to disk".into())
    }

    fn get_trainer(&self) -> TrainerWrapper {
        BpeTrainer::default().into()
    }
}

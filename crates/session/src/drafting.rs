//! Drafters by name, and whether a draft model goes with a model.

use std::num::NonZeroUsize;

use lathe_engine::{DraftTree, Drafter, Engine, LookupDrafter, ModelDrafter, StackedDrafter};
use lathe_model::{Model, OpenOptions};

use crate::catalogue::Catalogue;
use crate::error::SessionError;
use crate::open::{Need, open};
use crate::options::Options;

/// Who drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftSource {
    /// What followed the same tokens earlier in the text.
    Lookup,
    /// A smaller model with the same tokenizer: a name as for [`crate::open()`].
    Model(String),
}

/// Who drafts, the cheapest first, and how much.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DraftChoice {
    /// Each is asked where those before it have nothing. Empty: nothing is drafted.
    pub sources: Vec<DraftSource>,
    /// Tokens of a draft at most. `None` takes as many as pay, as measured.
    pub tokens_max: Option<NonZeroUsize>,
}

impl DraftChoice {
    /// Opens the drafters for an engine that serves `model` on the same device, with `need`.
    ///
    /// # Errors
    /// If a draft model cannot be opened or prepared; [`SessionError::DraftVocabulary`] if its
    /// tokens are not the model's.
    pub fn open(
        &self,
        catalogue: &Catalogue<'_>,
        model: &Model,
        options: &Options,
        need: Need,
    ) -> Result<Option<DraftEngine>, SessionError> {
        let mut drafters: Vec<Box<dyn Drafter>> = Vec::new();
        for source in &self.sources {
            drafters.push(match source {
                DraftSource::Lookup => Box::new(LookupDrafter::new()),
                DraftSource::Model(name) => {
                    let opened = open(catalogue, name, &OpenOptions::default())?;
                    check_vocabulary(&opened.model, model)?;
                    let context = need.context.min(opened.model.spec.context_max);
                    let session = opened.prepare(options, Need { context, ..need })?;
                    Box::new(ModelDrafter::new(session.executor))
                }
            });
        }
        let nodes_max = self.tokens_max.map_or(DraftTree::NODES_MAX, NonZeroUsize::get);
        let nodes_max = nodes_max.min(DraftTree::NODES_MAX);
        let all = |drafters| Box::new(StackedDrafter::new(drafters));
        Ok((!drafters.is_empty()).then(|| DraftEngine { drafter: all(drafters), nodes_max }))
    }
}

/// Drafters that are ready.
pub struct DraftEngine {
    drafter: Box<dyn Drafter>,
    nodes_max: usize,
}

impl DraftEngine {
    /// The engine with these drafters.
    pub fn attach(self, engine: Engine) -> Engine {
        engine.with_drafter(self.drafter, self.nodes_max)
    }
}

/// Refuses a draft model whose tokens are not those of `model`.
fn check_vocabulary(draft: &Model, model: &Model) -> Result<(), SessionError> {
    let refuse = |reason: String| {
        let (draft, model) = (draft.name.clone(), model.name.clone());
        Err(SessionError::DraftVocabulary { draft, model, reason })
    };
    let (found, expected) = (draft.spec.vocabulary, model.spec.vocabulary);
    if found != expected {
        return refuse(format!("it has {found} tokens, expected {expected}"));
    }
    let (Some(own), Some(other)) = (&draft.tokenizer, &model.tokenizer) else { return Ok(()) };
    let differs = |token: &u32| own.token_bytes(*token) != other.token_bytes(*token);
    match (0..expected as u32).find(differs) {
        Some(token) => refuse(format!("token {token} is another text there")),
        None => Ok(()),
    }
}

//! Drafters by name, and the check that a draft model fits a model.

use std::num::NonZeroUsize;

use lathe_engine::{DraftTree, Drafter, Engine, LookupDrafter, ModelDrafter, StackedDrafter};
use lathe_model::{Model, OpenOptions};

use crate::catalogue::Catalogue;
use crate::error::SessionError;
use crate::open::{Need, open};
use crate::options::Options;

/// A source of drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftSource {
    /// The tokens that followed the same words earlier in the text.
    Lookup,
    /// A smaller model with the same tokenizer: a name as for [`crate::open()`].
    Model(String),
}

/// The drafters, the cheapest first, and the length of drafts.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct DraftChoice {
    /// Each source is asked if those before it have no draft. Empty means no drafts.
    pub sources: Vec<DraftSource>,
    /// The most tokens of a draft. `None` chooses the number by measured gain.
    pub tokens_max: Option<NonZeroUsize>,
}

impl DraftChoice {
    /// Opens the drafters for an engine that serves `model` on the same device, with `need`.
    ///
    /// # Errors
    /// If a draft model cannot be opened or prepared; [`SessionError::DraftVocabulary`] if its
    /// tokens differ from the model's.
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

/// Drafters that are ready to run.
pub struct DraftEngine {
    drafter: Box<dyn Drafter>,
    nodes_max: usize,
}

impl DraftEngine {
    /// Adds these drafters to `engine`.
    pub fn attach(self, engine: Engine) -> Engine {
        engine.with_drafter(self.drafter, self.nodes_max)
    }
}

/// Checks that a draft model has the same tokens as `model`.
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

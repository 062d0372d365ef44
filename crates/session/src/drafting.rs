//! Drafters by name, and the check that a draft model fits a model.

use std::num::NonZeroUsize;
use std::path::Path;
use std::sync::Arc;

use lathe_engine::{
    DraftTree, Drafter, EagleDrafter, Engine, LookupDrafter, ModelDrafter, StackedDrafter,
};
use lathe_model::eagle::{Eagle, EagleTaps};
use lathe_model::lower::LowerOptions;
use lathe_model::{Model, OpenOptions};

use crate::catalogue::Catalogue;
use crate::error::SessionError;
use crate::open::{Need, open, prepare_program};
use crate::options::Options;
use crate::ranks::Ranks;

/// A source of drafts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DraftSource {
    /// The tokens that followed the same words earlier in the text.
    Lookup,
    /// A smaller model with the same tokenizer, or a folder with an EAGLE head for the model: a
    /// name as for [`crate::open()`].
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
        let mut taps = None;
        for source in &self.sources {
            drafters.push(match source {
                DraftSource::Lookup => Box::new(LookupDrafter::new()),
                DraftSource::Model(name) => {
                    let path = catalogue.locate(name)?.path;
                    if Eagle::is_in(&path) {
                        let (drafter, its_taps) = open_eagle(&path, model, options, need)?;
                        if taps.replace(its_taps).is_some() {
                            return Err(SessionError::TwoEagles);
                        }
                        Box::new(drafter)
                    } else {
                        Box::new(open_model(catalogue, name, model, options, need)?)
                    }
                }
            });
        }
        if drafters.is_empty() {
            return Ok(None);
        }
        let nodes_max = self.tokens_max.map_or(DraftTree::NODES_MAX, NonZeroUsize::get);
        let nodes_max = nodes_max.min(DraftTree::NODES_MAX);
        let drafter = Box::new(StackedDrafter::new(drafters));
        Ok(Some(DraftEngine { drafter, nodes_max, taps }))
    }
}

/// A smaller model that drafts for `model`.
fn open_model(
    catalogue: &Catalogue<'_>,
    name: &str,
    model: &Model,
    options: &Options,
    need: Need,
) -> Result<ModelDrafter, SessionError> {
    let opened = open(catalogue, name, &OpenOptions::default())?;
    check_vocabulary(&opened.model, model)?;
    let context = need.context.min(opened.model.spec.context_max);
    let session = opened.prepare(options, Need { context, ..need })?;
    Ok(ModelDrafter::new(session.executor))
}

/// The head in the folder `path`, and what `model` has to hand out for it.
fn open_eagle(
    path: &Path,
    model: &Model,
    options: &Options,
    need: Need,
) -> Result<(EagleDrafter, EagleTaps), SessionError> {
    let eagle = Eagle::open(path, &model.spec)?;
    let ranks = Ranks::default();
    let program = Arc::new(eagle.program(&LowerOptions::new(need.context))?);
    let weights = eagle.weights(&program, model)?;
    let backend = ranks.backend(options.device)?;
    let executor = prepare_program(&*backend, &program, &weights, options, need, ranks)?;
    let drafter = EagleDrafter::new(executor, eagle.embedding(model)?, eagle.tokens().to_vec());
    Ok((drafter, eagle.taps().clone()))
}

/// Drafters that are ready to run.
pub struct DraftEngine {
    drafter: Box<dyn Drafter>,
    nodes_max: usize,
    taps: Option<EagleTaps>,
}

impl DraftEngine {
    /// What the model has to hand out for the drafters: [`crate::Opened::tapped`].
    pub fn taps(&self) -> Option<&EagleTaps> {
        self.taps.as_ref()
    }

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

//! Opens the model that the word MODEL names. Fetches it if necessary, and prints notices to
//! stderr.

use anyhow::Error;
use lathe_model::{Model, OpenOptions};
use lathe_session::catalogue::{Catalogue, Located};
use lathe_session::measure::shape::Shape;
use lathe_session::{DraftChoice, DraftEngine, DraftSource, Environment, Need, Opened, Options};

use crate::arguments::DraftArguments;
use crate::output::bad_input;
use crate::progress::Terminal;

/// The files of a model.
pub(crate) fn locate(name: &str) -> Result<Located, Error> {
    with_catalogue(|catalogue| Ok(catalogue.locate(name)?))
}

/// A model with its files open.
pub(crate) fn open(name: &str, options: &OpenOptions) -> Result<Opened, Error> {
    with_catalogue(|catalogue| Ok(lathe_session::open(&catalogue, name, options)?))
}

/// A model to count or to time.
pub(crate) fn open_shape(name: &str, options: &OpenOptions) -> Result<Shape, Error> {
    with_catalogue(|catalogue| Ok(Shape::open(&catalogue, name, options)?))
}

/// The shape of a model, with random weights.
pub(crate) fn dummy_shape(
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Shape, Error> {
    with_catalogue(|catalogue| Ok(Shape::dummy(&catalogue, name, format, options)?))
}

/// A model to count. Its shape, if it has no weights or `format` is given.
pub(crate) fn describe_shape(
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Shape, Error> {
    with_catalogue(|catalogue| Ok(Shape::describe(&catalogue, name, format, options)?))
}

/// Who drafts, as `--draft` says.
pub(crate) fn draft_choice(arguments: &DraftArguments) -> Result<DraftChoice, Error> {
    let named = |name: &String| match name.as_str() {
        "ngram" => DraftSource::Lookup,
        model => DraftSource::Model(model.to_owned()),
    };
    let sources: Vec<DraftSource> = match arguments.draft.as_slice() {
        [none] if none == "none" => Vec::new(),
        names if names.iter().any(|name| name == "none" || name.is_empty()) => {
            return Err(bad_input("--draft: `none` and names do not go together"));
        }
        names => names.iter().map(named).collect(),
    };
    let tokens_max = arguments.draft_budget;
    if sources.is_empty() && tokens_max.is_some() {
        return Err(bad_input("--draft-budget needs a drafter, and --draft is none"));
    }
    Ok(DraftChoice { sources, tokens_max })
}

/// The drafters that `choice` names, for `model` on the same device.
pub(crate) fn open_drafter(
    choice: &DraftChoice,
    model: &Model,
    options: &Options,
    need: Need,
) -> Result<Option<DraftEngine>, Error> {
    with_catalogue(|catalogue| Ok(choice.open(&catalogue, model, options, need)?))
}

fn with_catalogue<T>(work: impl FnOnce(Catalogue<'_>) -> Result<T, Error>) -> Result<T, Error> {
    let environment = Environment::from_process();
    let reporter = Terminal::for_stderr();
    work(Catalogue { environment: &environment, reporter: &reporter })
}

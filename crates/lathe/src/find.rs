//! What the word MODEL names: found, fetched if need be, opened, with what a user should know on
//! stderr.

use anyhow::Error;
use lathe_model::OpenOptions;
use lathe_session::catalogue::{Catalogue, Located};
use lathe_session::measure::shape::Shape;
use lathe_session::{Environment, Opened};

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

/// The shape of a model, with weights that are made up.
pub(crate) fn dummy_shape(
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Shape, Error> {
    with_catalogue(|catalogue| Ok(Shape::dummy(&catalogue, name, format, options)?))
}

/// A model to count, or its shape if it has no weights or `format` is given.
pub(crate) fn describe_shape(
    name: &str,
    format: Option<&str>,
    options: &OpenOptions,
) -> Result<Shape, Error> {
    with_catalogue(|catalogue| Ok(Shape::describe(&catalogue, name, format, options)?))
}

fn with_catalogue<T>(work: impl FnOnce(Catalogue<'_>) -> Result<T, Error>) -> Result<T, Error> {
    let environment = Environment::from_process();
    let reporter = Terminal::for_stderr();
    work(Catalogue { environment: &environment, reporter: &reporter })
}

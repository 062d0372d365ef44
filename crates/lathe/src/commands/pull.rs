//! `lathe pull`: fetches a model into the cache.

use std::path::Path;

use anyhow::Error;
use lathe_session::catalogue::Origin;
use lathe_session::{bytes_under, human_bytes};
use serde::Serialize;

use crate::arguments::{Global, PullArguments};
use crate::find::locate;
use crate::output::{print, print_json};

#[derive(Serialize)]
struct Pulled<'a> {
    model: &'a str,
    path: &'a Path,
    source: &'a str,
    bytes: u64,
}

/// Fetches the model, unless it is cached, and prints its path.
pub(super) fn run(global: &Global, arguments: &PullArguments) -> Result<(), Error> {
    let located = locate(&arguments.name)?;
    let bytes = bytes_under(&located.path);
    if global.json {
        return print_json(&Pulled {
            model: &located.name,
            path: &located.path,
            source: located.origin.name(),
            bytes,
        });
    }
    if matches!(located.origin, Origin::Cache | Origin::Local) {
        say!("{} is here already ({})", located.name, human_bytes(bytes));
    }
    print(&format!("{}\n", located.path.display()))
}

//! `lathe pull`: fetches a model into the cache.

use std::path::Path;

use anyhow::Error;
use serde::Serialize;

use crate::arguments::{Global, PullArguments};
use crate::catalogue::Origin;
use crate::output::{human_bytes, print, print_json};
use crate::session::bytes_under;

#[derive(Serialize)]
struct Pulled<'a> {
    model: &'a str,
    path: &'a Path,
    source: &'a str,
    bytes: u64,
}

/// Fetches, unless it is there, and says where.
pub fn run(global: &Global, arguments: &PullArguments) -> Result<(), Error> {
    let located = super::locate(&arguments.name)?;
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
        eprintln!("{} is here already ({})", located.name, human_bytes(bytes));
    }
    print(&format!("{}\n", located.path.display()))
}

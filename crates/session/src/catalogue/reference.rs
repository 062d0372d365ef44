//! The meaning of the word MODEL on the command line.

use std::path::{Path, PathBuf};

use super::CatalogueError;
use super::entries::{self, Entry};

/// A parsed model name, which was not looked up yet.
#[derive(Debug, Clone)]
pub(super) enum Reference {
    /// A folder or a `.gguf` file that exists.
    Local(PathBuf),
    /// A catalogue name.
    Entry(&'static Entry),
    /// A repository of the Hub.
    Hub(HubReference),
}

/// `organisation/name[@revision][:quantization or file]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubReference {
    /// `organisation/name`.
    pub repository: String,
    /// Branch, tag or commit; `main` if absent.
    pub revision: String,
    /// The GGUF file: its name, or a part of it such as `Q4_K_M`.
    pub selector: Option<String>,
}

impl Reference {
    /// Parses `text`: a catalogue name, an existing path, or a Hub id. (A folder with the name of a
    /// catalogue entry needs `./name`.)
    pub(super) fn parse(text: &str) -> Result<Self, CatalogueError> {
        let unknown =
            |reason: String| CatalogueError::Unknown { reference: text.to_owned(), reason };
        if let Some(entry) = entries::find(text) {
            return Ok(Self::Entry(entry));
        }
        if Path::new(text).exists() {
            return Ok(Self::Local(PathBuf::from(text)));
        }
        if looks_like_a_path(text) {
            return Err(unknown("no such file or folder".to_owned()));
        }
        if let Some(hub) = HubReference::parse(text) {
            return Ok(Self::Hub(hub));
        }
        Err(unknown(format!(
            "not a folder, a .gguf file, a catalogue name ({}) or a Hub id (organisation/name)",
            entries::names()
        )))
    }
}

fn looks_like_a_path(text: &str) -> bool {
    let path = Path::new(text);
    path.is_absolute()
        || text.starts_with("./")
        || text.starts_with("../")
        || text.starts_with('~')
        || (text.ends_with(".gguf") && !text.contains(':'))
        || (text.matches('/').count() > 1 && !text.contains(':'))
}

impl HubReference {
    fn parse(text: &str) -> Option<Self> {
        let (id, selector) = match text.split_once(':') {
            Some((id, selector)) if !selector.is_empty() => (id, Some(selector.to_owned())),
            Some(_) => return None,
            None => (text, None),
        };
        let (repository, revision) = match id.split_once('@') {
            Some((repository, revision)) if is_revision(revision) => (repository, revision),
            Some(_) => return None,
            None => (id, "main"),
        };
        let (organisation, name) = repository.split_once('/')?;
        (is_name(organisation) && is_name(name)).then(|| Self {
            repository: repository.to_owned(),
            revision: revision.to_owned(),
            selector,
        })
    }
}

/// The Hub's rule for a name: letters, digits, `-`, `_`, `.`; no `--` or `..`; at most 96
/// characters.
fn is_name(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| !matches!(c, '-' | '.'));
    part.len() <= 96
        && part.chars().all(allowed)
        && edge(part.chars().next())
        && edge(part.chars().last())
        && !part.contains("--")
        && !part.contains("..")
}

fn is_revision(part: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    !part.is_empty()
        && part.len() <= 128
        && part.chars().all(allowed)
        && !part.starts_with('/')
        && !part.ends_with('/')
        && !part.contains("..")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(text: &str) -> HubReference {
        match Reference::parse(text) {
            Ok(Reference::Hub(hub)) => hub,
            other => panic!("{text}: {other:?}"),
        }
    }

    #[test]
    fn hub_ids() {
        assert_eq!(hub("org/name").repository, "org/name");
        assert_eq!(hub("org/name").revision, "main");
        assert_eq!(hub("org/name:Q4_K_M").selector.as_deref(), Some("Q4_K_M"));
        assert_eq!(hub("org/name:sub/x.gguf").selector.as_deref(), Some("sub/x.gguf"));
        let pinned = hub("org/name@v1.0:Q8_0");
        assert_eq!((pinned.revision.as_str(), pinned.selector.as_deref()), ("v1.0", Some("Q8_0")));
    }

    #[test]
    fn names_and_paths() {
        assert!(matches!(Reference::parse("tiny"), Ok(Reference::Entry(e)) if e.name == "tiny"));
        assert!(matches!(Reference::parse("/"), Ok(Reference::Local(_))));
        for bad in [
            "",
            "no-such-name",
            "./nothing",
            "/nothing/here",
            "missing.gguf",
            "a/b/c",
            "org/na me",
            "org/../x",
            "org/name:",
            "org/name@",
            "org/na--me",
            "-org/name",
            "org/name@../..",
        ] {
            let error = Reference::parse(bad).expect_err(bad);
            assert!(error.is_input(), "{bad}: {error}");
            assert!(!error.to_string().contains('\n'));
        }
    }
}

//! A repository of the Hub: its files, the selection of those that a model needs, and their
//! download into the cache.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::CatalogueError;
use super::cache::{CachedRepository, is_commit};
use super::download::{Blob, download};
use super::environment::Environment;
use super::http::{Client, Follow, header};
use super::reference::HubReference;
use crate::progress::Reporter;

/// Files, besides the weights, that describe a model: its configuration, tokenizer and templates.
const SMALL_FILES: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "quantize_config.json",
    "hf_quant_config.json",
];
const INDEX: &str = "model.safetensors.index.json";
const SINGLE: &str = "model.safetensors";
/// The order in which a GGUF kind is chosen if the reference names none.
const GGUF_PREFERENCE: &[&str] = &["Q4_K_M", "Q4_K", "Q4_0", "Q4_1", "Q8_0", "Q5_K_M", "Q6_K"];
/// The most bytes of a listing or an index. A server that sends more is at fault.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// The files of a commit.
#[derive(Debug)]
struct Listing {
    commit: String,
    files: Vec<String>,
}

/// The files of a repository that make up the model.
#[derive(Debug, PartialEq, Eq)]
enum ModelFiles {
    /// One GGUF file.
    Gguf(String),
    /// A safetensors folder.
    Folder,
}

/// The model in the cache, if it is complete. Uses no network.
pub(super) fn find_cached(environment: &Environment, reference: &HubReference) -> Option<PathBuf> {
    let repository = environment.cache.repository(&reference.repository);
    let snapshot = repository.snapshot(&reference.revision)?;
    let files = files_under(&snapshot);
    match choose(reference, &files).ok()? {
        ModelFiles::Gguf(file) => Some(snapshot.join(file)),
        ModelFiles::Folder => {
            let index = fs::read_to_string(snapshot.join(INDEX)).ok();
            let weights = match &index {
                Some(text) => shards(text).ok()?,
                None => vec![SINGLE.to_owned()],
            };
            weights.iter().all(|file| snapshot.join(file).is_file()).then_some(snapshot)
        }
    }
}

/// Fetches the missing files of the model and returns its folder or file.
pub(super) fn fetch(
    environment: &Environment,
    reference: &HubReference,
    reporter: &dyn Reporter,
) -> Result<PathBuf, CatalogueError> {
    let client = Client::new(&environment.endpoint, environment.token.as_deref())?;
    let repository = environment.cache.repository(&reference.repository);
    let listing = list(environment, &client, reference)?;
    let chosen = choose(reference, &listing.files)?;
    let fetcher = Fetcher { environment, client, reference, repository, listing, reporter };
    let path = match chosen {
        ModelFiles::Gguf(file) => fetcher.file(&file)?,
        ModelFiles::Folder => fetcher.folder()?,
    };
    fetcher.repository.set_revision(&reference.revision, &fetcher.listing.commit)?;
    Ok(path)
}

struct Fetcher<'a> {
    environment: &'a Environment,
    client: Client,
    reference: &'a HubReference,
    repository: CachedRepository,
    listing: Listing,
    reporter: &'a dyn Reporter,
}

impl Fetcher<'_> {
    fn folder(&self) -> Result<PathBuf, CatalogueError> {
        let has = |name: &str| self.listing.files.iter().any(|file| file == name);
        for name in SMALL_FILES.iter().filter(|name| has(name)) {
            self.file(name)?;
        }
        let weights = if has(INDEX) {
            let path = self.file(INDEX)?;
            let text = fs::read_to_string(&path).map_err(CatalogueError::io(&path))?;
            shards(&text)
                .map_err(|reason| CatalogueError::Corrupt { name: INDEX.into(), reason })?
        } else {
            vec![SINGLE.to_owned()]
        };
        for name in &weights {
            self.file(name)?;
        }
        Ok(self.repository.snapshot_folder(&self.listing.commit))
    }

    /// Fetches one file of the commit into the cache.
    fn file(&self, name: &str) -> Result<PathBuf, CatalogueError> {
        check_name(name)?;
        let linked = self.repository.snapshot_folder(&self.listing.commit).join(name);
        if linked.exists() {
            return Ok(linked);
        }
        let repository = &self.reference.repository;
        let url = format!(
            "{}/{repository}/resolve/{}/{}",
            self.environment.endpoint,
            self.listing.commit,
            encode(name)
        );
        let response = self.client.head(&url, Follow::SameHost)?;
        let status = response.status().as_u16();
        if !(response.status().is_success() || response.status().is_redirection()) {
            return Err(refused(&format!("{repository}/{name}"), &url, status));
        }
        let wrong = |reason: &str| CatalogueError::Http { url: url.clone(), reason: reason.into() };
        let etag = header(&response, "x-linked-etag").or_else(|| header(&response, "etag"));
        let etag = etag.and_then(normalise_etag).ok_or_else(|| wrong("no usable ETag"))?;
        let length = match header(&response, "x-linked-size") {
            Some(text) => text.parse().ok(),
            None if response.status().is_success() => {
                header(&response, "content-length").and_then(|text| text.parse().ok())
            }
            None => None,
        };
        self.repository.create()?;
        let blob = Blob { name, url: &url, etag: &etag, bytes: length };
        download(&self.client, &self.repository, &blob, self.reporter)?;
        self.repository.link(&self.listing.commit, name, &etag)
    }
}

fn list(
    environment: &Environment,
    client: &Client,
    reference: &HubReference,
) -> Result<Listing, CatalogueError> {
    let HubReference { repository, revision, .. } = reference;
    let url = format!(
        "{}/api/models/{repository}/revision/{}",
        environment.endpoint,
        revision.replace('/', "%2F")
    );
    let mut response = client.get(&url, 0)?;
    let status = response.status().as_u16();
    if status != 200 {
        return Err(refused(repository, &url, status));
    }
    let wrong = |reason: String| CatalogueError::Http { url: url.clone(), reason };
    let text = response
        .body_mut()
        .with_config()
        .limit(TEXT_BYTES_MAX)
        .read_to_string()
        .map_err(|error| wrong(error.to_string()))?;
    let value: Value = serde_json::from_str(&text).map_err(|error| wrong(error.to_string()))?;
    let commit = value["sha"].as_str().filter(|sha| is_commit(sha));
    let commit = commit.ok_or_else(|| wrong("no commit hash in the answer".into()))?;
    let files = value["siblings"].as_array().ok_or_else(|| wrong("no file list".into()))?;
    let files = files.iter().filter_map(|file| file["rfilename"].as_str());
    Ok(Listing { commit: commit.to_owned(), files: files.map(str::to_owned).collect() })
}

fn refused(what: &str, url: &str, status: u16) -> CatalogueError {
    let hint = match status {
        401 | 403 => {
            "the name is wrong, or the repository is private or gated (set HF_TOKEN, and accept \
             its terms on its page)"
        }
        404 => "there is no such repository, revision or file",
        _ => {
            let reason = format!("HTTP {status}");
            return CatalogueError::Http { url: url.to_owned(), reason };
        }
    };
    CatalogueError::Refused { what: what.to_owned(), status, hint: hint.to_owned() }
}

fn choose(reference: &HubReference, files: &[String]) -> Result<ModelFiles, CatalogueError> {
    let unknown = |reason: String| CatalogueError::Unknown {
        reference: match &reference.selector {
            Some(selector) => format!("{}:{selector}", reference.repository),
            None => reference.repository.clone(),
        },
        reason,
    };
    let ggufs: Vec<&String> = files.iter().filter(|file| is_model_gguf(file)).collect();
    let list = || ggufs.iter().map(|file| file.as_str()).collect::<Vec<_>>().join(", ");
    if let Some(selector) = &reference.selector {
        let chosen = match_gguf(&ggufs, selector)
            .ok_or_else(|| unknown(format!("no such GGUF file; there are: {}", list())))?;
        return whole_file(chosen).map_err(unknown);
    }
    let has = |name: &str| files.iter().any(|file| file == name);
    if has("config.json") && (has(SINGLE) || has(INDEX)) {
        return Ok(ModelFiles::Folder);
    }
    let preferred = GGUF_PREFERENCE.iter().find_map(|kind| match_gguf(&ggufs, kind));
    match (preferred, ggufs.as_slice()) {
        (Some(file), _) => whole_file(file).map_err(unknown),
        (None, [file]) => whole_file(file).map_err(unknown),
        (None, []) => Err(unknown(
            "the repository has neither config.json with model.safetensors nor a .gguf file".into(),
        )),
        (None, _) => Err(unknown(format!("choose a GGUF file with :NAME, one of: {}", list()))),
    }
}

/// Whether a GGUF file is a model. Image projectors and importance matrices are not.
fn is_model_gguf(file: &str) -> bool {
    let lower = file.to_lowercase();
    lower.ends_with(".gguf") && !lower.contains("mmproj") && !lower.contains("imatrix")
}

/// The file called `selector`, or else the shortest name that contains it as a word.
fn match_gguf<'a>(ggufs: &[&'a String], selector: &str) -> Option<&'a String> {
    let base = |file: &str| file.rsplit('/').next().unwrap_or(file).to_lowercase();
    let selector = selector.to_lowercase();
    let exact = |file: &&&String| file.to_lowercase() == selector || base(file) == selector;
    if let Some(file) = ggufs.iter().find(exact) {
        return Some(file);
    }
    let word = |file: &str| {
        let stem = file.strip_suffix(".gguf").unwrap_or(file);
        stem.match_indices(&selector).any(|(at, _)| {
            let edge = |c: Option<char>| c.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_');
            edge(stem[..at].chars().next_back()) && edge(stem[at + selector.len()..].chars().next())
        })
    };
    ggufs.iter().filter(|file| word(&base(file))).min_by_key(|file| file.len()).copied()
}

fn whole_file(file: &str) -> Result<ModelFiles, String> {
    let stem = file.strip_suffix(".gguf").unwrap_or(file);
    let split = stem.rsplit_once("-of-").is_some_and(|(_, count)| {
        !count.is_empty() && count != "00001" && count.bytes().all(|b| b.is_ascii_digit())
    });
    if split {
        return Err(format!("{file} is one part of a split GGUF model, which is not supported"));
    }
    Ok(ModelFiles::Gguf(file.to_owned()))
}

/// The files that a safetensors index names.
fn shards(index: &str) -> Result<Vec<String>, String> {
    let value: Value = serde_json::from_str(index).map_err(|error| error.to_string())?;
    let map = value["weight_map"].as_object().ok_or("no weight_map")?;
    let names: Option<BTreeSet<&str>> = map.values().map(Value::as_str).collect();
    let names = names.ok_or("weight_map has a value that is not a file name")?;
    for name in &names {
        check_name(name).map_err(|error| error.to_string())?;
    }
    Ok(names.into_iter().map(str::to_owned).collect())
}

/// Checks a file name from the server: it must stay within the snapshot.
fn check_name(name: &str) -> Result<(), CatalogueError> {
    let good = |part: &str| !part.is_empty() && part != "." && part != "..";
    if name.split('/').all(good) && !name.contains(['\\', '\0']) && !Path::new(name).is_absolute() {
        return Ok(());
    }
    let reason = "the Hub sent a file name that leaves the folder".to_owned();
    Err(CatalogueError::Corrupt { name: format!("{name:?}"), reason })
}

/// The bare value of an ETag header; `None` if it could not be a file name.
fn normalise_etag(text: &str) -> Option<String> {
    let bare = text.trim().trim_start_matches("W/").trim_matches('"');
    let good = !bare.is_empty()
        && bare.len() <= 128
        && bare.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_'));
    good.then(|| bare.to_owned())
}

fn encode(name: &str) -> String {
    let mut out = String::new();
    for byte in name.bytes() {
        match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'~' | b'/' => {
                out.push(byte as char);
            }
            _ => out.push_str(&format!("%{byte:02X}")),
        }
    }
    out
}

fn files_under(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![(folder.to_owned(), String::new())];
    while let Some((folder, prefix)) = open.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let path = entry.path();
            if path.is_dir() {
                open.push((path, format!("{name}/")));
            } else if path.is_file() {
                found.push(name);
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(selector: Option<&str>) -> HubReference {
        HubReference {
            repository: "o/n".into(),
            revision: "main".into(),
            selector: selector.map(str::to_owned),
        }
    }

    fn chosen(selector: Option<&str>, files: &[&str]) -> Result<ModelFiles, String> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        choose(&reference(selector), &files).map_err(|error| error.to_string())
    }

    #[test]
    fn folder_before_gguf() {
        let files = ["config.json", "model.safetensors", "a.gguf"];
        assert_eq!(chosen(None, &files), Ok(ModelFiles::Folder));
        assert_eq!(chosen(Some("a.gguf"), &files), Ok(ModelFiles::Gguf("a.gguf".into())));
    }

    #[test]
    fn gguf_by_kind() {
        let files =
            ["m-Q4_0.gguf", "m-Q4_0_4_4.gguf", "m.Q4_1.gguf", "m-IQ4_XS.gguf", "mmproj.gguf"];
        assert_eq!(chosen(None, &files), Ok(ModelFiles::Gguf("m-Q4_0.gguf".into())));
        assert_eq!(chosen(Some("q4_1"), &files), Ok(ModelFiles::Gguf("m.Q4_1.gguf".into())));
        assert!(chosen(Some("Q4"), &files).is_err());
        assert!(chosen(Some("mmproj"), &files).is_err());
        assert!(chosen(None, &["a.txt"]).is_err());
        assert!(chosen(None, &["x.gguf", "y.gguf"]).is_err());
        let split = ["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf"];
        assert!(chosen(Some("Q4_K_M"), &split).expect_err("split").contains("split"));
    }

    #[test]
    fn hostile_names() {
        for bad in ["../x", "/x", "a/../x", "a//x", "a\\x", "", "."] {
            assert!(check_name(bad).is_err(), "{bad}");
        }
        assert!(check_name("onnx/model.bin").is_ok());
        assert_eq!(normalise_etag("W/\"abc-1\"").as_deref(), Some("abc-1"));
        assert_eq!(normalise_etag("\"../x\""), None);
        assert!(shards(r#"{"weight_map":{"a":"../../x"}}"#).is_err());
        assert!(shards("[]").is_err());
    }
}

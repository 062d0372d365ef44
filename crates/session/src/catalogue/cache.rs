//! The cache on disk, in the layout of Python's `huggingface_hub`. Each finds the files that the
//! other fetched:
//!
//! ```text
//! <root>/models--organisation--name/refs/main                      a commit's hash
//!                                  /blobs/<etag>                   the bytes
//!                                  /snapshots/<commit>/<file>      a link to a blob
//! <root>/.locks/models--organisation--name/<etag>.lock             held while a blob is written
//! ```

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use super::CatalogueError;

/// The folder that holds all repositories.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache at `root`, which need not exist yet.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The folder of `repository` (`organisation/name`).
    pub fn repository(&self, repository: &str) -> CachedRepository {
        let folder = format!("models--{}", repository.replace('/', "--"));
        CachedRepository {
            folder: self.root.join(&folder),
            locks: self.root.join(".locks").join(folder),
        }
    }
}

/// One repository of the cache.
#[derive(Debug, Clone)]
pub struct CachedRepository {
    folder: PathBuf,
    locks: PathBuf,
}

/// Releases a blob's lock when dropped.
#[derive(Debug)]
pub struct BlobLock(#[allow(dead_code, reason = "the lock ends when the file closes")] File);

impl CachedRepository {
    /// The folder of this repository.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The snapshot of `revision` (branch, tag or commit), if it is cached.
    pub fn snapshot(&self, revision: &str) -> Option<PathBuf> {
        let commit = match fs::read_to_string(self.folder.join("refs").join(revision)) {
            Ok(text) => text.trim().to_owned(),
            Err(_) if is_commit(revision) => revision.to_owned(),
            Err(_) => return None,
        };
        if !is_commit(&commit) {
            return None;
        }
        let path = self.snapshot_folder(&commit);
        path.is_dir().then_some(path)
    }

    /// The folder with the links to the files of `commit`.
    pub fn snapshot_folder(&self, commit: &str) -> PathBuf {
        self.folder.join("snapshots").join(commit)
    }

    /// The path of the blob `etag`.
    pub fn blob(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(etag)
    }

    /// The path of the blob `etag` until it is complete.
    pub fn partial(&self, etag: &str) -> PathBuf {
        self.folder.join("blobs").join(format!("{etag}.incomplete"))
    }

    /// Locks the blob `etag` against other processes; `huggingface_hub` uses the same lock. Calls
    /// `waiting` once if another process holds it.
    pub fn lock(&self, etag: &str, waiting: impl FnOnce()) -> Result<BlobLock, CatalogueError> {
        make_folder(&self.locks)?;
        let path = self.locks.join(format!("{etag}.lock"));
        let file = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(CatalogueError::io(&path))?;
        if file.try_lock().is_err() {
            waiting();
            file.lock().map_err(CatalogueError::io(&path))?;
        }
        Ok(BlobLock(file))
    }

    /// Makes the folders that a download needs.
    pub fn create(&self) -> Result<(), CatalogueError> {
        make_folder(&self.folder.join("blobs"))?;
        make_folder(&self.folder.join("refs"))
    }

    /// Links `file` of `commit` to the blob `etag`.
    pub fn link(&self, commit: &str, file: &str, etag: &str) -> Result<PathBuf, CatalogueError> {
        let path = self.snapshot_folder(commit).join(file);
        let parent = path.parent().expect("a snapshot's file has a parent");
        make_folder(parent)?;
        if path.exists() {
            return Ok(path);
        }
        let _ = fs::remove_file(&path);
        let depth = file.split('/').count() + 1;
        let target = format!("{}blobs/{etag}", "../".repeat(depth));
        symlink(Path::new(&target), &self.blob(etag), &path).map_err(CatalogueError::io(&path))?;
        Ok(path)
    }

    /// Records that `revision` is `commit`. Does nothing if `revision` is the commit's own hash.
    pub fn set_revision(&self, revision: &str, commit: &str) -> Result<(), CatalogueError> {
        if revision == commit {
            return Ok(());
        }
        let path = self.folder.join("refs").join(revision);
        if fs::read_to_string(&path).is_ok_and(|text| text == commit) {
            return Ok(());
        }
        make_folder(path.parent().expect("a ref has a parent"))?;
        let mut temporary = path.clone().into_os_string();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let temporary = PathBuf::from(temporary);
        fs::write(&temporary, commit).map_err(CatalogueError::io(&temporary))?;
        fs::rename(&temporary, &path).map_err(CatalogueError::io(&path))
    }
}

/// Whether `text` is a commit's hash: 40 lower-case hexadecimal digits.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// Makes `path` and the folders above it.
pub(super) fn make_folder(path: &Path) -> Result<(), CatalogueError> {
    fs::create_dir_all(path).map_err(CatalogueError::io(path))
}

#[cfg(unix)]
fn symlink(target: &Path, _blob: &Path, link: &Path) -> std::io::Result<()> {
    match std::os::unix::fs::symlink(target, link) {
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

#[cfg(not(unix))]
fn symlink(_target: &Path, blob: &Path, link: &Path) -> std::io::Result<()> {
    fs::hard_link(blob, link).or_else(|_| fs::copy(blob, link).map(|_| ()))
}

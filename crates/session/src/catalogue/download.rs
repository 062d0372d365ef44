//! Downloads one blob from the Hub to the cache. A download resumes where an earlier attempt
//! stopped. The bytes are checked and then renamed, so that a blob under its own name is always
//! complete.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::Path;
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::CatalogueError;
use super::cache::CachedRepository;
use super::http::{Client, header};
use crate::progress::{Progress, Reporter};

/// The number of broken connections in a row, without a new byte, after which a download fails.
const FAILURES_MAX: u32 = 4;

/// A blob to fetch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blob<'a> {
    /// Its name in messages.
    pub name: &'a str,
    /// Its address.
    pub url: &'a str,
    /// Its name in the cache. If it is a SHA-256, the bytes are checked against it.
    pub etag: &'a str,
    /// Its length, if the server gave it.
    pub bytes: Option<u64>,
}

/// Downloads `blob` into `repository`, unless it is there.
pub(super) fn download(
    client: &Client,
    repository: &CachedRepository,
    blob: &Blob,
    reporter: &dyn Reporter,
) -> Result<(), CatalogueError> {
    let target = repository.blob(blob.etag);
    if target.exists() {
        return Ok(());
    }
    let waiting = || reporter.line(&format!("{}: another process is fetching it", blob.name));
    let _lock = repository.lock(blob.etag, waiting)?;
    if target.exists() {
        return Ok(());
    }
    let partial = repository.partial(blob.etag);
    gather(client, blob, &partial, reporter)?;
    if let Err(error) = check(blob, &partial) {
        let _ = fs::remove_file(&partial);
        return Err(error);
    }
    fs::rename(&partial, &target).map_err(CatalogueError::io(&target))
}

/// Appends to `partial` until it has all bytes.
fn gather(
    client: &Client,
    blob: &Blob,
    partial: &Path,
    reporter: &dyn Reporter,
) -> Result<(), CatalogueError> {
    let mut file = File::options()
        .create(true)
        .append(true)
        .open(partial)
        .map_err(CatalogueError::io(partial))?;
    let mut have = file.metadata().map_err(CatalogueError::io(partial))?.len();
    if blob.bytes.is_some_and(|bytes| have > bytes) {
        truncate(&file, partial)?;
        have = 0;
    }
    let progress = reporter.start(blob.name, blob.bytes, have);
    let mut failures = 0;
    while blob.bytes.is_none_or(|bytes| have < bytes) {
        match attempt(client, blob, &mut file, partial, &mut have, &*progress) {
            Ok(Outcome::Whole) => break,
            Ok(Outcome::Advanced) => failures = 0,
            Ok(Outcome::Stuck(reason)) => {
                failures += 1;
                if failures >= FAILURES_MAX {
                    let reason = format!("{reason}; {have} bytes are kept, run again to resume");
                    return Err(CatalogueError::Http { url: blob.url.to_owned(), reason });
                }
                std::thread::sleep(Duration::from_millis(200 << failures));
            }
            Err(error) => return Err(error),
        }
    }
    progress.finish();
    Ok(())
}

enum Outcome {
    /// The server has no more bytes.
    Whole,
    /// The connection ended early, after new bytes.
    Advanced,
    /// The connection ended without new bytes, for this reason.
    Stuck(String),
}

/// Reads from one connection.
fn attempt(
    client: &Client,
    blob: &Blob,
    file: &mut File,
    partial: &Path,
    have: &mut u64,
    progress: &dyn Progress,
) -> Result<Outcome, CatalogueError> {
    let response = match client.get(blob.url, *have) {
        Ok(response) => response,
        Err(CatalogueError::Http { reason, .. }) => return Ok(Outcome::Stuck(reason)),
        Err(error) => return Err(error),
    };
    match response.status().as_u16() {
        206 if range_start(header(&response, "content-range")) == Some(*have) => {}
        // The server does not resume (200), resumes at another byte, or has fewer bytes than we
        // have (416). The download starts again.
        200 | 206 | 416 if *have > 0 => {
            truncate(file, partial)?;
            *have = 0;
            progress.set(0);
            if response.status().as_u16() != 200 {
                return Ok(Outcome::Stuck("the server cannot resume".to_owned()));
            }
        }
        200 => {}
        status @ (429 | 500..=599) => return Ok(Outcome::Stuck(format!("HTTP {status}"))),
        status => {
            let hint = "the file cannot be read".to_owned();
            return Err(CatalogueError::Refused { what: blob.name.to_owned(), status, hint });
        }
    }
    let before = *have;
    let ended = copy(&mut response.into_body().into_reader(), file, |count| {
        *have += count;
        progress.set(*have);
    });
    match ended {
        Ok(()) if blob.bytes.is_none_or(|bytes| *have >= bytes) => Ok(Outcome::Whole),
        Ok(()) | Err(CopyError::Read(_)) if *have > before => Ok(Outcome::Advanced),
        Ok(()) => Ok(Outcome::Stuck("the connection ended early".to_owned())),
        Err(CopyError::Read(error)) => Ok(Outcome::Stuck(error.to_string())),
        Err(CopyError::Write(error)) => {
            let needed = blob.bytes.unwrap_or(0).saturating_sub(*have);
            Err(CatalogueError::write(partial, needed, error))
        }
    }
}

enum CopyError {
    Read(io::Error),
    Write(io::Error),
}

fn copy(
    from: &mut impl Read,
    to: &mut impl Write,
    mut advanced: impl FnMut(u64),
) -> Result<(), CopyError> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(CopyError::Read(error)),
        };
        to.write_all(&buffer[..count]).map_err(CopyError::Write)?;
        advanced(count as u64);
    }
}

/// The first byte of a range such as `Content-Range: bytes 5-9/10`.
fn range_start(text: Option<&str>) -> Option<u64> {
    text?.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn truncate(file: &File, path: &Path) -> Result<(), CatalogueError> {
    file.set_len(0).map_err(CatalogueError::io(path))
}

fn check(blob: &Blob, path: &Path) -> Result<(), CatalogueError> {
    let found = fs::metadata(path).map_err(CatalogueError::io(path))?.len();
    let corrupt = |reason| CatalogueError::Corrupt { name: blob.name.to_owned(), reason };
    if let Some(expected) = blob.bytes.filter(|bytes| *bytes != found) {
        return Err(corrupt(format!("expected {expected} bytes, found {found}")));
    }
    if blob.etag.len() == 64 && blob.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
        let digest = sha256(path)?;
        if digest != blob.etag {
            return Err(corrupt(format!("expected SHA-256 {}, found {digest}", blob.etag)));
        }
    }
    Ok(())
}

/// The SHA-256 of a file, lower-case hexadecimal.
pub(super) fn sha256(path: &Path) -> Result<String, CatalogueError> {
    let mut file = File::open(path).map_err(CatalogueError::io(path))?;
    let mut hasher = Sha256::new();
    io::copy(&mut file, &mut hasher).map_err(CatalogueError::io(path))?;
    Ok(hex(&hasher.finalize()))
}

/// Lower-case hexadecimal.
pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Full;

    impl Write for Full {
        fn write(&mut self, _: &[u8]) -> io::Result<usize> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_full_disk_is_its_own_error() {
        let ended = copy(&mut &b"bytes"[..], &mut Full, |_| ());
        let Err(CopyError::Write(error)) = ended else { panic!("the write must fail") };
        let error = CatalogueError::write(Path::new("/x"), 5, error);
        assert!(matches!(error, CatalogueError::DiskFull { needed: 5, .. }), "{error}");
        assert!(!error.is_input());
    }

    #[test]
    fn ranges() {
        assert_eq!(range_start(Some("bytes 5-9/10")), Some(5));
        assert_eq!(range_start(Some("bytes */10")), None);
        assert_eq!(range_start(None), None);
    }
}

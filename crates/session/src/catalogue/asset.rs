//! Models in this project's `assets` folder. Each is a GGUF file or a zip archive of one, which is
//! unpacked into the cache on first use.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use super::CatalogueError;
use super::cache::make_folder;
use super::download::sha256;
use super::environment::Environment;

/// The model called `name` in the assets.
pub(super) fn find(environment: &Environment, name: &str) -> Result<PathBuf, CatalogueError> {
    for folder in folders() {
        let plain = folder.join(format!("{name}.gguf"));
        if plain.is_file() {
            return Ok(plain);
        }
        let packed = folder.join(format!("{name}.gguf.zip"));
        if packed.is_file() {
            return unpack(environment, name, &packed);
        }
    }
    let reason = "the assets folder of the Lathe source tree was not found beside this program \
                  nor where it was built";
    Err(CatalogueError::Unknown { reference: name.to_owned(), reason: reason.to_owned() })
}

/// Folders that may hold assets: that of the build, and one beside the executable.
fn folders() -> Vec<PathBuf> {
    let mut folders = vec![PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../assets"))];
    if let Ok(executable) = std::env::current_exe() {
        for parent in executable.ancestors().skip(1).take(4) {
            folders.push(parent.join("assets"));
            folders.push(parent.join("share/lathe/assets"));
        }
    }
    folders
}

/// The cached copy of the file in `packed`. The archive's checksum names it, so a new version of
/// the asset gets a new name.
fn unpack(environment: &Environment, name: &str, packed: &Path) -> Result<PathBuf, CatalogueError> {
    let digest = sha256(packed)?;
    let commit = &digest[..40];
    let file = format!("{name}.gguf");
    let repository = environment.cache.repository(&format!("lathe/{name}"));
    if let Some(path) = repository.snapshot(commit).map(|snapshot| snapshot.join(&file))
        && path.is_file()
    {
        return Ok(path);
    }
    repository.create()?;
    let _lock = repository.lock(&digest, || {})?;
    let blob = repository.blob(&digest);
    if !blob.exists() {
        let partial = repository.partial(&digest);
        extract(packed, &file, &partial)?;
        fs::rename(&partial, &blob).map_err(CatalogueError::io(&blob))?;
    }
    make_folder(&repository.snapshot_folder(commit))?;
    let path = repository.link(commit, &file, &digest)?;
    repository.set_revision("main", commit)?;
    Ok(path)
}

fn extract(archive: &Path, inside: &str, target: &Path) -> Result<(), CatalogueError> {
    let corrupt = |error: zip::result::ZipError| CatalogueError::Corrupt {
        name: archive.display().to_string(),
        reason: error.to_string(),
    };
    let file = File::open(archive).map_err(CatalogueError::io(archive))?;
    let mut archive = zip::ZipArchive::new(file).map_err(corrupt)?;
    let mut entry = archive.by_name(inside).map_err(corrupt)?;
    let bytes = entry.size();
    let mut out = File::create(target).map_err(CatalogueError::io(target))?;
    io::copy(&mut entry, &mut out)
        .map(|_| ())
        .map_err(|error| CatalogueError::write(target, bytes, error))
}

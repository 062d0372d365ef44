//! A result on its way to OUT. It is made in a folder beside OUT and appears under its name when it
//! is whole. Nothing that Lathe did not write is touched.

use std::fs::{self, File, TryLockError};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error};

use crate::output::bad_input;

/// The file that says that Lathe made the folder. Its lock says that a run still works there.
const MARK: &str = ".made-by-lathe";

/// The folder `OUT.partial`. It is removed if the result is not finished. A run that is killed
/// leaves it behind, and the next run clears it.
pub(crate) struct Staging {
    out: PathBuf,
    folder: PathBuf,
    /// Holds the lock.
    _mark: File,
    finished: bool,
}

impl Staging {
    /// Takes the right to write `out`.
    ///
    /// # Errors
    /// If another run writes it, or `OUT.partial` exists and is not Lathe's.
    pub(crate) fn begin(out: &Path) -> Result<Self, Error> {
        // Without a slash at its end, which would put the folder inside of OUT.
        let out: PathBuf = out.components().collect();
        if out.file_name().is_none() {
            return Err(bad_input(format!("{}: expected the name of a result", out.display())));
        }
        let folder = beside(&out, ".partial");
        let at = |error| Error::new(error).context(folder.display().to_string());
        let mark = match fs::create_dir(&folder) {
            Ok(()) => File::create(folder.join(MARK)).map_err(at)?,
            Err(error) if error.kind() == ErrorKind::AlreadyExists => File::open(folder.join(MARK))
                .map_err(|_| {
                    let folder = folder.display();
                    bad_input(format!("{folder}: it exists and is not Lathe's; move it away"))
                })?,
            Err(error) => return Err(at(error)),
        };
        match mark.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(bad_input(format!("{}: another run writes it", out.display())));
            }
            Err(TryLockError::Error(error)) => return Err(at(error)),
        }
        let staging = Staging { out, folder, _mark: mark, finished: false };
        // What a run that was killed left.
        for entry in staging.entries()? {
            let removed = match entry.is_dir() {
                true => fs::remove_dir_all(&entry),
                false => fs::remove_file(&entry),
            };
            removed.with_context(|| entry.display().to_string())?;
        }
        Ok(staging)
    }

    /// A path beside OUT: OUT's name with `suffix` behind it.
    pub(crate) fn beside(&self, suffix: &str) -> PathBuf {
        beside(&self.out, suffix)
    }

    /// The folder, for a result that is a folder.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The path of a result that is a file. Other files may lie beside it.
    pub(crate) fn file(&self) -> PathBuf {
        self.folder.join(self.out.file_name().expect("checked at the beginning"))
    }

    /// The folder becomes OUT.
    pub(crate) fn finish_folder(mut self) -> Result<(), Error> {
        let mark = self.folder.join(MARK);
        fs::remove_file(&mark).with_context(|| mark.display().to_string())?;
        fs::rename(&self.folder, &self.out).with_context(|| self.out.display().to_string())?;
        self.finished = true;
        Ok(())
    }

    /// The files go to OUT's place, OUT last. A file that exists there stays as it is.
    pub(crate) fn finish_files(self) -> Result<(), Error> {
        let mut files = self.entries()?;
        files.sort_by_key(|path| *path == self.file());
        for path in files {
            let to = self.out.with_file_name(path.file_name().expect("an entry has a name"));
            if !to.exists() {
                fs::rename(&path, &to).with_context(|| to.display().to_string())?;
            }
        }
        // Dropping removes the empty folder.
        Ok(())
    }

    /// All that lies in the folder, without the mark.
    fn entries(&self) -> Result<Vec<PathBuf>, Error> {
        let at = || self.folder.display().to_string();
        let entries = fs::read_dir(&self.folder).with_context(at)?;
        let entries = entries.map(|entry| entry.map(|entry| entry.path()));
        let mut entries = entries.collect::<Result<Vec<_>, _>>().with_context(at)?;
        entries.retain(|path| path.file_name().is_some_and(|name| name != MARK));
        Ok(entries)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.finished {
            // A folder that cannot be removed has its mark, so that a later run clears it.
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// The path with more behind its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_one_run_writes_and_only_its_own() {
        let home = tempfile::tempdir().expect("a folder");
        let out = home.path().join("out");
        let first = Staging::begin(&out.join("")).expect("free");
        let error = Staging::begin(&out).err().expect("taken").to_string();
        assert!(error.ends_with("out: another run writes it"), "{error}");
        fs::write(first.folder().join("a"), "1").expect("written");
        drop(first);
        assert!(!home.path().join("out.partial").exists());

        // A run that was killed leaves its folder.
        let folder = home.path().join("out.partial");
        fs::create_dir(&folder).expect("a folder");
        fs::write(folder.join("diary"), "mine").expect("written");
        let error = Staging::begin(&out).err().expect("not Lathe's").to_string();
        assert!(error.contains("out.partial: it exists and is not Lathe's"), "{error}");
        assert_eq!(fs::read_to_string(folder.join("diary")).expect("kept"), "mine");
        fs::write(folder.join(MARK), "").expect("written");
        let next = Staging::begin(&out).expect("cleared");
        assert!(!folder.join("diary").exists());
        fs::write(next.folder().join("weights"), "2").expect("written");
        assert!(!out.exists());
        next.finish_folder().expect("renamed");
        let names: Vec<_> = fs::read_dir(&out).expect("a folder").flatten().collect();
        assert_eq!(names.len(), 1);
    }

    #[test]
    fn files_that_exist_stay() {
        let home = tempfile::tempdir().expect("a folder");
        let out = home.path().join("m.gguf");
        let recipe = home.path().join("m.recipe.toml");
        fs::write(&recipe, "mine").expect("written");
        let staging = Staging::begin(&out).expect("free");
        fs::write(staging.file(), "weights").expect("written");
        fs::write(staging.file().with_extension("recipe.toml"), "ours").expect("written");
        fs::write(staging.file().with_extension("provenance.json"), "{}").expect("written");
        staging.finish_files().expect("renamed");
        assert_eq!(fs::read_to_string(&out).expect("there"), "weights");
        assert_eq!(fs::read_to_string(&recipe).expect("there"), "mine");
        assert!(home.path().join("m.provenance.json").exists());
        assert!(!home.path().join("m.gguf.partial").exists());
    }
}

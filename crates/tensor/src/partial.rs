//! Files that appear whole or not at all. They are written under a temporary name and renamed at
//! the end.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file that is being written. If it is dropped before [`PartialFile::finish`], nothing is left
/// of it.
#[derive(Debug)]
pub(crate) struct PartialFile {
    file: File,
    position: u64,
    temporary: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl PartialFile {
    /// Starts a file that will become `path`. Its temporary name lies in the same directory and no
    /// other process uses it.
    pub(crate) fn create(path: &Path) -> io::Result<Self> {
        let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
        let mut temporary = name.to_os_string();
        temporary.push(format!(".{}.partial", std::process::id()));
        let temporary = path.with_file_name(temporary);
        let file = File::create(&temporary)?;
        Ok(Self { file, position: 0, temporary, path: path.to_owned(), finished: false })
    }

    /// Writes `bytes` at `offset`.
    pub(crate) fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        if self.position != offset {
            self.file.seek(SeekFrom::Start(offset))?;
        }
        // After a failed write the position is unknown, so the next write seeks.
        self.position = u64::MAX;
        self.file.write_all(bytes)?;
        self.position = offset + bytes.len() as u64;
        Ok(())
    }

    /// Sets the length of the file. Its last bytes may be a hole or padding.
    pub(crate) fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// The name that the file will have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Flushes the data to the disk and renames the file.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        self.finish_cached()
    }

    /// Renames the file without flushing it. The file outlives this process, but not a loss of
    /// power.
    pub(crate) fn finish_cached(mut self) -> io::Result<()> {
        fs::rename(&self.temporary, &self.path)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for PartialFile {
    fn drop(&mut self) {
        if !self.finished {
            // Nothing can be done about a file that cannot be removed.
            let _ = fs::remove_file(&self.temporary);
        }
    }
}

//! Files that appear whole or not at all: written under a temporary name, renamed at the end.

use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// A file being written. Dropped before [`PartialFile::finish`], it leaves nothing behind.
#[derive(Debug)]
pub(crate) struct PartialFile {
    file: File,
    position: u64,
    temporary: PathBuf,
    path: PathBuf,
    finished: bool,
}

impl PartialFile {
    /// Starts a file that will be `path`, under a name of this process's own beside it.
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
        // Unknown after a failed write: the next one seeks.
        self.position = u64::MAX;
        self.file.write_all(bytes)?;
        self.position = offset + bytes.len() as u64;
        Ok(())
    }

    /// Gives the file its length, in case the last bytes are a hole or padding.
    pub(crate) fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.file.set_len(bytes)
    }

    /// The name that the file will have.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Brings the data to the disk and gives the file its name.
    pub(crate) fn finish(self) -> io::Result<()> {
        self.file.sync_all()?;
        self.finish_cached()
    }

    /// Gives the file its name and leaves it to the operating system when the data goes to the
    /// disk: that outlives this process, not a loss of power.
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

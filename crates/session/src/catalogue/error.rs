//! Why a model could not be found or fetched.

use std::io;
use std::path::{Path, PathBuf};

/// A failure of the catalogue. [`CatalogueError::is_input`] tells bad input (exit code 2) from
/// the world's fault (exit code 1).
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The words that name the model name nothing.
    #[error("{reference}: {reason}")]
    Unknown {
        /// What was typed.
        reference: String,
        /// Why it cannot be a model, and what would be.
        reason: String,
    },
    /// The Hub refused.
    #[error("the Hub refused {what} (HTTP {status}): {hint}")]
    Refused {
        /// Repository or file.
        what: String,
        /// HTTP status.
        status: u16,
        /// What to do.
        hint: String,
    },
    /// The Hub could not be reached or misbehaved.
    #[error("{url}: {reason}")]
    Http {
        /// Address.
        url: String,
        /// What happened.
        reason: String,
    },
    /// The bytes that came are not the bytes that were promised.
    #[error("{name}: {reason}")]
    Corrupt {
        /// File.
        name: String,
        /// What was expected and found.
        reason: String,
    },
    /// No room.
    #[error(
        "no space left on the disk that holds {}; {needed} more bytes are needed",
        .path.display()
    )]
    DiskFull {
        /// Where it was to be written.
        path: PathBuf,
        /// Bytes still to come.
        needed: u64,
    },
    /// A file operation failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Every way to get a catalogue entry failed.
    #[error("cannot fetch {name} ({tried}); {by_hand}")]
    Unreachable {
        /// Catalogue name.
        name: String,
        /// What was tried and why it failed.
        tried: String,
        /// How to place the file by hand.
        by_hand: String,
    },
}

impl CatalogueError {
    /// Whether the caller asked for something that does not exist or may not be had.
    pub fn is_input(&self) -> bool {
        matches!(self, Self::Unknown { .. } | Self::Refused { .. })
    }

    /// An I/O error at `path`.
    pub fn io(path: &Path) -> impl FnOnce(io::Error) -> Self + '_ {
        move |source| Self::write(path, 0, source)
    }

    /// An I/O error while `needed` more bytes were to be written to `path`.
    pub fn write(path: &Path, needed: u64, source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                Self::DiskFull { path: path.to_owned(), needed }
            }
            _ => Self::Io { path: path.to_owned(), source },
        }
    }
}

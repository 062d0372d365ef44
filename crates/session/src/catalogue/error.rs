//! Why a model could not be found or fetched.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the catalogue. [`CatalogueError::is_input`] tells bad input (exit code 2) from a
/// failure of the network or the machine (exit code 1).
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    /// The name is not a model.
    #[error("{reference}: {reason}")]
    Unknown {
        /// What was typed.
        reference: String,
        /// Why it cannot be a model, and what names can be.
        reason: String,
    },
    /// The Hub refused a request.
    #[error("the Hub refused {what} (HTTP {status}): {hint}")]
    Refused {
        /// Repository or file.
        what: String,
        /// HTTP status.
        status: u16,
        /// A hint for the user.
        hint: String,
    },
    /// The Hub could not be reached, or its answer was not valid.
    #[error("{url}: {reason}")]
    Http {
        /// Address.
        url: String,
        /// The reason.
        reason: String,
    },
    /// The received bytes are not the expected ones.
    #[error("{name}: {reason}")]
    Corrupt {
        /// File.
        name: String,
        /// What was expected and what was found.
        reason: String,
    },
    /// The disk is full.
    #[error(
        "no space left on the disk that holds {}; {needed} more bytes are needed",
        .path.display()
    )]
    DiskFull {
        /// The path that was to be written.
        path: PathBuf,
        /// Bytes that are still missing.
        needed: u64,
    },
    /// A file operation failed.
    #[error("{}: {source}", .path.display())]
    Io {
        /// File or folder.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Every source of a catalogue entry failed.
    #[error("cannot fetch {name} ({tried}); {by_hand}")]
    Unreachable {
        /// Catalogue name.
        name: String,
        /// The sources that were tried, and why they failed.
        tried: String,
        /// Instructions to place the file by hand.
        by_hand: String,
    },
}

impl CatalogueError {
    /// Whether the caller asked for something that does not exist or is not accessible.
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

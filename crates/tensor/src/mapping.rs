//! Maps files as read-only memory. This is the only `unsafe` code of this crate.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::bytes::{Bytes, Owner};

/// Maps a whole file. An empty file gives no bytes.
pub(crate) fn map_file(path: &Path) -> io::Result<Bytes> {
    let file = File::open(path)?;
    let metadata = file.metadata()?;
    if metadata.is_dir() {
        return Err(io::Error::from(io::ErrorKind::IsADirectory));
    }
    if metadata.len() == 0 {
        return Ok(Bytes::new(Vec::new()));
    }
    // SAFETY: the mapping is read-only and lives as long as any `Bytes` cut from it. What Rust
    // cannot rule out is another process that rewrites or truncates the file meanwhile; every
    // reader of mapped weights takes that risk, and checkpoints are replaced by rename, which
    // leaves a mapped file as it is.
    let mapping = unsafe { memmap2::Mmap::map(&file)? };
    Ok(Bytes::of(Mapping(mapping)))
}

/// A file in memory.
struct Mapping(memmap2::Mmap);

impl Owner for Mapping {
    fn bytes(&self) -> &[u8] {
        &self.0
    }

    fn release(&self) {
        // This is only a request. If the system ignores it, pages stay until memory is short.
        #[cfg(unix)]
        // SAFETY: the mapping is shared and read-only, so pages that come back have the file's
        // bytes.
        let _ = unsafe { self.0.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_given_back_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("numbers");
        let numbers: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &numbers).unwrap();
        let mapped = map_file(&path).unwrap();
        let part = mapped.slice(777..90_000);
        for bytes in [&mapped, &part] {
            assert_eq!(part[..], numbers[777..90_000]);
            bytes.release();
        }
        assert_eq!(mapped[..], numbers);
        let owned = Bytes::new(numbers.clone());
        owned.release();
        assert_eq!(owned[..], numbers);
    }
}

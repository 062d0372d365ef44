//! Files as read-only memory. The only `unsafe` of this crate.

use std::fs::File;
use std::io;
use std::path::Path;

use crate::bytes::Bytes;

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
    Ok(Bytes::new(mapping))
}

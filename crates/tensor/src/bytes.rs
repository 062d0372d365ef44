//! `Bytes`: a view of read-only memory, owned or mapped from a file. Clones are cheap.

use std::ops::{Deref, Range};
use std::sync::Arc;

/// Read-only bytes. `clone` and `slice` share them and copy nothing.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

/// What holds bytes.
pub(crate) trait Owner: Send + Sync {
    fn bytes(&self) -> &[u8];

    /// Frees memory that can be read again from elsewhere.
    fn release(&self) {}
}

/// An owner whose bytes are in memory and stay there.
struct Plain<T>(T);

impl<T: AsRef<[u8]> + Send + Sync> Owner for Plain<T> {
    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }
}

impl Bytes {
    /// All of `owner`'s bytes.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self::of(Plain(owner))
    }

    pub(crate) fn of(owner: impl Owner + 'static) -> Self {
        let range = 0..owner.bytes().len();
        Self { owner: Arc::new(owner), range }
    }

    /// Frees the memory of the whole mapped file, whoever else reads it. Bytes that are read again
    /// come from the system's cache of files or from the disk. Nothing happens to bytes that are
    /// not mapped.
    pub fn release(&self) {
        self.owner.release();
    }

    /// The part `range` of these bytes, without a copy.
    ///
    /// # Panics
    /// If `range` does not lie within these bytes. Readers of files check that first.
    pub fn slice(&self, range: Range<usize>) -> Self {
        assert!(range.start <= range.end && range.end <= self.len(), "slice out of range");
        let start = self.range.start + range.start;
        Self { owner: Arc::clone(&self.owner), range: start..start + range.len() }
    }
}

impl Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.owner.bytes()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

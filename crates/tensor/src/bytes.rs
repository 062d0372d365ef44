//! `Bytes`: a cheap-to-clone view of read-only memory, owned or mapped from a file.

use std::ops::{Deref, Range};
use std::sync::Arc;

/// Read-only bytes that are shared, not copied, by `clone` and `slice`.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn Owner>,
    range: Range<usize>,
}

/// What holds bytes.
pub(crate) trait Owner: Send + Sync {
    fn bytes(&self) -> &[u8];

    /// Gives memory back that can be filled again from elsewhere.
    fn release(&self) {}
}

/// Whatever has bytes in memory.
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

    /// Gives the memory of a mapped file back, all of it, whoever else reads it: what is read again comes
    /// from the system's cache of files or from the disk. Bytes that are not mapped stay where they are.
    pub fn release(&self) {
        self.owner.release();
    }

    /// The part `range` of these bytes, without a copy.
    ///
    /// # Panics
    /// If `range` does not lie within these bytes (a programmer's error: readers check first).
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

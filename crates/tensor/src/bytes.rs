//! `Bytes`: a cheap-to-clone view of read-only memory, owned or mapped from a file.

use std::ops::{Deref, Range};
use std::sync::Arc;

/// Read-only bytes that are shared, not copied, by `clone` and `slice`.
#[derive(Clone)]
pub struct Bytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl Bytes {
    /// All of `owner`'s bytes.
    pub fn new(owner: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        let range = 0..owner.as_ref().len();
        Self { owner: Arc::new(owner), range }
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
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl std::fmt::Debug for Bytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Bytes({})", self.len())
    }
}

//! Zeroed memory for weights and activations, aligned to cache lines, on huge pages where it is
//! large.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use std::sync::{Arc, Mutex, PoisonError, Weak};

use lathe_program::BackendError;

/// Buffers above this size ask for huge pages. With pages of 4 KiB a worker waits for a page walk
/// every 64 cache lines, and the hardware prefetcher stops at the end of each page.
const HUGE: usize = 2 << 20;

/// The size of a pool that smaller weights share, so that they lie on huge pages too.
const POOL: usize = 16 << 20;

/// The pool that has room left, and where its room begins. It lives as long as a weight in it. This
/// is global so that weights of one model share pools, whatever loads them.
static OPEN: Mutex<(Weak<AlignedBytes>, usize)> = Mutex::new((Weak::new(), 0));

/// `len` zeroed bytes for a weight: a buffer, and the place in it where they begin, aligned to a
/// cache line. No other weight gets any of these bytes.
pub(crate) fn weight_memory(len: usize) -> Result<(Arc<AlignedBytes>, usize), BackendError> {
    if len >= POOL / 2 {
        return Ok((Arc::new(AlignedBytes::zeroed("weights", len)?), 0));
    }
    let mut open = OPEN.lock().unwrap_or_else(PoisonError::into_inner);
    let with_room = open.0.upgrade().filter(|_| open.1 + len <= POOL);
    let (pool, start) = match with_room {
        Some(pool) => (pool, open.1),
        None => (Arc::new(AlignedBytes::zeroed("weights", POOL)?), 0),
    };
    *open = (Arc::downgrade(&pool), (start + len).next_multiple_of(64));
    Ok((pool, start))
}

/// A fixed number of zeroed bytes, aligned to 64 (to 2 MiB where large).
pub(crate) struct AlignedBytes {
    pointer: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it owns its bytes like a `Box<[u8]>`.
unsafe impl Send for AlignedBytes {}
// SAFETY: as above; shared access is read-only.
unsafe impl Sync for AlignedBytes {}

impl AlignedBytes {
    /// `len` zeroed bytes for `what`.
    pub(crate) fn zeroed(what: &'static str, len: usize) -> Result<AlignedBytes, BackendError> {
        let alignment = if len >= HUGE { HUGE } else { 64 };
        let error = || BackendError::Memory { what, bytes: len };
        let layout = Layout::from_size_align(len.max(1), alignment).map_err(|_| error())?;
        if len >= HUGE {
            return Self::mapped(layout).ok_or_else(error);
        }
        // SAFETY: the layout is not empty.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(error)?;
        Ok(AlignedBytes { pointer, layout })
    }

    #[cfg(target_os = "linux")]
    fn mapped(layout: Layout) -> Option<AlignedBytes> {
        let len = layout.size().checked_next_multiple_of(HUGE)?;
        // SAFETY: a fresh anonymous mapping; the surplus for alignment is unmapped at once.
        unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let total = len.checked_add(HUGE)?;
            let base = libc::mmap(std::ptr::null_mut(), total, protection, flags, -1, 0);
            if base == libc::MAP_FAILED {
                return None;
            }
            let before = base.align_offset(HUGE);
            let start = base.byte_add(before);
            if before > 0 {
                libc::munmap(base, before);
            }
            libc::munmap(start.byte_add(len), HUGE - before);
            libc::madvise(start, len, libc::MADV_HUGEPAGE);
            Some(AlignedBytes { pointer: NonNull::new(start.cast())?, layout })
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn mapped(layout: Layout) -> Option<AlignedBytes> {
        // SAFETY: the layout is not empty.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) })?;
        Some(AlignedBytes { pointer, layout })
    }

    /// Bytes.
    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn as_ptr(&self) -> *const u8 {
        self.pointer.as_ptr()
    }

    pub(crate) fn as_mut_ptr(&mut self) -> *mut u8 {
        self.pointer.as_ptr()
    }
}

impl Drop for AlignedBytes {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if self.layout.size() >= HUGE {
            let len = self.layout.size().next_multiple_of(HUGE);
            // SAFETY: `mapped` made this mapping with this length.
            unsafe { libc::munmap(self.pointer.as_ptr().cast(), len) };
            return;
        }
        // SAFETY: allocated with this layout.
        unsafe { dealloc(self.pointer.as_ptr(), self.layout) }
    }
}

impl std::fmt::Debug for AlignedBytes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AlignedBytes({})", self.len())
    }
}

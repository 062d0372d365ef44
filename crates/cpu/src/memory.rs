//! `Memory`: one large zeroed allocation. The system provides its pages when they are first
//! touched.

use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::ptr::NonNull;

use lathe_program::BackendError;

/// The alignment of the memory, of pages of the cache and of activation buffers: a cache line,
/// which is also the widest register.
pub(crate) const ALIGNMENT: usize = 64;

// The alignment that every allocator provides. If more were asked for, the allocator would clear
// the memory itself and touch every page. So `pointer` finds the first aligned byte.
const ASKED_ALIGNMENT: usize = 16;

/// Zeroed bytes that several workers may read and write at disjoint places.
#[derive(Debug)]
pub(crate) struct Memory {
    start: NonNull<u8>,
    layout: Layout,
    bytes: usize,
}

// SAFETY: this is plain memory; who touches which bytes when is the business of the callers of
// `pointer`, whose use of it is unsafe.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// `bytes` zeros. `what` names them in the error.
    ///
    /// # Errors
    /// [`BackendError::Memory`] if the system does not have them.
    pub(crate) fn zeroed(bytes: usize, what: &'static str) -> Result<Self, BackendError> {
        let error = BackendError::Memory { what, bytes };
        let Some(asked) = bytes.checked_add(ALIGNMENT) else { return Err(error) };
        let Ok(layout) = Layout::from_size_align(asked, ASKED_ALIGNMENT) else { return Err(error) };
        // SAFETY: the layout's size is at least `ALIGNMENT`, not zero.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or(error)?;
        huge_pages(start, asked);
        Ok(Self { start, layout, bytes })
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }

    /// The first byte, aligned to [`ALIGNMENT`]. Its `bytes()` bytes may be read and written, as
    /// long as no two threads touch the same byte at once while one of them writes.
    pub(crate) fn pointer(&self) -> *mut u8 {
        let start = self.start.as_ptr();
        // SAFETY: the allocation has `ALIGNMENT` bytes more than `bytes`.
        unsafe { start.add(start.align_offset(ALIGNMENT)) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: allocated in `zeroed` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

/// Allocations of at least this size ask for huge pages. With pages of 4 KiB, every piece of the
/// cache that is read would cost a walk of the page table.
const HUGE_FROM: usize = 4 << 20;

#[cfg(target_os = "linux")]
fn huge_pages(start: NonNull<u8>, bytes: usize) {
    const PAGE: usize = 4096;
    if bytes < HUGE_FROM {
        return;
    }
    let first = start.as_ptr().align_offset(PAGE);
    // SAFETY: whole pages within the allocation; the advice changes no contents, and a refusal is
    // harmless.
    unsafe {
        let pages = start.as_ptr().add(first);
        libc::madvise(pages.cast(), (bytes - first) / PAGE * PAGE, libc::MADV_HUGEPAGE);
    }
}

#[cfg(not(target_os = "linux"))]
fn huge_pages(_start: NonNull<u8>, _bytes: usize) {}

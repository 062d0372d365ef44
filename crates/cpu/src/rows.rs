//! `Rows`: a buffer of activations that workers share.

/// A view of `[rows, width]` floats, one row after another. Several workers may have copies of it.
/// Kernels make sure that no two touch the same element while one writes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rows {
    start: *mut f32,
    width: usize,
}

// SAFETY: a pointer and a number; every access through it is unsafe and argued for there.
unsafe impl Send for Rows {}
// SAFETY: as above.
unsafe impl Sync for Rows {}

impl Rows {
    /// Rows of `width` floats at `start`.
    pub(crate) fn new(start: *mut f32, width: usize) -> Self {
        Self { start, width }
    }

    /// Floats in a row.
    pub(crate) fn width(self) -> usize {
        self.width
    }

    /// The first float of row `index`. It may be read and written as far as the buffer reaches.
    #[inline(always)]
    pub(crate) fn row(self, index: usize) -> *mut f32 {
        self.start.wrapping_add(index * self.width)
    }

    /// Row `index`.
    ///
    /// # Safety
    /// The row is within the buffer and nobody writes it while the slice lives.
    #[inline(always)]
    pub(crate) unsafe fn slice<'a>(self, index: usize) -> &'a [f32] {
        // SAFETY: the caller vouches for the row.
        unsafe { std::slice::from_raw_parts(self.row(index), self.width) }
    }

    /// The first `rows` rows.
    ///
    /// # Safety
    /// They are within the buffer and nobody writes them while the slice lives.
    pub(crate) unsafe fn slices<'a>(self, rows: usize) -> &'a [f32] {
        // SAFETY: the caller vouches for the rows.
        unsafe { std::slice::from_raw_parts(self.start, rows * self.width) }
    }

    /// The first `rows` rows, for writing.
    ///
    /// # Safety
    /// They are within the buffer and nobody else touches them while the slice lives.
    pub(crate) unsafe fn slices_mut<'a>(self, rows: usize) -> &'a mut [f32] {
        // SAFETY: the caller vouches for the rows.
        unsafe { std::slice::from_raw_parts_mut(self.start, rows * self.width) }
    }
}

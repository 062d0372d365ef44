//! `Matrix`: a packed weight and the kernels that multiply it.

use std::ops::Range;

use super::table::Kernels;
use crate::pack::PackedMatrix;
use crate::pack::layout::Operand;

/// A packed weight `[rows, columns]` and its kernels. Clones share the memory.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub(crate) packed: PackedMatrix,
    /// The form of activations that the kernels take.
    pub(crate) operand: Operand,
    pub(crate) kernels: Kernels,
}

impl Matrix {
    /// The same matrix, but rows in the prefill form are multiplied as all others are.
    pub(crate) fn without_prefill_form(self) -> Matrix {
        Matrix { kernels: self.kernels.without_prompt(), ..self }
    }

    /// Output rows.
    pub fn rows(&self) -> usize {
        self.packed.rows()
    }

    /// Input columns.
    pub fn columns(&self) -> usize {
        self.packed.columns()
    }

    /// Bytes that the matrix takes.
    pub fn bytes(&self) -> usize {
        self.packed.bytes()
    }

    /// Rows `range` as a matrix of their own, which shares the memory. One expert of a stack is
    /// such a matrix.
    ///
    /// # Panics
    /// If `range` leaves the matrix or does not start on a multiple of 16.
    pub fn slice_rows(&self, range: Range<usize>) -> Matrix {
        Matrix { packed: self.packed.slice_rows(range), ..self.clone() }
    }

    pub(crate) fn panels(&self) -> usize {
        self.packed.panels()
    }

    /// Bytes from a panel to the next.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.packed.panel_bytes()
    }

    /// Segments of 32 positions along a row, padding included.
    pub(crate) fn segments(&self) -> usize {
        self.packed.segments()
    }
}

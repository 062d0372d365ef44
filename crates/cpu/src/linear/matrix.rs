//! `Matrix`: a packed weight with the kernels that multiply it.

use std::ops::Range;

use super::table::Kernels;
use crate::pack::PackedMatrix;
use crate::pack::layout::Operand;

/// A packed weight `[rows, columns]`, and what multiplies it. Cloning shares the memory.
#[derive(Debug, Clone)]
pub struct Matrix {
    pub(crate) packed: PackedMatrix,
    /// The form of activations that the kernels take.
    pub(crate) operand: Operand,
    pub(crate) kernels: Kernels,
}

impl Matrix {
    /// Multiplies rows in the prefill form as all others are.
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

    /// Rows `range` as a matrix of its own, sharing the memory: one expert of a stack.
    ///
    /// # Panics
    /// If `range` leaves the matrix or does not start on a multiple of 16.
    pub fn slice_rows(&self, range: Range<usize>) -> Matrix {
        Matrix { packed: self.packed.slice_rows(range), ..self.clone() }
    }

    pub(crate) fn panels(&self) -> usize {
        self.packed.panels()
    }

    /// From a panel to the next, in bytes.
    pub(crate) fn panel_bytes(&self) -> usize {
        self.packed.panel_bytes()
    }

    /// Segments of 32 positions along a row, padding included.
    pub(crate) fn segments(&self) -> usize {
        self.packed.segments()
    }
}

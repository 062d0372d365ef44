//! What happens to a product: a bias is added, and it is written or added to `out`.

use super::activations::Activations;
use super::block::BLOCK;
use super::matrix::Matrix;
use crate::pack::PANEL;

/// The destination of a part's product.
pub(super) struct Output<'a> {
    pub(super) pointer: *mut f32,
    pub(super) bias: Option<&'a [f32]>,
    pub(super) accumulate: Option<f32>,
}

impl Output<'_> {
    /// Writes the sums of a row's outputs from `from` on, with the bias, or adds them to what is
    /// there.
    #[inline(always)]
    pub(super) fn store(&self, sums: &[f32], from: usize, to: &mut [f32]) {
        for (lane, value) in to.iter_mut().enumerate() {
            let mut sum = sums[lane];
            if let Some(bias) = self.bias {
                sum += bias[from + lane];
            }
            // A product with 1 changes no bit.
            *value = self.accumulate.map_or(sum, |scale| *value + sum * scale);
        }
    }
}

/// Adds the bias to the product of one panel, and writes it to the rows of a block or adds it to
/// them.
///
/// # Safety
/// `out` is `[rows, out]`, and nobody else touches the elements of this block and panel.
pub(super) unsafe fn store(
    matrix: &Matrix,
    activations: &Activations,
    product: &[f32; BLOCK * PANEL],
    block: usize,
    panel: usize,
    out: &Output<'_>,
) {
    let from = panel * PANEL;
    let width = (matrix.rows() - from).min(PANEL);
    for slot in 0..activations.block_rows(matrix, block) {
        let product = &product[slot * PANEL..][..width];
        let row = activations.row_of(block * BLOCK + slot);
        // SAFETY: row and panel lie within `out`, and this worker alone writes there.
        let out_row = unsafe {
            let start = out.pointer.add(row * matrix.rows() + from);
            std::slice::from_raw_parts_mut(start, width)
        };
        out.store(product, from, out_row);
    }
}

//! Matrix products of packed weights and prepared rows: `out[r, o] = sum over k of w[o, k] x[r, k]`.
//!
//! [`matmul`] divides the panels of all parts of a linear group among the workers by bytes, so
//! that each streams one run of memory; [`kernels`] has the arithmetic, [`activations`] the
//! operand, [`dispatch`] the choice of kernel. One row, a small batch and a prefill chunk run the
//! same kernels with more or fewer accumulators.

pub(crate) mod activations;
pub(crate) mod dispatch;
pub(crate) mod kernels;
#[cfg(test)]
mod tests;

use std::ops::Range;

pub use activations::{Activations, Operands};

use crate::gang::{Gang, share};
use crate::pack::{PANEL, PackedMatrix};
use activations::{BLOCK, padded_rows};
use kernels::PanelArgs;

/// Weights that stay in a core's second-level cache while blocks of rows pass by.
const CACHED_BYTES: usize = 256 << 10;

/// One matrix of a linear group and where its product goes.
#[derive(Debug)]
pub struct Part<'a> {
    /// `[out, in]`.
    pub matrix: &'a PackedMatrix,
    /// `[out]`, added to each row.
    pub bias: Option<&'a [f32]>,
    /// Whether the product is added to what `out` holds (a residual) and does not replace it.
    pub accumulate: bool,
    /// `[rows, out]`.
    pub out: &'a mut [f32],
}

impl<'a> Part<'a> {
    /// `out = x * transpose(matrix)`.
    pub fn new(matrix: &'a PackedMatrix, out: &'a mut [f32]) -> Part<'a> {
        Part { matrix, bias: None, accumulate: false, out }
    }
}

/// Multiplies the rows of `activations` by each part's matrix.
///
/// # Panics
/// If an `out` is not `[rows, out]`, a bias is not `[out]`, or the activations were not prepared
/// for the matrices' columns and operands (see [`Operands::of`]).
pub fn matmul(gang: &Gang, parts: &mut [Part<'_>], activations: &Activations) {
    for part in parts.iter() {
        let rows = part.matrix.rows();
        assert!(activations.serves(part.matrix), "activations prepared for the matrix");
        assert_eq!(part.out.len(), activations.rows() * rows, "out is [rows, out]");
        assert!(part.bias.is_none_or(|bias| bias.len() == rows), "bias is [out]");
    }
    let job = Job { parts: parts.as_mut_ptr(), count: parts.len(), activations };
    let panels: usize = parts.iter().map(|part| part.matrix.panels()).sum();
    let blocks = activations.blocks();
    let by_rows = panels < 4 * gang.workers() && blocks >= gang.workers();
    gang.run(|worker, workers| {
        // SAFETY: workers take disjoint panels, or disjoint blocks of rows.
        unsafe {
            if by_rows {
                job.work((0, 1), share(blocks, worker, workers));
            } else {
                job.work((worker, workers), 0..blocks);
            }
        }
    });
}

/// The parts, shared by workers that write disjoint elements of their outputs.
struct Job<'a, 'b> {
    parts: *mut Part<'b>,
    count: usize,
    activations: &'a Activations,
}

// SAFETY: see `Job::work`.
unsafe impl Sync for Job<'_, '_> {}

impl Job<'_, '_> {
    /// The share `(index, of)` of the panels, against `blocks` of the rows.
    ///
    /// # Safety
    /// Concurrent calls have disjoint shares or disjoint blocks.
    unsafe fn work(&self, (index, of): (usize, usize), blocks: Range<usize>) {
        // SAFETY: `parts` outlives the run, and only `out`'s elements are written, through
        // pointers, in disjoint places.
        unsafe {
            let matrix_of = |part: usize| (*self.parts.add(part)).matrix;
            let total: usize = (0..self.count).map(|part| matrix_of(part).bytes()).sum();
            let (from, to) = (total * index / of, total * (index + 1) / of);
            let mut before = 0;
            for part in 0..self.count {
                let matrix = matrix_of(part);
                let panel_bytes = matrix.panel_bytes().max(1);
                let panel_at = |bytes: usize| {
                    bytes.saturating_sub(before).div_ceil(panel_bytes).min(matrix.panels())
                };
                let panels =
                    if of == 1 { 0..matrix.panels() } else { panel_at(from)..panel_at(to) };
                before += matrix.bytes();
                let part = self.parts.add(part);
                let out = Output {
                    pointer: (*part).out.as_mut_ptr(),
                    bias: (*part).bias,
                    accumulate: (*part).accumulate,
                };
                panels_by_blocks(matrix, self.activations, panels, blocks.clone(), &out);
            }
        }
    }
}

/// Where a part's product goes.
struct Output<'a> {
    pointer: *mut f32,
    bias: Option<&'a [f32]>,
    accumulate: bool,
}

/// Multiplies `blocks` of rows by `panels`, a cacheful of panels at a time.
///
/// # Safety
/// `out` is `[rows, out]`, and nobody else touches those elements.
unsafe fn panels_by_blocks(
    matrix: &PackedMatrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
) {
    let at_once = (CACHED_BYTES / matrix.panel_bytes().max(1)).max(1);
    let mut first = panels.start;
    while first < panels.end {
        let last = panels.end.min(first + at_once);
        for block in blocks.clone() {
            // SAFETY: as the caller promises.
            unsafe { block_by_panels(matrix, activations, first..last, block, out) };
        }
        first = last;
    }
}

/// # Safety
/// As [`panels_by_blocks`].
unsafe fn block_by_panels(
    matrix: &PackedMatrix,
    activations: &Activations,
    panels: Range<usize>,
    block: usize,
    out: &Output<'_>,
) {
    let rows = activations.block_rows(block);
    let mut product = [0f32; BLOCK * PANEL];
    for panel in panels {
        let mut row = 0;
        while row < rows {
            let left = padded_rows(rows) - row;
            let (kernel, count) = dispatch::kernel(matrix.isa, matrix.layout, matrix.operand, left);
            let args = PanelArgs {
                panel: matrix.panel(panel),
                chunks: matrix.chunks,
                rows: activations.view(matrix.operand, block, row),
                out: product[row * PANEL..].as_mut_ptr(),
            };
            // SAFETY: the ISA was found available when the matrix was packed, the activations
            // serve the matrix, and `product` has `count` rows from `row` on.
            unsafe { kernel(&args) };
            row += count;
        }
        // SAFETY: as the caller promises.
        unsafe { store(matrix, &product, (block * BLOCK, rows), panel, out) };
    }
}

/// Adds the bias, and writes or adds the product of one panel to the rows `(first, count)`.
unsafe fn store(
    matrix: &PackedMatrix,
    product: &[f32; BLOCK * PANEL],
    (first, count): (usize, usize),
    panel: usize,
    out: &Output<'_>,
) {
    let from = panel * PANEL;
    let width = (matrix.rows() - from).min(PANEL);
    for row in 0..count {
        let product = &product[row * PANEL..][..width];
        // SAFETY: row and panel lie within `out`, and this worker alone writes there.
        let out_row = unsafe {
            let start = out.pointer.add((first + row) * matrix.rows() + from);
            std::slice::from_raw_parts_mut(start, width)
        };
        for (lane, value) in out_row.iter_mut().enumerate() {
            let mut sum = product[lane];
            if let Some(bias) = out.bias {
                sum += bias[from + lane];
            }
            *value = if out.accumulate { *value + sum } else { sum };
        }
    }
}

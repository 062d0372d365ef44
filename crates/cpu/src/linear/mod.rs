//! Matrix products of packed weights and prepared rows: `out[r, o] = sum over k of w[o, k] x[r, k]`.
//!
//! [`matmul`] divides the panels of all parts of a linear group among the workers by bytes, so
//! that each streams one run of memory; [`kernels`] has the arithmetic, [`activations`] the
//! operand, [`codes`] the decoders, [`dispatch`] the choice of kernel. One row, a small batch and a prefill chunk run the
//! same kernels with more or fewer accumulators.

pub(crate) mod activations;
pub(crate) mod codes;
pub(crate) mod dispatch;
pub(crate) mod kernels;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;

pub use activations::{Activations, Operands};

use crate::gang::{Gang, share};
use crate::pack::{PANEL, PackedMatrix};
use activations::{BLOCK, padded_rows};
use dispatch::{ChooseFn, ExpandFn};
use kernels::{Args, BATCH, Scratch};

/// Elements of activations that stay in a core's second-level cache while panels pass by.
const CACHED_ELEMENTS: usize = 512 << 10;
/// Blocks of rows that one worker multiplies by a panel while the panel is decoded.
const BLOCKS_AT_ONCE: usize = 16;

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

/// Multiplies `blocks` of rows by `panels`, a cacheful of rows at a time.
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
    let cached = CACHED_ELEMENTS / (BLOCK * matrix.columns().max(1));
    let at_once = cached.clamp(2, BLOCKS_AT_ONCE);
    let mut first = blocks.start;
    while first < blocks.end {
        let some = first..blocks.end.min(first + at_once);
        for panel in panels.clone() {
            // SAFETY: as the caller promises.
            unsafe { panel_by_blocks(matrix, activations, panel, some.clone(), out) };
        }
        first = some.end;
    }
}

/// Multiplies some blocks of rows by one panel.
///
/// # Safety
/// As [`panels_by_blocks`]; at most `BLOCKS_AT_ONCE` blocks.
unsafe fn panel_by_blocks(
    matrix: &PackedMatrix,
    activations: &Activations,
    panel: usize,
    blocks: Range<usize>,
    out: &Output<'_>,
) {
    let mut product = MaybeUninit::<[[f32; BLOCK * PANEL]; BLOCKS_AT_ONCE]>::uninit();
    let product = product.as_mut_ptr().cast::<[f32; BLOCK * PANEL]>();
    // SAFETY: the blocks in use are set to zero before they are read; the ISA was found available
    // when the matrix was packed, and the activations serve it.
    unsafe {
        product.write_bytes(0, blocks.len());
        let run = Run { matrix, activations, panel, blocks: blocks.clone(), product };
        let one_block = blocks.len() == 1;
        let padded = padded_rows(activations.block_rows(blocks.start));
        match (matrix.kernels.direct, matrix.kernels.expand) {
            (Some(direct), _) if one_block && padded <= matrix.kernels.direct_rows => {
                run.segments(Source::packed(matrix.panel(panel)), 0..matrix.segments(), direct);
            }
            (_, Some(expand)) => run.expanded(expand),
            (_, None) => run.plain(),
        }
        for (index, block) in blocks.enumerate() {
            let rows = (block * BLOCK, activations.block_rows(block));
            store(matrix, &*product.add(index), rows, panel, out);
        }
    }
}

/// Where kernels find a run of segments.
#[derive(Clone, Copy)]
struct Source<'a> {
    weights: *const u8,
    /// Scales and mins, if the weights were expanded.
    scratch: Option<&'a Scratch>,
    /// Packed bytes that are wanted soon, or null.
    next: *const u8,
}

impl Source<'_> {
    fn packed(weights: *const u8) -> Self {
        Source { weights, scratch: None, next: std::ptr::null() }
    }
}

/// One panel against some blocks of rows.
struct Run<'a> {
    matrix: &'a PackedMatrix,
    activations: &'a Activations,
    panel: usize,
    blocks: Range<usize>,
    /// By block.
    product: *mut [f32; BLOCK * PANEL],
}

impl Run<'_> {
    /// A batch of segments at a time, decoded once for all rows.
    ///
    /// # Safety
    /// As [`panel_by_blocks`].
    unsafe fn expanded(&self, expand: ExpandFn) {
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        let total = self.matrix.segments();
        let layout = self.matrix.layout;
        let batch_bytes = BATCH / layout.chunk_segments() * layout.chunk_bytes();
        for first in (0..total).step_by(BATCH) {
            let some = first..total.min(first + BATCH);
            // SAFETY: as the caller promises; `expand` writes what the kernels read, and a
            // scratch holds plain numbers.
            unsafe {
                let scratch = &mut *scratch.as_mut_ptr();
                let packed = self.matrix.segment(self.panel, first);
                expand(packed, some.len(), &self.matrix.constants, scratch);
                // While rows multiply this batch, the next one arrives.
                let next = packed.wrapping_add(batch_bytes);
                let weights = scratch.weights.as_ptr().cast();
                let source = Source { weights, scratch: Some(scratch), next };
                self.segments(source, some, self.matrix.kernels.tile);
            }
        }
    }

    /// Numbers that kernels read as they are packed; in batches if several blocks share them.
    ///
    /// # Safety
    /// As [`panel_by_blocks`].
    unsafe fn plain(&self) {
        let total = self.matrix.segments();
        let batch = if self.blocks.len() == 1 { total.max(1) } else { BATCH };
        for first in (0..total).step_by(batch) {
            let some = first..total.min(first + batch);
            let packed = self.matrix.segment(self.panel, first);
            // SAFETY: as the caller promises.
            unsafe { self.segments(Source::packed(packed), some, self.matrix.kernels.tile) };
        }
    }

    /// Adds the products of some segments to every block.
    ///
    /// # Safety
    /// As [`panel_by_blocks`]; `source` holds those segments for `choose`'s kernels.
    unsafe fn segments(&self, source: Source<'_>, segments: Range<usize>, choose: ChooseFn) {
        let none = std::ptr::null();
        let mut next = source.next;
        for (index, block) in self.blocks.clone().enumerate() {
            let rows = self.activations.block_rows(block);
            let mut row = 0;
            while row < rows {
                let (kernel, count) = choose(padded_rows(rows) - row);
                // SAFETY: as the caller promises; `product` has the block's rows.
                unsafe {
                    let args = Args {
                        weights: source.weights,
                        next,
                        scales: source.scratch.map_or(none, |s| s.scales.as_ptr()),
                        mins: source.scratch.map_or(none, |s| s.mins.as_ptr()),
                        segments: segments.len(),
                        rows: self.activations.view(
                            self.matrix.operand,
                            block,
                            row,
                            segments.start,
                        ),
                        acc: self.product.add(index).cast::<f32>().add(row * PANEL),
                        constants: &self.matrix.constants,
                    };
                    kernel(&args);
                }
                next = std::ptr::null();
                row += count;
            }
        }
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

//! Matrix products of packed weights and prepared rows: `out[r, o] = sum over k of w[o, k] x[r,
//! k]`.
//!
//! [`matmul`] divides the panels of all parts of a linear group among the workers by bytes, so that
//! each worker reads one run of memory. `kernels` has the arithmetic, `activations` prepares the
//! input, `codes` decodes weights, and `dispatch` chooses kernels.
//!
//! One row, a small batch and a prefill chunk run the same kernels with more or fewer accumulators.
//! There are two exceptions on machines that multiply pairs of `bf16` (AMX, AVX-512 BF16). Rows in
//! the prefill form are multiplied as tiles of such pairs (`prompt`), in units that whichever
//! worker is free takes. Some formats multiply decoding rows as AMX tiles too (`amx`).

// Only x86-64 multiplies rows as tiles.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod activations;
#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
pub(crate) mod block;
pub(crate) mod codes;
pub(crate) mod dispatch;
pub(crate) mod kernels;
mod matrix;
mod output;
#[cfg(target_arch = "x86_64")]
pub(crate) mod prompt;
pub(crate) mod table;
#[cfg(test)]
mod tests;

use std::mem::MaybeUninit;
use std::ops::Range;
#[cfg(target_arch = "x86_64")]
use std::sync::atomic::{AtomicUsize, Ordering};

use lathe_program::BackendError;
use lathe_tensor::Tensor;

pub use activations::{Activations, Operands};
pub use matrix::Matrix;

use crate::gang::{Gang, share};
use crate::isa::Isa;
use crate::pack::layout::{Offset, Operand, PanelLayout};
use crate::pack::{PANEL, PackedMatrix};
use block::{BLOCK, padded_rows};
use output::{Output, store};
#[cfg(target_arch = "x86_64")]
use table::Tiles;
use table::{Args, BATCH, ChooseFn, DirectFn, ExpandFn, Scratch};

/// The number of activations that stay in a core's second-level cache while panels are read.
const CACHED_ELEMENTS: usize = 512 << 10;
/// The most panels that direct kernels multiply at a time.
const PANELS_AT_ONCE: usize = 4;
/// The most blocks of rows that one worker multiplies by a panel after decoding it once.
const BLOCKS_AT_ONCE: usize = 16;

impl Matrix {
    /// Packs `tensor` as a matrix of `[product of the leading dimensions, last dimension]`, and
    /// chooses its kernels. `exact` chooses kernels that neither round activations nor accumulate
    /// in anything but `f32`.
    ///
    /// # Errors
    /// As [`PackedMatrix::pack`], and [`BackendError::Unsupported`] for codes under scales that
    /// no kernel reads.
    pub fn pack(tensor: &Tensor, isa: Isa, exact: bool) -> Result<Matrix, BackendError> {
        let packed = PackedMatrix::pack(tensor)?;
        let operand = operand(packed.layout, exact);
        let kernels = dispatch::kernels(isa, packed.layout, operand).ok_or_else(|| {
            let feature = format!("weights in {} laid out as {:?}", tensor.format, packed.layout);
            BackendError::Unsupported { backend: "cpu", feature }
        })?;
        let kernels = if exact { kernels.exact() } else { kernels };
        Ok(Matrix { packed, operand, kernels })
    }
}

/// How a matrix meets its input. Float weights multiply activations in `f32`. Rounding activations
/// to `bf16` would move logits of tiny models by 0.01 to 0.2, and by 4 where a token goes to
/// another expert. It would save no byte of the weights, which decoding waits for.
fn operand(layout: PanelLayout, exact: bool) -> Operand {
    match layout {
        PanelLayout::Coded(codes, scales) if !exact && !codes.is_float() => Operand::Int8(Offset {
            zero: codes.zero(),
            parts: scales.parts(),
            fineness: codes.fineness(),
        }),
        _ => Operand::F32,
    }
}

/// One matrix of a linear group and where its product goes.
#[derive(Debug)]
pub struct Part<'a> {
    /// `[out, in]`.
    pub matrix: &'a Matrix,
    /// `[out]`, added to each row.
    pub bias: Option<&'a [f32]>,
    /// How much of the product is added to what `out` holds (a residual); `None` replaces it.
    pub accumulate: Option<f32>,
    /// `[rows, out]`.
    pub out: &'a mut [f32],
}

impl<'a> Part<'a> {
    /// `out = x * transpose(matrix)`.
    pub fn new(matrix: &'a Matrix, out: &'a mut [f32]) -> Part<'a> {
        Part { matrix, bias: None, accumulate: None, out }
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
    let blocks = activations.rows().div_ceil(BLOCK);
    let by_rows = panels < 4 * gang.workers() && blocks >= gang.workers();
    #[cfg(target_arch = "x86_64")]
    let next = AtomicUsize::new(0);
    gang.run(|worker, workers| {
        // SAFETY: workers take disjoint panels, or disjoint blocks of rows.
        unsafe {
            #[cfg(target_arch = "x86_64")]
            job.prompt_units(worker, workers, &next);
            if by_rows {
                job.work((0, 1), (worker, workers));
            } else {
                job.work((worker, workers), (0, 1));
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
    fn matrix(&self, part: usize) -> &Matrix {
        // SAFETY: `part` is below `count`, and parts outlive the run.
        unsafe { (*self.parts.add(part)).matrix }
    }

    fn output(&self, part: usize) -> Output<'_> {
        // SAFETY: as in `matrix`; elements are only written through the pointer.
        unsafe {
            let part = self.parts.add(part);
            Output {
                pointer: (*part).out.as_mut_ptr(),
                bias: (*part).bias,
                accumulate: (*part).accumulate,
            }
        }
    }

    /// The part and the panels of unit `unit`. The panels of each part that `takes` accepts are cut
    /// into units of `panels`. `None` past the last unit.
    #[cfg(target_arch = "x86_64")]
    fn unit(
        &self,
        unit: usize,
        panels: usize,
        takes: impl Fn(&Matrix) -> bool,
    ) -> Option<(usize, Range<usize>)> {
        let mut before = 0;
        for part in (0..self.count).filter(|part| takes(self.matrix(*part))) {
            let all = self.matrix(part).panels();
            let first = unit.wrapping_sub(before).saturating_mul(panels);
            if unit >= before && first < all {
                return Some((part, first..all.min(first + panels)));
            }
            before += all.div_ceil(panels);
        }
        None
    }

    /// Multiplies rows in the prefill form. A unit of work is a few panels and a pass of rows, and
    /// whichever worker is free takes the next unit, because cores that are shared with other
    /// programs run at different speeds. All panels multiply a pass of rows before the next pass
    /// begins, so these rows stay in the cache.
    ///
    /// # Safety
    /// Workers have numbers of their own below `workers`, and the same `next`.
    #[cfg(target_arch = "x86_64")]
    unsafe fn prompt_units(&self, worker: usize, workers: usize, next: &AtomicUsize) {
        let blocks = self.activations.tiled_rows().div_ceil(BLOCK);
        if blocks == 0 {
            return;
        }
        let takes = |matrix: &Matrix| matrix.kernels.prompt.is_some();
        let tiled = (0..self.count).map(|part| self.matrix(part)).filter(|m| takes(m));
        let panels = tiled.clone().map(Matrix::panels).sum::<usize>() / (8 * workers);
        let panels = panels.clamp(2, UNIT_PANELS) & !1;
        let Some(segments) = tiled.clone().map(Matrix::segments).max() else { return };
        let pass = prompt::pass_blocks(segments, self.activations.tile_parts(), blocks);
        let units: usize = tiled.map(|matrix| matrix.panels().div_ceil(panels)).sum();
        let scratch = self.activations.tile_scratch(worker);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let first = index / units * pass;
            let Some((part, panels)) = self.unit(index % units, panels, takes) else { break };
            if first >= blocks {
                break;
            }
            let (matrix, out) = (self.matrix(part), self.output(part));
            let Some(prompt) = matrix.kernels.prompt else { break };
            let rows = first..blocks.min(first + pass);
            // SAFETY: units are disjoint; a matrix has products only where their instructions are
            // available.
            unsafe {
                prompt::multiply(prompt, matrix, self.activations, panels, rows, &out, scratch);
            }
        }
    }

    /// Multiplies a share `(index, of)` of the panels by a share of the blocks of rows. It does
    /// what [`Job::prompt_units`] leaves.
    ///
    /// # Safety
    /// Concurrent calls have disjoint shares of panels or of rows.
    unsafe fn work(&self, (index, of): (usize, usize), row_share: (usize, usize)) {
        let total: usize = (0..self.count).map(|part| self.matrix(part).bytes()).sum();
        let (from, to) = (total * index / of, total * (index + 1) / of);
        let mut before = 0;
        for part in 0..self.count {
            let matrix = self.matrix(part);
            let panel_bytes = matrix.panel_bytes().max(1);
            let panel_at = |bytes: usize| {
                bytes.saturating_sub(before).div_ceil(panel_bytes).min(matrix.panels())
            };
            let panels = if of == 1 { 0..matrix.panels() } else { panel_at(from)..panel_at(to) };
            before += matrix.bytes();
            let (index, of) = row_share;
            let blocks = share(self.activations.blocks(matrix), index, of);
            // SAFETY: only `out`'s elements are written, through pointers, in disjoint places.
            unsafe {
                panels_by_blocks(matrix, self.activations, panels, blocks, &self.output(part));
            }
        }
    }
}

/// The most panels of a unit of rows in the prefill form.
#[cfg(target_arch = "x86_64")]
const UNIT_PANELS: usize = 32;

/// Multiplies `blocks` of rows by `panels`, as many rows at a time as a cache holds.
///
/// # Safety
/// `out` is `[rows, out]`, and nobody else touches those elements.
unsafe fn panels_by_blocks(
    matrix: &Matrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    let blocks = match matrix.kernels.tiles {
        Tiles::None => blocks,
        // SAFETY: as the caller promises; a matrix has tiles only where AMX is available.
        Tiles::Split => unsafe {
            return amx::decode::multiply_split(matrix, activations, panels, blocks, out);
        },
        // SAFETY: the same.
        Tiles::Codes(batch) => unsafe {
            amx::decode::multiply_nibbles(matrix, activations, panels.clone(), blocks, out, batch)
        },
    };
    let one_block = blocks.len() == 1;
    if let Some(direct) = matrix.kernels.direct
        && one_block
        && padded_rows(activations.block_rows(matrix, blocks.start)) <= matrix.kernels.direct_rows
    {
        // SAFETY: as the caller promises.
        return unsafe { panels_direct(matrix, activations, panels, blocks.start, out, direct) };
    }
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

/// Multiplies one block of few rows by `panels`, some of them at a time, straight from the packed
/// bytes.
///
/// # Safety
/// As [`panels_by_blocks`].
unsafe fn panels_direct(
    matrix: &Matrix,
    activations: &Activations,
    panels: Range<usize>,
    block: usize,
    out: &Output<'_>,
    choose: DirectFn,
) {
    let mut product = [[0f32; BLOCK * PANEL]; PANELS_AT_ONCE];
    let rows = padded_rows(activations.block_rows(matrix, block));
    let mut panel = panels.start;
    while panel < panels.end {
        let (_, _, count) = choose(rows, panels.end - panel);
        let mut row = 0;
        while row < rows {
            // Blocks of 6 and 12 rows take two calls. The first call multiplies one panel, so the
            // second one does too.
            let (kernel, at_once, _) =
                choose(rows - row, if row == 0 { panels.end - panel } else { 1 });
            for product in &mut product[..count] {
                product[row * PANEL..(row + at_once) * PANEL].fill(0.0);
            }
            // SAFETY: as the caller promises; `product` has the rows of `count` panels. Padded rows
            // are sums of what kernels take.
            unsafe {
                let acc = product.as_mut_ptr().cast::<f32>().add(row * PANEL);
                kernel(&activations.args_of_panel(matrix, panel, (block, row), acc));
            }
            row += at_once;
        }
        for (index, product) in product[..count].iter().enumerate() {
            // SAFETY: as the caller promises.
            unsafe { store(matrix, activations, product, block, panel + index, out) };
        }
        panel += count;
    }
}

/// Multiplies some blocks of rows by one panel.
///
/// # Safety
/// As [`panels_by_blocks`]; at most `BLOCKS_AT_ONCE` blocks.
unsafe fn panel_by_blocks(
    matrix: &Matrix,
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
        let run = PanelProduct { matrix, activations, panel, blocks: blocks.clone(), product };
        match (matrix.kernels.plain, matrix.kernels.expand) {
            (plain, Some(expand)) if plain.is_none() || blocks.len() > 1 => run.expanded(expand),
            (plain, _) => run.plain(plain.unwrap_or(matrix.kernels.tile)),
        }
        for (index, block) in blocks.enumerate() {
            store(matrix, activations, &*product.add(index), block, panel, out);
        }
    }
}

/// The weights of a run of segments, as kernels read them.
#[derive(Clone, Copy)]
struct SegmentWeights<'a> {
    weights: *const u8,
    /// Scales and mins, if the weights were expanded.
    scratch: Option<&'a Scratch>,
    /// Packed bytes that are read next, or null.
    next: *const u8,
}

impl SegmentWeights<'_> {
    fn packed(weights: *const u8) -> Self {
        SegmentWeights { weights, scratch: None, next: std::ptr::null() }
    }
}

/// One panel against some blocks of rows.
struct PanelProduct<'a> {
    matrix: &'a Matrix,
    activations: &'a Activations,
    panel: usize,
    blocks: Range<usize>,
    /// The sums of each block.
    product: *mut [f32; BLOCK * PANEL],
}

impl PanelProduct<'_> {
    /// Decodes a batch of segments at a time, once for all rows.
    ///
    /// # Safety
    /// As [`panel_by_blocks`].
    unsafe fn expanded(&self, expand: ExpandFn) {
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        let total = self.matrix.packed.segments();
        let layout = self.matrix.packed.layout;
        let batch_bytes = BATCH / layout.chunk_segments() * layout.chunk_bytes();
        for first in (0..total).step_by(BATCH) {
            let some = first..total.min(first + BATCH);
            // SAFETY: as the caller promises; `expand` writes what the kernels read, and a
            // scratch holds plain numbers.
            unsafe {
                let scratch = &mut *scratch.as_mut_ptr();
                let packed = self.matrix.packed.segment(self.panel, first);
                expand(packed, some.len(), &self.matrix.packed.constants, scratch);
                // The next batch is fetched while rows multiply this one.
                let next = packed.wrapping_add(batch_bytes);
                let weights = scratch.weights.as_ptr().cast();
                let source = SegmentWeights { weights, scratch: Some(scratch), next };
                self.segments(source, some, self.matrix.kernels.tile);
            }
        }
    }

    /// Multiplies numbers that kernels read as they are packed, in batches if several blocks share
    /// them.
    ///
    /// # Safety
    /// As [`panel_by_blocks`].
    unsafe fn plain(&self, choose: ChooseFn) {
        let total = self.matrix.packed.segments();
        let batch = if self.blocks.len() == 1 { total.max(1) } else { BATCH };
        for first in (0..total).step_by(batch) {
            let some = first..total.min(first + batch);
            let packed = self.matrix.packed.segment(self.panel, first);
            // SAFETY: as the caller promises.
            unsafe { self.segments(SegmentWeights::packed(packed), some, choose) };
        }
    }

    /// Adds the products of some segments to every block.
    ///
    /// # Safety
    /// As [`panel_by_blocks`]; `source` holds those segments for `choose`'s kernels.
    unsafe fn segments(
        &self,
        source: SegmentWeights<'_>,
        segments: Range<usize>,
        choose: ChooseFn,
    ) {
        let none = std::ptr::null();
        let mut next = source.next;
        for (index, block) in self.blocks.clone().enumerate() {
            let rows = self.activations.block_rows(self.matrix, block);
            let mut row = 0;
            while row < rows {
                let (kernel, count) = choose(padded_rows(rows) - row);
                // SAFETY: as the caller promises; `product` has the block's rows.
                unsafe {
                    let args = Args {
                        weights: source.weights,
                        panel_bytes: 0,
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
                        constants: &self.matrix.packed.constants,
                    };
                    kernel(&args);
                }
                next = std::ptr::null();
                row += count;
            }
        }
    }
}

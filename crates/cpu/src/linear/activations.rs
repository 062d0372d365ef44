//! `Activations`: rows of a linear group's input, prepared once for all of its matrices.
//!
//! Rows are grouped in blocks of sixteen (the last block may have fewer) and stored segment by
//! segment. So a kernel walks one block along k with constant distances between its rows, and
//! sixteen rows of a segment are the operand of an AMX tile:
//! ```text
//! block of B rows = segment 0: row 0, row 1, ... row B-1;  segment 1: ...
//! codes: segment = 32 positions, 32 high and 32 low bytes a row (AVX2: 32 words);
//!        with f32 scale, sum * scale, -zero * sum
//! f32  : segment = 32 positions, 128 bytes a row
//! split: segment = 32 positions, 64 bytes of bf16 a row, twice: the nearest, and what that leaves
//! tiles: segment = 32 positions, 64 bytes of bf16 a row; prefill rows alone,
//!        and 1 KB between blocks
//! ```
//! A code is made of two signed bytes: `2^n * high + low`, with `high` in -127..=127 and `low` in
//! `-2^(n-1)..2^(n-1)`. Both bytes are operands of an int8 dot, whose results add up exactly. With
//! `most = 127 * 2^n` the scale of a segment is `max|x| / most`, and the code is `round(x * most /
//! max|x|)`, ties to even.
//!
//! [`Fineness::Fine`] has `n = 7`. It moves SmolLM2's log-probabilities by less than 0.0005 nats on
//! average, where one byte a code would move them by 0.044. The second dot costs no time while
//! decoding, which waits for the bytes of the weights. [`Fineness::Coarse`] has `n = 4` and is for
//! weights of four bits, whose own error is much larger. Sixteen times a nibble fits a byte, so one
//! product of tiles serves both bytes of a code.
//!
//! A segment that holds a NaN or an infinity gets it as its scale, so it is not hidden. Every row
//! is prepared alike, whatever rows are beside it.

use super::block::{BLOCK, BlockView, CODE_BYTES, padded_rows};
use super::matrix::Matrix;
use super::table::{Args, Tiles};
use crate::gang::Gang;
use crate::isa::SEGMENT;
#[cfg(target_arch = "x86_64")]
use crate::isa::features::{self, with_features};
use crate::pack::PANEL;
use crate::pack::layout::{Fineness, Offset, Operand};
use crate::pack::memory::AlignedBytes;

/// Rows are padded with zeros to a multiple of this number of positions, the longest chunk of a
/// format.
const PADDING: usize = 256;
/// The most different zero points that the matrices of one group may have.
const OFFSETS_MAX: usize = 5;

/// Segments between a block of tiled rows and the next. Blocks that lie a power of two apart would
/// share a few sets of a cache.
const TILE_GAP: usize = 16;
/// The most `bf16` parts of a row in the prefill form.
const TILE_PARTS_MAX: usize = 2;
/// The `bf16` parts of a row in the decoding form.
const SPLIT_PARTS: usize = 2;
/// The most segments of k that AMX multiplies while sums stay in registers.
pub(super) const TILE_SEGMENTS: usize = 64;
/// Rows of a pass over [`TILE_SEGMENTS`]: 1 MB of activations, half of a second-level cache.
pub(super) const TILE_ROWS: usize = 256;
/// The most panels whose sums are kept in memory while slices of k are multiplied.
pub(super) const TILE_PANELS: usize = 32;

/// A worker's memory for AMX.
#[derive(Debug, Clone, Copy)]
pub(super) struct TileScratch {
    /// Sums, tile by tile.
    pub(super) sums: *mut f32,
    /// The weights of two panels as tiles, [`TILE_SEGMENTS`] of each.
    pub(super) weights: *mut u8,
}

/// Bytes of the weights of [`TileScratch`].
const TILE_WEIGHTS_BYTES: usize = 2 * TILE_SEGMENTS * PANEL * SEGMENT * 2;

/// Bytes of the sums of [`TileScratch`] for `rows` rows: [`TILE_PANELS`] of a pass that slices k.
fn tile_sums_bytes(rows: usize) -> usize {
    rows.next_multiple_of(2 * BLOCK).min(TILE_ROWS) * TILE_PANELS * PANEL * 4
}

/// The forms of its input that a set of matrices needs. It is made once, when the matrices are
/// packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Operands {
    float: bool,
    /// Rows in the prefill form are needed in `f32` too, because some matrix has no tiles.
    float_all: bool,
    /// One for each [`Fineness`].
    int8: [bool; Fineness::COUNT],
    /// Whether codes are words and not separate bytes.
    words: bool,
    /// Whether rows in the decoding form are needed in two `bf16` parts.
    split: bool,
    /// Whether rows in the prefill form are needed in `bf16`. The other forms are then for the
    /// other rows only.
    tiles: bool,
    offsets: [Option<Offset>; OFFSETS_MAX],
}

impl Operands {
    /// What `matrices` need.
    pub fn of<'a>(matrices: impl IntoIterator<Item = &'a Matrix>) -> Operands {
        let mut all = Operands::default();
        for matrix in matrices {
            let tiles = matrix.kernels.has_prompt();
            all.tiles |= tiles;
            match matrix.operand {
                Operand::F32 if is_split(matrix) => all.split = true,
                Operand::F32 => (all.float, all.float_all) = (true, all.float_all || !tiles),
                Operand::Int8(offset) => {
                    all.int8[offset.fineness as usize] = true;
                    // All matrices of a program have kernels for one ISA.
                    all.words = matrix.kernels.words;
                    let known = all.offsets.contains(&Some(offset));
                    if !known && let Some(free) = all.offsets.iter_mut().find(|o| o.is_none()) {
                        *free = Some(offset);
                    }
                }
            }
        }
        all
    }

    /// Whether rows in the prefill form are prepared differently from the others.
    pub fn has_prefill_form(&self) -> bool {
        self.tiles
    }

    /// Whether activations prepared for `self` serve `matrix`.
    fn serve(&self, matrix: &Matrix) -> bool {
        match matrix.operand {
            Operand::F32 if is_split(matrix) => self.split,
            Operand::F32 => self.float,
            Operand::Int8(offset) => self.offsets.contains(&Some(offset)),
        }
    }
}

/// Whether `matrix` multiplies rows in the decoding form as tiles of two `bf16` parts.
fn is_split(matrix: &Matrix) -> bool {
    matches!(matrix.kernels.tiles, Tiles::Split)
}

/// Memory that grows when it is reserved.
#[derive(Debug, Default)]
struct Plane(Option<AlignedBytes>);

impl Plane {
    /// Makes the plane at least `bytes` long. If it grows, its contents are lost.
    fn reserve(&mut self, bytes: usize) {
        if self.0.as_ref().is_none_or(|have| have.len() < bytes) {
            // Activations take a few megabytes at most. If even these cannot be had the process
            // aborts, as `Vec` does.
            let fresh = AlignedBytes::zeroed("activations", bytes);
            self.0 = Some(fresh.expect("memory for activations"));
        }
    }

    fn pointer<T>(&self) -> *mut T {
        self.0.as_ref().map_or(std::ptr::null_mut(), |bytes| bytes.as_ptr().cast_mut().cast())
    }
}

/// Prepared input rows `[rows, columns]`. Keep one value and prepare it again for each product: its
/// memory is reused and only grows.
#[derive(Debug)]
pub struct Activations {
    rows: usize,
    columns: usize,
    operands: Operands,
    forms: Forms,
    float: Plane,
    /// Rows in the prefill form in `bf16`. A second plane has what the first leaves, if two parts
    /// are multiplied.
    tiles: [Plane; TILE_PARTS_MAX],
    tile_parts: usize,
    /// Rows in the decoding form in `bf16`, and what that leaves.
    split: [Plane; SPLIT_PARTS],
    /// One for each [`Fineness`].
    codes: [CodePlanes<Plane>; Fineness::COUNT],
    offsets: [Plane; OFFSETS_MAX],
    scratch: Plane,
    tile_scratch: Plane,
}

/// Codes of one [`Fineness`].
#[derive(Debug, Clone, Copy, Default)]
struct CodePlanes<P> {
    codes: P,
    scales: P,
    sums: P,
}

/// Pointers to all planes. Each worker writes its own rows.
#[derive(Clone, Copy)]
struct Writer<'a> {
    rows: usize,
    padded: usize,
    forms: &'a Forms,
    operands: Operands,
    float: *mut f32,
    tiles: [*mut u16; TILE_PARTS_MAX],
    split: [*mut u16; SPLIT_PARTS],
    codes: [CodePlanes<*mut u8>; Fineness::COUNT],
    offsets: [*mut i32; OFFSETS_MAX],
    scratch: *mut f32,
}

// SAFETY: workers write disjoint rows through it (and disjoint scratch).
unsafe impl Sync for Writer<'_> {}

/// Which rows are in the prefill form, and the place of each row in the planes. The rows of each
/// form are numbered separately.
#[derive(Debug, Default)]
struct Forms {
    /// For each row, its number among the rows of its form.
    place: Vec<u32>,
    /// For each row, whether it is in the prefill form.
    tiled: Vec<bool>,
    /// The rows in the decoding form, then the rows in the prefill form.
    order: Vec<u32>,
    /// How many rows are in the prefill form. If there are none, every row's place is its own
    /// number.
    tiled_count: usize,
}

impl Forms {
    fn set(&mut self, tiled: impl Iterator<Item = bool> + Clone) {
        self.place.clear();
        self.tiled.clear();
        self.order.clear();
        let mut counts = [0u32; 2];
        for tiled in tiled.clone() {
            let count = &mut counts[usize::from(tiled)];
            self.place.push(*count);
            self.tiled.push(tiled);
            *count += 1;
        }
        self.tiled_count = counts[1] as usize;
        for form in [false, true] {
            let rows = tiled.clone().enumerate().filter(|(_, tiled)| *tiled == form);
            self.order.extend(rows.map(|(row, _)| row as u32));
        }
    }
}

impl Default for Activations {
    fn default() -> Activations {
        Activations {
            rows: 0,
            columns: 0,
            operands: Operands::default(),
            forms: Forms::default(),
            float: Plane::default(),
            tiles: Default::default(),
            tile_parts: 1,
            split: Default::default(),
            codes: Default::default(),
            offsets: Default::default(),
            scratch: Plane::default(),
            tile_scratch: Plane::default(),
        }
    }
}

impl Activations {
    /// Activations of no rows.
    pub fn new() -> Activations {
        Activations::default()
    }

    /// Reserves memory for `[rows, columns]`, so that [`Activations::prepare`] need not allocate.
    pub fn reserve(&mut self, gang: &Gang, operands: Operands, rows: usize, columns: usize) {
        let padded = columns.next_multiple_of(PADDING);
        let rows = rows.next_multiple_of(BLOCK);
        let (elements, segments) = (rows * padded, rows * padded / SEGMENT);
        if operands.float {
            self.float.reserve(elements * 4);
        }
        if operands.tiles {
            for plane in &mut self.tiles[..self.tile_parts] {
                plane.reserve(elements * 2 + rows / BLOCK * TILE_GAP * CODE_BYTES);
            }
            self.tile_scratch
                .reserve(gang.workers() * (tile_sums_bytes(rows) + TILE_WEIGHTS_BYTES));
        }
        if operands.split {
            for plane in &mut self.split {
                plane.reserve(elements * 2);
            }
        }
        for (planes, _) in self.codes.iter_mut().zip(operands.int8).filter(|(_, needed)| *needed) {
            planes.codes.reserve(elements * 2);
            planes.scales.reserve(segments * 4);
            planes.sums.reserve(segments * 4);
        }
        for (plane, offset) in self.offsets.iter_mut().zip(operands.offsets) {
            if let Some(offset) = offset {
                plane.reserve(segments * offset.parts * 4);
            }
        }
        self.scratch.reserve(gang.workers() * padded * 4);
    }

    /// Prepares `input`, `[rows, columns]`, for matrices that need `operands`.
    ///
    /// # Panics
    /// If `input` is not whole rows.
    pub fn prepare(&mut self, gang: &Gang, operands: Operands, input: &[f32], columns: usize) {
        let rows = input.len() / columns.max(1);
        assert_eq!(rows * columns, input.len(), "input of whole rows");
        let writer = self.begin(gang, operands, rows, columns);
        for_each_row(gang, rows, columns, |_, row| {
            // SAFETY: each row is written by one worker.
            unsafe { writer.write_row(row, &input[row * columns..][..columns]) }
        });
    }

    /// As [`Activations::prepare`], but the rows are computed on the way: `fill(row, out)` writes
    /// row `row` to `out`, `[columns]`, on some worker (a norm, an activation, a gather).
    pub fn prepare_with(
        &mut self,
        gang: &Gang,
        operands: Operands,
        (rows, columns): (usize, usize),
        fill: impl Fn(usize, &mut [f32]) + Sync,
    ) {
        let writer = self.begin(gang, operands, rows, columns);
        for_each_row(gang, rows, columns, |worker, row| {
            // SAFETY: each worker has a scratch row of its own, and each row one worker.
            unsafe {
                let out = writer.scratch.add(worker * writer.padded);
                let out = std::slice::from_raw_parts_mut(out, columns);
                fill(row, out);
                writer.write_row(row, out);
            }
        });
    }

    fn begin(
        &mut self,
        gang: &Gang,
        operands: Operands,
        rows: usize,
        columns: usize,
    ) -> Writer<'_> {
        self.reserve(gang, operands, rows, columns);
        (self.rows, self.columns, self.operands) = (rows, columns, operands);
        let tiled = self.forms.tiled.len();
        assert!(tiled == 0 || tiled == rows, "forms of {tiled} rows for {rows}");
        Writer {
            rows,
            padded: columns.next_multiple_of(PADDING),
            forms: &self.forms,
            operands,
            float: self.float.pointer(),
            tiles: std::array::from_fn(|i| self.tiles[i].pointer()),
            split: self.split.each_ref().map(Plane::pointer),
            codes: self.codes.each_ref().map(|planes| CodePlanes {
                codes: planes.codes.pointer(),
                scales: planes.scales.pointer(),
                sums: planes.sums.pointer(),
            }),
            offsets: std::array::from_fn(|i| self.offsets[i].pointer()),
            scratch: self.scratch.pointer(),
        }
    }

    /// Rows prepared.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// Says which of the rows that are prepared from now on are in the prefill form. AMX and
    /// AVX-512's `bf16` dots multiply those rows in `bf16`. On other machines the form changes
    /// nothing. Before the first call no row is in the prefill form.
    pub fn set_forms(&mut self, prefill: impl Iterator<Item = bool> + Clone) {
        self.forms.set(prefill);
    }

    /// How many `bf16` parts of a row in the prefill form are multiplied. One part is the nearest
    /// `bf16`. The second part is the nearest `bf16` of what the first leaves. Two parts err about
    /// as `f32` does and cost twice the products.
    pub fn set_tile_parts(&mut self, parts: usize) {
        assert!((1..=TILE_PARTS_MAX).contains(&parts), "{parts} parts of a row");
        self.tile_parts = parts;
    }

    /// The number of `bf16` parts of a row in the prefill form.
    pub(crate) fn tile_parts(&self) -> usize {
        self.tile_parts
    }

    /// The number of rows in the prefill form. It is 0 where the form changes nothing.
    pub(crate) fn tiled_rows(&self) -> usize {
        if self.operands.tiles { self.forms.tiled_count } else { 0 }
    }

    /// The number of rows that `matrix` multiplies by kernels other than tiles.
    pub(crate) fn rows_for(&self, matrix: &Matrix) -> usize {
        if matrix.kernels.has_prompt() { self.rows - self.tiled_rows() } else { self.rows }
    }

    /// Rows in the plane of `operand`.
    fn plane_rows(&self, operand: Operand) -> usize {
        match operand {
            Operand::F32 if self.operands.float_all => self.rows,
            _ => self.rows - self.tiled_rows(),
        }
    }

    /// The row in slot `slot` of a plane.
    pub(crate) fn row_of(&self, slot: usize) -> usize {
        if self.tiled_rows() == 0 { slot } else { self.forms.order[slot] as usize }
    }

    /// The row in slot `slot` of the planes of tiles.
    pub(crate) fn tiled_row_of(&self, slot: usize) -> usize {
        self.forms.order[self.rows - self.tiled_rows() + slot] as usize
    }

    /// The scratch memory of worker `worker`.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(super) fn tile_scratch(&self, worker: usize) -> TileScratch {
        let sums = tile_sums_bytes(self.rows);
        let base = self.tile_scratch.pointer::<u8>();
        let at = base.wrapping_add(worker * (sums + TILE_WEIGHTS_BYTES));
        TileScratch { sums: at.cast(), weights: at.wrapping_add(sums) }
    }

    /// Part `part` of segment `segment` of block `block` in the planes of tiles, and the bytes from
    /// it to the next segment.
    pub(crate) fn tile(&self, part: usize, block: usize, segment: usize) -> (*const u8, usize) {
        let step = padded_rows((self.tiled_rows() - block * BLOCK).min(BLOCK)) * CODE_BYTES;
        let padded = self.columns.next_multiple_of(PADDING);
        let block_bytes = (BLOCK * padded / SEGMENT + TILE_GAP) * CODE_BYTES;
        let plane = self.tiles[part].pointer::<u8>().cast_const();
        (plane.wrapping_add(block * block_bytes + segment * step), step)
    }

    /// Part `part` of the rows of block `block` in the decoding form, as operands of tiles, and the
    /// bytes from a segment to the next.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) fn split_rows(&self, part: usize, block: usize) -> (*const u8, usize) {
        let step = padded_rows((self.rows - self.tiled_rows() - block * BLOCK).min(BLOCK));
        let padded = self.columns.next_multiple_of(PADDING);
        let plane = self.split[part].pointer::<u8>().cast_const();
        (plane.wrapping_add(block * BLOCK * padded * 2), step * CODE_BYTES)
    }

    /// The number of blocks that `matrix` multiplies by kernels other than tiles.
    pub(crate) fn blocks(&self, matrix: &Matrix) -> usize {
        self.rows_for(matrix).div_ceil(BLOCK)
    }

    /// The number of rows in block `block`.
    pub(crate) fn block_rows(&self, matrix: &Matrix, block: usize) -> usize {
        (self.rows_for(matrix) - block * BLOCK).min(BLOCK)
    }

    /// The arguments for all segments of packed panel `panel` and the rows from `first_row` of
    /// `block` on. Kernels of several panels also read the panels after it.
    pub(super) fn args_of_panel<'a>(
        &self,
        matrix: &'a Matrix,
        panel: usize,
        (block, first_row): (usize, usize),
        acc: *mut f32,
    ) -> Args<'a> {
        Args {
            weights: matrix.packed.panel(panel),
            panel_bytes: matrix.panel_bytes(),
            next: std::ptr::null(),
            scales: std::ptr::null(),
            mins: std::ptr::null(),
            segments: matrix.segments(),
            rows: self.view(matrix.operand, block, first_row, 0),
            acc,
            constants: &matrix.packed.constants,
        }
    }

    pub(crate) fn serves(&self, matrix: &Matrix) -> bool {
        self.columns == matrix.columns() && self.operands.serve(matrix)
    }

    /// The rows of block `block` from `first` on and their segments from `segment` on, as
    /// `operand`.
    pub(crate) fn view(
        &self,
        operand: Operand,
        block: usize,
        first: usize,
        segment: usize,
    ) -> BlockView {
        debug_assert!(block * BLOCK < self.plane_rows(operand));
        let stride = padded_rows((self.plane_rows(operand) - block * BLOCK).min(BLOCK));
        let padded = self.columns.next_multiple_of(PADDING);
        let elements = block * BLOCK * padded;
        let segments = elements / SEGMENT + first;
        let none = std::ptr::null();
        let mut view = BlockView {
            stride,
            x: none,
            scales: none.cast(),
            sums: none.cast(),
            offsets: none.cast(),
        };
        // SAFETY: the planes were reserved for all blocks, and `first` is a row of this one.
        unsafe {
            match operand {
                Operand::F32 => {
                    view.x = self.float.pointer::<u8>().add(elements * 4 + first * 128);
                    view.after::<128>(segment, 1)
                }
                Operand::Int8(offset) => {
                    let index = self.operands.offsets.iter().position(|o| *o == Some(offset));
                    let plane =
                        self.offsets[index.expect("activations serve the matrix")].pointer::<i32>();
                    let codes = &self.codes[offset.fineness as usize];
                    view.x = codes.codes.pointer::<u8>().add(elements * 2 + first * CODE_BYTES);
                    view.scales = codes.scales.pointer::<f32>().add(segments);
                    view.sums = codes.sums.pointer::<f32>().add(segments);
                    view.offsets = plane.add(elements / SEGMENT * offset.parts + first);
                    view.after::<CODE_BYTES>(segment, offset.parts)
                }
            }
        }
    }
}

/// Runs `work(worker, row)` for each row. The gang helps if there is enough work.
fn for_each_row(gang: &Gang, rows: usize, columns: usize, work: impl Fn(usize, usize) + Sync) {
    if rows < 2 || rows * columns < 4096 {
        for row in 0..rows {
            work(0, row);
        }
        return;
    }
    gang.run(|worker, workers| {
        for row in crate::gang::share(rows, worker, workers) {
            work(worker, row);
        }
    });
}

impl Writer<'_> {
    /// Writes row `row` with the widest vectors of the machine. All widths round alike, so the
    /// choice of [`crate::Isa`] does not matter here.
    ///
    /// # Safety
    /// The planes hold `rows` rows of `padded`, `row < rows`, and nobody else writes this row.
    unsafe fn write_row(&self, row: usize, x: &[f32]) {
        #[cfg(target_arch = "x86_64")]
        {
            with_features! { avx512 =>
                unsafe fn avx512(writer: &Writer<'_>, row: usize, x: &[f32]) {
                    // SAFETY: as the caller promises.
                    unsafe { writer.write_row_inline(row, x) }
                }
            }
            with_features! { avx2 =>
                unsafe fn avx2(writer: &Writer<'_>, row: usize, x: &[f32]) {
                    // SAFETY: as the caller promises.
                    unsafe { writer.write_row_inline(row, x) }
                }
            }
            if features::avx512() {
                // SAFETY: detected; and as the caller promises.
                return unsafe { avx512(self, row, x) };
            }
            if features::avx2() {
                // SAFETY: detected; and as the caller promises.
                return unsafe { avx2(self, row, x) };
            }
        }
        // SAFETY: as the caller promises.
        unsafe { self.write_row_inline(row, x) }
    }

    /// # Safety
    /// As [`Writer::write_row`].
    #[inline(always)]
    unsafe fn write_row_inline(&self, row: usize, x: &[f32]) {
        let forms = self.forms;
        let split = if self.operands.tiles { forms.tiled_count } else { 0 };
        let (place, tiled) =
            if split == 0 { (row, false) } else { (forms.place[row] as usize, forms.tiled[row]) };
        let exact = self.rows - split;
        let float_rows = if self.operands.float_all { self.rows } else { exact };
        let float = self.slot(if tiled { exact + place } else { place }, float_rows);
        let coded = self.slot(place, exact);
        let tile = self.tile_slot(place, split);
        let whole = x.len() / SEGMENT;
        for segment in 0..self.padded / SEGMENT {
            let values: [f32; SEGMENT] = if segment < whole {
                // SAFETY: the segment lies within the row.
                unsafe { x.as_ptr().add(segment * SEGMENT).cast::<[f32; SEGMENT]>().read() }
            } else {
                padded_segment(x, segment)
            };
            // SAFETY: as the caller promises; slots stay below `rows`, rounded up to blocks.
            unsafe {
                if self.operands.float && (!tiled || self.operands.float_all) {
                    let at = float.segment(segment);
                    self.float.add(at * SEGMENT).cast::<[f32; SEGMENT]>().write(values);
                }
                if tiled {
                    write_parts(&self.tiles, tile.segment(segment), values);
                }
                if self.operands.split && !tiled {
                    write_parts(&self.split, coded.segment(segment), values);
                }
                if !tiled {
                    let pair = coded.start * 2 + segment * 2 * coded.stride + coded.first;
                    let places = (coded.segment(segment), [pair, pair + coded.stride]);
                    if self.operands.int8[Fineness::Fine as usize] {
                        self.write_codes(&values, Fineness::Fine, places);
                    }
                    if self.operands.int8[Fineness::Coarse as usize] {
                        self.write_codes(&values, Fineness::Coarse, places);
                    }
                }
            }
        }
    }

    /// Slot `index` of the planes of tiles, which have gaps between their blocks.
    #[inline(always)]
    fn tile_slot(&self, index: usize, rows: usize) -> Slot {
        let slot = self.slot(index, rows);
        Slot { start: slot.start + index / BLOCK * TILE_GAP, ..slot }
    }

    /// Slot `index` of a plane that holds `rows` rows.
    #[inline(always)]
    fn slot(&self, index: usize, rows: usize) -> Slot {
        let block = index / BLOCK;
        Slot {
            start: block * BLOCK * self.padded / SEGMENT,
            // The stride is right only for rows of this plane's form, and only they are asked for.
            stride: padded_rows(rows.saturating_sub(block * BLOCK).min(BLOCK)),
            first: index % BLOCK,
        }
    }

    /// Writes the codes of segment `at` and their sums. `pair` has the places of the segment's two
    /// halves in planes that keep two numbers a segment.
    #[inline(always)]
    unsafe fn write_codes(
        &self,
        values: &[f32; SEGMENT],
        fineness: Fineness,
        (at, pair): (usize, [usize; 2]),
    ) {
        let (codes, scale) = quantize_segment(values, fineness);
        let mut halves = [0i32; 2];
        for (half, codes) in halves.iter_mut().zip(codes.chunks_exact(SEGMENT / 2)) {
            *half = codes.iter().sum();
        }
        let sum = halves[0] + halves[1];
        // SAFETY: as `write_row`.
        unsafe {
            let planes = &self.codes[fineness as usize];
            let to = planes.codes.add(at * CODE_BYTES);
            if self.operands.words {
                to.cast::<[i16; SEGMENT]>().write_unaligned(words_of(&codes));
            } else {
                to.cast::<[[i8; SEGMENT]; 2]>().write(split_codes(&codes, fineness));
            }
            planes.scales.cast::<f32>().add(at).write(scale);
            planes.sums.cast::<f32>().add(at).write(scale * sum as f32);
            for (plane, offset) in self.offsets.iter().zip(self.operands.offsets) {
                let Some(offset) = offset else { break };
                if offset.fineness != fineness {
                    continue;
                }
                if offset.parts == 1 {
                    plane.add(at).write(-offset.zero * sum);
                } else {
                    plane.add(pair[0]).write(-offset.zero * halves[0]);
                    plane.add(pair[1]).write(-offset.zero * halves[1]);
                }
            }
        }
    }
}

/// The place of a row in a plane, counted in segments.
#[derive(Clone, Copy)]
struct Slot {
    /// The first segment of the row's block.
    start: usize,
    /// Rows from one segment to the next.
    stride: usize,
    /// The row within its block.
    first: usize,
}

impl Slot {
    /// The place of one of the row's segments. The rows of a block lie beside each other within a
    /// segment.
    #[inline(always)]
    fn segment(self, segment: usize) -> usize {
        self.start + segment * self.stride + self.first
    }
}

/// A segment at or past the end of a row, padded with zeros.
#[cold]
fn padded_segment(x: &[f32], segment: usize) -> [f32; SEGMENT] {
    let rest = &x[(segment * SEGMENT).min(x.len())..];
    let mut values = [0f32; SEGMENT];
    values[..rest.len().min(SEGMENT)].copy_from_slice(&rest[..rest.len().min(SEGMENT)]);
    values
}

/// Writes a segment to each of `planes`. The first holds the nearest `bf16`, the second the nearest
/// `bf16` of what the first leaves.
///
/// # Safety
/// The planes that are not null have room for segment `at`.
#[inline(always)]
unsafe fn write_parts(planes: &[*mut u16], at: usize, values: [f32; SEGMENT]) {
    let mut left = values;
    for plane in planes.iter().filter(|plane| !plane.is_null()) {
        // A loop and not `map`: a closure would be compiled without this function's features.
        let mut rounded = [0; SEGMENT];
        for (left, rounded) in left.iter_mut().zip(&mut rounded) {
            *rounded = round_to_bf16(*left);
            *left -= f32::from_bits(u32::from(*rounded) << 16);
        }
        // SAFETY: as the caller promises.
        unsafe { plane.add(at * SEGMENT).cast::<[u16; SEGMENT]>().write(rounded) };
    }
}

/// Codes and scale of 32 values.
#[inline(always)]
pub(crate) fn quantize_segment(x: &[f32; SEGMENT], fineness: Fineness) -> ([i32; SEGMENT], f32) {
    // The largest code.
    let most = (127 << fineness.low_bits()) as f32;
    // Bit patterns are ordered as absolute values are. Infinities and NaNs are above all numbers.
    let mut bits = 0;
    for value in x {
        bits = bits.max(value.to_bits() & 0x7fff_ffff);
    }
    let largest = f32::from_bits(bits);
    let inverse = if largest > 0.0 { most / largest } else { 0.0 };
    let mut codes = [0; SEGMENT];
    for (code, value) in codes.iter_mut().zip(x) {
        // Adding 1.5 * 2^23 leaves the nearest integer, ties to even, in the low bits.
        *code = i32::from((value * inverse + 12_582_912.0).to_bits() as i16);
    }
    (codes, largest / most)
}

/// Codes as words. Four neighbours lie in the order 0, 2, 1, 3.
#[inline(always)]
fn words_of(codes: &[i32; SEGMENT]) -> [i16; SEGMENT] {
    let mut words = [0; SEGMENT];
    for (words, codes) in words.chunks_exact_mut(4).zip(codes.chunks_exact(4)) {
        for (word, at) in words.iter_mut().zip([0, 2, 1, 3]) {
            *word = codes[at] as i16;
        }
    }
    words
}

/// Codes as high bytes and low bytes.
#[inline(always)]
fn split_codes(codes: &[i32; SEGMENT], fineness: Fineness) -> [[i8; SEGMENT]; 2] {
    let bits = fineness.low_bits();
    let (mut high, mut low) = ([0; SEGMENT], [0; SEGMENT]);
    for ((high, low), code) in high.iter_mut().zip(&mut low).zip(codes) {
        let upper = (code + (1 << (bits - 1))) >> bits;
        (*high, *low) = (upper as i8, (code - (upper << bits)) as i8);
    }
    [high, low]
}

/// The nearest `bf16`, ties to even. A NaN stays a NaN.
#[inline(always)]
pub(crate) fn round_to_bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    if bits & 0x7fff_ffff > 0x7f80_0000 { quiet as u16 } else { rounded as u16 }
}

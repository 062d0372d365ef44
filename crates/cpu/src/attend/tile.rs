//! One worker's piece of attention: some rows and the tiles of some spans.

use std::ops::Range;

use lathe_program::kv_codec::hadamard;
use lathe_program::{BlockTable, KvFormat, KvLayerShape};

use super::plan::{Task, seen_by_all};
use super::softmax::{Clear, Finish, Merge, Soften, State, Store};
use super::split::{
    self, BLOCK, CHUNK, SplitColumns, SplitOperand, SplitProducts, SplitRows, operand_floats,
};
use super::{AttendJob, AttendShape, SPAN};
use crate::cache::code::F32;
use crate::cache::store::{KvStore, Plain};
use crate::cache::{LoadScales, LoadTile, PageRun, TILE, TileBuffers, page_runs, with_store};
use crate::lanes::product::{DecodedMatrix, Product};
use crate::lanes::{LANES, Width, dispatch};
use crate::memory::Memory;

/// Up to this many query vectors multiply the cache's codes where they lie.
const IN_PLACE_VECTORS_MAX: usize = 12;

/// Largest sizes of one worker's scratch memory, in floats.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ScratchSizes {
    query: usize,
    keys: usize,
    values: usize,
    scores: usize,
    sums: usize,
    rows: usize,
    /// Sizes of a tile of latents that keys and values are made from, and of a head's matrix.
    latent_keys: usize,
    latent_values: usize,
    matrix: usize,
    /// Split operands: queries, keys, weights of two blocks of vectors, values.
    split: [usize; 4],
}

impl ScratchSizes {
    /// Sizes that suffice for each of `shapes`, with or without rows whose products are split.
    pub(super) fn for_shapes(shapes: &[AttendShape], split: bool) -> Self {
        let mut sizes = Self::default();
        for shape in shapes {
            // Split products fill whole blocks.
            let vectors = shape.vectors_max(split).next_multiple_of(BLOCK);
            sizes.query = sizes.query.max((vectors * shape.key_dim).next_multiple_of(LANES));
            sizes.keys = sizes.keys.max(shape.key_dim * TILE);
            sizes.values = sizes.values.max(shape.value_stride() * TILE);
            sizes.scores = sizes.scores.max(vectors * TILE);
            sizes.sums = sizes.sums.max(vectors * shape.value_stride());
            sizes.rows = sizes.rows.max(vectors.next_multiple_of(LANES));
            if split {
                let operands = [
                    operand_floats(vectors, shape.key_dim),
                    operand_floats(TILE, shape.key_dim),
                    operand_floats(2 * BLOCK, TILE),
                    operand_floats(shape.value_stride(), TILE),
                ];
                for (size, operand) in sizes.split.iter_mut().zip(operands) {
                    *size = operand.max(*size);
                }
            }
            if let Some(rank) = shape.expanded_rank {
                sizes.latent_keys = sizes.latent_keys.max((rank + shape.key_dim) * TILE);
                let stride = rank.next_multiple_of(LANES);
                sizes.latent_values = sizes.latent_values.max(stride * TILE);
                sizes.matrix = sizes.matrix.max((rank * shape.key_dim).next_multiple_of(LANES));
            }
        }
        sizes
    }

    /// Floats of one worker.
    pub(super) fn floats(&self) -> usize {
        self.query
            + self.keys
            + self.values
            + 2 * TILE
            + self.scores
            + 2 * self.sums
            + 4 * self.rows
            + self.latent_keys
            + self.latent_values
            + self.matrix
            + self.split.iter().sum::<usize>()
    }
}

/// One worker's scratch memory.
#[derive(Clone, Copy)]
pub(super) struct Scratch {
    query: *mut f32,
    tile: TileBuffers,
    latents: TileBuffers,
    matrix: *mut f32,
    scores: *mut f32,
    split: SplitScratch,
    /// The state of the current span.
    span: State,
    /// The state of all spans before it.
    pub total: State,
}

impl Scratch {
    /// The part of `memory` that belongs to `worker`, for attentions of `shape`.
    pub(super) fn of_worker(
        memory: &Memory,
        sizes: &ScratchSizes,
        worker: usize,
        shape: &AttendShape,
    ) -> Self {
        let mut at = memory.pointer().cast::<f32>().wrapping_add(worker * sizes.floats());
        let mut take = |floats: usize| {
            let here = at;
            at = at.wrapping_add(floats);
            here
        };
        let stride = shape.value_stride();
        let query = take(sizes.query);
        let tile = TileBuffers {
            keys: take(sizes.keys),
            values: take(sizes.values),
            value_stride: stride,
            key_scales: take(TILE),
            value_scales: take(TILE),
        };
        let latents = TileBuffers {
            keys: take(sizes.latent_keys),
            values: take(sizes.latent_values),
            value_stride: shape.expanded_rank.unwrap_or(0).next_multiple_of(LANES),
            ..tile
        };
        let (matrix, scores) = (take(sizes.matrix), take(sizes.scores));
        let [queries, keys, weights, values] = sizes.split.map(|floats| take(floats).cast());
        let split = SplitScratch { queries, keys, weights, values };
        let mut state = || State {
            largest: take(sizes.rows),
            sum: take(sizes.rows),
            values: take(sizes.sums),
            stride,
        };
        Self { query, tile, latents, matrix, scores, split, span: state(), total: state() }
    }
}

/// Operands of split products.
#[derive(Clone, Copy)]
struct SplitScratch {
    queries: *mut u8,
    keys: *mut u8,
    /// The weights of two blocks of vectors.
    weights: *mut u8,
    values: *mut u8,
}

/// One task for one key head.
pub(super) struct Piece<'a> {
    /// The operands of all pieces.
    pub job: &'a AttendJob<'a>,
    /// The rows and spans of this piece.
    pub task: &'a Task,
    /// The key head.
    pub head: usize,
    /// This worker's memory.
    pub scratch: Scratch,
    /// Memory for spans that are merged later.
    pub partials: *mut f32,
    /// The products that replace those of `f32`.
    pub split: Option<SplitProducts>,
}

impl Piece<'_> {
    /// Computes the piece, tile by tile.
    ///
    /// # Safety
    /// Scratch memory was sized for this shape; [`super::Attention::run`]'s caller vouches for the
    /// job's rows and tables; stored spans go to places of this task alone.
    pub(super) unsafe fn run(&self, width: Width) {
        let (job, task) = (self.job, self.task);
        let sequence = &job.step.sequences[task.sequence];
        let slots = seen_by_all(job.step, sequence, task.first, task.rows, job.shape.window);
        let (span_state, total) = (self.scratch.span, self.scratch.total);
        let vectors = self.vectors();
        // SAFETY: as the caller promises.
        unsafe {
            self.stage_query();
            if let Some(split) = self.split {
                self.split_query(split);
                (split.begin)();
            }
            dispatch(width, Clear { state: total, vectors });
            for span in task.spans.clone() {
                dispatch(width, Clear { state: span_state, vectors });
                let from = slots.start.max(span * SPAN);
                let to = slots.end.min((span + 1) * SPAN);
                let mut tile = from / TILE * TILE;
                while tile < to {
                    self.tile(width, tile, from.max(tile)..to.min(tile + TILE), slots.end);
                    tile += TILE;
                }
                match &task.stored {
                    None => dispatch(width, Merge { total, part: span_state, vectors }),
                    Some(stored) => {
                        let place = |vector| {
                            let entry = stored.entry(self.head, vector, span);
                            State::stored(self.partials, job.shape, entry)
                        };
                        dispatch(width, Store { state: span_state, vectors, place });
                    }
                }
            }
            if let Some(split) = self.split {
                (split.end)();
            }
            if task.stored.is_none() {
                for vector in 0..vectors {
                    let (row, head) = self.row_and_head(vector);
                    dispatch(width, Finish { job, row, head, state: total.vector(vector) });
                }
            }
        }
    }

    fn vectors(&self) -> usize {
        self.task.rows * self.job.shape.group
    }

    /// The step's row and the query head of a vector.
    fn row_and_head(&self, vector: usize) -> (usize, usize) {
        let group = self.job.shape.group;
        let first =
            self.job.step.sequences[self.task.sequence].first_row as usize + self.task.first;
        (first + vector / group, self.head * group + vector % group)
    }

    /// Copies the queries side by side, multiplied by the scale and rotated as the cache's keys
    /// are.
    unsafe fn stage_query(&self) {
        let dim = self.job.shape.key_dim;
        let rotated = self.rotated();
        for vector in 0..self.vectors() {
            let (row, head) = self.row_and_head(vector);
            // SAFETY: the row has `heads * key_dim` elements, and the scratch room for the vector.
            unsafe {
                let from = std::slice::from_raw_parts(self.job.query.row(row).add(head * dim), dim);
                let to = std::slice::from_raw_parts_mut(self.scratch.query.add(vector * dim), dim);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * self.job.shape.scale;
                }
                hadamard(&mut to[dim - rotated..]);
            }
        }
    }

    /// Splits the queries.
    unsafe fn split_query(&self, products: SplitProducts) {
        let (dim, vectors) = (self.job.shape.key_dim, self.vectors());
        for first in (0..vectors).step_by(BLOCK) {
            let from = self.scratch.query.wrapping_add(first * dim).cast_const();
            let to = self.scratch.split.queries.cast::<f32>();
            let to = to.wrapping_add(operand_floats(first, dim)).cast();
            let rows = 0..(vectors - first).min(BLOCK);
            let chunks = dim.div_ceil(CHUNK);
            let split = SplitRows { from, stride: dim, rows, columns: 0..dim, chunks, to };
            // SAFETY: the queries are there, and the scratch has room for their blocks.
            unsafe { (products.rows)(&split) };
        }
    }

    /// The blocks that hold the vectors of some rows of the task.
    fn blocks(&self, rows: &Range<usize>) -> Range<usize> {
        let group = self.job.shape.group;
        rows.start * group / BLOCK..(rows.end * group).div_ceil(BLOCK)
    }

    /// Computes scores in some columns of the tile, for whole blocks that hold the vectors of
    /// `rows`.
    unsafe fn split_scores(
        &self,
        products: SplitProducts,
        columns: Range<usize>,
        rows: Range<usize>,
    ) {
        let (dim, scratch) = (self.job.shape.key_dim, self.scratch);
        let (chunks, blocks) = (dim.div_ceil(CHUNK), self.blocks(&rows));
        let from = scratch.tile.keys.wrapping_add(columns.start).cast_const();
        let to = scratch.split.keys;
        let columns_blocks = columns.len() / BLOCK;
        let split =
            SplitColumns { from, stride: TILE, lines: 0..dim, chunks, blocks: columns_blocks, to };
        // SAFETY: the tile's keys are there, and the scratch has room for them.
        unsafe { (products.columns)(&split) };
        let queries = scratch.split.queries.cast::<f32>();
        let queries = queries.wrapping_add(operand_floats(blocks.start * BLOCK, dim));
        let queries = SplitOperand { start: queries.cast(), blocks: blocks.len() };
        let keys = SplitOperand { start: to, blocks: columns_blocks };
        let scores = scratch.scores.wrapping_add(blocks.start * BLOCK * TILE + columns.start);
        // SAFETY: the scratch has room for whole blocks; the caller has begun.
        unsafe { split::multiply(products, (queries, keys, chunks), (scores, TILE), true) };
    }

    /// Adds the values of the tile's positions `filled`, weighted by some rows' weights in
    /// `columns`.
    unsafe fn split_sums(
        &self,
        products: SplitProducts,
        columns: Range<usize>,
        filled: Range<usize>,
        rows: Range<usize>,
    ) {
        const CHUNKS: usize = TILE / CHUNK;
        let (scratch, group) = (self.scratch, self.job.shape.group);
        let (state, blocks) = (scratch.span, self.blocks(&rows));
        let vectors = rows.start * group..rows.end * group;
        let values = SplitOperand { start: scratch.split.values, blocks: state.stride / BLOCK };
        let split = SplitColumns {
            from: scratch.tile.values,
            stride: state.stride,
            lines: filled,
            chunks: CHUNKS,
            blocks: values.blocks,
            to: scratch.split.values,
        };
        // SAFETY: the tile's values are there, and the scratch has room for them.
        unsafe { (products.columns)(&split) };
        for pair in blocks.clone().step_by(2) {
            let count = (blocks.end - pair).min(2);
            for block in pair..pair + count {
                let first = block * BLOCK;
                let within = |vector: usize| vector.clamp(first, first + BLOCK) - first;
                let to = scratch.split.weights.cast::<f32>();
                let split = SplitRows {
                    from: scratch.scores.wrapping_add(first * TILE),
                    stride: TILE,
                    rows: within(vectors.start)..within(vectors.end),
                    columns: columns.clone(),
                    chunks: CHUNKS,
                    to: to.wrapping_add(operand_floats((block - pair) * BLOCK, TILE)).cast(),
                };
                // SAFETY: the weights are there, and the scratch has room for two blocks.
                unsafe { (products.rows)(&split) };
            }
            let weights = SplitOperand { start: scratch.split.weights, blocks: count };
            let sums = state.values.wrapping_add(pair * BLOCK * state.stride);
            let operands = (weights, values, CHUNKS);
            // SAFETY: the scratch has room for whole blocks; the caller has begun.
            unsafe { split::multiply(products, operands, (sums, state.stride), false) };
        }
    }

    /// Elements at the end of a query that an int4 cache needs rotated. It is the whole query, or
    /// only the rotary part if the query meets latents: the matrices before it rotate the rest.
    fn rotated(&self) -> usize {
        match (self.job.cache.format(), self.job.layer.shape) {
            (KvFormat::Int4, KvLayerShape::Heads { key_dim, .. }) => key_dim,
            (KvFormat::Int4, KvLayerShape::Latent { rope_dim, .. }) => rope_dim,
            _ => 0,
        }
    }

    /// Adds the tile that starts at `tile`. Some row sees some of `slots`, and no row sees a slot
    /// from `end` on.
    unsafe fn tile(&self, width: Width, tile: usize, slots: Range<usize>, end: usize) {
        let (job, scratch, task) = (self.job, self.scratch, self.task);
        // The columns are whole vectors around the slots. Columns outside of the slots are masked.
        let first = (slots.start - tile) / LANES * LANES;
        let columns = first..(slots.end - tile).next_multiple_of(LANES);
        let to = scratch.tile;
        let scales = job
            .cache
            .scales_apart(job.layer)
            .then_some((to.key_scales.cast_const(), to.value_scales.cast_const()));
        let (scores, state) = (scratch.scores, scratch.span);
        let rows = self.rows_that_see(&slots);
        if rows.is_empty() {
            return;
        }
        let columns_seen = columns.clone();
        let soften = Soften {
            job,
            task,
            rows: rows.clone(),
            tile,
            columns: columns_seen,
            scores,
            state,
            scales,
        };
        // SAFETY: the buffers hold a tile of this shape, the scores a row of 64 for each vector,
        // the state a row of values for each; the tables hold the slots.
        unsafe {
            if let Some(split) = self.split {
                let filled = slots.start - tile..slots.end - tile;
                self.fill_tile(width, filled.clone(), slots);
                self.split_scores(split, columns.clone(), rows.clone());
                dispatch(width, soften);
                self.split_sums(split, columns, filled, rows);
            } else if self.reads_in_place() {
                with_store!(job.cache.format(), S => {
                    self.scores_in_place::<S>(width, slots.clone(), end, rows.clone());
                    if scales.is_some() {
                        dispatch(width, LoadScales(self.load(slots.clone(), to)));
                    }
                    dispatch(width, soften);
                    self.sums_in_place::<S>(width, slots, end, rows);
                });
            } else {
                let filled = slots.start - tile..slots.end - tile;
                self.fill_tile(width, filled, slots.clone());
                let keys = Plain::<F32>::new(to.keys.add(columns.start).cast(), TILE);
                self.scores(keys, columns, rows.clone()).run(width);
                dispatch(width, soften);
                let first = slots.start - tile;
                let values = to.values.add(first * to.value_stride).cast();
                let values = Plain::<F32>::new(values, to.value_stride);
                self.sums(values, first, slots.len(), rows).run(width);
            }
        }
    }

    /// Decodes positions to floats in the tile, or makes them from latents.
    unsafe fn fill_tile(&self, width: Width, filled: Range<usize>, slots: Range<usize>) {
        let Scratch { tile, latents, matrix, .. } = self.scratch;
        match self.job.expand {
            None => dispatch(width, self.load(slots, tile)),
            Some(expand) => {
                dispatch(width, self.load(slots, latents));
                // SAFETY: the scratch has room for tiles of this shape and for the matrix.
                unsafe { expand.tile(width, self.head, filled, latents, tile, matrix) }
            }
        }
    }

    /// The rows that can see one of `slots`, counted within the task. The other rows would add
    /// nothing.
    fn rows_that_see(&self, slots: &Range<usize>) -> Range<usize> {
        let (task, job) = (self.task, self.job);
        let sequence = &job.step.sequences[task.sequence];
        if sequence.ancestors.is_some() {
            return 0..task.rows;
        }
        // Row `i` is at position `at + i` and sees `window` positions up to its own.
        let at = sequence.cached as usize + task.first;
        let last = job.shape.window.map_or(usize::MAX, |window| slots.end - 1 + window);
        slots.start.saturating_sub(at)..task.rows.min(last.saturating_sub(at))
    }

    fn table(&self) -> &BlockTable {
        let id = self.job.step.sequences[self.task.sequence].id;
        self.job.tables.table(id, self.job.layer.group)
    }

    fn load(&self, positions: Range<usize>, to: TileBuffers) -> LoadTile<'_> {
        let (cache, layer) = (self.job.cache, self.job.layer);
        // Latents have only one head.
        let head = if self.job.expand.is_some() { 0 } else { self.head };
        LoadTile { cache, layer, head, table: self.table(), positions, to }
    }

    /// Whether codes are multiplied where they lie. For few query vectors, decoding a tile first
    /// costs more than it saves. The numbers are the same.
    fn reads_in_place(&self) -> bool {
        let heads = matches!(self.job.layer.shape, KvLayerShape::Heads { .. });
        let whole = |n: usize| n.is_multiple_of(LANES);
        let vectors = self.vectors() <= IN_PLACE_VECTORS_MAX;
        heads && vectors && whole(self.job.cache.block_tokens()) && whole(self.job.shape.value_dim)
    }

    unsafe fn scores_in_place<S: KvStore>(
        &self,
        width: Width,
        slots: Range<usize>,
        end: usize,
        rows: Range<usize>,
    ) {
        let tokens = self.job.cache.block_tokens();
        for mut run in page_runs(self.table(), tokens, slots) {
            // Pages, tiles and vectors begin at multiples of the same positions. The run starts at
            // the first position of its vector.
            let before = run.slot % LANES;
            (run.slot, run.position, run.count) =
                (run.slot - before, run.position - before, run.count + before);
            let keys = self.job.cache.keys::<S>(self.job.layer, self.head, run);
            let next = self
                .after_a_tile(run, end)
                .map(|run| self.job.cache.keys::<S>(self.job.layer, self.head, run));
            let first = run.position % TILE;
            let columns = first..first + run.count.next_multiple_of(LANES);
            // SAFETY: whole vectors of slots are within the page, and columns within the tile.
            unsafe {
                let ahead = next.map(|next| distance(keys, next));
                Product { ahead, ..self.scores(keys, columns, rows.clone()) }.run(width);
            }
        }
    }

    unsafe fn sums_in_place<S: KvStore>(
        &self,
        width: Width,
        slots: Range<usize>,
        end: usize,
        rows: Range<usize>,
    ) {
        let tokens = self.job.cache.block_tokens();
        for run in page_runs(self.table(), tokens, slots) {
            let next = self
                .after_a_tile(run, end)
                .map(|run| self.job.cache.values::<S>(self.job.layer, self.head, run));
            let values = self.job.cache.values::<S>(self.job.layer, self.head, run);
            let first = run.position % TILE;
            // SAFETY: the run's slots are within the page.
            unsafe {
                let ahead = next.map(|next| distance(values, next));
                Product { ahead, ..self.sums(values, first, run.count, rows.clone()) }.run(width);
            }
        }
    }

    /// The place of the positions one tile after `run`, if they are before `end`. They are fetched
    /// while `run` is computed. Pages are read in pieces of a few KiB, which are too short for the
    /// hardware's prefetching.
    fn after_a_tile(&self, run: PageRun, end: usize) -> Option<PageRun> {
        let next = run.position + TILE;
        let tokens = self.job.cache.block_tokens();
        (next < end).then(|| page_runs(self.table(), tokens, next..next + 1).next()).flatten()
    }

    /// Computes the scores of some rows' vectors in some columns of the tile.
    fn scores<M: DecodedMatrix>(
        &self,
        keys: M,
        columns: Range<usize>,
        rows: Range<usize>,
    ) -> Product<M> {
        let shape = self.job.shape;
        let first = rows.start * shape.group;
        Product {
            a: self.scratch.query.wrapping_add(first * shape.key_dim),
            a_stride: self.job.shape.key_dim,
            b: keys,
            c: self.scratch.scores.wrapping_add(first * TILE + columns.start),
            c_stride: TILE,
            rows: rows.len() * shape.group,
            columns: columns.len(),
            depth: self.job.shape.key_dim,
            accumulate: false,
            ahead: None,
        }
    }

    /// Adds the values of `count` positions from column `first` of the tile on, weighted by some
    /// rows' weights.
    fn sums<M: DecodedMatrix>(
        &self,
        values: M,
        first: usize,
        count: usize,
        rows: Range<usize>,
    ) -> Product<M> {
        let (state, group) = (self.scratch.span, self.job.shape.group);
        let vector = rows.start * group;
        Product {
            a: self.scratch.scores.wrapping_add(vector * TILE + first),
            a_stride: TILE,
            b: values,
            c: state.values.wrapping_add(vector * state.stride),
            c_stride: state.stride,
            rows: rows.len() * group,
            columns: state.stride,
            depth: count,
            accumulate: true,
            ahead: None,
        }
    }
}

/// Bytes from one matrix to another.
fn distance<M: DecodedMatrix>(from: M, to: M) -> isize {
    (to.line(0, 0) as isize).wrapping_sub(from.line(0, 0) as isize)
}

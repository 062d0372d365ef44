//! The arithmetic of attention: one piece of rows over its tiles, and the merge of segments.
//!
//! Online softmax as in FlashAttention-2 (Dao 2023, algorithm 1), a segment at a time.

use std::marker::PhantomData;
use std::ops::Range;

use super::plan::{Plan, Task, Visible, seen_by_all, visible};
use super::{AttendJob, AttendShape, SEGMENT};
use crate::cache::code::F32;
use crate::cache::{TILE, TileBuffers};
use crate::lanes::product::Product;
use crate::lanes::{Kernel, LANES, Lanes, math};
use crate::memory::Memory;

/// Largest sizes of one worker's scratch memory, in floats.
#[derive(Debug, Clone, Copy, Default)]
pub struct ScratchSizes {
    query: usize,
    keys: usize,
    values: usize,
    scores: usize,
    sums: usize,
    rows: usize,
}

impl ScratchSizes {
    /// Room for each of `shapes`.
    pub fn for_shapes(shapes: &[AttendShape]) -> Self {
        let mut sizes = Self::default();
        for shape in shapes {
            let vectors = shape.group * shape.rows_per_task();
            sizes.query = sizes.query.max((vectors * shape.key_dim).next_multiple_of(LANES));
            sizes.keys = sizes.keys.max(shape.key_dim * TILE);
            sizes.values = sizes.values.max(shape.value_stride() * TILE);
            sizes.scores = sizes.scores.max(vectors * TILE);
            sizes.sums = sizes.sums.max(vectors * shape.value_stride());
            sizes.rows = sizes.rows.max(vectors.next_multiple_of(LANES));
        }
        sizes
    }

    /// Floats of one worker.
    pub fn floats(&self) -> usize {
        self.query + self.keys + self.values + self.scores + 2 * self.sums + 4 * self.rows
    }
}

/// The running state of some query vectors: largest score, sum of weights, weighted values.
#[derive(Clone, Copy)]
struct State {
    largest: *mut f32,
    sum: *mut f32,
    values: *mut f32,
}

/// One worker's scratch memory.
#[derive(Clone, Copy)]
pub struct Scratch {
    query: *mut f32,
    tile: TileBuffers,
    scores: *mut f32,
    segment: State,
    total: State,
}

impl Scratch {
    /// The part of `memory` that belongs to `worker`.
    pub fn of_worker(memory: &Memory, sizes: &ScratchSizes, worker: usize) -> Self {
        let mut at = memory.pointer().cast::<f32>().wrapping_add(worker * sizes.floats());
        let mut take = |floats: usize| {
            let here = at;
            at = at.wrapping_add(floats);
            here
        };
        let query = take(sizes.query);
        let tile =
            TileBuffers { keys: take(sizes.keys), values: take(sizes.values), value_stride: 0 };
        let scores = take(sizes.scores);
        let mut state =
            || State { largest: take(sizes.rows), sum: take(sizes.rows), values: take(sizes.sums) };
        Self { query, tile, scores, segment: state(), total: state() }
    }
}

/// One task for one key head.
pub struct TaskKernel<'a> {
    pub job: &'a AttendJob<'a>,
    pub task: &'a Task,
    pub head: usize,
    pub scratch: Scratch,
    pub partials: *mut f32,
}

impl Kernel for TaskKernel<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (job, task) = (self.job, self.task);
        let sequence = &job.step.sequences[task.sequence];
        let slots = seen_by_all(job.step, sequence, task.first, task.rows, job.shape.window);
        // SAFETY: scratch memory was sized for this shape; `Attention::run`'s caller vouches for
        // the job's rows and tables; partial sums go to places of this task alone.
        unsafe {
            self.stage_query();
            self.clear::<L>(self.scratch.total);
            for segment in task.segments.clone() {
                self.clear::<L>(self.scratch.segment);
                let from = slots.start.max(segment * SEGMENT);
                let to = slots.end.min((segment + 1) * SEGMENT);
                let mut tile = from / TILE * TILE;
                while tile < to {
                    self.tile::<L>(tile, from.max(tile)..to.min(tile + TILE));
                    tile += TILE;
                }
                if task.stored.is_some() {
                    self.store_partial::<L>(segment);
                } else {
                    for vector in 0..self.vectors() {
                        let (total, part) = (
                            self.state(self.scratch.total, vector),
                            self.state(self.scratch.segment, vector),
                        );
                        merge::<L>(total, part, job.shape.value_stride());
                    }
                }
            }
            if task.stored.is_none() {
                for vector in 0..self.vectors() {
                    let (row, head) = self.row_and_head(vector);
                    finish::<L>(job, row, head, self.state(self.scratch.total, vector));
                }
            }
        }
    }
}

impl TaskKernel<'_> {
    #[inline(always)]
    fn vectors(&self) -> usize {
        self.task.rows * self.job.shape.group
    }

    /// The step's row and the query head of a vector.
    #[inline(always)]
    fn row_and_head(&self, vector: usize) -> (usize, usize) {
        let group = self.job.shape.group;
        let first =
            self.job.step.sequences[self.task.sequence].first_row as usize + self.task.first;
        (first + vector / group, self.head * group + vector % group)
    }

    #[inline(always)]
    fn state(&self, all: State, vector: usize) -> State {
        let stride = self.job.shape.value_stride();
        State {
            largest: all.largest.wrapping_add(vector),
            sum: all.sum.wrapping_add(vector),
            values: all.values.wrapping_add(vector * stride),
        }
    }

    /// Copies the queries side by side, the scale multiplied in.
    #[inline(always)]
    unsafe fn stage_query(&self) {
        let dim = self.job.shape.key_dim;
        for vector in 0..self.vectors() {
            let (row, head) = self.row_and_head(vector);
            // SAFETY: the row has `heads * key_dim` elements, and the scratch room for the vector.
            unsafe {
                let from = self.job.query.row(row).add(head * dim);
                let to = self.scratch.query.add(vector * dim);
                for i in 0..dim {
                    *to.add(i) = *from.add(i) * self.job.shape.scale;
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn clear<L: Lanes>(&self, state: State) {
        let floats = self.vectors() * self.job.shape.value_stride();
        // SAFETY: the state has room for all vectors.
        unsafe {
            for vector in 0..self.vectors() {
                *state.largest.add(vector) = f32::NEG_INFINITY;
                *state.sum.add(vector) = 0.0;
            }
            clear_values::<L>(state.values, floats);
        }
    }

    /// Adds the tile that starts at `tile`; some row sees something of `slots`.
    #[inline(always)]
    unsafe fn tile<L: Lanes>(&self, tile: usize, slots: Range<usize>) {
        let (job, shape, scratch) = (self.job, self.job.shape, self.scratch);
        let sequence = &job.step.sequences[self.task.sequence];
        let table = &sequence.tables[job.layer.group];
        let stride = shape.value_stride();
        let buffers = TileBuffers { value_stride: stride, ..scratch.tile };
        // Whole vectors of columns around the slots; what is outside of them is masked.
        let first = (slots.start - tile) / LANES * LANES;
        let columns = (slots.end - tile).next_multiple_of(LANES) - first;
        // SAFETY: the buffers hold a tile of this shape, the scores a row of 64 for each vector.
        unsafe {
            job.cache.load_tile::<L>(job.layer, self.head, table, slots.clone(), buffers);
            Product {
                a: scratch.query,
                a_stride: shape.key_dim,
                b: buffers.keys.add(first).cast(),
                b_stride: TILE,
                c: scratch.scores.add(first),
                c_stride: TILE,
                rows: self.vectors(),
                columns,
                depth: shape.key_dim,
                accumulate: false,
                code: PhantomData::<F32>,
            }
            .run::<L>();
            for row in 0..self.task.rows {
                let seen = visible(job.step, sequence, self.task.first + row, shape.window);
                for vector in row * shape.group..(row + 1) * shape.group {
                    let scores = scratch.scores.add(vector * TILE);
                    let state = self.state(scratch.segment, vector);
                    soften::<L>(shape, &seen, tile, first..first + columns, scores, state);
                }
            }
            Product {
                a: scratch.scores.add(slots.start - tile),
                a_stride: TILE,
                b: buffers.values.add((slots.start - tile) * stride).cast(),
                b_stride: stride,
                c: scratch.segment.values,
                c_stride: stride,
                rows: self.vectors(),
                columns: stride,
                depth: slots.len(),
                accumulate: true,
                code: PhantomData::<F32>,
            }
            .run::<L>();
        }
    }

    #[inline(always)]
    unsafe fn store_partial<L: Lanes>(&self, segment: usize) {
        let shape = self.job.shape;
        let Some(stored) = self.task.stored else { return };
        for vector in 0..self.vectors() {
            let entry = stored.entry(self.head, vector, segment);
            // SAFETY: the plan keeps entries within the partial sums' memory.
            unsafe {
                let to = partial(self.partials, shape, entry);
                let from = self.state(self.scratch.segment, vector);
                *to.largest = *from.largest;
                *to.sum = *from.sum;
                for i in (0..shape.value_stride()).step_by(LANES) {
                    L::load(from.values.add(i)).store(to.values.add(i));
                }
            }
        }
    }
}

/// A stored segment: its largest score and sum in the first vector, then the values.
#[inline(always)]
fn partial(partials: *mut f32, shape: &AttendShape, entry: usize) -> State {
    let at = partials.wrapping_add(entry * shape.partial_stride());
    State { largest: at, sum: at.wrapping_add(1), values: at.wrapping_add(LANES) }
}

/// Turns one row of scores of a tile into weights and rescales the state accordingly.
///
/// # Safety
/// `scores` is a row of 64 of which `columns` were computed; `state` is one vector's.
#[inline(always)]
unsafe fn soften<L: Lanes>(
    shape: &AttendShape,
    seen: &Visible<'_>,
    tile: usize,
    columns: Range<usize>,
    scores: *mut f32,
    state: State,
) {
    let low = seen.slots.start.max(tile + columns.start) - tile;
    let high = seen.slots.end.min(tile + columns.end).saturating_sub(tile);
    // SAFETY: all accesses are to `columns`, which lie within the row, and to the state.
    unsafe {
        if let Some(cap) = shape.softcap {
            for i in columns.clone().step_by(LANES) {
                let x = L::load(scores.add(i));
                math::tanh(x.mul(L::splat(1.0 / cap))).mul(L::splat(cap)).store(scores.add(i));
            }
        }
        for i in columns.start..low.min(columns.end) {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        for i in high.max(columns.start)..columns.end {
            *scores.add(i) = f32::NEG_INFINITY;
        }
        if let Some(tree) = &seen.tree {
            for i in low.max(tree.cached.saturating_sub(tile))..high {
                if !tree.sees(tile + i) {
                    *scores.add(i) = f32::NEG_INFINITY;
                }
            }
        }
        let mut most = L::splat(f32::NEG_INFINITY);
        for i in columns.clone().step_by(LANES) {
            most = most.max(L::load(scores.add(i)));
        }
        let most = most.largest();
        if most == f32::NEG_INFINITY {
            for i in columns.step_by(LANES) {
                L::splat(0.0).store(scores.add(i));
            }
            return;
        }
        let before = *state.largest;
        let largest = before.max(most);
        let mut sum = L::splat(0.0);
        for i in columns.step_by(LANES) {
            let weight = math::exp(L::load(scores.add(i)).sub(L::splat(largest)));
            weight.store(scores.add(i));
            sum = sum.add(weight);
        }
        let fade = if before == largest { 1.0 } else { (before - largest).exp() };
        *state.largest = largest;
        *state.sum = *state.sum * fade + sum.sum();
        if fade != 1.0 {
            scale::<L>(state.values, shape.value_stride(), fade);
        }
    }
}

/// # Safety
/// `floats` values at `values`, a multiple of 16.
#[inline(always)]
unsafe fn clear_values<L: Lanes>(values: *mut f32, floats: usize) {
    for i in (0..floats).step_by(LANES) {
        // SAFETY: the caller vouches for the values.
        unsafe { L::splat(0.0).store(values.add(i)) };
    }
}

/// # Safety
/// `floats` values at `values`, a multiple of 16.
#[inline(always)]
unsafe fn scale<L: Lanes>(values: *mut f32, floats: usize, factor: f32) {
    for i in (0..floats).step_by(LANES) {
        // SAFETY: the caller vouches for the values.
        unsafe { L::load(values.add(i)).mul(L::splat(factor)).store(values.add(i)) };
    }
}

/// Adds a segment to the total of the segments before it.
///
/// # Safety
/// Both are states of one vector with `floats` values.
#[inline(always)]
unsafe fn merge<L: Lanes>(total: State, part: State, floats: usize) {
    // SAFETY: the caller vouches for both states.
    unsafe {
        let (a, b) = (*total.largest, *part.largest);
        if b == f32::NEG_INFINITY {
            return;
        }
        let largest = a.max(b);
        let (fade_a, fade_b) = ((a - largest).exp(), (b - largest).exp());
        *total.largest = largest;
        *total.sum = *total.sum * fade_a + *part.sum * fade_b;
        for i in (0..floats).step_by(LANES) {
            let old = L::load(total.values.add(i)).mul(L::splat(fade_a));
            L::load(part.values.add(i)).fma(L::splat(fade_b), old).store(total.values.add(i));
        }
    }
}

/// Divides by the sum (and the sink) and stores a row's head.
///
/// # Safety
/// `state` is one vector's; the job's rows are valid.
#[inline(always)]
unsafe fn finish<L: Lanes>(job: &AttendJob<'_>, row: usize, head: usize, state: State) {
    let dim = job.shape.value_dim;
    // SAFETY: the caller vouches for the state, and the row has `heads * value_dim` elements.
    unsafe {
        let (mut sum, mut fade) = (*state.sum, 1.0);
        if let Some(sinks) = job.sinks {
            let largest = state.largest.read().max(sinks[head]);
            fade = (*state.largest - largest).exp();
            sum = sum * fade + (sinks[head] - largest).exp();
        }
        // A row that sees nothing (only a malformed tree has one) gives zeros.
        let factor = L::splat(if sum > 0.0 { fade / sum } else { 0.0 });
        let out = job.out.row(row).add(head * dim);
        for i in (0..dim).step_by(LANES) {
            L::load(state.values.add(i)).mul(factor).store_first(out.add(i), dim - i);
        }
    }
}

/// Merges the stored segments of rows that were split.
pub struct Merge<'a> {
    pub job: &'a AttendJob<'a>,
    pub plan: &'a Plan,
    /// Which of all vectors to merge, counted over splits, heads and vectors.
    pub mine: Range<usize>,
    pub scratch: Scratch,
    pub partials: *mut f32,
}

impl Kernel for Merge<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let shape = self.job.shape;
        let total = self.scratch.total;
        let mut before = 0;
        for split in &self.plan.splits {
            let stored = &split.stored;
            let vectors = stored.vectors * shape.kv_heads;
            let (first, last) = (self.mine.start.max(before), self.mine.end.min(before + vectors));
            for index in first..last {
                let (head, vector) =
                    ((index - before) / stored.vectors, (index - before) % stored.vectors);
                // SAFETY: the tasks have stored every segment; the scratch is this worker's.
                unsafe {
                    *total.largest = f32::NEG_INFINITY;
                    *total.sum = 0.0;
                    clear_values::<L>(total.values, shape.value_stride());
                    for segment in stored.first..stored.first + stored.count {
                        let entry = stored.entry(head, vector, segment);
                        merge::<L>(
                            total,
                            partial(self.partials, shape, entry),
                            shape.value_stride(),
                        );
                    }
                    let row = split.row + vector / shape.group;
                    finish::<L>(self.job, row, head * shape.group + vector % shape.group, total);
                }
            }
            before += vectors;
        }
    }
}

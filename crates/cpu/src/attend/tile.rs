//! One worker's piece of attention: some rows over the tiles of some segments.

use std::marker::PhantomData;
use std::ops::Range;

use super::plan::{Task, seen_by_all};
use super::softmax::{Clear, Finish, Merge, Soften, State, Store};
use super::{AttendJob, AttendShape, SEGMENT};
use crate::cache::code::F32;
use crate::cache::{LoadTile, TILE, TileBuffers};
use crate::lanes::product::Product;
use crate::lanes::{LANES, Width, dispatch};
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

/// One worker's scratch memory.
#[derive(Clone, Copy)]
pub struct Scratch {
    query: *mut f32,
    tile: TileBuffers,
    scores: *mut f32,
    /// The state of the segment that is being walked.
    segment: State,
    /// The state of all segments before it.
    pub total: State,
}

impl Scratch {
    /// The part of `memory` that belongs to `worker`, for attentions of `shape`.
    pub fn of_worker(
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
        };
        let scores = take(sizes.scores);
        let mut state = || State {
            largest: take(sizes.rows),
            sum: take(sizes.rows),
            values: take(sizes.sums),
            stride,
        };
        Self { query, tile, scores, segment: state(), total: state() }
    }
}

/// One task for one key head.
pub struct Piece<'a> {
    /// What all pieces work on.
    pub job: &'a AttendJob<'a>,
    /// Which rows and segments.
    pub task: &'a Task,
    /// The key head.
    pub head: usize,
    /// This worker's memory.
    pub scratch: Scratch,
    /// Where segments go that are merged later.
    pub partials: *mut f32,
}

impl Piece<'_> {
    /// Walks the tiles.
    ///
    /// # Safety
    /// Scratch memory was sized for this shape; [`super::Attention::run`]'s caller vouches for the
    /// job's rows and tables; stored segments go to places of this task alone.
    pub unsafe fn run(&self, width: Width) {
        let (job, task) = (self.job, self.task);
        let sequence = &job.step.sequences[task.sequence];
        let slots = seen_by_all(job.step, sequence, task.first, task.rows, job.shape.window);
        let (segment_state, total) = (self.scratch.segment, self.scratch.total);
        let vectors = self.vectors();
        // SAFETY: as the caller promises.
        unsafe {
            self.stage_query();
            dispatch(width, Clear { state: total, vectors });
            for segment in task.segments.clone() {
                dispatch(width, Clear { state: segment_state, vectors });
                let from = slots.start.max(segment * SEGMENT);
                let to = slots.end.min((segment + 1) * SEGMENT);
                let mut tile = from / TILE * TILE;
                while tile < to {
                    self.tile(width, tile, from.max(tile)..to.min(tile + TILE));
                    tile += TILE;
                }
                match &task.stored {
                    None => dispatch(width, Merge { total, part: segment_state, vectors }),
                    Some(stored) => {
                        let place = |vector| {
                            let entry = stored.entry(self.head, vector, segment);
                            State::stored(self.partials, job.shape, entry)
                        };
                        dispatch(width, Store { state: segment_state, vectors, place });
                    }
                }
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

    /// Copies the queries side by side, the scale multiplied in.
    unsafe fn stage_query(&self) {
        let dim = self.job.shape.key_dim;
        for vector in 0..self.vectors() {
            let (row, head) = self.row_and_head(vector);
            // SAFETY: the row has `heads * key_dim` elements, and the scratch room for the vector.
            unsafe {
                let from = std::slice::from_raw_parts(self.job.query.row(row).add(head * dim), dim);
                let to = std::slice::from_raw_parts_mut(self.scratch.query.add(vector * dim), dim);
                for (to, from) in to.iter_mut().zip(from) {
                    *to = from * self.job.shape.scale;
                }
            }
        }
    }

    /// Adds the tile that starts at `tile`; some row sees something of `slots`.
    unsafe fn tile(&self, width: Width, tile: usize, slots: Range<usize>) {
        let (job, scratch, task) = (self.job, self.scratch, self.task);
        let (layer, to) = (job.layer, scratch.tile);
        let table = &job.step.sequences[task.sequence].tables[layer.group];
        // Whole vectors of columns around the slots; what is outside of them is masked.
        let first = (slots.start - tile) / LANES * LANES;
        let columns = (slots.end - tile).next_multiple_of(LANES) - first;
        let load = LoadTile {
            cache: job.cache,
            layer,
            head: self.head,
            table,
            positions: slots.clone(),
            to,
        };
        let scores = Product {
            a: scratch.query,
            a_stride: job.shape.key_dim,
            b: to.keys.wrapping_add(first).cast(),
            b_stride: TILE,
            c: scratch.scores.wrapping_add(first),
            c_stride: TILE,
            rows: self.vectors(),
            columns,
            depth: job.shape.key_dim,
            accumulate: false,
            code: PhantomData::<F32>,
        };
        let columns = first..first + columns;
        let soften =
            Soften { job, task, tile, columns, scores: scratch.scores, state: scratch.segment };
        let sums = Product {
            a: scratch.scores.wrapping_add(slots.start - tile),
            a_stride: TILE,
            b: to.values.wrapping_add((slots.start - tile) * to.value_stride).cast(),
            b_stride: to.value_stride,
            c: scratch.segment.values,
            c_stride: to.value_stride,
            rows: self.vectors(),
            columns: to.value_stride,
            depth: slots.len(),
            accumulate: true,
            code: PhantomData::<F32>,
        };
        dispatch(width, load);
        // SAFETY: the buffers hold a tile of this shape, the scores a row of 64 for each vector,
        // the state a row of values for each.
        unsafe {
            scores.run(width);
            dispatch(width, soften);
            sums.run(width);
        }
    }
}

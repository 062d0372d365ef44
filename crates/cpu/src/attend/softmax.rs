//! The softmax of attention: online within a span (FlashAttention-2, Dao 2023, algorithm 1). Spans
//! are merged in order. Sinks and the division come at the end.

use std::ops::Range;

use super::plan::{AttendPlan, Task, Visible, visible};
use super::tile::Scratch;
use super::{AttendJob, AttendShape};
use crate::cache::TILE;
use crate::lanes::{Kernel, LANES, Lanes, math};

/// The state of some query vectors: the largest score, the sum of weights, and weighted values
/// `[stride]`. A kernel that gets a state has it for itself, and the state is valid for the
/// kernel's vectors.
#[derive(Clone, Copy)]
pub(super) struct State {
    /// The largest score. Minus infinity before any position was seen.
    pub largest: *mut f32,
    /// The sum of the weights, relative to `largest`.
    pub sum: *mut f32,
    /// The values, weighted and added.
    pub values: *mut f32,
    /// Floats from a vector's values to the next, a multiple of 16.
    pub stride: usize,
}

impl State {
    /// The state of vector `index` alone.
    #[inline(always)]
    pub(super) fn vector(self, index: usize) -> Self {
        Self {
            largest: self.largest.wrapping_add(index),
            sum: self.sum.wrapping_add(index),
            values: self.values.wrapping_add(index * self.stride),
            stride: self.stride,
        }
    }

    /// The state of a stored span: largest score and sum in the first 16 floats, then the values.
    pub(super) fn stored(partials: *mut f32, shape: &AttendShape, entry: usize) -> Self {
        let at = partials.wrapping_add(entry * shape.partial_stride());
        let (sum, values) = (at.wrapping_add(1), at.wrapping_add(LANES));
        Self { largest: at, sum, values, stride: shape.value_stride() }
    }

    /// Sets the state to that of a vector that saw no position.
    #[inline(always)]
    unsafe fn clear<L: Lanes>(self) {
        // SAFETY: the caller owns the state.
        unsafe {
            *self.largest = f32::NEG_INFINITY;
            *self.sum = 0.0;
            for i in (0..self.stride).step_by(LANES) {
                L::splat(0.0).store(self.values.add(i));
            }
        }
    }

    /// Adds a span to the spans before it.
    #[inline(always)]
    unsafe fn merge<L: Lanes>(self, part: Self) {
        // SAFETY: the caller owns both states.
        unsafe {
            let (a, b) = (*self.largest, *part.largest);
            if b == f32::NEG_INFINITY {
                return;
            }
            if a == f32::NEG_INFINITY {
                // The formulas below give the same numbers. This needs no exponentials.
                (*self.largest, *self.sum) = (b, *part.sum);
                for i in (0..self.stride).step_by(LANES) {
                    L::load(part.values.add(i)).store(self.values.add(i));
                }
                return;
            }
            let largest = a.max(b);
            let (fade_a, fade_b) = ((a - largest).exp(), (b - largest).exp());
            *self.largest = largest;
            *self.sum = *self.sum * fade_a + *part.sum * fade_b;
            for i in (0..self.stride).step_by(LANES) {
                let old = L::load(self.values.add(i)).mul(L::splat(fade_a));
                let new = L::load(part.values.add(i));
                new.fma(L::splat(fade_b), old).store(self.values.add(i));
            }
        }
    }
}

/// Clears the states of `vectors`.
pub(super) struct Clear {
    pub state: State,
    pub vectors: usize,
}

impl Kernel for Clear {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for vector in 0..self.vectors {
            // SAFETY: the state is this kernel's.
            unsafe { self.state.vector(vector).clear::<L>() };
        }
    }
}

/// Adds the spans of `vectors` to the spans before them.
pub(super) struct Merge {
    pub total: State,
    pub part: State,
    pub vectors: usize,
}

impl Kernel for Merge {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for vector in 0..self.vectors {
            // SAFETY: the states are this kernel's.
            unsafe { self.total.vector(vector).merge::<L>(self.part.vector(vector)) };
        }
    }
}

/// Copies the states of `vectors` to the places where they wait for the merge.
pub(super) struct Store<F> {
    pub state: State,
    pub vectors: usize,
    /// The place of a vector, this kernel's alone.
    pub place: F,
}

impl<F: Fn(usize) -> State> Kernel for Store<F> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for vector in 0..self.vectors {
            let (from, to) = (self.state.vector(vector), (self.place)(vector));
            // SAFETY: both states are this kernel's.
            unsafe {
                *to.largest = *from.largest;
                *to.sum = *from.sum;
                for i in (0..from.stride).step_by(LANES) {
                    L::load(from.values.add(i)).store(to.values.add(i));
                }
            }
        }
    }
}

/// Turns the scores of a tile into weights, and rescales the states accordingly.
pub(super) struct Soften<'a> {
    pub job: &'a AttendJob<'a>,
    pub task: &'a Task,
    /// Rows of the task that see something of the tile.
    pub rows: Range<usize>,
    /// First position of the tile.
    pub tile: usize,
    /// The columns of the tile that were computed, in whole vectors.
    pub columns: Range<usize>,
    /// `[vectors, 64]`, this kernel's.
    pub scores: *mut f32,
    /// The states of the task's vectors.
    pub state: State,
    /// Factors of the scores and factors of the values' weights, `[64]` each.
    pub scales: Option<(*const f32, *const f32)>,
}

impl Kernel for Soften<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (shape, task) = (self.job.shape, self.task);
        let sequence = &self.job.step.sequences[task.sequence];
        for row in self.rows.clone() {
            let seen = visible(self.job.step, sequence, task.first + row, shape.window);
            let whole = self.sees_all(&seen);
            for vector in row * shape.group..(row + 1) * shape.group {
                let scores = self.scores.wrapping_add(vector * TILE);
                // SAFETY: scores and states are this kernel's.
                unsafe {
                    match whole {
                        true => self.whole::<L>(scores, self.state.vector(vector)),
                        false => self.one::<L>(&seen, scores, self.state.vector(vector)),
                    }
                }
            }
        }
    }
}

impl Soften<'_> {
    /// Whether the scaled scores need neither cap nor mask, because the row sees the whole tile.
    fn sees_all(&self, seen: &Visible<'_>) -> bool {
        let tile = self.tile..self.tile + TILE;
        let slots = seen.slots.start <= tile.start && seen.slots.end >= tile.end;
        let tree = seen.tree.as_ref().is_some_and(|tree| tree.cached < tile.end);
        self.columns == (0..TILE) && slots && !tree && self.job.shape.softcap.is_none()
    }

    /// [`Soften::one`] for rows where [`Soften::sees_all`] holds. It computes the same numbers and
    /// keeps the scores in registers.
    #[inline(always)]
    unsafe fn whole<L: Lanes>(&self, scores: *mut f32, state: State) {
        const VECTORS: usize = TILE / LANES;
        // SAFETY: the scores are of a tile, and the state is the kernel's.
        unsafe {
            let mut x: [L; VECTORS] = std::array::from_fn(|i| L::load(scores.add(i * LANES)));
            if let Some((keys, _)) = self.scales {
                for (i, x) in x.iter_mut().enumerate() {
                    *x = x.mul(L::load(keys.add(i * LANES)));
                }
            }
            let most = x.iter().fold(L::splat(f32::NEG_INFINITY), |most, x| most.max(*x)).largest();
            if most == f32::NEG_INFINITY {
                (0..VECTORS).for_each(|i| L::splat(0.0).store(scores.add(i * LANES)));
                return;
            }
            let largest = (*state.largest).max(most);
            let mut sum = L::splat(0.0);
            for (i, x) in x.into_iter().enumerate() {
                let weight = math::exp(x.sub(L::splat(largest)));
                sum = sum.add(weight);
                let weight = match self.scales {
                    None => weight,
                    Some((_, values)) => weight.mul(L::load(values.add(i * LANES))),
                };
                weight.store(scores.add(i * LANES));
            }
            self.settle::<L>(state, largest, sum.sum());
        }
    }

    #[inline(always)]
    unsafe fn one<L: Lanes>(&self, seen: &Visible<'_>, scores: *mut f32, state: State) {
        let columns = self.columns.clone();
        // SAFETY: all accesses are to `columns` of the row, and to the state.
        unsafe {
            self.cap_and_mask::<L>(seen, scores);
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
            let largest = (*state.largest).max(most);
            let mut sum = L::splat(0.0);
            for i in columns.step_by(LANES) {
                let weight = math::exp(L::load(scores.add(i)).sub(L::splat(largest)));
                sum = sum.add(weight);
                match self.scales {
                    None => weight.store(scores.add(i)),
                    Some((_, values)) => weight.mul(L::load(values.add(i))).store(scores.add(i)),
                }
            }
            self.settle::<L>(state, largest, sum.sum());
        }
    }

    /// Adds the sum of a tile's weights and rescales the state. `largest` is the largest score so
    /// far.
    #[inline(always)]
    unsafe fn settle<L: Lanes>(&self, state: State, largest: f32, sum: f32) {
        // SAFETY: the state is the kernel's.
        unsafe {
            let before = *state.largest;
            *state.largest = largest;
            if before == largest || before == f32::NEG_INFINITY {
                // There is nothing to rescale.
                *state.sum += sum;
                return;
            }
            let fade = (before - largest).exp();
            *state.sum = *state.sum * fade + sum;
            for i in (0..state.stride).step_by(LANES) {
                let value = L::load(state.values.add(i)).mul(L::splat(fade));
                value.store(state.values.add(i));
            }
        }
    }

    /// Applies the soft cap, and writes minus infinity where the row does not see.
    #[inline(always)]
    unsafe fn cap_and_mask<L: Lanes>(&self, seen: &Visible<'_>, scores: *mut f32) {
        let (tile, columns) = (self.tile, self.columns.clone());
        let low = seen.slots.start.max(tile + columns.start) - tile;
        let high = seen.slots.end.min(tile + columns.end).saturating_sub(tile);
        // SAFETY: all accesses are to `columns` of the row.
        unsafe {
            if let Some((keys, _)) = self.scales {
                for i in columns.clone().step_by(LANES) {
                    let x = L::load(scores.add(i)).mul(L::load(keys.add(i)));
                    x.store(scores.add(i));
                }
            }
            if let Some(cap) = self.job.shape.softcap {
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
        }
    }
}

/// Divides by the sum (and the sink) and stores a row's head.
pub(super) struct Finish<'a> {
    pub job: &'a AttendJob<'a>,
    pub row: usize,
    /// The query head.
    pub head: usize,
    /// The state of one vector.
    pub state: State,
}

impl Kernel for Finish<'_> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (job, state, dim) = (self.job, self.state, self.job.shape.value_dim);
        // SAFETY: the state is this kernel's, and the row has `heads * value_dim` elements of
        // which this head's are nobody else's.
        unsafe {
            let (mut sum, mut fade) = (*state.sum, 1.0);
            if let Some(sinks) = job.sinks {
                let sink = sinks[self.head];
                let largest = state.largest.read().max(sink);
                fade = (*state.largest - largest).exp();
                sum = sum * fade + (sink - largest).exp();
            }
            // A row that sees nothing (only a malformed tree has one) gives zeros.
            let factor = L::splat(if sum > 0.0 { fade / sum } else { 0.0 });
            let out = job.out.row(self.row).add(self.head * dim);
            for i in (0..dim).step_by(LANES) {
                L::load(state.values.add(i)).mul(factor).store_first(out.add(i), dim - i);
            }
        }
    }
}

/// Merges the stored spans of rows that were split.
pub(super) struct MergeSplits<'a> {
    pub job: &'a AttendJob<'a>,
    pub plan: &'a AttendPlan,
    /// The vectors to merge, counted over splits, heads and vectors.
    pub mine: Range<usize>,
    pub scratch: Scratch,
    pub partials: *mut f32,
}

impl Kernel for MergeSplits<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self) {
        let (job, shape) = (self.job, self.job.shape);
        let state = self.scratch.total;
        let mut before = 0;
        for split in &self.plan.splits {
            let stored = &split.stored;
            let vectors = stored.vectors * shape.kv_heads;
            for index in self.mine.start.max(before)..self.mine.end.min(before + vectors) {
                let (head, vector) =
                    ((index - before) / stored.vectors, (index - before) % stored.vectors);
                // SAFETY: the tasks have stored every span; the scratch is this worker's.
                unsafe {
                    state.clear::<L>();
                    for span in stored.first..stored.first + stored.count {
                        let entry = stored.entry(head, vector, span);
                        state.merge::<L>(State::stored(self.partials, shape, entry));
                    }
                }
                let row = split.row + vector / shape.group;
                let head = head * shape.group + vector % shape.group;
                Finish { job, row, head, state }.run::<L>();
            }
            before += vectors;
        }
    }
}

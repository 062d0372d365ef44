//! Divides attention into pieces: which rows and spans a worker computes.

use std::ops::Range;

use lathe_program::{Step, StepSequence};

use super::{AttendShape, RowForm, SPAN};

/// With fewer pieces a worker than this, pieces are also cut along the positions.
pub(super) const ITEMS_PER_WORKER: usize = 2;

/// Rows of one sequence that read their positions together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Task {
    /// Index into the step's sequences.
    pub sequence: usize,
    /// First row, counted within the sequence.
    pub first: usize,
    /// Rows.
    pub rows: usize,
    /// The spans to compute.
    pub spans: Range<usize>,
    /// Where its spans are stored, if other tasks compute the rest of these rows' spans.
    pub stored: Option<Stored>,
    /// Whether its products are split in two parts.
    pub split: bool,
}

/// Where the spans of some rows are stored before they are merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    /// The place of the first stored span.
    pub base: usize,
    /// The number of the first span.
    pub first: usize,
    /// The number of spans.
    pub count: usize,
    /// Query vectors of a key head.
    pub vectors: usize,
}

impl Stored {
    /// The place of one span of one vector.
    pub(super) fn entry(&self, head: usize, vector: usize, span: usize) -> usize {
        self.base + (head * self.vectors + vector) * self.count + span - self.first
    }
}

/// Rows whose spans are computed by several tasks and then merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Split {
    /// First row of the step.
    pub row: usize,
    /// Where the spans are stored.
    pub stored: Stored,
}

/// The pieces of one attention.
#[derive(Debug, Default)]
pub(super) struct AttendPlan {
    /// The tasks. Each is done once for each key head.
    pub tasks: Vec<Task>,
    /// Rows that need a merge.
    pub splits: Vec<Split>,
}

/// The positions that a row sees: a range, and the rows of its tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Visible<'a> {
    /// A range of slots.
    pub slots: Range<usize>,
    /// What it sees from slot `cached` on, if it is a row of a tree.
    pub tree: Option<Tree<'a>>,
}

/// What a row of a draft tree sees of its own step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Tree<'a> {
    /// Slot of the sequence's first row.
    pub cached: usize,
    /// Bit `j` is set if the row sees row `j`.
    pub ancestors: u64,
    /// Positions of the sequence's rows.
    pub positions: &'a [u32],
    /// The first position that the window includes.
    pub first_position: usize,
}

impl Tree<'_> {
    /// Whether the row sees `slot`, which is at or after `cached`.
    pub(super) fn sees(&self, slot: usize) -> bool {
        let row = slot - self.cached;
        row < self.positions.len()
            && row < 64
            && self.ancestors >> row & 1 == 1
            && self.positions[row] as usize >= self.first_position
    }
}

/// What row `row` of `sequence` sees.
pub(super) fn visible<'a>(
    step: &'a Step,
    sequence: &'a StepSequence,
    row: usize,
    window: Option<usize>,
) -> Visible<'a> {
    let first_row = sequence.first_row as usize;
    let position = step.positions[first_row + row] as usize;
    let first_position = window.map_or(0, |w| (position + 1).saturating_sub(w));
    let cached = sequence.cached as usize;
    match &sequence.ancestors {
        None => Visible { slots: first_position..cached + row + 1, tree: None },
        Some(ancestors) => Visible {
            slots: first_position.min(cached)..cached + sequence.rows as usize,
            tree: Some(Tree {
                cached,
                ancestors: ancestors[row],
                positions: &step.positions[first_row..first_row + sequence.rows as usize],
                first_position,
            }),
        },
    }
}

/// The slots that any of `rows` rows from `first` on sees.
pub(super) fn seen_by_all(
    step: &Step,
    sequence: &StepSequence,
    first: usize,
    rows: usize,
    window: Option<usize>,
) -> Range<usize> {
    let mut all = visible(step, sequence, first, window).slots;
    for row in first + 1..first + rows {
        let slots = visible(step, sequence, row, window).slots;
        all = all.start.min(slots.start)..all.end.max(slots.end);
    }
    all
}

impl AttendPlan {
    /// A plan that holds the pieces of `rows_max` rows without allocating.
    pub(super) fn with_capacity(rows_max: usize, workers: usize) -> Self {
        let extra = 2 * ITEMS_PER_WORKER * ITEMS_PER_WORKER * workers * workers;
        Self {
            tasks: Vec::with_capacity(rows_max + extra.min(1 << 16)),
            splits: Vec::with_capacity(ITEMS_PER_WORKER * workers),
        }
    }

    /// Cuts the rows of one form in `step` into pieces for the workers. If the products of rows in
    /// the prefill form are `split`, these rows have pieces of their own. At most `capacity` spans
    /// are stored for a merge.
    pub(super) fn fill(
        &mut self,
        step: &Step,
        (form, split): (RowForm, bool),
        shape: &AttendShape,
        (workers, capacity): (usize, usize),
    ) {
        self.tasks.clear();
        self.splits.clear();
        // The last rows see the most positions. They come first, so that no worker ends with a long
        // piece.
        let stretches = |sequence: &StepSequence| {
            let [prefill, others] = form.rows(sequence);
            match split {
                true => [(others, false), (prefill, true)],
                // The two ranges are neighbours, so they are one.
                false if prefill.is_empty() => [(others, false), (0..0, false)],
                false => [(prefill.start..prefill.end.max(others.end), false), (0..0, false)],
            }
        };
        let pieces_of =
            |(rows, split): (Range<usize>, bool)| rows.len().div_ceil(shape.rows_per_task(split));
        let pieces: usize = step.sequences.iter().flat_map(&stretches).map(pieces_of).sum();
        let wanted = ITEMS_PER_WORKER * workers;
        let items = pieces * shape.kv_heads;
        let parts =
            if workers == 1 || items >= wanted { 1 } else { (2 * wanted).div_ceil(items.max(1)) };
        let mut stored = 0;
        let all = step.sequences.iter().enumerate();
        let all = all.flat_map(|(index, s)| stretches(s).map(|stretch| (index, s, stretch)));
        for (index, sequence, (Range { start, end }, split)) in all {
            let rows = end - start;
            let rows_per_task = shape.rows_per_task(split);
            for piece in (0..rows.div_ceil(rows_per_task)).rev() {
                let first = start + piece * rows_per_task;
                let rows = rows_per_task.min(end - first);
                let slots = seen_by_all(step, sequence, first, rows, shape.window);
                let spans = slots.start / SPAN..slots.end.div_ceil(SPAN);
                let entries = spans.len() * rows * shape.group * shape.kv_heads;
                let parts = if stored + entries <= capacity { parts.min(spans.len()) } else { 1 };
                if parts <= 1 {
                    let stored = None;
                    self.tasks.push(Task { sequence: index, first, rows, spans, stored, split });
                    continue;
                }
                let vectors = rows * shape.group;
                let place =
                    Stored { base: stored, first: spans.start, count: spans.len(), vectors };
                for part in 0..parts {
                    let cut = crate::gang::share(spans.len(), part, parts);
                    let spans = spans.start + cut.start..spans.start + cut.end;
                    self.tasks.push(Task {
                        sequence: index,
                        first,
                        rows,
                        spans,
                        stored: Some(place),
                        split,
                    });
                }
                self.splits.push(Split { row: sequence.first_row as usize + first, stored: place });
                stored += entries;
            }
        }
    }
}

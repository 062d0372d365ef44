//! `Step`: the rows of one run of a program, and how their tokens are chosen.
//!
//! Prefill chunks, prefix hits, decoding and tree verification differ only in this data. A step has
//! no block tables: an executor keeps them, and a step tells the changes ([`TableChange`]).

use std::sync::Arc;

use crate::sampling::{Sampling, TokenCounts, TokenMask};

/// The most rows of a draft tree: the bits of an ancestor mask.
pub const TREE_ROWS_MAX: usize = 64;

/// The number of a sequence in an executor, below [`crate::ExecutorLimits::sequences_max`]. After
/// [`TableChange::Clear`] another sequence may use the number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// The token of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    /// A token id.
    Given(u32),
    /// The token that a choice of the step submitted just before chose. The number is the index in
    /// [`Step::choices`]. If that choice had no token, the row runs token 0, and its result is
    /// meaningless.
    Chosen(u32),
}

impl From<u32> for TokenSource {
    fn from(token: u32) -> Self {
        TokenSource::Given(token)
    }
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSequence {
    /// The sequence whose cache the rows read and write.
    pub id: SequenceId,
    /// Its first row in the step.
    pub first_row: u32,
    /// The number of its rows, which are consecutive.
    pub rows: u32,
    /// Tokens of this sequence in the cache before this step. Without a tree, row `i` of the
    /// sequence is at position `cached + i` and sees every position up to its own.
    pub cached: u32,
    /// Rows at positions below this may use the forms that suit many rows: the expanded form of
    /// latent attention, and products that share decoded weights among rows. All others are
    /// computed like decoding rows ([`crate::Executor::expanded_until`]). The number is the same in
    /// every step of a request, so that no schedule changes the form of a row. For a tree it is at
    /// most `cached`.
    pub expanded: u32,
    /// Whether the rows use the long rotary tables ([`crate::Program::long_rope`]). It is the same
    /// for all cached rows of the text. When a text outgrows the short tables, it is computed again
    /// from the start.
    pub long_rope: bool,
    /// The ancestors of a draft tree's rows; `None` for causal rows. Row `i` is stored at slot
    /// `cached + i` and has the position in [`Step::positions`]. It sees the cache up to `cached`,
    /// and row `j` of this sequence if bit `j` of `ancestors[i]` is set (its own bit is set). A
    /// window counts from the rows' positions. A tree has at most [`TREE_ROWS_MAX`] rows.
    pub ancestors: Option<Vec<u64>>,
}

/// A change of an executor's block tables. The changes of a step are applied in order, before its
/// rows run and after the rows of every step submitted earlier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableChange {
    /// Empties all tables of a sequence, which ended or begins again. They then begin at block 0.
    Clear {
        /// The sequence.
        sequence: SequenceId,
    },
    /// Appends pages to a table.
    Extend {
        /// The sequence.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// Page numbers.
        pages: Vec<u32>,
    },
    /// Releases the blocks before `first`, which slid out of the group's window. An empty table
    /// then begins at `first`.
    Slide {
        /// The sequence.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// The first block that stays, counted from position 0. It is not before the table's first
        /// block.
        first: u32,
    },
    /// Releases blocks at the end.
    Truncate {
        /// The sequence.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// One past the last block that stays, counted from position 0.
        end: u32,
    },
}

/// What to do with the logits of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The row.
    pub row: u32,
    /// How to choose a token. `None` chooses none (scoring, evaluation).
    pub sampling: Option<Sampling>,
    /// The position of the chosen token in its text. The random number depends on this and on the
    /// seed alone.
    pub counter: u64,
    /// The tokens that penalties count, without those of [`TokenSource::Chosen`] rows. The executor
    /// counts each such row that this row sees (itself included) as generated once more.
    pub counts: Option<Arc<TokenCounts>>,
    /// Added to the logits of these tokens, in this order. Minus infinity forbids a token.
    pub bias: Option<Arc<[(u32, f32)]>>,
    /// The tokens that may be chosen. `None` means all.
    pub mask: Option<Arc<TokenMask>>,
    /// The results besides the token.
    pub report: Report,
}

impl Choice {
    /// Asks for the logits of `row` and chooses no token.
    pub fn logits_of(row: u32) -> Self {
        let report = Report { logprobs: None, logits: true };
        Choice { sampling: None, report, ..Choice::sample(row, Sampling::default(), 0) }
    }

    /// Chooses the token of `row`, without penalties, bias, mask or report.
    pub fn sample(row: u32, sampling: Sampling, counter: u64) -> Self {
        Choice {
            row,
            sampling: Some(sampling),
            counter,
            counts: None,
            bias: None,
            mask: None,
            report: Report::default(),
        }
    }
}

/// The results of a choice besides its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// Asks for the log-probability of the chosen token and of this many best tokens.
    pub logprobs: Option<u32>,
    /// Asks for the whole row of logits, as the program makes them.
    pub logits: bool,
}

/// The values of one [`crate::Op::Input`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepInput {
    /// `[rows, width]`.
    pub values: Vec<f32>,
}

/// The rows of one run of a program, their sequences, and the choices of tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// The token of each row.
    pub tokens: Vec<TokenSource>,
    /// The position of each row, for rotary tables.
    pub positions: Vec<u32>,
    /// The sequences, in the order of their rows. They cover the rows without gaps.
    pub sequences: Vec<StepSequence>,
    /// Changes of block tables, applied in order before the rows run.
    pub tables: Vec<TableChange>,
    /// The choices, ascending by row, at most one for each row.
    pub choices: Vec<Choice>,
    /// One for each [`crate::Op::Input`] of the program, by its number.
    pub inputs: Vec<StepInput>,
}

/// A copy of one token's slot in the cache of a sequence, in all layers and groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotMove {
    /// The sequence.
    pub sequence: SequenceId,
    /// The slot to copy, a position of the sequence.
    pub from: u32,
    /// The slot to overwrite.
    pub to: u32,
}

/// A malformed step: a bug of the scheduler, found before the step runs.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("invalid step: {0}")]
pub struct StepError(pub String);

impl Step {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Empties the step and keeps its memory.
    pub fn clear(&mut self) {
        self.tokens.clear();
        self.positions.clear();
        self.sequences.clear();
        self.tables.clear();
        self.choices.clear();
        self.inputs.clear();
    }
}

impl StepSequence {
    /// The rows' range in the step.
    pub fn row_range(&self) -> std::ops::Range<usize> {
        self.first_row as usize..(self.first_row + self.rows) as usize
    }

    /// How many of the sequence's first rows are at positions below [`StepSequence::expanded`].
    pub fn rows_expanded(&self) -> usize {
        self.expanded.saturating_sub(self.cached).min(self.rows) as usize
    }

    /// One past the last cache slot that the step writes: `cached + rows`.
    pub fn slots_end(&self) -> usize {
        self.cached as usize + self.rows as usize
    }

    /// Whether row `row` of the sequence sees its row `other`.
    pub fn sees(&self, row: usize, other: usize) -> bool {
        match &self.ancestors {
            None => other <= row,
            Some(ancestors) => ancestors[row] >> other & 1 == 1,
        }
    }
}

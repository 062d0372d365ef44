//! `Step`: the rows that one run of a program works on, and how their tokens are chosen.
//!
//! Prefill chunks, prefix hits, decoding and tree verification differ only in this data. Block
//! tables are not in it: an executor keeps them, and a step says what changes ([`TableChange`]).

use std::sync::Arc;

use crate::sampling::{Sampling, TokenCounts, TokenMask};

/// Rows that a draft tree may have: the bits of an ancestor mask.
pub const TREE_ROWS_MAX: usize = 64;

/// A sequence of an executor, below [`crate::ExecutorLimits::sequences_max`]. The number is free
/// for another sequence after [`TableChange::Clear`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SequenceId(pub u32);

/// The token of a row.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenSource {
    /// A token id.
    Given(u32),
    /// The token that this choice of the step submitted just before chose, by its index in
    /// [`Step::choices`]. If it could choose none, the row runs token 0 and means nothing.
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
    /// Whose cache the rows read and write.
    pub id: SequenceId,
    /// First row of the step that belongs to this sequence.
    pub first_row: u32,
    /// Rows, consecutive.
    pub rows: u32,
    /// Tokens that the cache holds for this sequence before this step. Without a tree, row `i`
    /// of the sequence is at position `cached + i` and sees every position up to its own.
    pub cached: u32,
    /// Rows at positions below this one may be computed in the forms that pay for many rows: the
    /// expanded form of latent attention, and products whose decoded weights many rows share. All
    /// others are computed as decoding rows are ([`crate::Executor::expanded_until`]). The same in
    /// every step of a request, so that no schedule changes which form a row gets; at most `cached`
    /// for a tree.
    pub expanded: u32,
    /// Whether the rows turn by the long rotary tables ([`crate::Program::long_rope`]). The same
    /// for all that the cache holds of the text: when a text outgrows the short tables, it begins
    /// anew.
    pub long_rope: bool,
    /// For a draft tree: row `i` is stored at slot `cached + i`, has the position given in
    /// [`Step::positions`], and sees the cache up to `cached` and those rows `j` of this
    /// sequence for which bit `j` of `ancestors[i]` is set (itself included). A window counts from
    /// the rows' positions. At most [`TREE_ROWS_MAX`] rows. `None`: causal.
    pub ancestors: Option<Vec<u64>>,
}

/// A change of the block tables that an executor keeps. The changes of a step are applied in order,
/// before its rows run and after the rows of every step submitted earlier.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TableChange {
    /// The sequence is over, or begins anew: all its tables are empty and begin at block 0.
    Clear {
        /// Whose.
        sequence: SequenceId,
    },
    /// Appends pages to a table.
    Extend {
        /// Whose.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// Page numbers.
        pages: Vec<u32>,
    },
    /// Blocks before `first` slid out of the group's window. An empty table then begins there.
    Slide {
        /// Whose.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// The first block that stays, counted from position 0; not before the table's first.
        first: u32,
    },
    /// Gives up blocks at the end.
    Truncate {
        /// Whose.
        sequence: SequenceId,
        /// The KV group.
        group: u32,
        /// One past the last block that stays, counted from position 0.
        end: u32,
    },
}

/// What is wanted of the logits of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// The row.
    pub row: u32,
    /// How a token is chosen; `None` chooses none (scoring, evaluation).
    pub sampling: Option<Sampling>,
    /// With the seed, all that the random number depends on: the position that the chosen token
    /// has in its text.
    pub counter: u64,
    /// The tokens that penalties look at, but for those of [`TokenSource::Chosen`] rows: the
    /// executor counts each of these that the row sees (itself included) as generated once more.
    pub counts: Option<Arc<TokenCounts>>,
    /// Added to the logits of these tokens, in this order; minus infinity forbids one.
    pub bias: Option<Arc<[(u32, f32)]>>,
    /// The tokens that may be chosen; `None`: all.
    pub mask: Option<Arc<TokenMask>>,
    /// What is handed out besides the token.
    pub report: Report,
}

impl Choice {
    /// The logits of `row`, and no token.
    pub fn logits_of(row: u32) -> Self {
        let report = Report { logprobs: None, logits: true };
        Choice { sampling: None, report, ..Choice::sample(row, Sampling::default(), 0) }
    }

    /// The token of `row`, without penalties, bias, mask or report.
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

/// What a choice hands out besides its token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Report {
    /// The log-probability of the chosen token, and those of this many best tokens.
    pub logprobs: Option<u32>,
    /// The whole row of logits, as the program makes them.
    pub logits: bool,
}

/// The values of one [`crate::Op::Input`].
#[derive(Debug, Clone, PartialEq, Default)]
pub struct StepInput {
    /// `[rows, width]`.
    pub values: Vec<f32>,
}

/// Rows of tokens, where they belong, and what is wanted of them.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Step {
    /// Token of each row.
    pub tokens: Vec<TokenSource>,
    /// Position of each row (for rotary tables).
    pub positions: Vec<u32>,
    /// The sequences, in order of their rows, which they cover without gaps.
    pub sequences: Vec<StepSequence>,
    /// Changes of block tables, applied in order before the rows run.
    pub tables: Vec<TableChange>,
    /// What is wanted of rows' logits, ascending by row, at most one a row.
    pub choices: Vec<Choice>,
    /// One for each [`crate::Op::Input`] of the program, by its number.
    pub inputs: Vec<StepInput>,
}

/// A token's place in the cache of a sequence moves: all layers and groups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotMove {
    /// Whose.
    pub sequence: SequenceId,
    /// The slot to copy, a position of the sequence.
    pub from: u32,
    /// Where to.
    pub to: u32,
}

/// What is wrong with a step: a scheduler's mistake, found before it runs.
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

    /// Rows at the sequence's beginning that are below [`StepSequence::expanded`].
    pub fn rows_expanded(&self) -> usize {
        self.expanded.saturating_sub(self.cached).min(self.rows) as usize
    }

    /// One past the last cache slot that the step writes: `cached + rows`.
    pub fn slots_end(&self) -> usize {
        self.cached as usize + self.rows as usize
    }

    /// Whether row `row` of the sequence sees row `other` of it.
    pub fn sees(&self, row: usize, other: usize) -> bool {
        match &self.ancestors {
            None => other <= row,
            Some(ancestors) => ancestors[row] >> other & 1 == 1,
        }
    }
}

//! `Step`: the rows that one run of a program works on.
//!
//! Prefill chunks, prefix hits, decoding and tree verification differ only in this data.

/// The blocks of one sequence in one KV group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockTable {
    /// Index of the first block that is still held: position `p` lies in
    /// `blocks[p / block_tokens - first]`. Blocks before it slid out of the window.
    pub first: u32,
    /// Page numbers.
    pub blocks: Vec<u32>,
}

/// One sequence's part of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepSequence {
    /// First row of the step that belongs to this sequence.
    pub first_row: u32,
    /// Rows, consecutive.
    pub rows: u32,
    /// Tokens that the cache holds for this sequence before this step; without a tree, row `i`
    /// of the sequence is at position `cached + i` and sees every position up to its own.
    pub cached: u32,
    /// One table a KV group, long enough for `cached + rows` positions.
    pub tables: Vec<BlockTable>,
    /// For a draft tree: row `i` is stored at slot `cached + i`, has the position given in
    /// [`Step::positions`], and sees the cache up to `cached` and those rows `j` of this
    /// sequence for which bit `j` of `ancestors[i]` is set (itself included). `None`: causal.
    pub ancestors: Option<Vec<u64>>,
}

/// Rows of tokens and where they belong.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    /// Token of each row.
    pub tokens: Vec<u32>,
    /// Position of each row (for rotary tables).
    pub positions: Vec<u32>,
    /// The sequences, in order of their rows, which they cover without gaps.
    pub sequences: Vec<StepSequence>,
    /// Rows whose logits are wanted, ascending.
    pub logits_rows: Vec<u32>,
}

/// What is wrong with a step: a scheduler's mistake, found before it runs.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("invalid step: {0}")]
pub struct StepError(pub String);

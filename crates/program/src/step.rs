//! `Step`: the rows that one run of a program works on.
//!
//! Prefill chunks, prefix hits, decoding and tree verification differ only in this data.

use crate::kv::KvLayout;
use crate::program::Program;

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
    /// Rows at positions below this one may be computed in the forms that pay for many rows: the
    /// expanded form of latent attention, and products whose decoded weights many rows share. All
    /// others are computed as decoding rows are ([`crate::Executor::expanded_until`]). The same in
    /// every step of a request, so that no schedule changes which form a row gets; at most `cached`
    /// for a tree.
    pub expanded: u32,
    /// For a draft tree: row `i` is stored at slot `cached + i`, has the position given in
    /// [`Step::positions`], and sees the cache up to `cached` and those rows `j` of this
    /// sequence for which bit `j` of `ancestors[i]` is set (itself included); a window counts from
    /// the rows' positions. At most 64 rows. `None`: causal.
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

/// Rows that a draft tree may have: the bits of an ancestor mask.
pub const TREE_ROWS_MAX: usize = 64;

impl Step {
    /// Rows of the step.
    pub fn rows(&self) -> usize {
        self.tokens.len()
    }

    /// Checks everything that a backend relies on: sequences cover the rows in order, tokens and
    /// positions are in range, tables hold every position that a row can see or is stored at, no
    /// page is written by two sequences or groups, masks name rows of their own sequence.
    ///
    /// # Errors
    /// [`StepError`] names the sequence or row, what was found and what was expected.
    pub fn validate(&self, program: &Program) -> Result<(), StepError> {
        self.validate_with(program, &mut Vec::new())
    }

    /// As [`Step::validate`], with memory for page numbers that is kept from step to step: one
    /// that has grown to the largest step is not allocated again.
    ///
    /// # Errors
    /// As [`Step::validate`].
    pub fn validate_with(&self, program: &Program, pages: &mut Vec<u32>) -> Result<(), StepError> {
        let rows = self.rows();
        check(rows > 0, || "it has no rows".to_owned())?;
        check(self.positions.len() == rows, || {
            format!("{rows} tokens but {} positions", self.positions.len())
        })?;
        for (row, token) in self.tokens.iter().enumerate() {
            check((*token as usize) < program.vocabulary, || {
                format!("row {row}: token {token}, the vocabulary has {}", program.vocabulary)
            })?;
        }
        for (row, position) in self.positions.iter().enumerate() {
            check((*position as usize) < program.context_max, || {
                format!(
                    "row {row}: position {position}, the context ends at {}",
                    program.context_max
                )
            })?;
        }
        let mut next = 0;
        for (index, sequence) in self.sequences.iter().enumerate() {
            check(sequence.first_row as usize == next && sequence.rows > 0, || {
                let (first, count) = (sequence.first_row, sequence.rows);
                format!(
                    "sequence {index}: {count} rows from row {first}, expected them from {next}"
                )
            })?;
            next += sequence.rows as usize;
            check(next <= rows, || format!("sequence {index}: ends at row {next} of {rows}"))?;
            let at = |StepError(reason)| StepError(format!("sequence {index}: {reason}"));
            self.check_positions(sequence).map_err(at)?;
            sequence.check_tables(&program.kv).map_err(at)?;
        }
        check(next == rows, || format!("sequences cover {next} of {rows} rows"))?;
        self.check_logits_rows()?;
        self.check_written_pages(&program.kv, pages)
    }

    /// Checks that every page number is below `kv_blocks`.
    ///
    /// # Errors
    /// [`StepError`] names the sequence and the page.
    pub fn check_blocks(&self, kv_blocks: usize) -> Result<(), StepError> {
        for (index, sequence) in self.sequences.iter().enumerate() {
            for page in sequence.tables.iter().flat_map(|table| &table.blocks) {
                check((*page as usize) < kv_blocks, || {
                    format!("sequence {index}: page {page}, the cache has {kv_blocks}")
                })?;
            }
        }
        Ok(())
    }

    fn check_positions(&self, sequence: &StepSequence) -> Result<(), StepError> {
        let (first, rows) = (sequence.first_row as usize, sequence.rows as usize);
        let positions = &self.positions[first..first + rows];
        let Some(ancestors) = &sequence.ancestors else {
            for (i, position) in positions.iter().enumerate() {
                let expected = sequence.cached as usize + i;
                check(*position as usize == expected, || {
                    format!("row {i}: position {position}, expected {expected} without a tree")
                })?;
            }
            return Ok(());
        };
        check(sequence.expanded <= sequence.cached, || {
            format!("rows below {} are expanded, but those of a tree never", sequence.expanded)
        })?;
        check(ancestors.len() == rows && rows <= TREE_ROWS_MAX, || {
            format!("{} masks for {rows} rows (at most {TREE_ROWS_MAX})", ancestors.len())
        })?;
        let beyond = if rows == TREE_ROWS_MAX { 0 } else { u64::MAX << rows };
        for (i, (mask, position)) in ancestors.iter().zip(positions).enumerate() {
            check(mask & beyond == 0, || {
                format!("row {i}: mask {mask:#x} names rows past {rows}")
            })?;
            check(mask >> i & 1 == 1, || format!("row {i}: mask {mask:#x} leaves itself out"))?;
            check(*position >= sequence.cached, || {
                format!("row {i}: position {position} lies in the {} cached", sequence.cached)
            })?;
        }
        Ok(())
    }

    fn check_logits_rows(&self) -> Result<(), StepError> {
        let rows = self.rows();
        for (i, row) in self.logits_rows.iter().enumerate() {
            check((*row as usize) < rows, || format!("logits of row {row} of {rows}"))?;
            check(i == 0 || self.logits_rows[i - 1] < *row, || {
                format!("logits rows do not ascend at row {row}")
            })?;
        }
        Ok(())
    }

    fn check_written_pages(
        &self,
        layout: &KvLayout,
        pages: &mut Vec<u32>,
    ) -> Result<(), StepError> {
        pages.clear();
        for sequence in &self.sequences {
            let (cached, end) = (sequence.cached as usize, sequence.slots_end());
            for table in &sequence.tables {
                let first = cached / layout.block_tokens - table.first as usize;
                let last = (end - 1) / layout.block_tokens - table.first as usize;
                pages.extend(&table.blocks[first..=last]);
            }
        }
        pages.sort_unstable();
        match pages.windows(2).find(|pair| pair[0] == pair[1]) {
            Some(pair) => Err(StepError(format!("page {} is written twice", pair[0]))),
            None => Ok(()),
        }
    }
}

impl StepSequence {
    /// Rows at the sequence's beginning that are below [`StepSequence::expanded`].
    pub fn rows_expanded(&self) -> usize {
        self.expanded.saturating_sub(self.cached).min(self.rows) as usize
    }

    /// One past the last cache slot that the step writes: `cached + rows`.
    pub fn slots_end(&self) -> usize {
        self.cached as usize + self.rows as usize
    }

    fn check_tables(&self, layout: &KvLayout) -> Result<(), StepError> {
        let groups = layout.groups.len();
        check(self.tables.len() == groups, || {
            format!("{} block tables for {groups} KV groups", self.tables.len())
        })?;
        for (group, table) in self.tables.iter().enumerate() {
            let visible = layout.first_visible(group, self.cached as usize);
            let first = table.first as usize * layout.block_tokens;
            check(first <= visible, || {
                format!("group {group}: position {visible} is visible, the table starts at {first}")
            })?;
            let end = (table.first as usize + table.blocks.len()) * layout.block_tokens;
            check(self.slots_end() <= end, || {
                format!("group {group}: {} slots, the table ends at {end}", self.slots_end())
            })?;
        }
        Ok(())
    }
}

impl BlockTable {
    /// The page and the place in it of `slot`.
    ///
    /// # Panics
    /// If the table does not hold that slot; [`Step::validate`] makes sure that it does.
    pub fn locate(&self, slot: usize, block_tokens: usize) -> (usize, usize) {
        let block = slot / block_tokens - self.first as usize;
        (self.blocks[block] as usize, slot % block_tokens)
    }
}

fn check(holds: bool, reason: impl FnOnce() -> String) -> Result<(), StepError> {
    if holds { Ok(()) } else { Err(StepError(reason())) }
}

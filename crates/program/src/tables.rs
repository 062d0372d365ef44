//! `SequenceTables`: the block tables that an executor on the host keeps between steps, and the
//! checks of a step against them.

use crate::backend::ExecutorLimits;
use crate::kv::KvLayout;
use crate::program::Program;
use crate::step::{
    SequenceId, SlotMove, Step, StepError, StepSequence, TREE_ROWS_MAX, TableChange, TokenSource,
};

/// The blocks of one sequence in one KV group.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BlockTable {
    /// Index of the first block that is still held: position `p` lies in
    /// `blocks[p / block_tokens - first]`. Blocks before it slid out of the window.
    pub first: u32,
    /// Page numbers.
    pub blocks: Vec<u32>,
}

impl BlockTable {
    /// One past the last block, counted from position 0.
    pub fn end(&self) -> u32 {
        self.first + self.blocks.len() as u32
    }

    /// The page of `slot`, and the place in the page.
    ///
    /// # Panics
    /// If the table does not hold that slot. [`SequenceTables::accept`] prevents this.
    pub fn locate(&self, slot: usize, block_tokens: usize) -> (usize, usize) {
        let block = slot / block_tokens - self.first as usize;
        (self.blocks[block] as usize, slot % block_tokens)
    }
}

/// The changes that give `sequence` these tables, one for each group, whatever it had before.
pub fn replace_tables(sequence: SequenceId, tables: &[BlockTable]) -> Vec<TableChange> {
    let mut changes = vec![TableChange::Clear { sequence }];
    for (group, table) in (0..).zip(tables) {
        if table.first > 0 {
            changes.push(TableChange::Slide { sequence, group, first: table.first });
        }
        let pages = table.blocks.clone();
        changes.push(TableChange::Extend { sequence, group, pages });
    }
    changes
}

/// The data to undo one change of one table.
#[derive(Debug, Clone, Copy)]
struct Undo {
    table: usize,
    first: u32,
    /// Pages at the end of [`SequenceTables::removed`] that were at the front of the table.
    front: usize,
    /// Pages after those, which were at the end of the table.
    back: usize,
    /// Pages that were appended.
    added: usize,
}

/// The block tables of all sequences of an executor. In steady state, accepting a step allocates no
/// memory.
#[derive(Debug, Clone, Default)]
pub struct SequenceTables {
    groups: usize,
    /// The tables, by sequence and then by group.
    tables: Vec<BlockTable>,
    undo: Vec<Undo>,
    removed: Vec<u32>,
    /// The pages that a step writes. Scratch of the checks.
    written: Vec<u32>,
    /// For each choice of the last accepted step, whether it chose a token.
    chose: Vec<bool>,
}

impl SequenceTables {
    /// Empty tables for `sequences_max` sequences.
    pub fn new(layout: &KvLayout, sequences_max: usize) -> Self {
        let groups = layout.groups.len();
        let tables = vec![BlockTable::default(); groups * sequences_max];
        Self { groups, tables, ..Self::default() }
    }

    /// The table of `sequence` in `group`.
    pub fn table(&self, sequence: SequenceId, group: usize) -> &BlockTable {
        &self.tables[sequence.0 as usize * self.groups + group]
    }

    /// Checks everything that a backend relies on, and applies the step's changes. Sequences cover
    /// the rows in order. Tokens and positions are in range. Tables hold every position that a row
    /// sees or writes. No page is written by two sequences or groups. Masks name rows of their own
    /// sequence. Choices and inputs fit the program.
    ///
    /// # Errors
    /// [`StepError`] names the sequence, row or change, what was found and what was expected. The
    /// tables are then unchanged.
    pub fn accept(
        &mut self,
        step: &Step,
        program: &Program,
        limits: &ExecutorLimits,
    ) -> Result<(), StepError> {
        let check = StepCheck { step, program, limits };
        check.rows()?;
        check.tokens(&self.chose)?;
        check.choices()?;
        check.inputs()?;
        self.undo.clear();
        self.removed.clear();
        let changed = step.tables.iter().enumerate().try_for_each(|(index, change)| {
            let at = |StepError(reason)| StepError(format!("table change {index}: {reason}"));
            self.apply(change, limits).map_err(at)
        });
        if let Err(error) = changed.and_then(|()| self.check_tables(step, &program.kv)) {
            self.take_back();
            return Err(error);
        }
        self.chose.clear();
        self.chose.extend(step.choices.iter().map(|choice| choice.sampling.is_some()));
        Ok(())
    }

    /// Checks that both slots of each move lie in the tables of all groups.
    ///
    /// # Errors
    /// [`StepError`] names the move.
    pub fn check_moves(&self, moves: &[SlotMove], layout: &KvLayout) -> Result<(), StepError> {
        for SlotMove { sequence, from, to } in moves {
            let base = sequence.0 as usize * self.groups;
            let tables = self.tables.get(base..base + self.groups);
            let tables = tables.ok_or_else(|| no_sequence(*sequence))?;
            for (group, table) in tables.iter().enumerate() {
                let held = table.first as usize * layout.block_tokens
                    ..table.end() as usize * layout.block_tokens;
                check(held.contains(&(*from as usize)) && held.contains(&(*to as usize)), || {
                    let SequenceId(id) = sequence;
                    format!("move {from} to {to}: sequence {id} holds {held:?} in group {group}")
                })?;
            }
        }
        Ok(())
    }

    fn apply(&mut self, change: &TableChange, limits: &ExecutorLimits) -> Result<(), StepError> {
        match change {
            TableChange::Clear { sequence } => {
                let base = sequence.0 as usize * self.groups;
                check((sequence.0 as usize) < limits.sequences_max, || no_sequence(*sequence).0)?;
                for table in base..base + self.groups {
                    let Self { tables, removed, undo, .. } = self;
                    let BlockTable { first, blocks } = &mut tables[table];
                    let back = blocks.len();
                    undo.push(Undo { table, first: *first, front: 0, back, added: 0 });
                    removed.append(blocks);
                    *first = 0;
                }
            }
            TableChange::Extend { sequence, group, pages } => {
                if let Some(page) = pages.iter().find(|page| **page as usize >= limits.kv_blocks) {
                    let blocks = limits.kv_blocks;
                    return Err(StepError(format!("page {page}, the cache has {blocks}")));
                }
                let table = self.index(*sequence, *group)?;
                let BlockTable { first, blocks } = &mut self.tables[table];
                blocks.extend_from_slice(pages);
                let (first, added) = (*first, pages.len());
                self.undo.push(Undo { table, first, front: 0, back: 0, added });
            }
            TableChange::Slide { sequence, group, first: to } => {
                let table = self.index(*sequence, *group)?;
                let BlockTable { first, blocks } = &mut self.tables[table];
                check(to >= first, || {
                    format!("slides to block {to}, the table begins at {first}")
                })?;
                let front = blocks.len().min((to - *first) as usize);
                self.undo.push(Undo { table, first: *first, front, back: 0, added: 0 });
                self.removed.extend(blocks.drain(..front));
                *first = *to;
            }
            TableChange::Truncate { sequence, group, end } => {
                let table = self.index(*sequence, *group)?;
                let BlockTable { first, blocks } = &mut self.tables[table];
                let held = *first..=*first + blocks.len() as u32;
                check(held.contains(end), || {
                    format!("ends at block {end}, the table has {held:?}")
                })?;
                let kept = (end - *first) as usize;
                let back = blocks.len() - kept;
                self.undo.push(Undo { table, first: *first, front: 0, back, added: 0 });
                self.removed.extend(blocks.drain(kept..));
            }
        }
        Ok(())
    }

    fn index(&self, sequence: SequenceId, group: u32) -> Result<usize, StepError> {
        let groups = self.groups;
        check((group as usize) < groups, || format!("group {group} of {groups}"))?;
        let index = sequence.0 as usize * groups + group as usize;
        if index < self.tables.len() { Ok(index) } else { Err(no_sequence(sequence)) }
    }

    /// Undoes the changes of a step that is refused.
    fn take_back(&mut self) {
        while let Some(Undo { table, first, front, back, added }) = self.undo.pop() {
            let table = &mut self.tables[table];
            table.first = first;
            table.blocks.truncate(table.blocks.len() - added);
            let start = self.removed.len() - front - back;
            table.blocks.splice(0..0, self.removed[start..start + front].iter().copied());
            table.blocks.extend(&self.removed[start + front..]);
            self.removed.truncate(start);
        }
    }

    /// Checks the tables of a step's sequences, after its changes were applied.
    fn check_tables(&mut self, step: &Step, layout: &KvLayout) -> Result<(), StepError> {
        let Self { groups, tables, written, .. } = self;
        written.clear();
        written.extend(step.sequences.iter().map(|sequence| sequence.id.0));
        no_twice(written).map_err(|id| StepError(format!("sequence id {id} occurs twice")))?;
        written.clear();
        for (index, sequence) in step.sequences.iter().enumerate() {
            let at = |reason| StepError(format!("sequence {index}: {reason}"));
            let base = sequence.id.0 as usize * *groups;
            let own = tables.get(base..base + *groups).ok_or_else(|| no_sequence(sequence.id))?;
            let (cached, end) = (sequence.cached as usize, sequence.slots_end());
            for (group, table) in own.iter().enumerate() {
                let visible = layout.first_visible(group, cached);
                let (held, held_end) = (
                    table.first as usize * layout.block_tokens,
                    table.end() as usize * layout.block_tokens,
                );
                check(held <= visible, || {
                    format!(
                        "group {group}: position {visible} is visible, the table starts at {held}"
                    )
                })
                .map_err(|StepError(reason)| at(reason))?;
                check(end <= held_end, || {
                    format!("group {group}: {end} slots, the table ends at {held_end}")
                })
                .map_err(|StepError(reason)| at(reason))?;
                let first = cached / layout.block_tokens - table.first as usize;
                let last = (end - 1) / layout.block_tokens - table.first as usize;
                written.extend(&table.blocks[first..=last]);
            }
        }
        no_twice(written).map_err(|page| StepError(format!("page {page} is written twice")))
    }
}

/// Sorts `numbers`. The error is the first number that occurs twice.
fn no_twice(numbers: &mut [u32]) -> Result<(), u32> {
    numbers.sort_unstable();
    numbers.windows(2).find(|pair| pair[0] == pair[1]).map_or(Ok(()), |pair| Err(pair[0]))
}

/// The checks that need no tables.
struct StepCheck<'a> {
    step: &'a Step,
    program: &'a Program,
    limits: &'a ExecutorLimits,
}

impl StepCheck<'_> {
    fn rows(&self) -> Result<(), StepError> {
        let Self { step, limits, .. } = self;
        let rows = step.rows();
        check(rows > 0, || "it has no rows".to_owned())?;
        check(rows <= limits.rows_max, || {
            format!("{rows} rows, this executor takes at most {}", limits.rows_max)
        })?;
        check(step.positions.len() == rows, || {
            format!("{rows} tokens but {} positions", step.positions.len())
        })?;
        let mut next = 0;
        for (index, sequence) in step.sequences.iter().enumerate() {
            check(sequence.first_row as usize == next && sequence.rows > 0, || {
                let (first, count) = (sequence.first_row, sequence.rows);
                format!(
                    "sequence {index}: {count} rows from row {first}, expected them from {next}"
                )
            })?;
            next += sequence.rows as usize;
            check(next <= rows, || format!("sequence {index}: ends at row {next} of {rows}"))?;
            let at = |StepError(reason)| StepError(format!("sequence {index}: {reason}"));
            check((sequence.id.0 as usize) < limits.sequences_max, || no_sequence(sequence.id).0)
                .map_err(at)?;
            self.positions(sequence).map_err(at)?;
        }
        check(next == rows, || format!("sequences cover {next} of {rows} rows"))
    }

    fn tokens(&self, chose: &[bool]) -> Result<(), StepError> {
        let Self { step, program, .. } = self;
        for (row, token) in step.tokens.iter().enumerate() {
            match *token {
                TokenSource::Given(token) => {
                    check((token as usize) < program.vocabulary, || {
                        let vocabulary = program.vocabulary;
                        format!("row {row}: token {token}, the vocabulary has {vocabulary}")
                    })?;
                }
                TokenSource::Chosen(choice) => {
                    check(chose.get(choice as usize) == Some(&true), || {
                        format!("row {row}: choice {choice} of the step before chose no token")
                    })?;
                }
            }
        }
        let context = program.context_max;
        for (row, position) in step.positions.iter().enumerate() {
            check((*position as usize) < context, || {
                format!("row {row}: position {position}, the context ends at {context}")
            })?;
        }
        Ok(())
    }

    fn positions(&self, sequence: &StepSequence) -> Result<(), StepError> {
        let rows = sequence.rows as usize;
        let positions = &self.step.positions[sequence.row_range()];
        let original = self.program.long_rope_after();
        check(original.is_some() || !sequence.long_rope, || {
            "a long text, but the program has no rotary table for it".to_owned()
        })?;
        if let Some(original) = original.filter(|_| !sequence.long_rope) {
            let last = positions.iter().copied().max().unwrap_or(0) as usize;
            check(last < original, || {
                format!("position {last} turns by the short table, which ends at {original}")
            })?;
        }
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

    fn choices(&self) -> Result<(), StepError> {
        let (choices, rows) = (&self.step.choices, self.step.rows());
        let vocabulary = self.program.vocabulary;
        check(choices.is_empty() || self.program.makes_logits(), || {
            format!("{} choices, but the program makes no logits", choices.len())
        })?;
        for (i, choice) in choices.iter().enumerate() {
            let row = choice.row;
            check((row as usize) < rows, || format!("a choice of row {row} of {rows}"))?;
            check(i == 0 || choices[i - 1].row < row, || {
                format!("the choices' rows do not ascend at row {row}")
            })?;
            let bias = choice.bias.iter().flat_map(|bias| bias.iter()).map(|(token, _)| *token);
            let counted = choice.counts.iter().flat_map(|counts| counts.tokens());
            if let Some(token) = bias.chain(counted).find(|token| *token as usize >= vocabulary) {
                let reason = format!("row {row}: token {token}, the vocabulary has {vocabulary}");
                return Err(StepError(reason));
            }
            let masked = choice.mask.as_ref().map_or(vocabulary, |mask| mask.vocabulary());
            check(masked == vocabulary, || {
                format!("row {row}: a mask of {masked} tokens, the vocabulary has {vocabulary}")
            })?;
        }
        Ok(())
    }

    fn inputs(&self) -> Result<(), StepError> {
        let (found, expected) = (self.step.inputs.len(), self.program.inputs());
        check(found == expected, || format!("{found} inputs, the program has {expected}"))?;
        if expected == 0 {
            return Ok(());
        }
        for (index, width) in self.program.input_widths().into_iter().enumerate() {
            let (found, rows) = (self.step.inputs[index].values.len(), self.step.rows());
            check(found == rows * width, || {
                format!("input {index}: {found} numbers, expected {rows} rows of {width}")
            })?;
        }
        Ok(())
    }
}

fn no_sequence(SequenceId(id): SequenceId) -> StepError {
    StepError(format!("sequence id {id} is beyond what this executor holds"))
}

fn check(holds: bool, reason: impl FnOnce() -> String) -> Result<(), StepError> {
    if holds { Ok(()) } else { Err(StepError(reason())) }
}

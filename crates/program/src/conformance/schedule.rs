//! Steps like those of a scheduler: several sequences in chunks, pages in any order, and blocks
//! that are released as they slide out of a window.

use super::random::Random;
use crate::program::Program;
use crate::step::{
    Choice, SequenceId, Step, StepInput, StepSequence, TREE_ROWS_MAX, TableChange, TokenSource,
};
use crate::tables::BlockTable;

/// Sequences that grow step by step, and the free pages.
#[derive(Debug, Clone)]
pub struct Schedule<'a> {
    program: &'a Program,
    free: Vec<u32>,
    sequences: Vec<Growing>,
}

#[derive(Debug, Clone)]
struct Growing {
    tokens: Vec<u32>,
    done: usize,
    tables: Vec<BlockTable>,
    /// The first two thirds of the tokens, the same in every schedule of these tokens.
    expanded: u32,
    /// The same in every schedule of these tokens, and in a tree after them.
    long_rope: bool,
}

/// The part of one sequence in a step.
#[derive(Debug, Clone)]
pub struct Chunk {
    /// The sequence.
    pub sequence: usize,
    /// Rows.
    pub rows: usize,
    /// For a tree, the parent (`None`: the last cached token) and the token of each row. A sequence
    /// does not continue after a tree.
    pub tree: Option<Vec<(Option<usize>, u32)>>,
}

impl<'a> Schedule<'a> {
    /// `sequences` of tokens over `kv_blocks` pages, in an order from `random`.
    pub fn new(
        program: &'a Program,
        sequences: Vec<Vec<u32>>,
        kv_blocks: usize,
        random: &mut Random,
    ) -> Self {
        let mut free: Vec<u32> = (0..kv_blocks as u32).collect();
        random.shuffle(&mut free);
        let tables = vec![BlockTable::default(); program.kv.groups.len()];
        let growing = |tokens: Vec<u32>| {
            let expanded = tokens.len() as u32 * 2 / 3;
            let long_rope = program.long_rope(tokens.len() + TREE_ROWS_MAX);
            Growing { tokens, done: 0, tables: tables.clone(), expanded, long_rope }
        };
        Self { program, free, sequences: sequences.into_iter().map(growing).collect() }
    }

    /// Tokens of `sequence` that have not run yet.
    pub fn left(&self, sequence: usize) -> usize {
        let sequence = &self.sequences[sequence];
        sequence.tokens.len() - sequence.done
    }

    /// Tokens of `sequence` in the cache.
    pub fn done(&self, sequence: usize) -> usize {
        self.sequences[sequence].done
    }

    /// The step of `chunks`, with the logits of all rows if the program makes any. Its inputs are
    /// random numbers near 1.
    ///
    /// # Panics
    /// If pages run out, or a chunk is longer than the rest of its sequence.
    pub fn step(&mut self, chunks: &[Chunk]) -> Step {
        let mut step = Step::default();
        for chunk in chunks {
            if self.sequences[chunk.sequence].tables.iter().all(|table| table.blocks.is_empty()) {
                let sequence = SequenceId(chunk.sequence as u32);
                step.tables.push(TableChange::Clear { sequence });
            }
            self.give_back(chunk.sequence, &mut step);
            self.take(chunk.sequence, chunk.rows, &mut step);
            let growing = &mut self.sequences[chunk.sequence];
            let cached = growing.done;
            let mut ancestors = chunk.tree.as_ref().map(|_| Vec::new());
            match (&chunk.tree, &mut ancestors) {
                (Some(tree), Some(masks)) => {
                    for (i, (parent, token)) in tree.iter().enumerate() {
                        let above = parent.map_or(0, |parent| masks[parent]);
                        masks.push(above | 1u64 << i);
                        step.tokens.push(TokenSource::Given(*token));
                        step.positions.push((cached + above.count_ones() as usize) as u32);
                    }
                }
                _ => {
                    let tokens = &growing.tokens[cached..cached + chunk.rows];
                    step.tokens.extend(tokens.iter().map(|token| TokenSource::Given(*token)));
                    step.positions.extend(cached as u32..(cached + chunk.rows) as u32);
                    growing.done += chunk.rows;
                }
            }
            step.sequences.push(StepSequence {
                id: SequenceId(chunk.sequence as u32),
                first_row: (step.tokens.len() - chunk.rows) as u32,
                rows: chunk.rows as u32,
                cached: cached as u32,
                expanded: growing.expanded,
                long_rope: growing.long_rope,
                ancestors,
            });
        }
        if self.program.makes_logits() {
            step.choices = (0..step.rows() as u32).map(Choice::logits_of).collect();
        }
        step.inputs = self.inputs(&step);
        step
    }

    /// Takes some of the sequences that have tokens left, with at most `rows_max` rows in total.
    /// `None` when all are done.
    pub fn random_step(&mut self, rows_max: usize, random: &mut Random) -> Option<Step> {
        let mut open: Vec<usize> =
            (0..self.sequences.len()).filter(|index| self.left(*index) > 0).collect();
        random.shuffle(&mut open);
        let (mut chunks, mut room) = (Vec::new(), rows_max);
        for sequence in open {
            if room == 0 || (!chunks.is_empty() && random.below(4) == 0) {
                break;
            }
            let most = self.left(sequence).min(room);
            let rows = if random.coin() { 1 } else { random.between(1, most) };
            room -= rows;
            chunks.push(Chunk { sequence, rows, tree: None });
        }
        (!chunks.is_empty()).then(|| self.step(&chunks))
    }

    /// A random tree of `rows` rows after the cached tokens of `sequence`.
    pub fn random_tree(&mut self, sequence: usize, rows: usize, random: &mut Random) -> Step {
        let vocabulary = self.program.vocabulary;
        let node = |i: usize, random: &mut Random| {
            let parent = if i == 0 || random.below(5) == 0 { None } else { Some(random.below(i)) };
            (parent, random.below(vocabulary) as u32)
        };
        let tree = (0..rows).map(|i| node(i, random)).collect();
        self.step(&[Chunk { sequence, rows, tree: Some(tree) }])
    }

    /// Numbers that depend only on the rows' positions and tokens, so that chunks do not matter.
    fn inputs(&self, step: &Step) -> Vec<StepInput> {
        let widths = self.program.input_widths();
        let input = |(index, width): (usize, usize)| {
            let mut values = Vec::with_capacity(step.rows() * width);
            for (token, position) in step.tokens.iter().zip(&step.positions) {
                let token = match *token {
                    TokenSource::Given(token) | TokenSource::Chosen(token) => token,
                };
                let seed = u64::from(token) << 32 | u64::from(*position);
                let mut random = Random::named(seed, &format!("input {index}"));
                values.extend((0..width).map(|_| random.normal()));
            }
            StepInput { values }
        };
        widths.into_iter().enumerate().map(input).collect()
    }

    fn give_back(&mut self, index: usize, step: &mut Step) {
        let layout = &self.program.kv;
        let sequence = &mut self.sequences[index];
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            let first = layout.first_visible(group, sequence.done) / layout.block_tokens;
            let before = table.first;
            while (table.first as usize) < first && !table.blocks.is_empty() {
                self.free.insert(0, table.blocks.remove(0));
                table.first += 1;
            }
            if table.first > before {
                step.tables.push(TableChange::Slide {
                    sequence: SequenceId(index as u32),
                    group: group as u32,
                    first: table.first,
                });
            }
        }
    }

    fn take(&mut self, index: usize, rows: usize, step: &mut Step) {
        let sequence = &mut self.sequences[index];
        let blocks = (sequence.done + rows).div_ceil(self.program.kv.block_tokens);
        for (group, table) in sequence.tables.iter_mut().enumerate() {
            let missing = blocks.saturating_sub(table.end() as usize);
            if missing == 0 {
                continue;
            }
            let page = |_| self.free.pop().expect("pages enough for the schedule");
            let pages: Vec<u32> = (0..missing).map(page).collect();
            table.blocks.extend(&pages);
            step.tables.push(TableChange::Extend {
                sequence: SequenceId(index as u32),
                group: group as u32,
                pages,
            });
        }
    }
}

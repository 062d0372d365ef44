//! Draft trees. A chain that runs as a tree has the bits of plain decoding. An accepted branch,
//! whose slots are moved behind the cached tokens, continues as if it had been decoded.

use std::sync::Arc;

use super::compare::{Failure, Settings, options};
use super::models::SmallDecoder;
use super::random::Random;
use super::weights::SeededWeights;
use crate::backend::{Backend, BackendError, Executor};
use crate::program::Program;
use crate::step::{
    Choice, SequenceId, SlotMove, Step, StepSequence, TREE_ROWS_MAX, TableChange, TokenSource,
};

/// The most positions of a sequence.
const LENGTH: usize = 400;
const ROWS_MAX: usize = 3 * TREE_ROWS_MAX;
/// The most accepted rows of a branch.
const ACCEPTED_MAX: usize = 12;
/// The plain sequence, the sequence with trees, and one that fills the step.
const SEQUENCES: usize = 3;

/// Runs trees of up to 64 rows beside decoding rows and prefill chunks, across borders of blocks,
/// tiles and windows, on small decoders of every kind.
///
/// # Errors
/// [`Failure`] names the first row that differs. Chains must agree to the bit. The rows after an
/// accepted branch must agree within the tolerance, because they see their ancestors in other
/// slots, and sums may have another order.
pub fn trees(backend: &dyn Backend, settings: &Settings) -> Result<(), Failure> {
    for (name, decoder) in [
        ("grouped", SmallDecoder::grouped()),
        ("gated", SmallDecoder::gated()),
        ("latent", SmallDecoder::latent()),
        ("mixture", SmallDecoder::mixture()),
    ] {
        let program = decoder.fitting(settings.format.block_len()).program();
        for seed in 0..settings.seeds {
            let failure = |reason| Failure { case: format!("trees, {name}/{seed}"), reason };
            Trees::new(backend, settings, &program, seed)
                .and_then(|mut trees| trees.run(settings))
                .map_err(failure)?;
        }
    }
    Ok(())
}

/// Two sequences with the same text. One decodes it row by row, the other by trees.
struct Trees {
    program: Arc<Program>,
    executor: Box<dyn Executor>,
    random: Random,
    tokens: Vec<u32>,
    /// Tokens of both sequences in the cache.
    cached: usize,
    /// Tokens of the sequence that fills steps.
    filled: usize,
    begun: [bool; SEQUENCES],
}

/// A node of a tree: its parent, its token, and how deep it is.
#[derive(Clone, Copy)]
struct Node {
    parent: Option<usize>,
    token: u32,
    depth: usize,
}

impl Trees {
    fn new(
        backend: &dyn Backend,
        settings: &Settings,
        program: &Program,
        seed: u64,
    ) -> Result<Self, String> {
        let program = Arc::new(program.clone());
        let weights = SeededWeights { program: &program, format: settings.format, seed: 5 };
        let options = options(settings, SEQUENCES * pages(&program), ROWS_MAX);
        let executor = backend
            .prepare(Arc::clone(&program), &weights, &options)
            .map_err(|error| error.to_string())?;
        let mut random = Random::named(seed, "trees");
        let tokens = (0..LENGTH).map(|_| random.below(program.vocabulary) as u32).collect();
        let begun = [false; SEQUENCES];
        Ok(Self { program, executor, random, tokens, cached: 0, filled: 0, begun })
    }

    fn run(&mut self, settings: &Settings) -> Result<(), String> {
        let prompt = self.random.between(1, 150);
        for id in 0..2 {
            let mut step = Step::default();
            self.causal(&mut step, id, 0, prompt);
            self.logits(&step)?;
        }
        self.cached = prompt;
        for round in 0..5 {
            let cached = self.cached;
            let at = |reason| format!("round {round}, {cached} cached: {reason}");
            let rows = self.random.between(1, TREE_ROWS_MAX.min(LENGTH - self.cached - 1));
            let plain = self.plain(rows)?;
            let chain: Vec<Node> = self.chain(rows);
            let found = self.tree(&chain)?;
            let vocabulary = self.program.vocabulary;
            if let Some(i) = (0..plain.len()).find(|i| plain[*i].to_bits() != found[*i].to_bits()) {
                let (row, f, e) = (i / vocabulary, found[i], plain[i]);
                return Err(at(format!("row {row} of a chain of {rows}: {f}, expected {e}")));
            }
            self.accept(settings, rows).map_err(at)?;
        }
        Ok(())
    }

    /// The logits of the next rows, with one row in each step.
    fn plain(&mut self, rows: usize) -> Result<Vec<f32>, String> {
        let mut logits = Vec::new();
        for position in self.cached..self.cached + rows {
            let mut step = Step::default();
            self.causal(&mut step, 0, position, 1);
            logits.extend(self.logits(&step)?);
        }
        Ok(logits)
    }

    /// The next tokens of the text as a chain, in which each is the parent of the next.
    fn chain(&self, rows: usize) -> Vec<Node> {
        let node = |depth: usize| Node {
            parent: depth.checked_sub(1),
            token: self.tokens[self.cached + depth],
            depth,
        };
        (0..rows).map(node).collect()
    }

    /// Verifies a tree in which a part of the text is one branch among others. Then accepts the
    /// branch, and both sequences decode one more token.
    fn accept(&mut self, settings: &Settings, rows: usize) -> Result<(), String> {
        let accepted = self.random.between(1, rows.min(ACCEPTED_MAX));
        let mut nodes: Vec<Node> = Vec::new();
        let mut branch: Vec<usize> = Vec::new();
        while branch.len() < accepted {
            // With four siblings each, twelve accepted rows make a tree of sixty.
            for _ in 0..self.random.below(5) {
                let parent = match nodes.len() {
                    0 => None,
                    some => self.random.coin().then(|| self.random.below(some)),
                };
                let depth = parent.map_or(0, |parent| nodes[parent].depth + 1);
                let token = self.random.below(self.program.vocabulary) as u32;
                nodes.push(Node { parent, token, depth });
            }
            let depth = branch.len();
            let token = self.tokens[self.cached + depth];
            let parent = branch.last().copied();
            branch.push(nodes.len());
            nodes.push(Node { parent, token, depth });
        }
        self.tree(&nodes)?;
        let sequence = SequenceId(1);
        let cached = self.cached as u32;
        let moves: Vec<SlotMove> = branch
            .iter()
            .enumerate()
            .map(|(to, from)| SlotMove {
                sequence,
                from: cached + *from as u32,
                to: cached + to as u32,
            })
            .filter(|it| it.from != it.to)
            .collect();
        self.executor.move_slots(&moves).map_err(|error| error.to_string())?;
        self.cached += accepted;
        let (mut plain, mut after) = (Step::default(), Step::default());
        self.causal(&mut plain, 0, self.cached, 1);
        self.causal(&mut after, 1, self.cached, 1);
        let (expected, found) = (self.logits(&plain)?, self.logits(&after)?);
        let tolerance = settings.tolerance;
        for (token, (e, f)) in expected.iter().zip(&found).enumerate() {
            let close = (e - f).abs() <= tolerance.absolute + tolerance.relative * e.abs();
            if !close {
                return Err(format!("token {token} after {accepted} accepted: {f}, expected {e}"));
            }
        }
        // The next chain is compared bit by bit, so its cache must have the bits of plain decoding.
        let mut again = Step::default();
        self.causal(&mut again, 1, self.cached - accepted, accepted + 1);
        self.logits(&again)?;
        self.cached += 1;
        Ok(())
    }

    /// The logits of a tree of the second sequence, beside a chunk of the third. The tables end at
    /// the end of the tree.
    fn tree(&mut self, nodes: &[Node]) -> Result<Vec<f32>, String> {
        let mut step = Step::default();
        let chunk = self.random.below(40).min(LENGTH - self.filled);
        let first = self.random.coin();
        if chunk > 0 && first {
            self.causal(&mut step, 2, self.filled, chunk);
            step.choices.clear();
        }
        self.begin(&mut step, 1);
        let first_row = step.rows() as u32;
        let mut ancestors: Vec<u64> = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            let above = node.parent.map_or(0, |parent| ancestors[parent]);
            ancestors.push(above | 1 << i);
            step.tokens.push(TokenSource::Given(node.token));
            step.positions.push((self.cached + node.depth) as u32);
            step.choices.push(Choice::logits_of(first_row + i as u32));
        }
        step.sequences.push(StepSequence {
            id: SequenceId(1),
            first_row,
            rows: nodes.len() as u32,
            cached: self.cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: Some(ancestors),
        });
        if chunk > 0 && !first {
            let choices = step.choices.len();
            self.causal(&mut step, 2, self.filled, chunk);
            step.choices.truncate(choices);
        }
        self.filled += chunk;
        self.logits(&step)
    }

    /// Adds rows of a sequence from `cached` on, in the form of decoding rows, with their logits.
    fn causal(&mut self, step: &mut Step, id: usize, cached: usize, rows: usize) {
        self.begin(step, id);
        let first_row = step.rows() as u32;
        let tokens = self.tokens[cached..cached + rows].iter();
        step.tokens.extend(tokens.map(|token| TokenSource::Given(*token)));
        step.positions.extend((cached..cached + rows).map(|position| position as u32));
        step.choices.extend((first_row..first_row + rows as u32).map(Choice::logits_of));
        step.sequences.push(StepSequence {
            id: SequenceId(id as u32),
            first_row,
            rows: rows as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        });
    }

    /// Gives a sequence all its pages when it begins.
    fn begin(&mut self, step: &mut Step, id: usize) {
        if std::mem::replace(&mut self.begun[id], true) {
            return;
        }
        let (sequence, layout) = (SequenceId(id as u32), &self.program.kv);
        let blocks = LENGTH.div_ceil(layout.block_tokens);
        let mut free: Vec<u32> = (0..pages(&self.program))
            .map(|page| (id * pages(&self.program) + page) as u32)
            .collect();
        self.random.shuffle(&mut free);
        step.tables.push(TableChange::Clear { sequence });
        for (group, pages) in (0..).zip(free.chunks(blocks)) {
            step.tables.push(TableChange::Extend { sequence, group, pages: pages.to_vec() });
        }
    }

    fn logits(&mut self, step: &Step) -> Result<Vec<f32>, String> {
        let output = self.executor.run(step).map_err(|error: BackendError| error.to_string())?;
        Ok(output.logits.to_vec())
    }
}

/// Pages of one sequence.
fn pages(program: &Program) -> usize {
    program.kv.groups.len() * LENGTH.div_ceil(program.kv.block_tokens)
}

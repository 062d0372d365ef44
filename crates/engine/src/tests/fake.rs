//! A fake executor whose "model" is a hash of everything that it can see through the block
//! tables. Each position's entry depends on all entries before it that its windows show, as the
//! keys of a deep model do, so that a wrong page anywhere changes every later token.

use std::collections::VecDeque;
use std::sync::Arc;

use lathe_program::kv::KvLayerDecl;
use lathe_program::{
    BackendError, Chooser, Executor, ExecutorLimits, KvFormat, KvGroup, KvLayer, KvLayerShape,
    KvLayout, LatentSpec, LongRope, Op, Program, RopeStyle, RopeTable, SequenceTables, SlotMove,
    Step, StepOutput, StepSequence, TokenLogprobs, Value, Weight,
};

pub(crate) const VOCABULARY: usize = 61;

pub(crate) struct FakeExecutor {
    program: Arc<Program>,
    limits: ExecutorLimits,
    tables: SequenceTables,
    /// `[page][slot]`.
    pages: Vec<Vec<u64>>,
    chooser: Chooser,
    logits: Vec<f32>,
    /// What the steps in flight came to, the oldest first.
    outcomes: VecDeque<Result<Made, BackendError>>,
    collected: Made,
    /// A row sees all of its window, or only some of it (for very long texts).
    thorough: bool,
    /// About one step in so many fails half-way; 0 means none.
    failing: u64,
    steps: u64,
    moves: u64,
}

/// What a step made.
#[derive(Default)]
struct Made {
    tokens: Vec<Option<u32>>,
    logprobs: Vec<Option<TokenLogprobs>>,
    logits: Vec<f32>,
}

/// A cache of one layer a group, with these windows.
pub(crate) fn layout(block_tokens: usize, windows: &[Option<usize>]) -> KvLayout {
    let shape = KvLayerShape::Heads { kv_heads: 1, key_dim: 1, value_dim: 1 };
    let layers =
        (0..windows.len() as u32).map(|group| KvLayerDecl { shape, group, slot: 0 }).collect();
    let group =
        |(layer, &window): (usize, &Option<usize>)| KvGroup { layers: vec![layer as u32], window };
    KvLayout { block_tokens, layers, groups: windows.iter().enumerate().map(group).collect() }
}

pub(crate) fn program(kv: KvLayout, context_max: usize) -> Program {
    let (values, weights, ropes) = Default::default();
    let (input, head) = (Value(0), Weight(0));
    let ops = vec![Op::Logits { input, head, gather: false, scale: 1.0, softcap: None }];
    Program { ops, values, weights, ropes, kv, routings: 0, vocabulary: VOCABULARY, context_max }
}

impl FakeExecutor {
    pub(crate) fn new(kv: KvLayout, context_max: usize, rows_max: usize, pages: usize) -> Self {
        let limits = ExecutorLimits {
            rows_max,
            sequences_max: rows_max,
            kv_blocks: pages,
            steps_in_flight: 1,
        };
        let tables = SequenceTables::new(&kv, limits.sequences_max);
        let pages = vec![vec![0; kv.block_tokens]; pages];
        let program = Arc::new(program(kv, context_max));
        FakeExecutor {
            program,
            limits,
            tables,
            pages,
            chooser: Chooser::default(),
            logits: Vec::new(),
            outcomes: VecDeque::new(),
            collected: Made::default(),
            thorough: true,
            failing: 0,
            steps: 0,
            moves: 0,
        }
    }

    /// With a latent attention of rank 64 whose heads have 32 elements: the first whole 64s of a
    /// prompt are expanded, and differ from what is absorbed.
    pub(crate) fn latent(mut self) -> Self {
        let spec = LatentSpec {
            heads: 1,
            rank: 64,
            rope_dim: 32,
            nope_dim: 32,
            value_dim: 32,
            scale: 1.0,
            window: None,
            softcap: None,
            key_up: Weight(0),
            value_up: Weight(0),
        };
        let (query, layer, out) = (Value(0), KvLayer(0), Value(0));
        let program = Arc::get_mut(&mut self.program).expect("not shared yet");
        program.ops.push(Op::AttendLatent { query, layer, spec, out });
        self
    }

    /// Texts of more than `original` tokens turn by another table.
    pub(crate) fn long_rope_after(mut self, original: usize) -> Self {
        let long = Some(LongRope { original, inverse_frequencies: vec![0.5] });
        let style = RopeStyle::HalfSplit;
        let table = RopeTable { inverse_frequencies: vec![1.0], long, magnitude: 1.0, style };
        Arc::get_mut(&mut self.program).expect("not shared yet").ropes.push(table);
        self
    }

    /// Takes this many steps before the first is collected.
    pub(crate) fn steps_in_flight(mut self, steps: usize) -> Self {
        self.limits.steps_in_flight = steps;
        self
    }

    pub(crate) fn hasty(mut self) -> Self {
        self.thorough = false;
        self
    }

    pub(crate) fn failing(mut self, one_in: u64) -> Self {
        self.failing = one_in;
        self
    }

    fn entry(&mut self, sequence: &StepSequence, group: usize, position: usize) -> &mut u64 {
        let table = self.tables.table(sequence.id, group);
        let (page, slot) = table.locate(position, self.program.kv.block_tokens);
        &mut self.pages[page][slot]
    }

    /// The slots that row `row` of a sequence sees, by position: those cached, then its ancestors.
    fn slots(step: &Step, sequence: &StepSequence, row: usize) -> Vec<usize> {
        let cached = sequence.cached as usize;
        let mut slots: Vec<usize> = (0..cached).collect();
        let own = sequence.row_range();
        for other in (0..own.len()).filter(|other| sequence.sees(row, *other)) {
            // An ancestor comes before its row, at the position after that of its own parent.
            assert_eq!(step.positions[own.start + other] as usize, slots.len());
            slots.push(cached + other);
        }
        slots
    }

    /// Everything that a row can see but itself: `slots` are those of its positions, its own last.
    fn seen(&mut self, sequence: &StepSequence, slots: &[usize]) -> u64 {
        let position = slots.len() - 1;
        let mut hash = 7;
        for group in 0..self.program.kv.groups.len() {
            let window = self.program.kv.groups[group].window.unwrap_or(usize::MAX);
            let first = (position + 1).saturating_sub(window);
            let visible = position - first;
            let stride = if self.thorough { 1 } else { (visible / 4).max(1) };
            for back in (0..visible).step_by(stride) {
                hash = mix(hash, *self.entry(sequence, group, slots[position - 1 - back]));
            }
        }
        hash
    }

    fn check(&self, step: &Step) {
        let block_tokens = self.program.kv.block_tokens;
        // Pages that a sequence writes are in nobody else's tables.
        let mut holders = vec![0; self.pages.len()];
        let groups = self.program.kv.groups.len();
        let tables = |sequence: &StepSequence| {
            let id = sequence.id;
            (0..groups).map(move |group| self.tables.table(id, group))
        };
        for table in step.sequences.iter().flat_map(tables) {
            table.blocks.iter().for_each(|&page| holders[page as usize] += 1);
        }
        let mut next_row = 0;
        for sequence in &step.sequences {
            assert_eq!(sequence.first_row, next_row);
            next_row += sequence.rows;
            let (first, end) =
                (sequence.cached as usize, (sequence.cached + sequence.rows) as usize);
            for table in tables(sequence) {
                assert!(
                    (table.first as usize + table.blocks.len()) * block_tokens >= end,
                    "table too short"
                );
                for block in first / block_tokens..end.div_ceil(block_tokens) {
                    let page = table.blocks[block - table.first as usize];
                    assert_eq!(holders[page as usize], 1, "page {page} is written and shared");
                }
            }
        }
        assert_eq!(next_row as usize, step.tokens.len());
    }
}

impl FakeExecutor {
    fn run_step(&mut self, step: &Step) -> Result<Made, BackendError> {
        self.logits.clear();
        self.chooser.begin(step);
        self.steps += 1;
        let fails = self.failing > 0 && mix(self.steps, 0).is_multiple_of(self.failing);
        for (index, sequence) in step.sequences.iter().enumerate() {
            if fails && index == step.sequences.len() / 2 {
                return Err(BackendError::Device("this step fails".into()));
            }
            for row in sequence.first_row..sequence.first_row + sequence.rows {
                let position = step.positions[row as usize];
                let within = (row - sequence.first_row) as usize;
                let slots = Self::slots(step, sequence, within);
                assert_eq!(position as usize, slots.len() - 1);
                let seen = self.seen(sequence, &slots);
                let form = u32::from(position < sequence.expanded) << 31;
                let form = form | u32::from(sequence.long_rope) << 30;
                let own = own(seen, position, self.chooser.row_tokens()[row as usize] | form);
                for group in 0..self.program.kv.groups.len() {
                    let slot = sequence.cached as usize + within;
                    *self.entry(sequence, group, slot) = mix(own, group as u64);
                }
                if step.choices.iter().any(|choice| choice.row == row) {
                    self.logits.extend(logits(own));
                }
            }
        }
        self.chooser.choose(step, VOCABULARY, &mut self.logits);
        Ok(Made {
            tokens: self.chooser.tokens().to_vec(),
            logprobs: self.chooser.logprobs().to_vec(),
            logits: self.logits[..self.chooser.logits_rows() * VOCABULARY].to_vec(),
        })
    }
}

impl Executor for FakeExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn kv_format(&self) -> KvFormat {
        KvFormat::F32
    }

    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        assert!(self.outcomes.len() < self.limits.steps_in_flight, "steps in flight");
        self.tables.accept(step, &self.program, &self.limits).unwrap();
        self.check(step);
        let after_a_failure = self.outcomes.iter().any(Result::is_err);
        let made = self.run_step(step);
        self.outcomes.push_back(match after_a_failure {
            true => Err(BackendError::Device("the step before failed".into())),
            false => made,
        });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        self.collected = self.outcomes.pop_front().expect("a step in flight")?;
        let Made { tokens, logprobs, logits } = &self.collected;
        Ok(StepOutput { tokens, logprobs, logits, captures: Vec::new() })
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        self.moves += 1;
        if self.failing > 0 && mix(self.moves, 1).is_multiple_of(self.failing) {
            return Err(BackendError::Device("these moves fail".into()));
        }
        let block_tokens = self.program.kv.block_tokens;
        for SlotMove { sequence, from, to } in moves {
            for group in 0..self.program.kv.groups.len() {
                let table = self.tables.table(*sequence, group);
                let (page, slot) = table.locate(*from as usize, block_tokens);
                let (to_page, to_slot) = table.locate(*to as usize, block_tokens);
                self.pages[to_page][to_slot] = self.pages[page][slot];
            }
        }
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        0
    }

    fn kv_bytes(&self) -> usize {
        0
    }
}

/// SplitMix64's finalizer over both.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let mut x = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// What a row knows: its token, its position, and everything that it sees.
fn own(seen: u64, position: u32, token: u32) -> u64 {
    mix(mix(seen, u64::from(position)), u64::from(token))
}

fn logits(own: u64) -> impl Iterator<Item = f32> {
    (0..VOCABULARY as u64).map(move |token| (mix(own, 1000 + token) % 10_000) as f32 / 1000.0)
}

/// The same model over plain lists: no pages, no chunks, no batches. Logits after the last token.
pub(crate) fn naive_logits(tokens: &[u32], windows: &[Option<usize>]) -> Vec<f32> {
    naive_logits_of(tokens, windows, None)
}

/// As [`naive_logits`], of texts that are long beyond `long_after` tokens.
pub(crate) fn naive_logits_of(
    tokens: &[u32],
    windows: &[Option<usize>],
    long_after: Option<usize>,
) -> Vec<f32> {
    let long_rope = long_after.is_some_and(|original| tokens.len() > original);
    let form = u32::from(long_rope) << 30;
    let mut entries: Vec<u64> = Vec::new();
    for (position, &token) in tokens.iter().enumerate() {
        let mut seen = 7;
        for (group, window) in windows.iter().enumerate() {
            let first = window.map_or(0, |window| (position + 1).saturating_sub(window));
            for &entry in entries[first..].iter().rev() {
                seen = mix(seen, mix(entry, group as u64));
            }
        }
        entries.push(own(seen, position as u32, token | form));
    }
    logits(*entries.last().unwrap()).collect()
}

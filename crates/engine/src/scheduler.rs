//! `Scheduler`: which rows run next. Pure and deterministic: it sees tokens and page numbers,
//! never logits, text or time.
//!
//! **Policy.** A step has at most `rows_max` rows. Running sequences with one token to compute
//! (decoding) get their row first, then the prompts of running sequences advance in chunks, in
//! order of arrival, and then waiting requests are admitted in order of arrival.
//!
//! **Fairness.** First come, first served, and no request starves: at most `rows_max` sequences
//! run, so that each decoding one gets a row in every step and at least one row is left for
//! prompts while any is unfinished; a request is admitted only after all earlier ones.
//!
//! **Preemption.** When blocks run out, the sequence in need takes those of the latest arrival
//! that is not yet part of this step, never those of an earlier arrival; if there is none it waits
//! a step, and holds what it has. A preempted sequence goes back to its place in the queue and is
//! recomputed from its tokens (and from whatever of its blocks is still cached).
//!
//! **No deadlock.** [`Scheduler::add`]'s caller has checked that each sequence fits the pool
//! alone. Of the running sequences the earliest can preempt all others, so that every step has
//! at least one row, and every sequence has an end.
//!
//! **One step ahead.** A device must not wait for the host: a plan may be made while an earlier one
//! is in flight. A sequence whose token that one chooses gets its next row all the same, with
//! [`TokenSource::Chosen`] in the token's place ([`Sequence`] counts such tokens as awaited). What
//! is in flight is neither preempted nor given back: who needs its blocks waits, and no later
//! arrival is planned meanwhile. A sequence that turns out to have ended has one row in vain; its
//! blocks go back when that row's step has been collected.
//!
//! **Long texts.** A model may turn the positions of long texts by other frequencies
//! ([`StepSequence::long_rope`]). When a text outgrows the short ones, what the cache holds of it
//! is given back, and it returns to its place in the queue, as if it had been preempted. No row and
//! no draft lies beyond that border before.
//!
//! **Drafts.** A sequence that is drafted for gets a row for its last token and one for each node
//! of its draft tree, at the slots that follow. Such a sequence is planned only when its last token
//! is known, and not again before its tree has been verified. [`Scheduler::commit`] keeps the
//! accepted nodes and gives the blocks of the others back. Trees take no row and no block that
//! another sequence needs in the same step, and preempt nobody. Windows slide by committed
//! positions alone, so that dropping nodes never needs a block that has been given back.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lathe_program::{KvLayout, SlotMove, Step, StepSequence, TokenSource};

use crate::draft::DraftTree;
use crate::kv::{KvCache, SequenceBlocks};
use crate::request::RequestId;

/// What the scheduler must know of the engine's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SchedulerConfig {
    /// Rows of a step at most.
    pub rows_max: usize,
    /// Sequences that run at a time at most.
    pub sequences_max: usize,
    /// Pages of the KV cache.
    pub kv_blocks: usize,
    /// `Some` keeps blocks of texts for those that begin alike; the seed of the hashes.
    pub prefix_seed: Option<u64>,
    /// `false` recomputes a sequence from its first token for each new one, and keeps nothing.
    pub kv_cache: bool,
    /// [`lathe_program::Program::long_rope_after`].
    pub long_rope_after: Option<usize>,
}

/// One text: its tokens, and how much of it the cache holds.
#[derive(Debug, Default)]
pub struct Sequence {
    /// Prompt and generated tokens.
    pub tokens: Vec<u32>,
    /// Positions whose keys and values are in the cache.
    pub computed: usize,
    /// Positions that were in the cache when the sequence first ran.
    pub cached: Option<usize>,
    /// Positions that are computed or in flight.
    scheduled: usize,
    /// Tokens after [`Sequence::tokens`] that steps in flight choose.
    awaited: usize,
    /// The choice, in the plan made last, that chooses the last awaited token.
    choice: u32,
    /// Plans in flight that have rows of the sequence.
    in_flight: usize,
    /// Positions that the sequence computes at most.
    length_max: usize,
    /// Whether drafts may be made for it.
    drafts: bool,
    blocks: SequenceBlocks,
    /// Positions below this one are computed by the expanded form of latent attention.
    expanded: usize,
    /// Positions that the short rotary tables serve, until the text outgrows them.
    short_rope: Option<usize>,
    /// Whether it has outgrown them.
    long_rope: bool,
    /// What the cache knows the tokens by: pages of one form are not those of the other.
    keys: Vec<u32>,
}

/// Set in the key of a token whose row is expanded; no token id is as large.
const EXPANDED: u32 = 1 << 31;
/// Set in the keys of a text that turns by the long rotary tables; no token id is as large.
const LONG_ROPE: u32 = 1 << 30;

impl Sequence {
    /// A text of which the first `expanded` rows are expanded, and `length_max` are computed.
    fn new(
        tokens: Vec<u32>,
        expanded: usize,
        length_max: usize,
        drafts: bool,
        short_rope: Option<usize>,
    ) -> Self {
        let mut keys = tokens.clone();
        keys[..expanded].iter_mut().for_each(|key| *key |= EXPANDED);
        let mut sequence =
            Sequence { tokens, keys, expanded, length_max, drafts, short_rope, ..Self::default() };
        sequence.outgrow();
        sequence
    }

    /// Adds known tokens to the text.
    fn extend(&mut self, tokens: impl Iterator<Item = u32>) {
        let known = self.tokens.len();
        self.tokens.extend(tokens);
        let bit = if self.long_rope { LONG_ROPE } else { 0 };
        self.keys.extend(self.tokens[known..].iter().map(|token| token | bit));
    }

    /// Whether the text has outgrown the short rotary tables, by which it still turns.
    fn outgrows(&self) -> bool {
        self.short_rope.is_some_and(|original| self.tokens.len() > original)
    }

    /// Goes over to the long rotary tables if the text needs them; whether it does so now. Nothing
    /// of it is in the cache.
    fn outgrow(&mut self) -> bool {
        if !self.outgrows() {
            return false;
        }
        (self.short_rope, self.long_rope) = (None, true);
        self.keys.iter_mut().for_each(|key| *key |= LONG_ROPE);
        true
    }

    /// Positions that it may have before it ends, or outgrows the short rotary tables.
    fn end(&self) -> usize {
        self.length_max.min(self.short_rope.unwrap_or(usize::MAX))
    }

    /// Tokens that are known or chosen by a step in flight.
    fn length(&self) -> usize {
        self.tokens.len() + self.awaited
    }

    /// Rows that it wants, but for those of a draft.
    fn pending(&self) -> usize {
        // A draft follows a token that is known.
        let waits = self.drafts && self.awaited > 0;
        if waits { 0 } else { self.length().min(self.end()) - self.scheduled }
    }

    /// Whether a draft may follow its last token in the next step.
    fn takes_draft(&self) -> bool {
        let decodes = self.drafts && self.in_flight == 0 && self.pending() == 1;
        decodes && self.scheduled >= self.expanded
    }

    /// Gives all blocks back and starts over. Nothing of it is in flight.
    fn rewind(&mut self, cache: &mut KvCache) {
        debug_assert_eq!((self.in_flight, self.awaited), (0, 0), "nothing is in flight");
        cache.release(&mut self.blocks, &self.keys[..self.computed]);
        (self.computed, self.scheduled) = (0, 0);
    }
}

/// A sequence's part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedSequence {
    /// Whose.
    pub request: RequestId,
    /// Rows of the step.
    pub rows: usize,
    /// The rows of the step whose logits choose a token: the last known token's, and those of the
    /// tree. Empty if the rows end before the last known token.
    pub choice_rows: Range<u32>,
    /// What is drafted; empty for a plain step.
    pub tree: DraftTree,
    /// The nodes of the tree that were accepted, from the root on. The engine fills it.
    pub accepted: Vec<usize>,
}

impl PlannedSequence {
    /// Rows that advance the sequence whatever is accepted.
    pub(crate) fn sure_rows(&self) -> usize {
        self.rows - self.tree.len()
    }
}

/// A sequence that may be drafted for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Draftable {
    /// Whose.
    pub request: RequestId,
    /// Nodes of its tree at most.
    pub nodes_max: usize,
    /// Nodes on a path at most.
    pub depth_max: usize,
}

/// A step and whose rows it has.
#[derive(Debug, Default)]
pub struct Plan {
    /// For the executor.
    pub step: Step,
    /// In the order of the step's sequences; those with choices are in the order of its choices.
    pub sequences: Vec<PlannedSequence>,
    /// Choices so far.
    choices: u32,
}

/// Counts since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SchedulerCounts {
    /// Steps committed.
    pub steps: u64,
    /// Rows committed.
    pub rows: u64,
    /// Times that a sequence gave its blocks back to another.
    pub preemptions: u64,
    /// Tokens of sequences when they first ran.
    pub prefix_queried_tokens: u64,
    /// Those of them that were in the cache.
    pub prefix_hit_tokens: u64,
    /// Tokens of preempted sequences that were still in the cache when they ran again.
    pub resumed_hit_tokens: u64,
    /// Nodes of draft trees committed.
    pub drafted_tokens: u64,
    /// Those of them that were accepted.
    pub accepted_tokens: u64,
}

/// All sequences and the cache that they share.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    cache: KvCache,
    sequences: BTreeMap<RequestId, Sequence>,
    waiting: BTreeSet<RequestId>,
    running: BTreeSet<RequestId>,
    /// Requests that are over, but for rows in flight.
    ended: BTreeSet<RequestId>,
    /// Plans that are neither committed nor taken back.
    in_flight: usize,
    counts: SchedulerCounts,
}

/// Whether a plan may take more sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    /// It may.
    Open,
    /// A sequence waits for blocks that are in flight: nobody who came later may go first.
    Closed,
}

impl Scheduler {
    /// No sequences. `rows_max` and `sequences_max` are at least 1.
    pub fn new(config: SchedulerConfig, layout: &KvLayout) -> Self {
        assert!(config.rows_max > 0 && config.sequences_max > 0);
        let prefix_seed = config.prefix_seed.filter(|_| config.kv_cache);
        let sequences_max = config.sequences_max.min(config.rows_max);
        let cache = KvCache::new(layout, config.kv_blocks, sequences_max, prefix_seed);
        let (sequences, waiting, running, ended, counts) = Default::default();
        Scheduler { config, cache, sequences, waiting, running, ended, in_flight: 0, counts }
    }

    /// The cache.
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// A sequence that has not been removed.
    pub fn sequence(&self, request: RequestId) -> Option<&Sequence> {
        self.sequences.get(&request)
    }

    /// Requests that have no blocks.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Requests that have blocks.
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Counts since the start.
    pub fn counts(&self) -> SchedulerCounts {
        self.counts
    }

    /// Queues a sequence, which fits the pool alone at `length_max`, the most positions that it
    /// will compute; `expanded` is its [`StepSequence::expanded`]. `drafts` says whether it may be
    /// drafted for, which needs a cache.
    pub fn add(
        &mut self,
        request: RequestId,
        tokens: Vec<u32>,
        expanded: usize,
        length_max: usize,
        drafts: bool,
    ) {
        assert!(!tokens.is_empty() && tokens.len() <= length_max);
        let drafts = drafts && self.config.kv_cache;
        let short_rope = self.config.long_rope_after;
        let sequence = Sequence::new(tokens, expanded, length_max, drafts, short_rope);
        assert!(self.sequences.insert(request, sequence).is_none(), "{request:?} exists");
        self.waiting.insert(request);
    }

    /// Ends a sequence, whatever its state. What it holds goes back when nothing of it is in flight
    /// any more.
    ///
    /// # Panics
    /// If there is no such sequence, or it has ended.
    pub fn remove(&mut self, request: RequestId) {
        let known = self.waiting.remove(&request) || self.running.remove(&request);
        assert!(known, "{request:?} waits or runs");
        self.ended.insert(request);
        let sequence = self.sequences.get_mut(&request).expect("it waits or runs");
        sequence.awaited = 0;
        self.bury(request);
    }

    /// Forgets a sequence that has ended, once nothing of it is in flight.
    fn bury(&mut self, request: RequestId) {
        let sequence = self.sequences.get_mut(&request).expect("a sequence that ended");
        if sequence.in_flight == 0 {
            sequence.rewind(&mut self.cache);
            self.sequences.remove(&request);
            self.ended.remove(&request);
        }
    }

    /// Appends the token that a committed plan chose.
    pub fn append(&mut self, request: RequestId, token: u32) {
        let sequence = self.sequences.get_mut(&request).expect("a sequence of the plan");
        assert!(sequence.computed == sequence.tokens.len(), "all tokens before it are computed");
        sequence.awaited = sequence.awaited.saturating_sub(1);
        sequence.extend(std::iter::once(token));
        if !self.config.kv_cache || sequence.outgrows() {
            sequence.rewind(&mut self.cache);
        }
        if sequence.outgrow() {
            self.running.remove(&request);
            self.waiting.insert(request);
        }
    }

    /// The sequences that the next plan may have trees for, with a fair share of the rows that it
    /// has left.
    pub fn draftable(&self) -> Vec<Draftable> {
        let running = || self.running.iter().map(|request| (*request, &self.sequences[request]));
        let decoding = running().filter(|(_, sequence)| sequence.pending() == 1).count();
        let takers = running().filter(|(_, sequence)| sequence.takes_draft()).count();
        // A prompt goes on by a row at least.
        let prompts = running().any(|(_, it)| it.pending() > 1) || !self.waiting.is_empty();
        let taken = decoding + usize::from(prompts);
        let share = self.config.rows_max.saturating_sub(taken) / takers.max(1);
        let one = |(request, sequence): (RequestId, &Sequence)| {
            let depth_max = sequence.end() - sequence.length();
            let nodes_max = share.min(DraftTree::NODES_MAX);
            (depth_max > 0).then_some(Draftable { request, nodes_max, depth_max })
        };
        let takers = running().filter(|(_, sequence)| share > 0 && sequence.takes_draft());
        takers.filter_map(one).collect()
    }

    /// Chooses the rows of the next step and gives them blocks, in `plan`, which is empty. `trees`
    /// has drafts of [`Scheduler::draftable`] sequences. Each plan is committed or taken back, in
    /// the order in which they were made. It stays empty only if there are no sequences, or those
    /// that there are wait for plans in flight.
    pub fn schedule(&mut self, plan: &mut Plan, trees: &mut BTreeMap<RequestId, DraftTree>) {
        let wants = |request: &&RequestId| self.sequences[request].pending() > 0;
        let (decoding, filling): (Vec<RequestId>, Vec<RequestId>) = self
            .running
            .iter()
            .filter(wants)
            .partition(|request| self.sequences[request].pending() == 1);
        let mut next = Next::Open;
        for request in decoding.into_iter().chain(filling) {
            if next == Next::Open {
                let tree = trees.remove(&request).unwrap_or_default();
                next = self.advance(request, tree, plan);
            }
        }
        if next == Next::Open {
            self.admit(plan);
        }
        if plan.sequences.is_empty() {
            let waits = self.sequences.is_empty() || self.in_flight > 0;
            assert!(waits, "a plan without progress");
        } else {
            self.cache.take_changes(&mut plan.step.tables);
            self.in_flight += 1;
        }
    }

    /// Gives a running sequence as many rows as budget and blocks allow, and as much of `tree` as
    /// is left then.
    fn advance(&mut self, request: RequestId, mut tree: DraftTree, plan: &mut Plan) -> Next {
        // It may have been preempted by an earlier one of this step.
        let budget = self.config.rows_max - plan.step.tokens.len();
        if budget == 0 || !self.running.contains(&request) {
            return Next::Open;
        }
        let scheduled = self.sequences[&request].scheduled;
        while self.cache.length_affordable(&self.sequences[&request].blocks, 0) <= scheduled {
            if self.preempt_after(request, plan) {
                continue;
            }
            return if self.would_free_blocks(request) { Next::Closed } else { Next::Open };
        }
        let others = self.running.len();
        let sequence = self.sequences.get_mut(&request).expect("running");
        let affordable = self.cache.length_affordable(&sequence.blocks, 0) - scheduled;
        let rows = sequence.pending().min(budget).min(affordable);
        let beside = self.cache.length_affordable(&sequence.blocks, others);
        let slots = beside.min(sequence.short_rope.unwrap_or(usize::MAX));
        let slots = slots.saturating_sub(scheduled + rows);
        tree.truncate(if sequence.takes_draft() { slots.min(budget - rows) } else { 0 });
        self.cache.grow(&mut sequence.blocks, scheduled + rows + tree.len());
        plan.push(request, sequence, rows, tree);
        Next::Open
    }

    /// Whether there will be blocks for `request` once what is in flight has been collected.
    fn would_free_blocks(&self, request: RequestId) -> bool {
        let later = self.running.iter().rev().take_while(|&&victim| victim > request);
        let in_flight = |victim: &RequestId| self.sequences[victim].in_flight > 0;
        !self.ended.is_empty() || later.copied().any(|victim| in_flight(&victim))
    }

    /// Preempts the latest arrival after `request` that is neither part of the plan nor in flight.
    fn preempt_after(&mut self, request: RequestId, plan: &Plan) -> bool {
        let busy = |victim: &RequestId| {
            let planned = plan.sequences.iter().any(|part| part.request == *victim);
            planned || self.sequences[victim].in_flight > 0
        };
        let victim = self.running.iter().rev().take_while(|&&victim| victim > request);
        let Some(victim) = victim.copied().find(|victim| !busy(victim)) else { return false };
        let sequence = self.sequences.get_mut(&victim).expect("running");
        sequence.rewind(&mut self.cache);
        self.running.remove(&victim);
        self.waiting.insert(victim);
        self.counts.preemptions += 1;
        true
    }

    /// Starts waiting requests while there are rows, and room for all tokens that they have now.
    fn admit(&mut self, plan: &mut Plan) {
        let sequences_max = self.config.sequences_max.min(self.config.rows_max);
        while let Some(&request) = self.waiting.first() {
            let held = self.running.len() + self.ended.len();
            if held >= sequences_max || plan.step.tokens.len() == self.config.rows_max {
                return;
            }
            let sequence = self.sequences.get_mut(&request).expect("waiting");
            let hit = self.cache.find(&sequence.keys);
            let needed = self.cache.pages_for(sequence.tokens.len()).saturating_sub(hit.shared);
            let alone = self.running.is_empty() && self.ended.is_empty();
            if needed > self.cache.pool().available() && !alone {
                return;
            }
            self.counts.take_hit(sequence, hit.length);
            (sequence.computed, sequence.scheduled) = (hit.length, hit.length);
            sequence.blocks = self.cache.acquire(hit);
            self.waiting.remove(&request);
            self.running.insert(request);
            if self.advance(request, DraftTree::default(), plan) == Next::Closed {
                return;
            }
        }
    }

    /// Takes back the plan made last, which no executor accepted: its changes of tables are still
    /// to be told.
    pub fn refused(&mut self, mut plan: Plan) {
        self.cache.restore_changes(std::mem::take(&mut plan.step.tables));
        self.take_back(plan);
    }

    /// Takes back the plan made last, whose step failed: its rows are computed again.
    pub fn take_back(&mut self, plan: Plan) {
        self.in_flight -= 1;
        for part in plan.sequences {
            let sequence = self.sequences.get_mut(&part.request).expect("a sequence of the plan");
            sequence.scheduled -= part.sure_rows();
            sequence.awaited -= usize::from(!part.choice_rows.is_empty() && sequence.awaited > 0);
            sequence.in_flight -= 1;
            if self.ended.contains(&part.request) {
                sequence.awaited = 0;
                self.bury(part.request);
            }
        }
    }

    /// The places in the cache that the accepted nodes of the oldest plan in flight move to: from
    /// those of their rows to those behind the text. They move before the plan is committed.
    pub fn moves(&self, plan: &Plan) -> Vec<SlotMove> {
        let mut moves = Vec::new();
        for part in &plan.sequences {
            let ended = self.ended.contains(&part.request);
            let accepted = part.accepted.iter().enumerate().filter(|_| !ended);
            let sequence = &self.sequences[&part.request];
            let first = sequence.computed + part.sure_rows();
            moves.extend(accepted.filter(|(to, node)| to != *node).map(|(to, node)| SlotMove {
                sequence: sequence.blocks.id(),
                from: (first + node) as u32,
                to: (first + to) as u32,
            }));
        }
        moves
    }

    /// Takes note that the step of the oldest plan in flight has run, and that the nodes that it
    /// names as accepted lie behind their texts. Tokens that it chose last for sequences that have
    /// not ended are appended next.
    pub fn commit(&mut self, plan: &Plan) {
        self.in_flight -= 1;
        for part in &plan.sequences {
            self.counts.rows += part.rows as u64;
            let sequence = self.sequences.get_mut(&part.request).expect("a sequence of the plan");
            sequence.in_flight -= 1;
            if self.ended.contains(&part.request) {
                sequence.awaited = 0;
                self.bury(part.request);
                continue;
            }
            let accepted = part.accepted.iter().map(|node| part.tree.token(*node));
            sequence.extend(accepted);
            sequence.scheduled += part.accepted.len();
            sequence.computed += part.sure_rows() + part.accepted.len();
            self.cache.commit(&mut sequence.blocks, &sequence.keys[..sequence.computed]);
            if !part.tree.is_empty() {
                self.cache.truncate(&mut sequence.blocks, sequence.computed);
            }
            self.counts.drafted_tokens += part.tree.len() as u64;
            self.counts.accepted_tokens += part.accepted.len() as u64;
        }
        self.counts.steps += 1;
    }

    /// Panics unless pool, tables and queues agree. For tests.
    pub fn validate(&self) {
        self.cache.validate(self.sequences.values().map(|sequence| &sequence.blocks));
        let known = self.waiting.len() + self.running.len() + self.ended.len();
        assert_eq!(known, self.sequences.len());
        assert!(self.running.len() <= self.config.sequences_max);
        for (request, sequence) in &self.sequences {
            let sets = [&self.waiting, &self.running, &self.ended];
            assert_eq!(sets.iter().filter(|set| set.contains(request)).count(), 1);
            let waits = self.waiting.contains(request);
            assert!(!waits || sequence.scheduled == 0, "{request:?} waits with blocks");
            assert!(sequence.computed <= sequence.tokens.len());
            assert!(sequence.computed <= sequence.scheduled);
            assert!(sequence.in_flight <= self.in_flight);
            assert!(sequence.short_rope.is_none_or(|original| sequence.scheduled <= original));
            assert!(!self.ended.contains(request) || sequence.in_flight > 0);
            if sequence.in_flight == 0 {
                assert_eq!((sequence.awaited, sequence.scheduled), (0, sequence.computed));
            }
        }
    }
}

impl SchedulerCounts {
    fn take_hit(&mut self, sequence: &mut Sequence, length: usize) {
        if sequence.cached.is_some() {
            self.resumed_hit_tokens += length as u64;
            return;
        }
        sequence.cached = Some(length);
        self.prefix_queried_tokens += sequence.tokens.len() as u64;
        self.prefix_hit_tokens += length as u64;
    }
}

impl Plan {
    /// Empties the plan and keeps its memory.
    pub fn clear(&mut self) {
        self.step.clear();
        self.sequences.clear();
        self.choices = 0;
    }

    fn push(
        &mut self,
        request: RequestId,
        sequence: &mut Sequence,
        known_rows: usize,
        tree: DraftTree,
    ) {
        let first = sequence.scheduled;
        let end = first + known_rows;
        let (first_row, rows) = (self.step.tokens.len() as u32, known_rows + tree.len());
        self.step.sequences.push(StepSequence {
            id: sequence.blocks.id(),
            first_row,
            rows: rows as u32,
            cached: first as u32,
            expanded: sequence.expanded as u32,
            long_rope: sequence.long_rope,
            // A chain has the bits of plain rows as plain rows.
            ancestors: (!tree.is_chain()).then(|| tree.ancestors()),
        });
        // At most the last token is still to be chosen: by the plan made just before.
        let token = |position: usize| match sequence.tokens.get(position) {
            Some(token) => TokenSource::Given(*token),
            None => TokenSource::Chosen(sequence.choice),
        };
        self.step.tokens.extend((first..end).map(token));
        self.step.positions.extend(first as u32..end as u32);
        let nodes = 0..tree.len();
        self.step.tokens.extend(nodes.clone().map(|node| TokenSource::Given(tree.token(node))));
        self.step.positions.extend(nodes.map(|node| (end - 1 + tree.depth(node)) as u32));
        let last_row = first_row + rows as u32;
        let chooses = end == sequence.length();
        let choosing = if chooses { 1 + tree.len() as u32 } else { 0 };
        sequence.scheduled = end;
        sequence.in_flight += 1;
        if chooses {
            sequence.awaited += 1;
            sequence.choice = self.choices;
            self.choices += choosing;
        }
        let (choice_rows, accepted) = (last_row - choosing..last_row, Vec::new());
        self.sequences.push(PlannedSequence { request, rows, choice_rows, tree, accepted });
    }
}

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
//! **Room for speculation.** A draft tree would be a part with more rows than pending tokens and
//! `ancestors` in its [`StepSequence`]. Nothing here assumes one row a decode: rows are given by
//! budget and affordable length, and `computed` moves only in [`Scheduler::commit`]. Accepting
//! `n` of `m` drafted rows is `computed += n`, then truncating the tables to
//! `computed.div_ceil(block_tokens)`; windows slide by committed positions alone, so that a
//! rollback never needs a block that has been given back.

use std::collections::{BTreeMap, BTreeSet};

use lathe_program::{KvLayout, Step, StepSequence, TokenSource};

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
    blocks: SequenceBlocks,
    /// Positions below this one are computed by the expanded form of latent attention.
    expanded: usize,
    /// What the cache knows the tokens by: pages of one form are not those of the other.
    keys: Vec<u32>,
}

/// Set in the key of a token whose row is expanded; no token id is as large.
const EXPANDED: u32 = 1 << 31;

impl Sequence {
    /// A text of which the first `expanded` rows are expanded.
    fn new(tokens: Vec<u32>, expanded: usize) -> Self {
        let mut keys = tokens.clone();
        keys[..expanded].iter_mut().for_each(|key| *key |= EXPANDED);
        Sequence { tokens, keys, expanded, ..Sequence::default() }
    }

    fn pending(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// Gives all blocks back and starts over.
    fn rewind(&mut self, cache: &mut KvCache) {
        cache.release(&mut self.blocks, &self.keys[..self.computed]);
        self.computed = 0;
    }
}

/// A sequence's part of a plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlannedSequence {
    /// Whose.
    pub request: RequestId,
    /// Tokens computed.
    pub rows: usize,
    /// The step's row of the last token, whose logits choose the next one; `None` if the rows end
    /// before it.
    pub choice_row: Option<u32>,
}

/// A step and whose rows it has.
#[derive(Debug, Default)]
pub struct Plan {
    /// For the executor.
    pub step: Step,
    /// In the order of the step's sequences; those with a choice are in the order of its choices.
    pub sequences: Vec<PlannedSequence>,
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
}

/// All sequences and the cache that they share.
#[derive(Debug)]
pub struct Scheduler {
    config: SchedulerConfig,
    cache: KvCache,
    sequences: BTreeMap<RequestId, Sequence>,
    waiting: BTreeSet<RequestId>,
    running: BTreeSet<RequestId>,
    counts: SchedulerCounts,
}

impl Scheduler {
    /// No sequences. `rows_max` and `sequences_max` are at least 1.
    pub fn new(config: SchedulerConfig, layout: &KvLayout) -> Self {
        assert!(config.rows_max > 0 && config.sequences_max > 0);
        let prefix_seed = config.prefix_seed.filter(|_| config.kv_cache);
        let sequences_max = config.sequences_max.min(config.rows_max);
        let cache = KvCache::new(layout, config.kv_blocks, sequences_max, prefix_seed);
        let (sequences, waiting, running) = Default::default();
        Scheduler { config, cache, sequences, waiting, running, counts: SchedulerCounts::default() }
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

    /// Queues a sequence, which fits the pool alone at its greatest length; `expanded` is its
    /// [`StepSequence::expanded`].
    pub fn add(&mut self, request: RequestId, tokens: Vec<u32>, expanded: usize) {
        assert!(!tokens.is_empty());
        let sequence = Sequence::new(tokens, expanded);
        assert!(self.sequences.insert(request, sequence).is_none(), "{request:?} exists");
        self.waiting.insert(request);
    }

    /// Ends a sequence, whatever its state; `None` if there is none. Not between
    /// [`Scheduler::schedule`] and [`Scheduler::commit`].
    pub fn remove(&mut self, request: RequestId) -> Option<Sequence> {
        let mut sequence = self.sequences.remove(&request)?;
        sequence.rewind(&mut self.cache);
        self.waiting.remove(&request);
        self.running.remove(&request);
        Some(sequence)
    }

    /// Appends the token that a step's logits chose.
    pub fn append(&mut self, request: RequestId, token: u32) {
        let sequence = self.sequences.get_mut(&request).expect("a sequence of the plan");
        assert_eq!(sequence.pending(), 0, "a token is chosen once all before it are computed");
        sequence.tokens.push(token);
        sequence.keys.push(token);
        if !self.config.kv_cache {
            sequence.rewind(&mut self.cache);
        }
    }

    /// Chooses the rows of the next step and gives them blocks. Empty only if there are no
    /// sequences. A plan that is not committed (the step failed) may be made again.
    pub fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        let (decoding, filling): (Vec<RequestId>, Vec<RequestId>) =
            self.running.iter().partition(|request| self.sequences[request].pending() == 1);
        for request in decoding.into_iter().chain(filling) {
            self.advance(request, &mut plan);
        }
        self.admit(&mut plan);
        if !plan.sequences.is_empty() {
            self.cache.take_changes(&mut plan.step.tables);
        }
        assert!(!plan.sequences.is_empty() || self.sequences.is_empty(), "a plan without progress");
        plan
    }

    /// Gives a running sequence as many rows as budget and blocks allow.
    fn advance(&mut self, request: RequestId, plan: &mut Plan) {
        // It may have been preempted by an earlier one of this step.
        let budget = self.config.rows_max - plan.step.tokens.len();
        if budget == 0 || !self.running.contains(&request) {
            return;
        }
        let computed = self.sequences[&request].computed;
        while self.cache.length_affordable(&self.sequences[&request].blocks) <= computed {
            if !self.preempt_after(request, plan) {
                return;
            }
        }
        let sequence = self.sequences.get_mut(&request).expect("running");
        let affordable = self.cache.length_affordable(&sequence.blocks) - computed;
        let rows = sequence.pending().min(budget).min(affordable);
        self.cache.grow(&mut sequence.blocks, computed + rows);
        plan.push(request, sequence, rows);
    }

    /// Preempts the latest arrival after `request` that is not part of the plan.
    fn preempt_after(&mut self, request: RequestId, plan: &Plan) -> bool {
        let planned =
            |victim: &RequestId| plan.sequences.iter().any(|part| part.request == *victim);
        let victim = self.running.iter().rev().take_while(|&&victim| victim > request);
        let Some(victim) = victim.copied().find(|victim| !planned(victim)) else { return false };
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
            if self.running.len() == sequences_max || plan.step.tokens.len() == self.config.rows_max
            {
                return;
            }
            let sequence = self.sequences.get_mut(&request).expect("waiting");
            let hit = self.cache.find(&sequence.keys);
            let needed = self.cache.pages_for(sequence.tokens.len()).saturating_sub(hit.shared);
            if needed > self.cache.pool().available() && !self.running.is_empty() {
                return;
            }
            self.counts.take_hit(sequence, hit.length);
            sequence.computed = hit.length;
            sequence.blocks = self.cache.acquire(hit);
            self.waiting.remove(&request);
            self.running.insert(request);
            self.advance(request, plan);
        }
    }

    /// Takes note that no executor has the plan's changes of tables.
    pub fn refused(&mut self, plan: Plan) {
        self.cache.restore_changes(plan.step.tables);
    }

    /// Takes note that the plan's step has run.
    pub fn commit(&mut self, plan: &Plan) {
        for part in &plan.sequences {
            let sequence = self.sequences.get_mut(&part.request).expect("a sequence of the plan");
            sequence.computed += part.rows;
            self.cache.commit(&mut sequence.blocks, &sequence.keys[..sequence.computed]);
            self.counts.rows += part.rows as u64;
        }
        self.counts.steps += u64::from(!plan.sequences.is_empty());
    }

    /// Panics unless pool, tables and queues agree. For tests.
    pub fn validate(&self) {
        self.cache.validate(self.sequences.values().map(|sequence| &sequence.blocks));
        assert_eq!(self.waiting.len() + self.running.len(), self.sequences.len());
        assert!(self.running.len() <= self.config.sequences_max);
        for (request, sequence) in &self.sequences {
            assert_ne!(self.waiting.contains(request), self.running.contains(request));
            assert!(
                self.running.contains(request) || sequence.computed == 0,
                "{request:?} waits with blocks"
            );
            assert!(sequence.computed <= sequence.tokens.len());
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
    fn push(&mut self, request: RequestId, sequence: &Sequence, rows: usize) {
        let computed = sequence.computed;
        let end = computed + rows;
        self.step.sequences.push(StepSequence {
            id: sequence.blocks.id(),
            first_row: self.step.tokens.len() as u32,
            rows: rows as u32,
            cached: computed as u32,
            expanded: sequence.expanded as u32,
            ancestors: None,
        });
        let tokens = sequence.tokens[computed..end].iter();
        self.step.tokens.extend(tokens.map(|token| TokenSource::Given(*token)));
        self.step.positions.extend(computed as u32..end as u32);
        let chooses = end == sequence.tokens.len();
        let choice_row = chooses.then(|| self.step.tokens.len() as u32 - 1);
        self.sequences.push(PlannedSequence { request, rows, choice_row });
    }
}

//! Seeded fuzz of the control plane: random requests, steps, failures and cancellations against
//! a naive model that knows neither pages nor batches.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_program::{Choice, Sampler, TokenCounts};
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::fake::{FakeExecutor, VOCABULARY, layout, naive_logits_of};
use crate::*;

const OPERATIONS: usize = 10_000;
const CONTEXT_MAX: usize = 64;

/// A request that is in the engine, and what the engine has said of it.
struct Expected {
    request: Request,
    tokens: Vec<u32>,
    cancelled: bool,
}

/// Drafts random trees, which often have the tokens that will be chosen. Sometimes it fails.
struct RandomDrafter {
    random: ChaCha8Rng,
    windows: Vec<Option<usize>>,
    long_after: Option<usize>,
}

impl RandomDrafter {
    /// The token that follows `tokens`, but for penalties.
    fn next(&self, text: &DraftText<'_>, tokens: &[u32]) -> u32 {
        let choice = Choice::sample(0, text.sampling, tokens.len() as u64);
        let logits = naive_logits_of(tokens, &self.windows, self.long_after);
        Sampler::default().choose(&choice, &[], &logits).expect("logits are numbers")
    }

    fn grow(&mut self, text: &DraftText<'_>, tree: &mut DraftTree) {
        let nodes = self.random.random_range(0..text.nodes_max.min(9) + 1);
        while tree.len() < nodes {
            let parents = (0..tree.len()).filter(|node| tree.depth(*node) < text.depth_max);
            let parents: Vec<usize> = parents.collect();
            let parent = parents.choose(&mut self.random).copied();
            let parent = parent.filter(|_| self.random.random_bool(0.8));
            let mut path = Vec::new();
            let mut at = parent;
            while let Some(node) = at {
                path.insert(0, tree.token(node));
                at = tree.parent(node);
            }
            let tokens = [text.tokens, &path].concat();
            let token = match self.random.random_bool(0.6) {
                true => self.next(text, &tokens),
                false => self.random.random_range(0..VOCABULARY as u32),
            };
            tree.push(parent, token);
        }
    }
}

impl Drafter for RandomDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), lathe_program::BackendError> {
        if self.random.random_bool(0.01) {
            return Err(lathe_program::BackendError::Device("the drafter fails".into()));
        }
        texts.iter().zip(trees).for_each(|(text, tree)| self.grow(text, tree));
        Ok(())
    }
}

struct Fuzz {
    random: ChaCha8Rng,
    windows: Vec<Option<usize>>,
    long_after: Option<usize>,
    block_tokens: usize,
    config: EngineConfig,
    kv_blocks: usize,
    engine: Engine,
    live: BTreeMap<RequestId, Expected>,
    /// Texts that are over: what chats continue.
    past: Vec<Vec<u32>>,
    refused: [u64; 2],
    failures: u64,
}

impl Fuzz {
    fn new(seed: u64, kv_cache: bool, steps_in_flight: usize, drafts: bool) -> Self {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let window =
            |random: &mut ChaCha8Rng| random.random_bool(0.5).then(|| random.random_range(1..14));
        let windows: Vec<_> = (0..random.random_range(1..4)).map(|_| window(&mut random)).collect();
        let block_tokens = random.random_range(1..6);
        let alone = pages_alone(CONTEXT_MAX, block_tokens, &windows);
        let rows_max = random.random_range(1..24);
        let config = EngineConfig {
            sequences_max: random.random_range(2..9),
            waiting_max: random.random_range(1..9),
            prefix_cache: random.random_bool(0.8),
            prefix_seed: random.random(),
            kv_cache,
        };
        // Some requests never fit, and not many fit at a time.
        let kv_blocks = random.random_range(alone * 5 / 6 + 1..alone * 2 + 2);
        let kv = layout(block_tokens, &windows);
        let mut executor = FakeExecutor::new(kv, CONTEXT_MAX, rows_max, kv_blocks)
            .failing(40)
            .steps_in_flight(steps_in_flight);
        let long_after = random.random_bool(0.5).then(|| random.random_range(8..CONTEXT_MAX));
        if let Some(original) = long_after {
            executor = executor.long_rope_after(original);
        }
        let mut engine = Engine::new(Box::new(executor), config.clone()).unwrap();
        if drafts {
            let (random, windows) = (ChaCha8Rng::seed_from_u64(seed), windows.clone());
            engine =
                engine.with_drafter(Box::new(RandomDrafter { random, windows, long_after }), 9);
        }
        let (live, past, refused) = Default::default();
        Fuzz {
            random,
            windows,
            long_after,
            block_tokens,
            config,
            kv_blocks,
            engine,
            live,
            past,
            refused,
            failures: 0,
        }
    }

    fn operate(&mut self) {
        match self.random.random_range(0..10) {
            0..2 => self.add(),
            2 => self.cancel(),
            _ => self.step(),
        }
        self.engine.validate();
        let stats = self.engine.stats();
        assert_eq!(
            stats.waiting + stats.running,
            self.live.values().filter(|live| !live.cancelled).count()
        );
        assert!(stats.running <= self.config.sequences_max);
        // Preempted requests return to the queue whatever its limit.
        assert!(stats.waiting <= self.config.waiting_max + self.config.sequences_max);
    }

    fn request(&mut self) -> Request {
        // Few different tokens and old texts, so that prefixes are often shared.
        let random = &mut self.random;
        let mut prompt = self
            .past
            .choose(random)
            .filter(|_| random.random_bool(0.7))
            .cloned()
            .unwrap_or_default();
        prompt.truncate(random.random_range(0..CONTEXT_MAX / 2));
        prompt.extend((0..random.random_range(1..12)).map(|_| random.random_range(0..2)));
        prompt.truncate(CONTEXT_MAX - 1);
        let sampling = Sampling {
            temperature: if random.random_bool(0.5) { 0.0 } else { 1.5 },
            top_k: random.random_range(0..8),
            repetition_penalty: if random.random_bool(0.8) { 1.0 } else { 1.3 },
            seed: random.random(),
            ..Sampling::default()
        };
        let max_tokens = random.random_bool(0.9).then(|| random.random_range(1..24));
        let stop_tokens =
            (0..random.random_range(0..4)).map(|_| random.random_range(0..61)).collect();
        Request { prompt, sampling, max_tokens, stop_tokens, ..Request::default() }
    }

    fn add(&mut self) {
        let request = self.request();
        let waiting = self.engine.stats().waiting;
        let wanted = request.max_tokens.unwrap_or(1).min(CONTEXT_MAX - request.prompt.len());
        let needed =
            pages_alone(request.prompt.len() + wanted - 1, self.block_tokens, &self.windows);
        match self.engine.add(request.clone(), None) {
            Ok(id) => {
                assert!(waiting < self.config.waiting_max && needed <= self.kv_blocks);
                self.live.insert(id, Expected { request, tokens: Vec::new(), cancelled: false });
            }
            Err(AddError::QueueFull { waiting: found, .. }) => {
                assert!(found == waiting && waiting >= self.config.waiting_max);
                self.refused[0] += 1;
            }
            Err(AddError::TooFewBlocks { needed: found, available }) => {
                assert_eq!((found, available), (needed, self.kv_blocks));
                assert!(needed > available);
                self.refused[1] += 1;
            }
            Err(error) => panic!("{error}"),
        }
    }

    fn cancel(&mut self) {
        let ids: Vec<RequestId> = self.live.keys().copied().collect();
        if let Some(&id) = ids.choose(&mut self.random) {
            let live = self.live.get_mut(&id).unwrap();
            assert_eq!(self.engine.cancel(id), !live.cancelled);
            live.cancelled = true;
        }
    }

    fn step(&mut self) {
        let rows = self.engine.stats().rows;
        let events = match self.engine.step() {
            Ok(events) => events,
            Err(EngineError::Backend(_)) => {
                self.failures += 1;
                return;
            }
            Err(error) => panic!("{error}"),
        };
        let busy = self.live.values().any(|live| !live.cancelled);
        assert!(!busy || self.engine.stats().rows > rows, "a step without progress");
        for event in events {
            match event {
                Event::Token { request, token, .. } => {
                    self.live.get_mut(&request).unwrap().tokens.push(token)
                }
                Event::Finished { request, reason, generated_tokens, .. } => {
                    let live = self.live.remove(&request).unwrap();
                    assert_eq!(generated_tokens, live.tokens.len());
                    assert_eq!(live.cancelled, reason == FinishReason::Cancelled);
                    self.compare(live, reason);
                }
            }
        }
    }

    /// The text must be the naive model's, and must end where it should.
    fn compare(&mut self, live: Expected, reason: FinishReason) {
        let Expected { request, tokens, .. } = live;
        let mut sampler = Sampler::default();
        let mut counts = TokenCounts::new(&request.prompt);
        let mut text = request.prompt.clone();
        for &token in &tokens {
            let logits = naive_logits_of(&text, &self.windows, self.long_after);
            let choice = Choice {
                counts: Some(Arc::new(counts.clone())),
                ..Choice::sample(0, request.sampling, text.len() as u64)
            };
            let expected = sampler.choose(&choice, &[], &logits);
            assert_eq!(expected, Some(token), "after {text:?}");
            counts.record(token);
            text.push(token);
        }
        let stop = tokens.iter().position(|token| request.stop_tokens.contains(token));
        match reason {
            FinishReason::Stop => assert_eq!(stop, Some(tokens.len() - 1)),
            FinishReason::Length => {
                let full =
                    pages_alone(text.len(), self.block_tokens, &self.windows) > self.kv_blocks;
                assert!(
                    full || text.len() == CONTEXT_MAX || Some(tokens.len()) == request.max_tokens
                );
                assert_eq!(stop, None);
            }
            FinishReason::Cancelled => assert_eq!(stop, None),
            FinishReason::InvalidLogits => panic!("all logits are numbers"),
        }
        self.past.push(text);
        if self.past.len() > 20 {
            let index = self.random.random_range(0..20);
            self.past.swap_remove(index);
        }
    }
}

/// Pages for `length` positions of a sequence alone, by trying every position.
fn pages_alone(length: usize, block_tokens: usize, windows: &[Option<usize>]) -> usize {
    let held = |window: &Option<usize>| {
        // The row at `last` may stand anywhere in its block, and its window reaches back.
        let touched = |last: usize, window: usize| {
            last / block_tokens - (last + 1).saturating_sub(window) / block_tokens + 1
        };
        let all = length.div_ceil(block_tokens);
        window.map_or(all, |window| {
            all.min(
                (0..block_tokens)
                    .map(|at| touched(1000 * block_tokens + at, window))
                    .max()
                    .unwrap(),
            )
        })
    };
    windows.iter().map(held).sum()
}

fn fuzz(seed: u64, kv_cache: bool, steps_in_flight: usize, drafts: bool) -> Stats {
    let mut fuzz = Fuzz::new(seed, kv_cache, steps_in_flight, drafts);
    for _ in 0..OPERATIONS {
        fuzz.operate();
    }
    for _ in 0..OPERATIONS {
        fuzz.step();
    }
    assert!(fuzz.engine.is_idle() && fuzz.live.is_empty(), "seed {seed} does not come to an end");
    let stats = fuzz.engine.stats();
    assert_eq!(stats.blocks_used, 0);
    println!(
        "seed {seed}: {} refused, {} failed steps, {stats:?}",
        fuzz.refused[0] + fuzz.refused[1],
        fuzz.failures
    );
    stats
}

#[test]
fn random_operations_never_change_a_text() {
    for steps_in_flight in [1, 2, 3] {
        let stats: Vec<Stats> =
            (0..16).map(|seed| fuzz(seed, true, steps_in_flight, false)).collect();
        // The fuzz is worth something only if it reaches what it is about.
        let sum = |count: fn(&Stats) -> u64| stats.iter().map(count).sum::<u64>();
        assert!(sum(|stats| stats.preemptions) > 500);
        assert!(sum(|stats| stats.prefix_hit_tokens) > 10_000);
        assert!(sum(|stats| stats.resumed_hit_tokens) > 1_000);
    }
}

#[test]
fn random_operations_without_cache() {
    for seed in 100..103 {
        assert_eq!(fuzz(seed, false, 2, false).prefix_hit_tokens, 0);
    }
}

#[test]
fn random_drafts_never_change_a_text() {
    for steps_in_flight in [1, 2] {
        let stats: Vec<Stats> =
            (200..212).map(|seed| fuzz(seed, true, steps_in_flight, true)).collect();
        let sum = |count: fn(&Stats) -> u64| stats.iter().map(count).sum::<u64>();
        assert!(sum(|stats| stats.preemptions) > 300);
        assert!(sum(|stats| stats.prefix_hit_tokens) > 7_000);
        let (drafted, accepted) =
            (sum(|stats| stats.drafted_tokens), sum(|stats| stats.accepted_tokens));
        assert!(drafted > 50_000 && accepted > 15_000, "{drafted} {accepted}");
    }
}

#[test]
fn nothing_is_drafted_without_a_cache() {
    assert_eq!(fuzz(300, false, 1, true).drafted_tokens, 0);
}

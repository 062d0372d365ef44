//! `ModelDrafter`: a smaller model of the same vocabulary drafts.

use std::collections::BTreeMap;
use std::time::Instant;

use lathe_program::{
    BackendError, Choice, Executor, Report, Sampling, Step, StepSequence, TokenLogprobs,
    TokenSource,
};

use super::acceptance::Acceptance;
use super::{DraftText, DraftTree, Drafter};
use crate::kv::{KvCache, SequenceBlocks};
use crate::request::RequestId;

/// Tokens that a node may have instead of the drafter's own choice.
const SIBLINGS: u32 = 3;
/// What a step of the draft model costs, as a part of one of the model, before either is measured.
const FIRST_GUESS: f64 = 0.1;
/// How much a measured time still counts after one more.
const KEPT: f64 = 0.9;

/// Drafts with a model of its own, which has its own cache.
///
/// It chooses as the request does, with the request's random numbers, and goes on while its own
/// choice is likely enough to pay. Other tokens that are likely enough become leaves beside it.
pub struct ModelDrafter {
    executor: Box<dyn Executor>,
    cache: KvCache,
    texts: BTreeMap<RequestId, Text>,
    step: Step,
    /// What a step with one row a text takes; `None` before any was measured.
    own_seconds: Option<f64>,
    /// Of tokens that were drawn at random.
    drawn: Acceptance,
}

/// What the draft model's cache holds of a text.
#[derive(Default)]
struct Text {
    held: SequenceBlocks,
    /// The tokens whose keys and values are there.
    fed: Vec<u32>,
    /// Whether its tokens are drawn at random.
    drawn: bool,
    /// Whether it turns by the draft model's long rotary tables.
    long_rope: bool,
}

/// A text that is being drafted for.
struct Draft<'a> {
    text: DraftText<'a>,
    /// Its place among the trees.
    index: usize,
    /// Tokens to feed.
    next: Vec<u32>,
    /// The node that the last of them is; `None` for a token of the text.
    node: Option<usize>,
    /// The probability that all nodes so far are accepted, as the draft model sees it.
    probability: f64,
}

impl ModelDrafter {
    /// Drafts with `executor`, whose model has the vocabulary of the model that verifies.
    pub fn new(executor: Box<dyn Executor>) -> Self {
        let limits = executor.limits();
        let layout = &executor.program().kv;
        let cache = KvCache::new(layout, limits.kv_blocks, limits.sequences_max, None);
        let (texts, step, drawn) = Default::default();
        Self { executor, cache, texts, step, own_seconds: None, drawn }
    }

    /// What one of its steps costs, as a part of a step of the model.
    fn own_cost(&self, text: &DraftText<'_>) -> f64 {
        let measured = self.own_seconds.filter(|_| text.step_seconds > 0.0);
        measured.map_or(FIRST_GUESS, |own| own / text.step_seconds)
    }

    /// Takes back what the cache holds beyond the text, and says what is to be fed. `None` where
    /// the draft model has no room for the text.
    fn begin<'a>(&mut self, text: DraftText<'a>, index: usize) -> Option<Draft<'a>> {
        let limits = self.executor.limits();
        let context_max = self.executor.program().context_max;
        let known = self.texts.contains_key(&text.request);
        if text.tokens.len() >= context_max || (!known && self.texts.len() >= limits.sequences_max)
        {
            return None;
        }
        let state = self.texts.entry(text.request).or_default();
        state.drawn = text.sampling.temperature > 0.0;
        let long_rope = self.executor.program().long_rope(text.tokens.len());
        if std::mem::replace(&mut state.long_rope, long_rope) != long_rope {
            self.cache.release(&mut state.held, &state.fed);
            state.fed.clear();
        }
        let same = state.fed.iter().zip(text.tokens).take_while(|(fed, token)| fed == token);
        // The last token is fed again if need be: its logits are wanted.
        let kept = same.count().min(text.tokens.len() - 1);
        state.fed.truncate(kept);
        self.cache.truncate(&mut state.held, kept);
        self.cache.commit(&mut state.held, &text.tokens[..kept]);
        let next = text.tokens[kept..].to_vec();
        Some(Draft { text, index, next, node: None, probability: 1.0 })
    }

    /// Feeds what the drafts have next, in as many steps as that takes; what was chosen after each.
    fn feed(
        &mut self,
        drafts: &mut Vec<Draft<'_>>,
    ) -> Result<Vec<Option<(u32, TokenLogprobs)>>, BackendError> {
        let rows_max = self.executor.limits().rows_max;
        let mut chosen = vec![None; drafts.len()];
        loop {
            self.step.clear();
            let mut ending = Vec::new();
            for (place, draft) in drafts.iter_mut().enumerate() {
                let room = rows_max - self.step.tokens.len();
                let state = self.texts.get_mut(&draft.text.request).expect("a text that began");
                let affordable = self.cache.length_affordable(&state.held, 0);
                let room = room.min(affordable.saturating_sub(state.fed.len()));
                let rows = draft.next.len().min(room);
                if rows == 0 {
                    continue;
                }
                let cached = state.fed.len();
                self.cache.grow(&mut state.held, cached + rows);
                let first_row = self.step.tokens.len() as u32;
                self.step.sequences.push(StepSequence {
                    id: state.held.id(),
                    first_row,
                    rows: rows as u32,
                    cached: cached as u32,
                    expanded: 0,
                    long_rope: state.long_rope,
                    ancestors: None,
                });
                let tokens = draft.next.drain(..rows);
                state.fed.extend(tokens.as_slice());
                self.step.tokens.extend(tokens.map(TokenSource::Given));
                self.step.positions.extend(cached as u32..(cached + rows) as u32);
                if draft.next.is_empty() {
                    let row = first_row + rows as u32 - 1;
                    self.step.choices.push(choice(row, draft.text.sampling, cached + rows));
                    ending.push(place);
                }
            }
            if self.step.tokens.is_empty() {
                return Ok(chosen);
            }
            self.cache.take_changes(&mut self.step.tables);
            let made = self.executor.run(&self.step)?;
            for (place, (token, logprobs)) in
                ending.into_iter().zip(made.tokens.iter().zip(made.logprobs))
            {
                chosen[place] = token.zip(logprobs.clone());
            }
        }
    }
}

/// How the draft model chooses: as the request does, but for penalties, whose counts it lacks.
fn choice(row: u32, sampling: Sampling, position: usize) -> Choice {
    let plain = Sampling::default();
    let sampling = Sampling {
        repetition_penalty: plain.repetition_penalty,
        presence_penalty: plain.presence_penalty,
        frequency_penalty: plain.frequency_penalty,
        ..sampling
    };
    let report = Report { logprobs: Some(SIBLINGS), logits: false };
    Choice { report, ..Choice::sample(row, sampling, position as u64) }
}

impl Drafter for ModelDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        let program = self.executor.program();
        let (context_max, long_after) = (program.context_max, program.long_rope_after());
        let worth = |text: &DraftText<'_>| text.probability_min + self.own_cost(text) < 1.0;
        let worthy = texts.iter().enumerate().filter(|(_, text)| worth(text));
        let worthy: Vec<(usize, DraftText<'_>)> = worthy.map(|(at, text)| (at, *text)).collect();
        let mut drafts = Vec::new();
        for (index, text) in worthy {
            drafts.extend(self.begin(text, index));
        }
        while !drafts.is_empty() {
            let (started, one_row) = (Instant::now(), drafts.iter().all(|it| it.next.len() == 1));
            let chosen = match self.feed(&mut drafts) {
                Ok(chosen) => chosen,
                Err(error) => {
                    // What the cache holds is not known any more.
                    self.texts.keys().copied().collect::<Vec<_>>().into_iter().for_each(|it| {
                        self.forget(it);
                    });
                    return Err(error);
                }
            };
            if one_row {
                let seconds = started.elapsed().as_secs_f64();
                let kept = |own: f64| own * KEPT + seconds * (1.0 - KEPT);
                self.own_seconds = Some(self.own_seconds.map_or(seconds, kept));
            }
            let mut going = Vec::new();
            for (mut draft, chosen) in drafts.into_iter().zip(chosen) {
                let Some((token, logprobs)) = chosen else { continue };
                let tree = &mut trees[draft.index];
                let drawn = draft.text.sampling.temperature > 0.0;
                let rate = drawn.then(|| self.drawn.rate());
                draft.grow(tree, (token, &logprobs), rate, self.own_cost(&draft.text));
                let state = &self.texts[&draft.text.request];
                let fed = state.fed.len();
                // A draft ends where the text would begin anew with the long rotary tables.
                let short_end = long_after.filter(|_| !state.long_rope).unwrap_or(usize::MAX);
                if !draft.next.is_empty() && fed + 1 < context_max && fed < short_end {
                    going.push(draft);
                }
            }
            drafts = going;
        }
        Ok(())
    }

    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        let state = self.texts.get_mut(&request);
        if state.is_some_and(|state| state.drawn) && !tree.is_empty() {
            self.drawn.observe(accepted, tree.len().min(accepted + 1));
        }
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(mut text) = self.texts.remove(&request) {
            self.cache.release(&mut text.held, &text.fed);
        }
    }
}

impl Draft<'_> {
    /// Adds the chosen token and its likely siblings below the last node. If the chosen one is
    /// likely enough to be built on, at `own_cost`, it is what is fed next. `drawn` is how often a
    /// token that was drawn at random was accepted: both models draw by the same random numbers.
    fn grow(
        &mut self,
        tree: &mut DraftTree,
        (token, logprobs): (u32, &TokenLogprobs),
        drawn: Option<f64>,
        own_cost: f64,
    ) {
        let DraftText { nodes_max, depth_max, probability_min, .. } = self.text;
        let (below, parent) = (self.probability, self.node);
        let own = below * drawn.unwrap_or_else(|| f64::from(logprobs.logprob).exp());
        if tree.len() < nodes_max && own >= probability_min {
            let node = tree.push(parent, token);
            if own >= probability_min + own_cost && tree.depth(node) < depth_max {
                (self.node, self.probability, self.next) = (Some(node), own, vec![token]);
            }
        }
        for (sibling, logprob) in logprobs.top.iter().filter(|_| drawn.is_none()) {
            let likely = below * f64::from(*logprob).exp() >= probability_min;
            if likely && tree.len() < nodes_max {
                tree.push(parent, *sibling);
            }
        }
    }
}

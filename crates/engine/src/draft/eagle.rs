//! `EagleDrafter`: a small head drafts from the features that the model has made of a text
//! (EAGLE-3, arXiv 2503.01840), in a dynamic tree (EAGLE-2, arXiv 2406.16858, section 4).
//!
//! **Expansion.** The value of a node is the product of the head's probabilities on its path. In
//! each layer the nodes of the highest values are expanded, all in one step of the head, as long as
//! what they may add is worth that step. **Rerank.** Of all nodes the best stay, as many as pay. A
//! node is worth no more than its parent, so that what stays is a tree.
//!
//! The head has its own cache. Its row for position `p` of a text reads the token at `p + 1` and
//! the model's features at `p`. Rows of drafted tokens read what the row above them made, and give
//! their slots back. Where the model did not compute the beginning of a text, because it was cached
//! for another, the head sees the text from there on.

use std::collections::BTreeMap;
use std::time::Instant;

use lathe_program::{
    BackendError, Choice, Executor, Report, Sampling, Step, StepInput, StepSequence, TREE_ROWS_MAX,
    TokenSource,
};
use lathe_tensor::Tensor;

use super::{DraftText, DraftTree, Drafter};
use crate::kv::{KvCache, SequenceBlocks};
use crate::request::RequestId;

/// Children of a node.
const CHILDREN: u32 = 8;
/// Nodes of a layer that are expanded.
const EXPANDED_MAX: usize = 8;
/// What a step of the head costs, as a part of one of the model, before either is measured.
const FIRST_GUESS: f64 = 0.1;
/// How often a text is passed over when nothing pays and the head was seen to be wrong.
const PAUSE: u32 = 16;
/// A head is seen to be wrong when its probabilities are to be multiplied by less than this.
const WRONG: f64 = 0.5;
/// How much a measured time still counts after one more.
const KEPT: f64 = 0.9;

/// Drafts with a head that reads features of the model.
pub struct EagleDrafter {
    executor: Box<dyn Executor>,
    /// `[vocabulary, width]` of the model's tokens.
    embedding: Tensor,
    /// By token of the head: the model's.
    tokens: Vec<u32>,
    /// Elements of the head's inputs: embedding, features, and the row above where it is not read
    /// in the features' place.
    input_widths: Vec<usize>,
    cache: KvCache,
    texts: BTreeMap<RequestId, Text>,
    step: Step,
    /// What a step with drafted rows takes; `None` before any was measured.
    own_seconds: Option<f64>,
    calibration: Calibration,
}

/// What the head has of a text.
#[derive(Default)]
struct Text {
    held: SequenceBlocks,
    /// The position of its first row.
    first: usize,
    /// Rows in the cache, but for those of drafted tokens.
    computed: usize,
    /// Features of the rows that follow.
    features: Vec<f32>,
    /// What the last computed row made.
    made: Option<Made>,
    /// How often the text is still passed over.
    pause: u32,
    /// How many nodes of the last tree the head expects to be accepted.
    expected: f64,
}

/// What a row of the head made.
#[derive(Debug, Clone, Default)]
struct Made {
    /// What may follow: tokens of the model and their probabilities, the best first.
    next: Vec<(u32, f64)>,
    /// The stream that rows below it read.
    hidden: Vec<f32>,
}

/// What a row reads besides its embedding.
enum Source<'a> {
    Features(&'a [f32]),
    Above(&'a [f32]),
}

/// A text that is being drafted for.
struct Draft<'a> {
    text: DraftText<'a>,
    /// Its place among the trees.
    index: usize,
    nodes: Vec<Node>,
    /// The nodes that have been expanded, by row.
    expanded: Vec<usize>,
    /// What each expanded node made.
    made: Vec<Made>,
    /// What the text's last row made.
    root: Made,
}

/// A drafted token.
struct Node {
    parent: Option<usize>,
    token: u32,
    /// The probability that it is accepted, as the head sees it.
    value: f64,
    depth: usize,
    /// Its row, if it was expanded.
    row: Option<usize>,
}

/// How far the head's own probabilities are to be believed.
#[derive(Debug, Clone, Copy, Default)]
struct Calibration {
    expected: f64,
    accepted: f64,
}

impl Calibration {
    /// How much a tree still counts after one more.
    const KEPT: f64 = 0.97;

    /// Multiplies the head's probabilities.
    fn scale(self) -> f64 {
        ((self.accepted + 1.0) / (self.expected + 1.0)).min(1.0)
    }

    /// Without anything drafted (`expected` is 0), what was seen is forgotten bit by bit, so that
    /// drafts are tried again.
    fn observe(&mut self, expected: f64, accepted: f64) {
        self.expected = self.expected * Self::KEPT + expected;
        self.accepted = self.accepted * Self::KEPT + accepted;
    }
}

impl EagleDrafter {
    /// Drafts with `executor`, whose program is an EAGLE head's (`lathe_model::eagle`). Its token
    /// `i` is the model's token `tokens[i]`, and `embedding` is that of the model's tokens.
    ///
    /// # Panics
    /// If the program has not the inputs of such a head, or the sizes do not fit.
    pub fn new(executor: Box<dyn Executor>, embedding: Tensor, tokens: Vec<u32>) -> Self {
        let limits = executor.limits();
        let program = executor.program();
        let input_widths = program.input_widths();
        assert!([2, 3].contains(&input_widths.len()), "an embedding, features, and a row above");
        assert_eq!(input_widths[0], embedding.columns(), "the embedding's width");
        assert_eq!(program.vocabulary, tokens.len(), "a token of the model for each of the head");
        let cache = KvCache::new(&program.kv, limits.kv_blocks, limits.sequences_max, None);
        let (texts, step, calibration) = Default::default();
        Self {
            executor,
            embedding,
            tokens,
            input_widths,
            cache,
            texts,
            step,
            own_seconds: None,
            calibration,
        }
    }

    /// What a step of the head costs, as a part of a step of the model.
    fn own_cost(&self, text: &DraftText<'_>) -> f64 {
        let measured = self.own_seconds.filter(|_| text.step_seconds > 0.0);
        measured.map_or(FIRST_GUESS, |own| own / text.step_seconds)
    }

    /// Takes back the rows of drafted tokens. `None` where there are no features up to the end of
    /// the text, or no room.
    fn begin<'a>(&mut self, text: DraftText<'a>, index: usize) -> Option<Draft<'a>> {
        let state = self.texts.get_mut(&text.request)?;
        if state.pause > 0 {
            state.pause -= 1;
            return None;
        }
        self.cache.truncate(&mut state.held, state.computed);
        self.cache.commit(&mut state.held, &text.tokens[..state.computed]);
        let rows = (text.tokens.len() - 1).checked_sub(state.first)?;
        let known = state.computed + state.features.len() / self.input_widths[1];
        let fits = rows <= self.executor.program().context_max && rows > 0 && known >= rows;
        let (nodes, expanded, made, root) = Default::default();
        fits.then_some(Draft { text, index, nodes, expanded, made, root })
    }

    /// Adds a row to the step.
    fn push(&mut self, token: u32, position: usize, source: Source<'_>) {
        let step = &mut self.step;
        step.inputs.resize_with(self.input_widths.len(), StepInput::default);
        // The row's own token is not read: its embedding is an input.
        step.tokens.push(TokenSource::Given(0));
        step.positions.push(position as u32);
        let embedded = &mut step.inputs[0].values;
        let start = embedded.len();
        embedded.resize(start + self.input_widths[0], 0.0);
        self.embedding.row_into(token as usize, &mut embedded[start..]);
        match (source, &self.input_widths[1..]) {
            (Source::Features(values) | Source::Above(values), [_]) => {
                step.inputs[1].values.extend_from_slice(values);
            }
            (Source::Features(values), widths) => {
                step.inputs[1].values.extend_from_slice(values);
                let above = &mut step.inputs[2].values;
                above.resize(above.len() + widths[1], 0.0);
            }
            (Source::Above(values), widths) => {
                let features = &mut step.inputs[1].values;
                features.resize(features.len() + widths[0], 0.0);
                step.inputs[2].values.extend_from_slice(values);
            }
        }
    }

    /// Asks for what the row that was added last makes.
    fn choose(&mut self) {
        let row = self.step.tokens.len() as u32 - 1;
        let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
        let report = Report { logprobs: Some(CHILDREN), logits: false };
        self.step.choices.push(Choice { report, ..Choice::sample(row, sampling, 0) });
    }

    /// Runs the step; what the rows made that were asked for.
    fn run(&mut self) -> Result<Vec<Made>, BackendError> {
        self.cache.take_changes(&mut self.step.tables);
        let output = self.executor.run(&self.step)?;
        let width = self.input_widths[0];
        let made = self.step.choices.iter().zip(output.logprobs).map(|(choice, logprobs)| {
            let top = logprobs.iter().flat_map(|logprobs| &logprobs.top);
            let model_token = |(token, logprob): &(u32, f32)| {
                (self.tokens[*token as usize], f64::from(*logprob).exp())
            };
            let next = top.map(model_token).collect();
            let hidden = output.captures[0][choice.row as usize * width..][..width].to_vec();
            Made { next, hidden }
        });
        Ok(made.collect())
    }

    /// Computes the rows of the texts that are not in the cache, in as many steps as that takes.
    fn feed_texts(&mut self, drafts: &mut Vec<Draft<'_>>) -> Result<(), BackendError> {
        let rows_max = self.executor.limits().rows_max;
        let width = self.input_widths[1];
        loop {
            self.step.clear();
            let mut ending = Vec::new();
            for draft in drafts.iter() {
                let request = draft.text.request;
                let mut state = self.texts.remove(&request).expect("a text that began");
                let left = draft.text.tokens.len() - 1 - state.first - state.computed;
                let affordable = self.cache.length_affordable(&state.held, 0);
                let rows = left.min(rows_max - self.step.tokens.len());
                let rows = rows.min(affordable.saturating_sub(state.computed));
                if rows > 0 {
                    self.cache.grow(&mut state.held, state.computed + rows);
                    self.begin_sequence(&state, rows, None);
                    let features: Vec<f32> = state.features.drain(..rows * width).collect();
                    for (row, features) in features.chunks_exact(width).enumerate() {
                        let slot = state.computed + row;
                        let token = draft.text.tokens[state.first + slot + 1];
                        self.push(token, slot, Source::Features(features));
                    }
                    state.computed += rows;
                    state.made = None;
                    if rows == left {
                        self.choose();
                        ending.push(request);
                    }
                }
                self.texts.insert(request, state);
            }
            if self.step.tokens.is_empty() {
                break;
            }
            let made = self.run()?;
            for (request, made) in ending.into_iter().zip(made) {
                self.texts.get_mut(&request).expect("it was fed").made = Some(made);
            }
        }
        // Where the cache has no room for the whole text, nothing is drafted.
        drafts.retain_mut(|draft| {
            let state = &self.texts[&draft.text.request];
            let whole = draft.text.tokens.len() - 1 == state.first + state.computed;
            let made = state.made.clone().filter(|_| whole);
            draft.root = made.unwrap_or_default();
            !draft.root.next.is_empty()
        });
        Ok(())
    }

    fn begin_sequence(&mut self, state: &Text, rows: usize, ancestors: Option<Vec<u64>>) {
        self.step.sequences.push(StepSequence {
            id: state.held.id(),
            first_row: self.step.tokens.len() as u32,
            rows: rows as u32,
            cached: state.computed as u32,
            expanded: 0,
            long_rope: false,
            ancestors,
        });
    }

    /// Expands a layer of each draft that it pays for; whether there was one.
    fn expand(&mut self, drafts: &mut [Draft<'_>]) -> Result<bool, BackendError> {
        let rows_max = self.executor.limits().rows_max;
        let mut waiting: Vec<usize> = Vec::new();
        for (place, draft) in drafts.iter_mut().enumerate() {
            let state = &self.texts[&draft.text.request];
            let affordable = self.cache.length_affordable(&state.held, 0);
            let room = affordable.saturating_sub(state.computed).min(rows_max).min(TREE_ROWS_MAX);
            let context = self.executor.program().context_max - state.computed;
            if draft.choose_layer(self.own_cost(&draft.text), room.min(context)) {
                waiting.push(place);
            }
        }
        let any = !waiting.is_empty();
        while !waiting.is_empty() {
            self.step.clear();
            let mut running = Vec::new();
            waiting.retain(|place| {
                let draft = &drafts[*place];
                let fits = self.step.tokens.len() + draft.expanded.len() <= rows_max
                    && self.push_tree(draft);
                running.extend(fits.then_some(*place));
                !fits
            });
            if running.is_empty() {
                // The others took the blocks. What has no row is no longer expanded.
                waiting.iter().for_each(|place| drafts[*place].cut());
                break;
            }
            let started = Instant::now();
            let mut made = self.run()?.into_iter();
            let seconds = started.elapsed().as_secs_f64();
            let kept = |own: f64| own * KEPT + seconds * (1.0 - KEPT);
            self.own_seconds = Some(self.own_seconds.map_or(seconds, kept));
            for place in running {
                let new = drafts[place].expanded.len() - drafts[place].made.len();
                drafts[place].grow(made.by_ref().take(new).collect());
            }
        }
        Ok(any)
    }

    /// Adds the expanded nodes of a draft to the step and asks for what the new ones make. `false`
    /// if there are no blocks for them.
    fn push_tree(&mut self, draft: &Draft<'_>) -> bool {
        let request = draft.text.request;
        let mut state = self.texts.remove(&request).expect("a text that began");
        let end = state.computed + draft.expanded.len();
        let fits = self.cache.length_affordable(&state.held, 0) >= end;
        if fits {
            self.cache.grow(&mut state.held, end);
            self.begin_sequence(&state, draft.expanded.len(), Some(draft.ancestors()));
            for (row, node) in draft.expanded.iter().enumerate() {
                let node = &draft.nodes[*node];
                let position = state.computed + node.depth - 1;
                self.push(node.token, position, Source::Above(&draft.above(node).hidden));
                if row >= draft.made.len() {
                    self.choose();
                }
            }
        }
        self.texts.insert(request, state);
        fits
    }

    fn draft(
        &mut self,
        mut drafts: Vec<Draft<'_>>,
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        self.feed_texts(&mut drafts)?;
        let scale = self.calibration.scale();
        drafts.iter_mut().for_each(|draft| draft.begin(scale));
        while self.expand(&mut drafts)? {}
        for draft in drafts {
            let expected = draft.rank(&mut trees[draft.index]) / scale;
            let state = self.texts.get_mut(&draft.text.request).expect("a text that began");
            state.expected = expected;
            if trees[draft.index].is_empty() {
                state.pause = if scale < WRONG { PAUSE } else { 0 };
                self.calibration.observe(0.0, 0.0);
            }
        }
        Ok(())
    }
}

impl Drafter for EagleDrafter {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        let worthy = texts.iter().enumerate().filter(|(_, text)| text.probability_min < 1.0);
        let worthy: Vec<(usize, DraftText<'_>)> = worthy.map(|(at, text)| (at, *text)).collect();
        let drafts = worthy.into_iter().filter_map(|(at, text)| self.begin(text, at)).collect();
        let done = self.draft(drafts, trees);
        if done.is_err() {
            // What the cache holds is not known any more.
            let all: Vec<RequestId> = self.texts.keys().copied().collect();
            all.into_iter().for_each(|request| self.forget(request));
        }
        done
    }

    fn reads_features(&self) -> bool {
        true
    }

    fn features(&mut self, request: RequestId, first: usize, rows: &[f32]) {
        let width = self.input_widths[1];
        let known = self.texts.len();
        let new = !self.texts.contains_key(&request);
        if new && known >= self.executor.limits().sequences_max {
            return;
        }
        let state = self.texts.entry(request).or_insert_with(|| Text { first, ..Text::default() });
        let end = state.first + state.computed + state.features.len() / width;
        if first > end || first < state.first {
            // What lies between was not computed, or the text began anew.
            self.cache.release(&mut state.held, &[]);
            *state = Text { first, ..Text::default() };
        }
        let end = state.first + state.computed + state.features.len() / width;
        let known = (end - first).min(rows.len() / width);
        state.features.extend_from_slice(&rows[known * width..]);
    }

    fn observe(&mut self, request: RequestId, tree: &DraftTree, accepted: usize) {
        if let Some(state) = self.texts.get(&request).filter(|_| !tree.is_empty()) {
            self.calibration.observe(state.expected, accepted as f64);
        }
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(mut text) = self.texts.remove(&request) {
            self.cache.release(&mut text.held, &[]);
        }
    }
}

impl Draft<'_> {
    /// The nodes that follow the text.
    fn begin(&mut self, scale: f64) {
        let next = std::mem::take(&mut self.root.next);
        self.add(None, scale, 1, &next);
        self.root.next = next;
    }

    fn add(&mut self, parent: Option<usize>, value: f64, depth: usize, next: &[(u32, f64)]) {
        let node = |(token, probability): &(u32, f64)| Node {
            parent,
            token: *token,
            value: value * probability.min(1.0),
            depth,
            row: None,
        };
        self.nodes.extend(next.iter().map(node));
    }

    /// Marks the best nodes of the last layer as expanded, if a step of `own_cost` may pay and
    /// `rows` are not exceeded.
    fn choose_layer(&mut self, own_cost: f64, rows: usize) -> bool {
        let DraftText { depth_max, probability_min, .. } = self.text;
        let Some(depth) = self.nodes.last().map(|node| node.depth) else { return false };
        let room = rows.saturating_sub(self.expanded.len()).min(EXPANDED_MAX);
        let open = |node: &usize| {
            let node = &self.nodes[*node];
            node.depth == depth && node.row.is_none() && node.value > probability_min
        };
        let mut best: Vec<usize> = (0..self.nodes.len()).filter(open).collect();
        best.sort_by(|a, b| self.nodes[*b].value.total_cmp(&self.nodes[*a].value));
        best.truncate(room);
        let value: f64 = best.iter().map(|node| self.nodes[*node].value).sum();
        if depth >= depth_max || best.is_empty() || value < own_cost + probability_min {
            return false;
        }
        best.sort_unstable();
        for node in best {
            self.nodes[node].row = Some(self.expanded.len());
            self.expanded.push(node);
        }
        true
    }

    /// Takes back the marks of nodes that were not computed.
    fn cut(&mut self) {
        for node in self.expanded.drain(self.made.len()..) {
            self.nodes[node].row = None;
        }
    }

    /// Adds what the nodes made that were expanded last.
    fn grow(&mut self, made: Vec<Made>) {
        for made in made {
            let node = self.expanded[self.made.len()];
            let Node { value, depth, .. } = self.nodes[node];
            self.add(Some(node), value, depth + 1, &made.next);
            self.made.push(made);
        }
    }

    /// What the row above a node made.
    fn above(&self, node: &Node) -> &Made {
        let row = node.parent.and_then(|parent| self.nodes[parent].row);
        row.map_or(&self.root, |row| &self.made[row])
    }

    /// The masks of the expanded nodes' rows.
    fn ancestors(&self) -> Vec<u64> {
        let mut masks: Vec<u64> = Vec::new();
        for (row, node) in self.expanded.iter().enumerate() {
            let parent = self.nodes[*node].parent.and_then(|parent| self.nodes[parent].row);
            masks.push(parent.map_or(0, |parent| masks[parent]) | 1 << row);
        }
        masks
    }

    /// Fills the tree with the best nodes; the sum of their values.
    fn rank(&self, tree: &mut DraftTree) -> f64 {
        let DraftText { nodes_max, probability_min, .. } = self.text;
        let pays = |node: &usize| self.nodes[*node].value >= probability_min;
        let mut best: Vec<usize> = (0..self.nodes.len()).filter(pays).collect();
        // Of equal values the first comes first, and so a parent before its child.
        best.sort_by(|a, b| self.nodes[*b].value.total_cmp(&self.nodes[*a].value));
        best.truncate(nodes_max);
        best.sort_unstable();
        let mut places = BTreeMap::new();
        for node in &best {
            let parent = self.nodes[*node].parent.map(|parent| places[&parent]);
            places.insert(*node, tree.push(parent, self.nodes[*node].token));
        }
        best.iter().map(|node| self.nodes[*node].value).sum()
    }
}

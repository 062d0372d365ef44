//! `Engine`: the loop around scheduler, executor and texts.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Instant;

use lathe_program::sampling::validate_bias;
use lathe_program::{
    BackendError, Choice, Executor, Report, StepSequence, TokenCounts, TokenLogprobs,
};

use crate::draft::{DraftText, DraftTree, Drafter, StepCost};
use crate::request::{AddError, Event, FinishReason, Request, RequestId};
use crate::scheduler::{Draftable, Plan, PlannedSequence, Scheduler, SchedulerConfig};
use crate::text::{TextDecoder, TextOutput};

/// Limits and switches of an engine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineConfig {
    /// Sequences that run at a time at most (and never more than a step has rows, or the executor
    /// holds).
    pub sequences_max: usize,
    /// Requests that wait at most.
    pub waiting_max: usize,
    /// Keep blocks of finished texts for requests that begin alike.
    pub prefix_cache: bool,
    /// Seed of the prefix hashes. No text depends on it.
    pub prefix_seed: u64,
    /// `false` recomputes the whole text for each token, to show what the cache is for.
    pub kv_cache: bool,
}

impl Default for EngineConfig {
    fn default() -> Self {
        EngineConfig {
            sequences_max: 64,
            waiting_max: 1024,
            prefix_cache: true,
            prefix_seed: 0,
            kv_cache: true,
        }
    }
}

/// Why the engine could not be made or could not step.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// A configuration or an executor that cannot run anything.
    #[error("{name} is 0, expected at least 1")]
    Config {
        /// Which field of [`EngineConfig`] or of the executor's limits.
        name: &'static str,
    },
    /// The executor failed. No request has advanced; the step may be tried again.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The executor returned another number of tokens than there were choices.
    #[error("the executor made {found} choices, expected {expected}")]
    Choices {
        /// Choices returned.
        found: usize,
        /// Choices asked for.
        expected: usize,
    },
}

/// What the engine is doing and has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    /// Requests without blocks.
    pub waiting: usize,
    /// Requests with blocks.
    pub running: usize,
    /// Pages of the cache.
    pub blocks_total: usize,
    /// Pages that running requests hold.
    pub blocks_used: usize,
    /// Unreferenced pages whose contents are kept for later requests.
    pub blocks_idle: usize,
    /// Steps run.
    pub steps: u64,
    /// Rows run.
    pub rows: u64,
    /// Times that a request's blocks were taken for another.
    pub preemptions: u64,
    /// Tokens of requests when they first ran: what was looked up among cached prefixes.
    pub prefix_queried_tokens: u64,
    /// Those of them that were found and not computed again.
    pub prefix_hit_tokens: u64,
    /// Tokens of preempted requests that were still cached when they ran again.
    pub resumed_hit_tokens: u64,
    /// Requests accepted.
    pub requests: u64,
    /// Prompt tokens accepted.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub generated_tokens: u64,
    /// Tokens drafted and verified.
    pub drafted_tokens: u64,
    /// Those of them that were accepted.
    pub accepted_tokens: u64,
}

impl Stats {
    /// Share of looked-up tokens that were found, 0 to 1; 0 before the first.
    pub fn prefix_hit_rate(&self) -> f64 {
        self.prefix_hit_tokens as f64 / self.prefix_queried_tokens.max(1) as f64
    }
}

/// One request's side of the output.
struct Output {
    /// What penalties look at, if there are any.
    counts: Option<Arc<TokenCounts>>,
    bias: Option<Arc<[(u32, f32)]>>,
    text: TextOutput,
    request: Request,
    /// Tokens to generate at most, the room in context and cache included.
    tokens_max: usize,
    generated: usize,
}

/// Serves requests with one executor.
pub struct Engine {
    executor: Box<dyn Executor>,
    scheduler: Scheduler,
    outputs: BTreeMap<RequestId, Output>,
    /// Events of [`Engine::cancel`], handed out by the next step.
    pending: Vec<Event>,
    /// Plans whose steps are submitted and not collected, the oldest first.
    in_flight: VecDeque<Plan>,
    /// Plans that may be in flight: two, so that the next step is there when one is done.
    in_flight_max: usize,
    /// Plans whose memory can be used again.
    spare: Vec<Plan>,
    drafter: Option<Box<dyn Drafter>>,
    /// Nodes of a tree at most.
    draft_nodes_max: usize,
    /// Drafts for the next plan.
    trees: BTreeMap<RequestId, DraftTree>,
    cost: StepCost,
    /// When the last step was collected, or the first one after a pause was submitted.
    busy_since: Option<Instant>,
    config: EngineConfig,
    stats: Stats,
}

impl Engine {
    /// An engine without requests; rows and pages are those of the executor.
    ///
    /// # Errors
    /// [`EngineError::Config`] names a limit that is 0.
    pub fn new(executor: Box<dyn Executor>, config: EngineConfig) -> Result<Engine, EngineError> {
        let limits = executor.limits();
        let sequences_max = config.sequences_max.min(limits.sequences_max);
        let needed = [
            ("rows_max", limits.rows_max),
            ("sequences_max", sequences_max),
            ("kv_blocks", limits.kv_blocks),
        ];
        if let Some(&(name, _)) = needed.iter().find(|(_, value)| *value == 0) {
            return Err(EngineError::Config { name });
        }
        let scheduling = SchedulerConfig {
            rows_max: limits.rows_max,
            sequences_max,
            kv_blocks: limits.kv_blocks,
            prefix_seed: config.prefix_cache.then_some(config.prefix_seed),
            kv_cache: config.kv_cache,
            long_rope_after: executor.program().long_rope_after(),
        };
        let scheduler = Scheduler::new(scheduling, &executor.program().kv);
        // Without a cache the next step begins with the first token again, once all are known.
        let in_flight_max = if config.kv_cache { limits.steps_in_flight.clamp(1, 2) } else { 1 };
        let (outputs, pending, in_flight, spare) = Default::default();
        let (trees, stats) = Default::default();
        Ok(Engine {
            executor,
            scheduler,
            outputs,
            pending,
            in_flight,
            in_flight_max,
            spare,
            drafter: None,
            draft_nodes_max: 0,
            trees,
            cost: StepCost::default(),
            busy_since: None,
            config,
            stats,
        })
    }

    /// The same engine, which drafts trees of at most `nodes_max` nodes for all requests that are
    /// added from now on. Without a cache ([`EngineConfig::kv_cache`]) nothing is drafted.
    pub fn with_drafter(self, drafter: Box<dyn Drafter>, nodes_max: usize) -> Engine {
        Engine { drafter: Some(drafter), draft_nodes_max: nodes_max, ..self }
    }

    /// Queues a request. Text deltas need a `decoder`; without one they are empty.
    pub fn add(
        &mut self,
        request: Request,
        decoder: Option<Box<dyn TextDecoder>>,
    ) -> Result<RequestId, AddError> {
        let tokens_max = self.check(&request, decoder.is_some())?;
        let id = RequestId(self.stats.requests);
        self.stats.requests += 1;
        self.stats.prompt_tokens += request.prompt.len() as u64;
        let expanded = self.executor.expanded_until(request.prompt.len());
        // The last token that is generated is never computed.
        let length_max = request.prompt.len() + tokens_max - 1;
        let drafts = self.drafter.is_some();
        self.scheduler.add(id, request.prompt.clone(), expanded, length_max, drafts);
        let penalties = request.sampling.has_penalties();
        let bias = &request.logit_bias;
        let output = Output {
            counts: penalties.then(|| Arc::new(TokenCounts::new(&request.prompt))),
            bias: (!bias.is_empty()).then(|| bias.as_slice().into()),
            text: TextOutput::new(decoder, request.stop_strings.clone()),
            request,
            tokens_max,
            generated: 0,
        };
        self.outputs.insert(id, output);
        Ok(id)
    }

    /// Whether the request can be served, and how many tokens it may generate.
    fn check(&self, request: &Request, has_decoder: bool) -> Result<usize, AddError> {
        let program = self.executor.program();
        let (vocabulary, context_max) = (program.vocabulary, program.context_max);
        let tokens = request.prompt.len();
        if tokens == 0 {
            return Err(AddError::EmptyPrompt);
        }
        if request.max_tokens == Some(0) {
            return Err(AddError::NothingToGenerate);
        }
        if let Some(position) =
            request.prompt.iter().position(|&token| token as usize >= vocabulary)
        {
            return Err(AddError::TokenOutOfRange {
                token: request.prompt[position],
                position,
                vocabulary,
            });
        }
        if tokens >= context_max {
            return Err(AddError::PromptTooLong { tokens, context_max });
        }
        request.sampling.validate()?;
        validate_bias(&request.logit_bias, vocabulary)?;
        if let Some(index) = request.stop_strings.iter().position(String::is_empty) {
            return Err(AddError::EmptyStopString { index });
        }
        if !request.stop_strings.is_empty() && !has_decoder {
            return Err(AddError::StopStringsNeedText { stop_strings: request.stop_strings.len() });
        }
        let waiting = self.scheduler.waiting();
        if waiting >= self.config.waiting_max {
            return Err(AddError::QueueFull { waiting, waiting_max: self.config.waiting_max });
        }
        self.room(tokens, request.max_tokens)
    }

    /// Tokens that may follow a prompt of `tokens`: as the request asks, within context and cache.
    fn room(&self, tokens: usize, max_tokens: Option<usize>) -> Result<usize, AddError> {
        let context_max = self.executor.program().context_max;
        let cache = self.scheduler.cache();
        // The last token that is generated is never computed, so it takes no place in the cache.
        let fits = (cache.length_max(context_max) + 1).saturating_sub(tokens);
        let wanted = max_tokens.unwrap_or(fits).clamp(1, context_max - tokens);
        if wanted > fits {
            let (needed, available) = (cache.pages_for(tokens + wanted - 1), cache.pool().pages());
            return Err(AddError::TooFewBlocks { needed, available });
        }
        Ok(wanted)
    }

    /// Ends a request at once; its `Finished` event comes with the next step. Text that was held
    /// back is dropped. `false` if there is no such request (any more).
    pub fn cancel(&mut self, request: RequestId) -> bool {
        let exists = self.outputs.contains_key(&request);
        if exists {
            let finished = self.finish(request, FinishReason::Cancelled);
            self.pending.push(finished);
        }
        exists
    }

    /// Whether there is nothing to do and nothing to report.
    pub fn is_idle(&self) -> bool {
        self.outputs.is_empty() && self.pending.is_empty() && self.in_flight.is_empty()
    }

    /// Schedules rows, submits them, collects the oldest step and commits it: the whole loop.
    /// Returns what happened, in order of arrival within the step. Without requests it does
    /// nothing.
    ///
    /// # Errors
    /// [`EngineError`] if the executor failed. No request has advanced by what was in flight.
    pub fn step(&mut self) -> Result<Vec<Event>, EngineError> {
        while self.in_flight.len() < self.in_flight_max {
            self.draft()?;
            let mut plan = self.spare.pop().unwrap_or_default();
            plan.clear();
            self.scheduler.schedule(&mut plan, &mut self.trees);
            self.trees.clear();
            if plan.sequences.is_empty() {
                self.spare.push(plan);
                break;
            }
            self.submit(plan)?;
        }
        let chosen = self.collect()?;
        let mut events = std::mem::take(&mut self.pending);
        chosen.into_iter().for_each(|chosen| self.report(chosen, &mut events));
        Ok(events)
    }

    /// Asks the drafter for trees of the sequences that the next plan may have some for.
    fn draft(&mut self) -> Result<(), EngineError> {
        let Some(drafter) = &mut self.drafter else { return Ok(()) };
        let wanted = self.scheduler.draftable();
        if wanted.is_empty() {
            return Ok(());
        }
        let context_max = self.executor.program().context_max;
        let running = self.scheduler.running();
        let (probability_min, step_seconds) =
            (self.cost.probability_min(running), self.cost.step_seconds(running));
        let text = |it: &Draftable| {
            let tokens = &self.scheduler.sequence(it.request).expect("it runs").tokens;
            // Slots, too, lie within the context.
            let nodes_max = it.nodes_max.min(self.draft_nodes_max);
            let nodes_max = nodes_max.min(context_max - tokens.len());
            let sampling = self.outputs[&it.request].request.sampling;
            let (request, depth_max) = (it.request, it.depth_max);
            DraftText {
                request,
                tokens,
                sampling,
                nodes_max,
                depth_max,
                probability_min,
                step_seconds,
            }
        };
        let texts: Vec<DraftText<'_>> =
            wanted.iter().map(text).filter(|text| text.nodes_max > 0).collect();
        let mut trees = vec![DraftTree::default(); texts.len()];
        drafter.propose(&texts, &mut trees)?;
        let named = texts.iter().map(|text| text.request).zip(trees);
        self.trees.extend(named.filter(|(_, tree)| !tree.is_empty()));
        Ok(())
    }

    /// Hands a plan's step to the executor.
    fn submit(&mut self, mut plan: Plan) -> Result<(), EngineError> {
        for part in &plan.sequences {
            let output = &self.outputs[&part.request];
            for (index, row) in part.choice_rows.clone().enumerate() {
                let position = plan.step.positions[row as usize] as usize + 1;
                let node = index.checked_sub(1);
                let choice = output.choice(row, position, &part.tree, node);
                plan.step.choices.push(choice);
            }
        }
        if self.in_flight.is_empty() {
            self.busy_since = Some(Instant::now());
        }
        match self.executor.submit(&plan.step) {
            Ok(()) => {
                // What penalties count is then shared with nobody.
                plan.step.choices.clear();
                self.in_flight.push_back(plan);
                Ok(())
            }
            Err(error) => {
                match error {
                    BackendError::Step(_) => self.scheduler.refused(plan),
                    _ => self.scheduler.take_back(plan),
                }
                self.drain();
                Err(error.into())
            }
        }
    }

    /// Takes back all plans in flight, the latest first, and drops what their steps made.
    fn drain(&mut self) {
        for _ in 0..self.in_flight.len() {
            // An error of theirs follows from the one that is being told.
            drop(self.executor.collect());
        }
        while let Some(plan) = self.in_flight.pop_back() {
            self.scheduler.take_back(plan);
        }
    }

    /// Waits for the oldest step; the tokens that it chose, in the order of its plan.
    fn collect(&mut self) -> Result<Vec<Chosen>, EngineError> {
        let Some(plan) = self.in_flight.front_mut() else { return Ok(Vec::new()) };
        let expected = plan.sequences.iter().map(|part| part.choice_rows.len()).sum();
        let reads_features = self.drafter.as_ref().is_some_and(|drafter| drafter.reads_features());
        let mut features = Vec::new();
        let result = self.executor.collect().map_err(EngineError::from).and_then(|output| {
            let (found, reported) = (output.tokens.len(), output.logprobs.len());
            if found != expected || reported != expected {
                return Err(EngineError::Choices { found: found.min(reported), expected });
            }
            let (mut chosen, mut first) = (Vec::new(), 0);
            for part in &mut plan.sequences {
                let own = first..first + part.choice_rows.len();
                first = own.end;
                accept(part, &output.tokens[own.clone()], &output.logprobs[own], &mut chosen);
            }
            if reads_features {
                features = features_of(plan, &output.captures);
            }
            Ok(chosen)
        });
        let mut plan = self.in_flight.pop_front().expect("it is the oldest");
        let moved = result.and_then(|chosen| {
            let moves = self.scheduler.moves(&plan);
            match moves.is_empty() {
                true => Ok(chosen),
                false => self.executor.move_slots(&moves).map(|()| chosen).map_err(Into::into),
            }
        });
        if moved.is_err() {
            self.drain();
            self.scheduler.take_back(plan);
            return moved;
        }
        self.scheduler.commit(&plan);
        if let Some(drafter) = &mut self.drafter {
            // Those that ended while the step was in flight are forgotten already.
            for it in features.iter().filter(|it| self.outputs.contains_key(&it.request)) {
                drafter.features(it.request, it.first, &it.rows);
            }
            for part in plan.sequences.iter().filter(|part| !part.tree.is_empty()) {
                drafter.observe(part.request, &part.tree, part.accepted.len());
            }
        }
        self.note_cost(&plan);
        plan.clear();
        self.spare.push(plan);
        moved
    }

    /// Takes note of what a step cost that had no rows of prompts.
    fn note_cost(&mut self, plan: &Plan) {
        let now = Instant::now();
        let since = self.busy_since.replace(now);
        let decodes = plan.sequences.iter().all(|part| part.rows == 1 + part.tree.len());
        if let Some(since) = since.filter(|_| decodes) {
            self.cost.observe(plan.step.rows(), now - since);
        }
    }

    /// Appends a chosen token to its text and tells what came of it.
    fn report(&mut self, chosen: Chosen, events: &mut Vec<Event>) {
        let Chosen { request, token, logprobs, accepted } = chosen;
        if !self.outputs.contains_key(&request) {
            // It ended while this token was in flight.
            return;
        }
        let Some(token) = token else {
            events.push(self.finish(request, FinishReason::InvalidLogits));
            return;
        };
        let output = self.outputs.get_mut(&request).expect("a request of the plan");
        let (text, reason) = output.push(token);
        if !accepted {
            self.scheduler.append(request, token);
        }
        self.stats.generated_tokens += 1;
        events.push(Event::Token { request, token, text, logprobs });
        if let Some(reason) = reason {
            events.push(self.finish(request, reason));
        }
    }

    fn finish(&mut self, request: RequestId, reason: FinishReason) -> Event {
        let output = self.outputs.remove(&request).expect("an unfinished request");
        let sequence = self.scheduler.sequence(request).expect("an unfinished request");
        let cached_tokens = sequence.cached.unwrap_or(0);
        self.scheduler.remove(request);
        if let Some(drafter) = &mut self.drafter {
            drafter.forget(request);
        }
        Event::Finished {
            request,
            reason,
            prompt_tokens: output.request.prompt.len(),
            cached_tokens,
            generated_tokens: output.generated,
        }
    }

    /// What the engine is doing and has done.
    pub fn stats(&self) -> Stats {
        let pool = self.scheduler.cache().pool();
        let counts = self.scheduler.counts();
        Stats {
            waiting: self.scheduler.waiting(),
            running: self.scheduler.running(),
            blocks_total: pool.pages(),
            blocks_used: pool.pages() - pool.available(),
            blocks_idle: pool.idle(),
            steps: counts.steps,
            rows: counts.rows,
            preemptions: counts.preemptions,
            prefix_queried_tokens: counts.prefix_queried_tokens,
            prefix_hit_tokens: counts.prefix_hit_tokens,
            resumed_hit_tokens: counts.resumed_hit_tokens,
            drafted_tokens: counts.drafted_tokens,
            accepted_tokens: counts.accepted_tokens,
            ..self.stats
        }
    }

    /// The executor, for its program and sizes.
    pub fn executor(&self) -> &dyn Executor {
        &*self.executor
    }

    /// Gives the executor back; requests that still run are lost.
    pub fn into_executor(mut self) -> Box<dyn Executor> {
        self.drain();
        self.executor
    }

    /// Panics unless scheduler, pool and tables agree. For tests.
    pub fn validate(&self) {
        self.scheduler.validate();
    }
}

/// A token that was chosen, or none if the logits were not numbers.
struct Chosen {
    request: RequestId,
    token: Option<u32>,
    logprobs: Option<TokenLogprobs>,
    /// Whether it was drafted, so that the scheduler has it.
    accepted: bool,
}

/// What the taps made of the rows of a text that stay.
struct Features {
    request: RequestId,
    /// The position of the first row.
    first: usize,
    /// `[rows, width of all taps]`.
    rows: Vec<f32>,
}

/// The rows that advance the texts of a plan: those of known tokens, and of accepted nodes.
fn features_of(plan: &Plan, captures: &[&[f32]]) -> Vec<Features> {
    let all = plan.step.rows();
    let of_part = |(part, sequence): (&PlannedSequence, &StepSequence)| {
        let sure = part.sure_rows();
        let kept = (0..sure).chain(part.accepted.iter().map(|node| sure + node));
        let mut rows = Vec::new();
        for row in kept.map(|row| sequence.first_row as usize + row) {
            for tap in captures {
                let width = tap.len() / all;
                rows.extend_from_slice(&tap[row * width..(row + 1) * width]);
            }
        }
        Features { request: part.request, first: sequence.cached as usize, rows }
    };
    plan.sequences.iter().zip(&plan.step.sequences).map(of_part).collect()
}

/// Follows the tokens that a part's rows chose down its tree, as far as it has them, and adds them
/// to `chosen`.
fn accept(
    part: &mut PlannedSequence,
    tokens: &[Option<u32>],
    logprobs: &[Option<TokenLogprobs>],
    chosen: &mut Vec<Chosen>,
) {
    let mut row = 0;
    while let Some((token, logprobs)) = tokens.get(row).zip(logprobs.get(row)) {
        let node = token.and_then(|token| part.tree.child(row.checked_sub(1), token));
        let (request, accepted) = (part.request, node.is_some());
        chosen.push(Chosen { request, token: *token, logprobs: logprobs.clone(), accepted });
        let Some(node) = node else { return };
        part.accepted.push(node);
        row = node + 1;
    }
}

impl Output {
    /// How the token at `position` of the text is chosen, by the logits of a row: that of a node
    /// of `tree`, or of the last known token.
    fn choice(&self, row: u32, position: usize, tree: &DraftTree, node: Option<usize>) -> Choice {
        let Request { sampling, logprobs, .. } = &self.request;
        let mut counts = self.counts.clone();
        if let Some((counts, node)) = counts.as_mut().zip(node) {
            tree.for_each_above(node, |token| Arc::make_mut(counts).record(token));
        }
        Choice {
            row,
            sampling: Some(*sampling),
            counter: position as u64,
            counts,
            bias: self.bias.clone(),
            mask: None,
            report: Report { logprobs: logprobs.map(|count| count as u32), logits: false },
        }
    }

    /// Takes the next token: its text delta, and the reason if the text ends with it.
    fn push(&mut self, token: u32) -> (String, Option<FinishReason>) {
        self.generated += 1;
        if let Some(counts) = &mut self.counts {
            Arc::make_mut(counts).record(token);
        }
        let stops = !self.request.ignore_stop;
        if stops && self.request.stop_tokens.contains(&token) {
            return (self.text.finish().0, Some(FinishReason::Stop));
        }
        let (mut text, found) = self.text.push(token);
        if stops && found {
            return (text, Some(FinishReason::Stop));
        }
        if self.generated < self.tokens_max {
            return (text, None);
        }
        let (rest, found) = self.text.finish();
        text.push_str(&rest);
        let reason = if stops && found { FinishReason::Stop } else { FinishReason::Length };
        (text, Some(reason))
    }
}

//! Runs a program op by op.

use std::collections::VecDeque;
use std::sync::Arc;

use super::ReferenceBackend;
use super::attention::{LatentWeights, Seen, attend, attend_latent};
use super::cache::Cache;
use super::experts::{self, Routed};
use super::math::{activate, matmul, norm, rope, sigmoid, softcap};
use super::router;
use super::weights::Weights;
use crate::backend::{BackendError, Executor, ExecutorLimits, RoutedExperts, StepOutput};
use crate::kv::KvFormat;
use crate::op::*;
use crate::program::{Lifetime, Program};
use crate::sampling::{Chooser, TokenLogprobs};
use crate::step::{Choice, SlotMove, Step, StepError};
use crate::tables::SequenceTables;

/// A program on the reference backend.
pub struct ReferenceExecutor {
    program: Arc<Program>,
    weights: Weights,
    cache: Cache,
    tables: SequenceTables,
    limits: ExecutorLimits,
    pool: Option<rayon::ThreadPool>,
    backend: ReferenceBackend,
    lifetimes: Vec<Lifetime>,
    chooser: Chooser,
    run: StepValues,
    /// Results of steps that have run and are not collected yet, the oldest first.
    submitted: VecDeque<Result<Made, BackendError>>,
    collected: Made,
}

/// The results of a step's ops so far.
#[derive(Default)]
struct StepValues {
    values: Vec<Vec<f32>>,
    routings: Vec<Routed>,
    logits: Vec<f32>,
    captures: Vec<Vec<f32>>,
}

/// The results that a step hands out.
#[derive(Default)]
struct Made {
    routings: Vec<Routed>,
    tokens: Vec<Option<u32>>,
    logprobs: Vec<Option<TokenLogprobs>>,
    logits: Vec<f32>,
    captures: Vec<Vec<f32>>,
}

/// A thread pool of its own, if a number of threads is given.
pub(super) fn pool(threads: Option<usize>) -> Result<Option<rayon::ThreadPool>, BackendError> {
    let build = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = threads.map(build).transpose();
    pool.map_err(|error| BackendError::Device(format!("threads: {error}")))
}

impl ReferenceExecutor {
    pub(super) fn new(
        program: Arc<Program>,
        weights: Weights,
        cache: Cache,
        limits: ExecutorLimits,
        pool: Option<rayon::ThreadPool>,
        backend: ReferenceBackend,
    ) -> Self {
        let lifetimes = program.liveness();
        let tables = SequenceTables::new(&program.kv, limits.sequences_max);
        let (chooser, run, submitted, collected) = Default::default();
        Self {
            program,
            weights,
            cache,
            tables,
            limits,
            pool,
            backend,
            lifetimes,
            chooser,
            run,
            submitted,
            collected,
        }
    }

    /// Runs an accepted step to its end.
    fn run_step(&mut self, step: &Step) -> Result<Made, BackendError> {
        self.run = StepValues {
            values: vec![Vec::new(); self.program.values.len()],
            routings: vec![Routed::default(); self.program.routings],
            logits: Vec::new(),
            captures: vec![Vec::new(); self.program.capture_widths().len()],
        };
        self.chooser.begin(step);
        match self.pool.take() {
            Some(pool) => {
                let done = pool.install(|| self.run_ops(step));
                self.pool = Some(pool);
                done?;
            }
            None => self.run_ops(step)?,
        }
        let StepValues { routings, mut logits, captures, .. } = std::mem::take(&mut self.run);
        let vocabulary = self.program.vocabulary;
        self.chooser.choose(step, vocabulary, &mut logits);
        logits.truncate(self.chooser.logits_rows() * vocabulary);
        let (tokens, logprobs) = (self.chooser.tokens().to_vec(), self.chooser.logprobs().to_vec());
        Ok(Made { routings, tokens, logprobs, logits, captures })
    }

    fn run_ops(&mut self, step: &Step) -> Result<(), BackendError> {
        let program = Arc::clone(&self.program);
        for (index, op) in program.ops.iter().enumerate() {
            match op {
                Op::Route { input, spec, out } => {
                    self.run.routings[out.0 as usize] = self.route(*input, spec);
                }
                Op::Experts { input, routing, spec, out } => {
                    let widths = [program.value_width(*input), program.value_width(*out)];
                    let choices = &self.run.routings[routing.0 as usize];
                    let input = self.value(*input);
                    let sum = experts::run(spec, &self.weights, input, widths, choices);
                    self.run.values[out.0 as usize] = sum;
                }
                _ => self.run_op(op, step)?,
            }
            for value in op.inputs().chain(op.outputs()) {
                if self.lifetimes[value.0 as usize].last_use == index {
                    self.run.values[value.0 as usize] = Vec::new();
                }
            }
        }
        Ok(())
    }

    fn seen<'a>(&'a self, step: &'a Step) -> Seen<'a> {
        Seen { step, tables: &self.tables, cache: &self.cache }
    }

    fn value(&self, value: Value) -> &[f32] {
        &self.run.values[value.0 as usize]
    }

    fn optional(&self, weight: Option<Weight>) -> Option<&[f32]> {
        weight.map(|weight| self.weights.get(weight))
    }

    fn run_op(&mut self, op: &Op, step: &Step) -> Result<(), BackendError> {
        let program = Arc::clone(&self.program);
        let width = |value: Value| program.value_width(value);
        match op {
            Op::Linear { input, parts } => {
                for part in parts {
                    let (matrix, bias) = (self.weights.get(part.weight), self.optional(part.bias));
                    let made = matmul(matrix, bias, self.value(*input), width(*input));
                    self.run.values[part.out.0 as usize] = made;
                }
            }
            Op::WriteKv { key: first, value: second, layer }
            | Op::WriteLatent { latent: first, rope_key: second, layer } => {
                self.write(step, *layer, *first, *second);
            }
            Op::AllReduce { input, out } => {
                let mut sum = self.value(*input).to_vec();
                self.backend.collective.all_reduce_sum(&mut sum)?;
                self.run.values[out.0 as usize] = sum;
            }
            Op::AllGather { input, out } => {
                let whole = self.gather(self.value(*input), width(*input))?;
                self.run.values[out.0 as usize] = whole;
            }
            Op::Logits { input, head, gather, scale, softcap } => {
                self.run.logits = self.logits(step, *input, *head, *gather, (*scale, *softcap))?;
            }
            Op::Capture { input, tap } => {
                self.run.captures[*tap as usize] = self.value(*input).to_vec();
            }
            _ => {
                let made = self.compute(op, step);
                if let Some(out) = op.outputs().next() {
                    self.run.values[out.0 as usize] = made;
                }
            }
        }
        Ok(())
    }

    /// Computes the ops that make one value from values, weights and the cache.
    fn compute(&self, op: &Op, step: &Step) -> Vec<f32> {
        let program = &*self.program;
        let width = |value: Value| program.value_width(value);
        match op {
            Op::Embed { table, first_token, multiplier, out } => {
                self.embed(*table, *first_token, *multiplier, width(*out))
            }
            Op::Input { input, .. } => step.inputs[*input as usize].values.clone(),
            Op::Norm { input, weight, bias, kind, epsilon, groups, .. } => {
                let vectors = [self.optional(*weight), self.optional(*bias)];
                let shape = [width(*input), *groups];
                norm(self.value(*input), vectors, *kind, *epsilon, shape)
            }
            Op::Transform { input, transform, .. } => {
                let mut rows = self.value(*input).to_vec();
                transform.apply(&mut rows, width(*input));
                rows
            }
            Op::Rope { input, heads, offset, rope: table, .. } => {
                let table = &program.ropes[table.0 as usize];
                rope(self.value(*input), step, [*heads, *offset], table)
            }
            Op::Attend { query, layer, spec, .. } => {
                let (query, sinks) = (self.value(*query), self.optional(spec.sinks));
                let group = program.kv.layer(*layer).group as usize;
                attend(self.seen(step), *layer, group, spec, sinks, query)
            }
            Op::AttendLatent { query, layer, spec, .. } => {
                self.attend_latent(step, *query, *layer, spec)
            }
            Op::Activate { gate, up, kind, .. } => {
                let gate = self.value(*gate);
                let up = up.map_or(gate, |up| self.value(up));
                gate.iter().zip(up).map(|(gate, up)| activate(*kind, *gate, *up)).collect()
            }
            Op::Add { left, right, scale, .. } => {
                let pairs = self.value(*left).iter().zip(self.value(*right));
                pairs.map(|(left, right)| left + right * scale).collect()
            }
            Op::Gate { input, gate, kind: GateKind::Sigmoid, .. } => {
                let run = width(*input) / width(*gate);
                let gate = self.value(*gate);
                let inputs = self.value(*input).iter().enumerate();
                inputs.map(|(i, x)| x * sigmoid(gate[i / run])).collect()
            }
            Op::Slice { input, start, out } => {
                let rows = self.value(*input).chunks_exact(width(*input));
                let columns = *start..start + width(*out);
                rows.flat_map(|row| &row[columns.clone()]).copied().collect()
            }
            _ => unreachable!("{} makes no value here", op.kind()),
        }
    }

    fn embed(&self, table: Weight, first: u32, multiplier: f32, n: usize) -> Vec<f32> {
        let table = self.weights.get(table);
        let tokens = self.chooser.row_tokens();
        let mut out = Vec::with_capacity(tokens.len() * n);
        for token in tokens {
            let row = token.checked_sub(first).and_then(|row| {
                let row = row as usize;
                table.get(row * n..(row + 1) * n)
            });
            match row {
                Some(row) => out.extend(row.iter().map(|x| x * multiplier)),
                None => out.resize(out.len() + n, 0.0),
            }
        }
        out
    }

    fn write(&mut self, step: &Step, layer: KvLayer, first: Value, second: Value) {
        let group = self.program.kv.layer(layer).group as usize;
        let (first_width, second_width) =
            (self.program.value_width(first), self.program.value_width(second));
        let (first, second) = (first.0 as usize, second.0 as usize);
        for sequence in &step.sequences {
            for i in 0..sequence.rows as usize {
                let row = sequence.first_row as usize + i;
                let slot = sequence.cached as usize + i;
                self.cache.write(
                    layer,
                    self.tables.table(sequence.id, group),
                    slot,
                    &self.run.values[first][row * first_width..(row + 1) * first_width],
                    &self.run.values[second][row * second_width..(row + 1) * second_width],
                );
            }
        }
    }

    fn attend_latent(
        &self,
        step: &Step,
        query: Value,
        layer: KvLayer,
        spec: &LatentSpec,
    ) -> Vec<f32> {
        let weights = LatentWeights {
            key_up: self.weights.get(spec.key_up),
            value_up: self.weights.get(spec.value_up),
        };
        let (query, form) = (self.value(query), self.backend.latent_form);
        let group = self.program.kv.layer(layer).group as usize;
        attend_latent(self.seen(step), layer, group, spec, &weights, query, form)
    }

    fn route(&self, input: Value, spec: &RouterSpec) -> Routed {
        let (bias, width) = (self.optional(spec.bias), self.program.value_width(input));
        let logits = matmul(self.weights.get(spec.weight), bias, self.value(input), width);
        let correction = self.optional(spec.correction);
        let rows = logits.chunks_exact(spec.experts);
        let chosen = rows.flat_map(|logits| router::choose(spec, correction, logits));
        let (experts, weights) = chosen.unzip();
        Routed { experts, weights, experts_per_token: spec.experts_per_token }
    }

    fn logits(
        &self,
        step: &Step,
        input: Value,
        head: Weight,
        gather: bool,
        (scale, cap): (f32, Option<f32>),
    ) -> Result<Vec<f32>, BackendError> {
        let width = self.program.value_width(input);
        let row = |choice: &Choice| &self.value(input)[choice.row as usize * width..][..width];
        let rows: Vec<f32> = step.choices.iter().flat_map(row).copied().collect();
        let mut logits = matmul(self.weights.get(head), None, &rows, width);
        if gather {
            logits = self.gather_logits(&logits, step.choices.len(), head)?;
        }
        logits.iter_mut().for_each(|x| *x = softcap(cap, *x * scale));
        Ok(logits)
    }

    /// Puts the ranks' logits side by side. The last rank's part may be narrower. All parts are
    /// sent at the width of the widest, and what lies past the vocabulary is dropped.
    fn gather_logits(
        &self,
        part: &[f32],
        rows: usize,
        head: Weight,
    ) -> Result<Vec<f32>, BackendError> {
        let (vocabulary, ranks) = (self.program.vocabulary, self.backend.collective.ranks());
        let (found, width) = (self.program.weight(head).shape[0], vocabulary.div_ceil(ranks));
        let mut padded = vec![0f32; rows * width];
        for (out, row) in padded.chunks_exact_mut(width).zip(part.chunks_exact(found)) {
            out[..found].copy_from_slice(row);
        }
        let whole = self.gather(&padded, width)?;
        let rows = whole.chunks_exact(width * ranks);
        Ok(rows.flat_map(|row| &row[..vocabulary]).copied().collect())
    }

    /// The parts of all ranks, `width` elements of a row each, side by side.
    fn gather(&self, part: &[f32], width: usize) -> Result<Vec<f32>, BackendError> {
        let collective = &self.backend.collective;
        let ranks = collective.ranks();
        let mut by_rank = vec![0f32; part.len() * ranks];
        collective.all_gather(part, &mut by_rank)?;
        let mut whole = Vec::with_capacity(by_rank.len());
        for row in 0..part.len() / width {
            for rank in 0..ranks {
                whole.extend(&by_rank[rank * part.len() + row * width..][..width]);
            }
        }
        Ok(whole)
    }
}

impl Executor for ReferenceExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn kv_format(&self) -> KvFormat {
        self.cache.format()
    }

    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    /// The step runs at once. Its result waits until it is collected.
    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        let most = self.limits.steps_in_flight;
        if self.submitted.len() == most {
            return Err(StepError(format!("{most} steps are in flight already")).into());
        }
        self.tables.accept(step, &self.program, &self.limits)?;
        let made = self.run_step(step);
        self.submitted.push_back(made);
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        let made = self.submitted.pop_front();
        self.collected = made.ok_or_else(|| StepError("no step is in flight".to_owned()))??;
        let Made { tokens, logprobs, logits, captures, .. } = &self.collected;
        let captures = captures.iter().map(Vec::as_slice).collect();
        Ok(StepOutput { tokens, logprobs, logits, captures })
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        self.tables.check_moves(moves, &self.program.kv)?;
        for SlotMove { sequence, from, to } in moves {
            for group in 0..self.program.kv.groups.len() {
                let table = self.tables.table(*sequence, group);
                self.cache.copy_slot(group, table, *from as usize, *to as usize);
            }
        }
        Ok(())
    }

    fn routing(&self, routing: Routing) -> Option<RoutedExperts<'_>> {
        let Routed { experts, weights, experts_per_token } =
            self.collected.routings.get(routing.0 as usize)?;
        let experts_per_token = *experts_per_token;
        Some(RoutedExperts { experts, weights, experts_per_token })
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn kv_bytes(&self) -> usize {
        self.cache.bytes()
    }
}

//! Runs a program op by op.

use std::sync::Arc;

use super::ReferenceBackend;
use super::attention::{LatentWeights, attend, attend_latent};
use super::cache::Cache;
use super::experts::{self, Choices};
use super::math::{activate, matmul, norm, rope, sigmoid, softcap};
use super::router;
use super::weights::Weights;
use crate::backend::{BackendError, Executor, StepOutput};
use crate::kv::KvFormat;
use crate::observe::{ObservedInput, ObservedRouting, Observer};
use crate::op::*;
use crate::program::{Lifetime, Program};
use crate::step::{Step, StepError};

/// A program on the reference backend.
pub struct ReferenceExecutor {
    program: Arc<Program>,
    weights: Weights,
    cache: Cache,
    rows_max: usize,
    pool: Option<rayon::ThreadPool>,
    backend: ReferenceBackend,
    lifetimes: Vec<Lifetime>,
    run: Run,
}

/// What a step leaves behind.
#[derive(Default)]
struct Run {
    values: Vec<Vec<f32>>,
    routings: Vec<Choices>,
    logits: Vec<f32>,
    captures: Vec<Vec<f32>>,
}

/// Threads of its own where a number is asked for.
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
        rows_max: usize,
        pool: Option<rayon::ThreadPool>,
        backend: ReferenceBackend,
    ) -> Self {
        let lifetimes = program.liveness();
        let run = Run::default();
        Self { program, weights, cache, rows_max, pool, backend, lifetimes, run }
    }

    fn run_all(
        &mut self,
        step: &Step,
        observer: Option<&mut (dyn Observer + '_)>,
    ) -> Result<StepOutput<'_>, BackendError> {
        step.validate(&self.program)?;
        step.check_blocks(self.cache.blocks())?;
        if step.rows() > self.rows_max {
            let reason = format!("{} rows, at most {} fit", step.rows(), self.rows_max);
            return Err(StepError(reason).into());
        }
        self.run = Run {
            values: vec![Vec::new(); self.program.values.len()],
            routings: vec![Choices::default(); self.program.routings],
            logits: Vec::new(),
            captures: vec![Vec::new(); self.program.capture_widths().len()],
        };
        match (self.pool.take(), observer) {
            // An observer is not `Send`: it stays on this thread, the loops on the common pool.
            (Some(pool), None) => {
                let done = pool.install(|| self.run_ops(step, None));
                self.pool = Some(pool);
                done?;
            }
            (pool, observer) => {
                self.pool = pool;
                self.run_ops(step, observer)?;
            }
        }
        let captures = self.run.captures.iter().map(Vec::as_slice).collect();
        Ok(StepOutput { logits: &self.run.logits, captures })
    }

    fn run_ops(
        &mut self,
        step: &Step,
        mut observer: Option<&mut (dyn Observer + '_)>,
    ) -> Result<(), BackendError> {
        let program = Arc::clone(&self.program);
        for (index, op) in program.ops.iter().enumerate() {
            if let Some(observer) = observer.as_deref_mut() {
                let inputs: Vec<ObservedInput<'_>> =
                    op.inputs().map(|value| self.observed(value)).collect();
                observer.op(index, op, &inputs);
            }
            match op {
                Op::Route { input, spec, out } => {
                    let choices = self.route(*input, spec);
                    if let Some(observer) = observer.as_deref_mut() {
                        let Choices { experts, weights, experts_per_token } = &choices;
                        let experts_per_token = *experts_per_token;
                        let routing = ObservedRouting { experts, weights, experts_per_token };
                        observer.routing(index, op, routing);
                    }
                    self.run.routings[out.0 as usize] = choices;
                }
                Op::Experts { input, routing, spec, out } => {
                    let widths = [program.value_width(*input), program.value_width(*out)];
                    let choices = &self.run.routings[routing.0 as usize];
                    let input = self.value(*input);
                    let sum = experts::run(spec, &self.weights, input, widths, choices, |expert| {
                        if let Some(observer) = observer.as_deref_mut() {
                            observer.expert(index, op, expert);
                        }
                    });
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

    fn observed(&self, value: Value) -> ObservedInput<'_> {
        ObservedInput { value, data: self.value(value), width: self.program.value_width(value) }
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

    /// The ops that make one value from values, weights and the cache.
    fn compute(&self, op: &Op, step: &Step) -> Vec<f32> {
        let program = &*self.program;
        let width = |value: Value| program.value_width(value);
        match op {
            Op::Embed { table, first_token, multiplier, out } => {
                self.embed(step, *table, *first_token, *multiplier, width(*out))
            }
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
                rope(self.value(*input), &step.positions, [*heads, *offset], table)
            }
            Op::Attend { query, layer, spec, .. } => {
                let (query, sinks) = (self.value(*query), self.optional(spec.sinks));
                let group = program.kv.layer(*layer).group as usize;
                attend(step, &self.cache, *layer, group, spec, sinks, query)
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

    fn embed(&self, step: &Step, table: Weight, first: u32, multiplier: f32, n: usize) -> Vec<f32> {
        let table = self.weights.get(table);
        let mut out = Vec::with_capacity(step.rows() * n);
        for token in &step.tokens {
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
                    &sequence.tables[group],
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
        attend_latent(step, &self.cache, layer, group, spec, &weights, query, form)
    }

    fn route(&self, input: Value, spec: &RouterSpec) -> Choices {
        let (bias, width) = (self.optional(spec.bias), self.program.value_width(input));
        let logits = matmul(self.weights.get(spec.weight), bias, self.value(input), width);
        let correction = self.optional(spec.correction);
        let rows = logits.chunks_exact(spec.experts);
        let chosen = rows.flat_map(|logits| router::choose(spec, correction, logits));
        let (experts, weights) = chosen.unzip();
        Choices { experts, weights, experts_per_token: spec.experts_per_token }
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
        let row = |row: &u32| &self.value(input)[*row as usize * width..][..width];
        let rows: Vec<f32> = step.logits_rows.iter().flat_map(row).copied().collect();
        let mut logits = matmul(self.weights.get(head), None, &rows, width);
        if gather {
            logits = self.gather_logits(&logits, step.logits_rows.len(), head)?;
        }
        logits.iter_mut().for_each(|x| *x = softcap(cap, *x * scale));
        Ok(logits)
    }

    /// Puts the ranks' logits side by side. The last rank's part may be narrower: parts travel
    /// at the width of the widest, and what lies past the vocabulary is dropped.
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

    /// Rows of `width` of each rank, side by side.
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

    fn run(&mut self, step: &Step) -> Result<StepOutput<'_>, BackendError> {
        self.run_all(step, None)
    }

    fn run_observed(
        &mut self,
        step: &Step,
        observer: &mut dyn Observer,
    ) -> Result<StepOutput<'_>, BackendError> {
        self.run_all(step, Some(observer))
    }

    fn routing(&self, routing: Routing) -> Option<ObservedRouting<'_>> {
        let Choices { experts, weights, experts_per_token } =
            self.run.routings.get(routing.0 as usize)?;
        let experts_per_token = *experts_per_token;
        Some(ObservedRouting { experts, weights, experts_per_token })
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn kv_bytes(&self) -> usize {
        self.cache.bytes()
    }
}

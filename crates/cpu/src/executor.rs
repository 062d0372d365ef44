//! `CpuExecutor`: runs the stages of a prepared program one after another, each on the gang.
//!
//! The calling thread is worker 0. It does alone what is too small to share. A step allocates
//! nothing once a step of its kind has run.

use std::ops::Range;
use std::sync::Arc;

use lathe_program::{
    BackendError, Chooser, Executor, ExecutorLimits, KvFormat, Op, Program, RopeTable,
    RoutedExperts, Routing, SequenceTables, SlotMove, Step, StepError, StepOutput,
};
use lathe_tensor::Tensor;

use crate::attend::{AttendJob, Attention, RowForm};
use crate::cache::{KvCache, Write};
use crate::elementwise::{Activate, Add, Norm, Rotate, SigmoidGate, fill_angles};
use crate::experts::{ChosenExperts, GroupScratch, RouteStage};
use crate::gang::{Gang, share};
use crate::lanes::{Kernel, LANES, Lanes, Width, dispatch, math};
use crate::latent::{LatentScratch, LatentStage};
use crate::linear::{Activations, Part, matmul};
use crate::memory::Memory;
use crate::plan::Buffers;
use crate::profile::Profile;
use crate::ranks::Ranks;
use crate::rows::Rows;
use crate::stage::{
    ActivateStage, AddStage, AttendStage, LinearInput, LinearStage, LogitsInput, LogitsStage,
    NormStage, PartStage, Stage,
};
use crate::transform::TransformStage;

/// Whole blocks of this many rows of a prompt are in the prefill form. Decoding weights for fewer
/// rows does not pay, and no page of the cache lies across the border of a block.
const PREFILL_ROWS: usize = 64;

/// Elementwise work on fewer floats is done without waking the gang.
const ALONE_FLOATS: usize = 8192;

/// A prepared program on the CPU.
#[derive(Debug)]
pub(crate) struct CpuExecutor {
    pub(crate) program: Arc<Program>,
    pub(crate) stages: Vec<Stage>,
    /// Whether rows in the prefill form are computed differently from the others.
    pub(crate) prefill_form: bool,
    pub(crate) weight_bytes: usize,
    pub(crate) limits: ExecutorLimits,
    /// The rows of a step that ran and is not collected yet, or the error that ended it.
    pub(crate) in_flight: Option<Result<usize, BackendError>>,
    pub(crate) state: State,
    /// The memory that the stages' pointers refer to.
    pub(crate) _buffers: Buffers,
}

/// The memory and the workers that stages use.
#[derive(Debug)]
pub(crate) struct State {
    pub width: Width,
    pub gang: Gang,
    pub ranks: Ranks,
    pub cache: KvCache,
    pub attention: Attention,
    pub latent: LatentScratch,
    pub activations: Activations,
    pub angles: Vec<Angles>,
    pub routings: Vec<ChosenExperts>,
    /// Router logits and ranks, `[rows_max, 2 * experts]`.
    pub router: Vec<f32>,
    pub groups: GroupScratch,
    pub logits: Vec<f32>,
    /// Tokens of the vocabulary. 0 if the program makes no logits.
    pub logits_width: usize,
    pub captures: Vec<Vec<f32>>,
    pub capture_widths: Vec<usize>,
    /// The sequence of each row.
    pub sequence_of: Vec<u32>,
    /// Whether each row is in the prefill form.
    pub prefill: Vec<bool>,
    /// Whether each row turns by the long rotary tables.
    pub long_rope: Vec<bool>,
    /// Ranges of the step's rows whose latent attention is absorbed.
    pub absorbed: Vec<Range<usize>>,
    /// The sequences' block tables.
    pub tables: SequenceTables,
    /// Chooses tokens, and keeps the tokens of the step's rows.
    pub chooser: Chooser,
    pub profile: Profile,
}

// SAFETY: the pointers in stages and buffers are into memory that the executor owns, and are
// used only in `run`, which has it for itself.
unsafe impl Send for CpuExecutor {}

/// Cosines and sines of a step's rows for one rotary table.
#[derive(Debug)]
pub(crate) struct Angles {
    memory: Memory,
    pairs: usize,
}

impl Angles {
    /// Room for `rows_max` rows.
    pub(crate) fn new(table: &RopeTable, rows_max: usize) -> Result<Self, BackendError> {
        let pairs = table.inverse_frequencies.len();
        let memory = Memory::zeroed(rows_max * 2 * pairs * size_of::<f32>(), "rotary angles")?;
        Ok(Self { memory, pairs })
    }

    fn rows(&self) -> Rows {
        Rows::new(self.memory.pointer().cast(), 2 * self.pairs)
    }
}

impl Executor for CpuExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn kv_format(&self) -> KvFormat {
        self.state.cache.format()
    }

    fn expanded_until(&self, given: usize) -> usize {
        let has_latents = self.program.ops.iter().any(|op| matches!(op, Op::AttendLatent { .. }));
        match self.prefill_form && !has_latents {
            true => given / PREFILL_ROWS * PREFILL_ROWS,
            false => self.program.expanded_until(given),
        }
    }

    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    /// Runs the step to its end. `collect` tells whether it succeeded.
    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        if self.in_flight.is_some() {
            return Err(StepError("a step is in flight already".to_owned()).into());
        }
        self.state.tables.accept(step, &self.program, &self.limits)?;
        self.in_flight = Some(self.run_stages(step).map(|()| step.rows()));
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        let in_flight = self.in_flight.take();
        let rows = in_flight.ok_or_else(|| StepError("no step is in flight".to_owned()))??;
        let State { chooser, logits, logits_width, captures, capture_widths, .. } = &self.state;
        let captures = captures.iter().zip(capture_widths);
        Ok(StepOutput {
            tokens: chooser.tokens(),
            logprobs: chooser.logprobs(),
            logits: &logits[..chooser.logits_rows() * logits_width],
            captures: captures.map(|(all, width)| &all[..rows * width]).collect(),
        })
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        let State { tables, cache, .. } = &mut self.state;
        tables.check_moves(moves, &self.program.kv)?;
        let tokens = cache.block_tokens();
        for SlotMove { sequence, from, to } in moves {
            for group in 0..self.program.kv.groups.len() {
                let table = tables.table(*sequence, group);
                let (from, to) =
                    (table.locate(*from as usize, tokens), table.locate(*to as usize, tokens));
                cache.copy_slot(group, from, to);
            }
        }
        Ok(())
    }

    fn routing(&self, routing: Routing) -> Option<RoutedExperts<'_>> {
        let chosen = self.state.routings.get(routing.0 as usize)?;
        let pairs = self.state.sequence_of.len() * chosen.per_row;
        (pairs > 0).then(|| RoutedExperts {
            experts: &chosen.experts[..pairs],
            weights: &chosen.weights[..pairs],
            experts_per_token: chosen.per_row,
        })
    }

    fn weight_bytes(&self) -> usize {
        self.weight_bytes
    }

    fn kv_bytes(&self) -> usize {
        self.state.cache.bytes()
    }
}

impl CpuExecutor {
    /// Runs an accepted step: its stages, then its choices.
    fn run_stages(&mut self, step: &Step) -> Result<(), BackendError> {
        let Self { program, stages, state, .. } = self;
        state.begin(program, step);
        for stage in stages.iter() {
            let start = state.profile.start();
            state.run(stage, step)?;
            state.profile.stop(stage, step.rows(), start);
        }
        state.profile.step(step.rows());
        let State { chooser, logits, logits_width, .. } = state;
        chooser.choose(step, *logits_width, logits);
        Ok(())
    }
}

impl State {
    /// Prepares what the stages of a step share: the sequence of each row, angles, and memory for
    /// logits.
    fn begin(&mut self, program: &Program, step: &Step) {
        self.chooser.begin(step);
        self.sequence_of.clear();
        for (index, sequence) in step.sequences.iter().enumerate() {
            let rows = self.sequence_of.len() + sequence.rows as usize;
            self.sequence_of.resize(rows, index as u32);
        }
        self.prefill.clear();
        for sequence in &step.sequences {
            let (rows, expanded) = (sequence.rows as usize, sequence.rows_expanded());
            self.prefill.extend((0..rows).map(|row| row < expanded));
        }
        self.activations.set_forms(self.prefill.iter().copied());
        self.long_rope.clear();
        let long_rope = step.sequences.iter();
        self.long_rope.extend(long_rope.flat_map(|it| it.row_range().map(|_| it.long_rope)));
        self.absorbed.clear();
        for sequence in &step.sequences {
            let first = sequence.first_row as usize;
            let [_, rows] = RowForm::Absorbed.rows(sequence);
            match self.absorbed.last_mut() {
                Some(before) if before.end == first + rows.start => before.end = first + rows.end,
                _ if rows.is_empty() => {}
                _ => self.absorbed.push(first + rows.start..first + rows.end),
            }
        }
        for (table, angles) in program.ropes.iter().zip(&self.angles) {
            let out = angles.rows();
            self.by_rows(step.rows(), 16 * out.width(), |rows| {
                // SAFETY: angles have room for `rows_max` rows, and workers have rows of their own.
                unsafe { fill_angles(table, &self.long_rope, &step.positions, out, rows) }
            });
        }
        let logits = step.choices.len() * self.logits_width;
        if self.logits.len() < logits {
            self.logits.resize(logits, 0.0);
        }
    }

    /// Divides rows among the workers, or does them all on this thread if they are little work.
    fn by_rows(&self, rows: usize, floats_per_row: usize, work: impl Fn(Range<usize>) + Sync) {
        if rows == 1 || rows * floats_per_row < ALONE_FLOATS {
            return work(0..rows);
        }
        self.gang.run(|worker, workers| work(share(rows, worker, workers)));
    }

    /// Runs one stage. The buffers hold `rows_max` rows, and a step has no more. A stage's inputs
    /// are complete before it starts.
    fn run(&mut self, stage: &Stage, step: &Step) -> Result<(), BackendError> {
        let (width, count) = (self.width, step.rows());
        match stage {
            Stage::Embed { table, first_token, multiplier, out } => {
                self.embed(table, *first_token, *multiplier, *out, count);
            }
            Stage::Input { input, out } => {
                // SAFETY: the buffer holds the step's rows; the gang is idle.
                unsafe { out.slices_mut(count) }.copy_from_slice(&step.inputs[*input].values);
            }
            Stage::Norm(norm) => self.by_rows(count, norm.input.width(), |rows| {
                run_norm(width, norm, norm.input, norm.out, rows);
            }),
            Stage::Linear(linear) => self.linear(linear, count),
            Stage::Rotate(rotate) => {
                let angles = self.angles[rotate.rope].rows();
                let (input, out) = (rotate.input, rotate.out);
                let (heads, offset, style) = (rotate.heads, rotate.offset, rotate.style);
                self.by_rows(count, input.width(), |rows| {
                    dispatch(width, Rotate { input, heads, offset, style, angles, out, rows });
                });
            }
            Stage::Transform(transform) => self.transform(transform, count),
            Stage::Write { layer, first, second } => self.write(*layer, *first, *second, step),
            Stage::Attend(attend) => self.attend(attend, step),
            Stage::AttendLatent(latent) => self.attend_latent(latent, step),
            Stage::Activate(stage) => self.by_rows(count, 4 * stage.out.width(), |rows| {
                run_activate(width, stage, stage.out, rows);
            }),
            Stage::Add(add) => self.add(add, count),
            Stage::Gate { input, gate, out } => {
                let (input, gate, out) = (*input, *gate, *out);
                self.by_rows(count, 4 * out.width(), |rows| {
                    dispatch(width, SigmoidGate { input, gate, out, rows });
                });
            }
            Stage::Copy { input, start, out } => copy(*input, *start, *out, count),
            Stage::Route(route) => self.route(route, count),
            Stage::Experts(experts) => {
                let routing = &self.routings[experts.routing];
                let scratch = (&mut self.activations, &mut self.groups);
                // SAFETY: see above.
                unsafe {
                    experts.run((width, &self.gang), &self.prefill[..count], routing, scratch)
                };
            }
            Stage::AllReduce { input, out } => {
                copy(*input, 0, *out, count);
                // SAFETY: see above; the gang is idle.
                self.ranks.sum(unsafe { out.slices_mut(count) })?;
            }
            Stage::AllGather { input, out } => {
                // SAFETY: see above; the two do not overlap, as gathering is not done in place.
                let (part, whole) = unsafe { (input.slices(count), out.slices_mut(count)) };
                self.ranks.gather(part, input.width(), whole, out.width())?;
            }
            Stage::Logits(logits) => self.logits(logits, step)?,
            Stage::Capture { input, tap } => {
                // SAFETY: see above.
                let rows = unsafe { input.slices(count) };
                self.captures[*tap][..rows.len()].copy_from_slice(rows);
            }
        }
        Ok(())
    }

    fn embed(&self, table: &Tensor, first: u32, multiplier: f32, out: Rows, count: usize) {
        let tokens = self.chooser.row_tokens();
        self.by_rows(count, out.width(), |rows| {
            for row in rows {
                // SAFETY: the row is this worker's.
                let to = unsafe { std::slice::from_raw_parts_mut(out.row(row), out.width()) };
                embed(table, tokens[row], first, multiplier, to);
            }
        });
    }

    fn add(&self, stage: &AddStage, count: usize) {
        self.by_rows(count, stage.out.width(), |rows| run_add(self.width, stage, rows));
    }

    fn transform(&self, stage: &TransformStage, count: usize) {
        self.by_rows(count, 8 * stage.out.width(), |rows| {
            // SAFETY: buffers hold the step's rows, and workers have rows of their own.
            unsafe { stage.run(self.width, rows) }
        });
    }

    fn linear(&mut self, stage: &LinearStage, count: usize) {
        let Self { width, gang, activations, .. } = self;
        prepare(*width, gang, activations, stage, count);
        let mut parts = stage.parts.as_slice();
        while !parts.is_empty() {
            let (now, later) = parts.split_at(parts.len().min(4));
            match now {
                [a] => matmul(gang, &mut [part(a, count)], activations),
                [a, b] => matmul(gang, &mut [part(a, count), part(b, count)], activations),
                [a, b, c] => {
                    matmul(
                        gang,
                        &mut [part(a, count), part(b, count), part(c, count)],
                        activations,
                    );
                }
                [a, b, c, d] => {
                    let parts =
                        &mut [part(a, count), part(b, count), part(c, count), part(d, count)];
                    matmul(gang, parts, activations);
                }
                _ => {}
            }
            parts = later;
        }
    }

    fn write(&mut self, layer: usize, first: Rows, second: Rows, step: &Step) {
        let (cache, tables) = (&self.cache, &self.tables);
        let sequence_of = self.sequence_of.as_slice();
        let layer = cache.layer(layer);
        self.by_rows(step.rows(), 4 * (first.width() + second.width()), |rows| {
            let write = Write { cache, layer, step, tables, sequence_of, first, second, rows };
            dispatch(self.width, write);
        });
    }

    fn attend(&mut self, stage: &AttendStage, step: &Step) {
        let job = AttendJob {
            shape: &stage.shape,
            cache: &self.cache,
            layer: self.cache.layer(stage.layer),
            step,
            tables: &self.tables,
            query: stage.query,
            sinks: stage.sinks.as_deref(),
            out: stage.out,
            form: RowForm::All,
            expand: None,
        };
        // SAFETY: buffers hold the step's rows, and the tables every visible position
        // (`Step::validate`).
        unsafe { self.attention.run(&self.gang, &job) };
    }

    fn attend_latent(&mut self, stage: &LatentStage, step: &Step) {
        let place = (self.width, &self.gang);
        let (query, out) = stage.latent_rows(&self.latent);
        let job = AttendJob {
            shape: &stage.shape,
            cache: &self.cache,
            layer: self.cache.layer(stage.layer),
            step,
            tables: &self.tables,
            query,
            sinks: None,
            out,
            form: RowForm::Absorbed,
            expand: None,
        };
        let expanded = AttendJob {
            shape: &stage.expanded_shape,
            query: stage.query,
            out: stage.out,
            form: RowForm::Expanded,
            expand: Some(stage),
            ..job
        };
        let (all, ranges) = (step.rows(), &self.absorbed);
        let absorbed: usize = ranges.iter().map(Range::len).sum();
        // SAFETY: as in `attend`; the scratch has room for `rows_max` rows, and the forms write
        // rows of their own.
        unsafe {
            if absorbed > 0 {
                ranges.iter().for_each(|rows| stage.absorb(place, rows.clone(), &self.latent));
                self.attention.run(&self.gang, &job);
                ranges.iter().for_each(|rows| stage.expand(place, rows.clone(), &self.latent));
            }
            if absorbed < all {
                self.attention.run(&self.gang, &expanded);
            }
        }
    }

    fn route(&mut self, stage: &RouteStage, count: usize) {
        let experts = stage.spec.experts;
        // SAFETY: the input's rows are valid.
        let input = unsafe { stage.input.slices(count) };
        self.activations.prepare(&self.gang, stage.operands, input, stage.input.width());
        let (logits, ranks) = self.router.split_at_mut(count * experts);
        let part = Part { bias: stage.bias.as_deref(), ..Part::new(&stage.matrix, logits) };
        matmul(&self.gang, &mut [part], &self.activations);
        let routing = &mut self.routings[stage.routing];
        let chosen = routing.experts.chunks_exact_mut(routing.per_row);
        let weights = routing.weights.chunks_exact_mut(routing.per_row);
        for ((logits, chosen), weights) in logits.chunks_exact_mut(experts).zip(chosen).zip(weights)
        {
            stage.choose(logits, &mut ranks[..experts], chosen, weights);
        }
    }

    fn logits(&mut self, stage: &LogitsStage, step: &Step) -> Result<(), BackendError> {
        let (width, asked) = (self.width, &step.choices);
        if asked.is_empty() {
            return Ok(());
        }
        let columns = stage.matrix.columns();
        self.activations.set_forms(asked.iter().map(|choice| self.prefill[choice.row as usize]));
        self.activations.prepare_with(
            &self.gang,
            stage.operands,
            (asked.len(), columns),
            |i, out| {
                let row = asked[i].row as usize;
                match &stage.source {
                    LogitsInput::Norm(norm) => {
                        let out = window(out, row);
                        run_norm(width, norm, norm.input, out, row..row + 1);
                    }
                    // SAFETY: the row is valid and complete.
                    LogitsInput::Rows(rows) => out.copy_from_slice(unsafe { rows.slice(row) }),
                }
            },
        );
        let own = asked.len() * stage.matrix.rows();
        let logits = match stage.gather {
            true => self.ranks.own_logits(own),
            false => &mut self.logits[..own],
        };
        matmul(&self.gang, &mut [Part::new(&stage.matrix, logits)], &self.activations);
        self.activations.set_forms(self.prefill.iter().copied());
        if stage.scale != 1.0 || stage.softcap.is_some() {
            let all = Rows::new(logits.as_mut_ptr(), 1);
            let (scale, softcap, floats) = (stage.scale, stage.softcap, logits.len());
            self.gang.run(|worker, workers| {
                dispatch(
                    width,
                    SoftenLogits { all, range: share(floats, worker, workers), scale, softcap },
                );
            });
        }
        if stage.gather {
            let whole = &mut self.logits[..asked.len() * self.logits_width];
            self.ranks.gather_logits(stage.matrix.rows(), whole, self.logits_width)?;
        }
        Ok(())
    }
}

/// Prepares the input of a linear group. An op that is fused into it is computed on the way.
fn prepare(
    width: Width,
    gang: &Gang,
    activations: &mut Activations,
    stage: &LinearStage,
    count: usize,
) {
    let shape = (count, stage.columns);
    match &stage.source {
        LinearInput::Rows(rows) => {
            // SAFETY: the buffer holds the step's rows, complete.
            let input = unsafe { rows.slices(count) };
            activations.prepare(gang, stage.operands, input, stage.columns);
        }
        LinearInput::Norm(norm) => {
            activations.prepare_with(gang, stage.operands, shape, |row, out| {
                run_norm(width, norm, norm.input, window(out, row), row..row + 1);
            })
        }
        LinearInput::AddNorm(add, norm) => {
            activations.prepare_with(gang, stage.operands, shape, |row, out| {
                run_add(width, add, row..row + 1);
                run_norm(width, norm, norm.input, window(out, row), row..row + 1);
            })
        }
        LinearInput::Activate(activate) => {
            activations.prepare_with(gang, stage.operands, shape, |row, out| {
                run_activate(width, activate, window(out, row), row..row + 1);
            })
        }
    }
}

/// A buffer of which only row `row` exists, at `out`.
fn window(out: &mut [f32], row: usize) -> Rows {
    Rows::new(out.as_mut_ptr().wrapping_sub(row * out.len()), out.len())
}

fn part(stage: &PartStage, count: usize) -> Part<'_> {
    Part {
        matrix: &stage.matrix,
        bias: stage.bias.as_deref(),
        accumulate: stage.accumulate,
        // SAFETY: the buffer holds the step's rows; parts of a group write different buffers, and
        // nobody else touches them.
        out: unsafe { stage.out.slices_mut(count) },
    }
}

fn run_norm(width: Width, stage: &NormStage, input: Rows, out: Rows, rows: Range<usize>) {
    let (weight, bias) = (stage.weight.as_deref(), stage.bias.as_deref());
    let (kind, epsilon, groups) = (stage.kind, stage.epsilon, stage.groups);
    dispatch(width, Norm { input, weight, bias, kind, epsilon, groups, out, rows });
}

fn run_add(width: Width, stage: &AddStage, rows: Range<usize>) {
    let AddStage { left, right, scale, out } = *stage;
    dispatch(width, Add { left, right, scale, out, rows });
}

fn run_activate(width: Width, stage: &ActivateStage, out: Rows, rows: Range<usize>) {
    let ActivateStage { gate, up, kind, .. } = *stage;
    dispatch(width, Activate { gate, up, kind, out, rows, columns: 0..out.width() });
}

fn embed(table: &Tensor, token: u32, first: u32, multiplier: f32, to: &mut [f32]) {
    match token.checked_sub(first).filter(|t| (*t as usize) < table.rows()) {
        Some(row) => table.row_into(row as usize, to),
        None => to.fill(0.0),
    }
    if multiplier != 1.0 {
        to.iter_mut().for_each(|x| *x *= multiplier);
    }
}

fn copy(input: Rows, start: usize, out: Rows, count: usize) {
    if input.row(0) == out.row(0) && input.width() == out.width() {
        return;
    }
    for row in 0..count {
        // SAFETY: both buffers hold the step's rows; they do not overlap, since only ops that
        // work in place may share a buffer and those were handled above.
        unsafe {
            std::ptr::copy_nonoverlapping(input.row(row).add(start), out.row(row), out.width());
        }
    }
}

/// Scales and caps logits.
struct SoftenLogits {
    all: Rows,
    /// The logits of this worker.
    range: Range<usize>,
    scale: f32,
    softcap: Option<f32>,
}

impl Kernel for SoftenLogits {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        for i in self.range.clone().step_by(LANES) {
            let (at, count) = (self.all.row(i), self.range.end - i);
            // SAFETY: the range is within the logits and this worker's.
            unsafe {
                let mut x = L::load_first(at, count).mul(L::splat(self.scale));
                if let Some(cap) = self.softcap {
                    x = math::tanh(x.mul(L::splat(1.0 / cap))).mul(L::splat(cap));
                }
                x.store_first(at, count);
            }
        }
    }
}

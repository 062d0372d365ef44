//! `CudaExecutor`: a prepared program on the device.
//!
//! A step's kernels are submitted without waiting, and the next step's while they run. A step of
//! few rows is recorded as a graph when its like has run once. Where all choices are plain greedy
//! ones, the device chooses, and only tokens come back. All others are chosen on the host when the
//! step is collected, by the sampler that the reference uses; the logits of the choices come back
//! for that.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use lathe_program::sampling::Chooser;
use lathe_program::{
    BackendError, BufferPlan, Choice, Executor, ExecutorLimits, ExecutorOptions, KvFormat, Op,
    Program, RopeTable, SequenceTables, SlotMove, Step, StepError, StepOutput, Value, WeightSource,
};
use lathe_tensor::hadamard::Hadamard;

use crate::cache::{self, Cache};
use crate::device::{Device, Graph, Memory, TokenBox};
use crate::gemm;
use crate::step_data::StepData;
use crate::units::{self, Unit};
use crate::weights::{Weights, unsupported};

/// Rows of the largest step that is recorded as a graph, and graphs that are kept.
const GRAPH_ROWS_MAX: usize = 256;
const GRAPHS_MAX: usize = 128;

const STEPS_IN_FLIGHT: usize = 2;

/// A step that was submitted and is not collected.
struct InFlight {
    step: Step,
    /// The box that its tokens come to; `None`: they are chosen on the host.
    tokens: Option<usize>,
    /// Whether what it made has been brought back already.
    finished: bool,
}

/// All that the launches of a step depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct GraphKey {
    rows: usize,
    choices: usize,
    stride: usize,
    tiles: usize,
    greedy: bool,
}

/// A routing on the device.
pub(crate) struct Routed {
    experts: Memory,
    weights: Memory,
    pub(crate) per_token: usize,
}

impl Routed {
    /// Of the experts and of their weights.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        (self.experts.address(), self.weights.address())
    }
}

pub(crate) struct CudaExecutor {
    pub(crate) device: Arc<Device>,
    pub(crate) program: Arc<Program>,
    pub(crate) weights: Weights,
    pub(crate) cache: Cache,
    pub(crate) kv_suffix: &'static str,
    pub(crate) step: StepData,
    pub(crate) ropes: Vec<Memory>,
    /// By rotary table: a sine and a cosine for each row and pair.
    pub(crate) angles: Vec<Memory>,
    /// Transposed matrices, by size.
    pub(crate) hadamards: BTreeMap<usize, Memory>,
    pub(crate) routings: Vec<Routed>,
    /// What an op of two kernels keeps between them.
    pub(crate) scratch: [Memory; 2],
    pub(crate) logits: Memory,
    pub(crate) captures: Vec<Memory>,
    /// A product's activations in the order of the tensor cores.
    pub(crate) prepared: Memory,
    /// What kernels of two parts keep between them.
    pub(crate) product_sums: Memory,
    pub(crate) attention_parts: Memory,
    pub(crate) best_parts: Memory,
    /// The tokens of greedy choices; all bits set where there is none.
    pub(crate) best_tokens: Memory,
    pub(crate) exact: bool,
    /// Rows and choices of the step that runs.
    pub(crate) rows: usize,
    pub(crate) choices: usize,
    pub(crate) units: Vec<Unit>,
    /// By step; absent values have run once.
    graphs: HashMap<GraphKey, Option<Graph>>,
    /// Whether the device chooses the tokens of the step submitted last.
    greedy: bool,
    plan: BufferPlan,
    buffers: Vec<Memory>,
    limits: ExecutorLimits,
    tables: SequenceTables,
    chooser: Chooser,
    in_flight: VecDeque<InFlight>,
    /// For tokens that come back, used by turns.
    boxes: [TokenBox; STEPS_IN_FLIGHT],
    submitted: usize,
    logits_host: Vec<f32>,
    captures_host: Vec<Vec<f32>>,
}

impl CudaExecutor {
    pub(crate) fn new(
        device: Arc<Device>,
        program: Arc<Program>,
        source: &dyn WeightSource,
        options: &ExecutorOptions,
        format: KvFormat,
    ) -> Result<Self, BackendError> {
        device.bind()?;
        let (rows_max, kv_blocks) = (options.rows_max.max(1), options.kv_blocks);
        let (sequences_max, steps_in_flight) = (rows_max, STEPS_IN_FLIGHT);
        let limits = ExecutorLimits { rows_max, sequences_max, kv_blocks, steps_in_flight };
        let kv_suffix = cache::suffix(format)
            .ok_or_else(|| unsupported(format!("a KV cache in {}", format.name())))?;
        let allocate = |elements: usize, what| device.allocate(rows_max * elements * 4, what);
        let rows_of = |widths: &[usize], what| -> Result<Vec<Memory>, BackendError> {
            widths.iter().map(|width| allocate(*width, what)).collect()
        };
        let plan = program.buffer_plan();
        let (activations, parts) = ("the activations", "the parts of sums");
        let capture_widths = program.capture_widths();
        let scratch = scratch_elements(&program);
        let weights = Weights::load(&device, &program, source, options.exact)?;
        let product_sums = gemm::sums(&program, &weights, rows_max);
        let prepared = gemm::prepared_bytes(&program, &weights, rows_max);
        let attention_parts = units::attention_parts(&program, rows_max);
        let units = match options.exact {
            true => (0..program.ops.len()).map(Unit::Op).collect(),
            false => units::units(&program, &weights, &plan, format),
        };
        let executor = Self {
            prepared: device.allocate(prepared, activations)?,
            product_sums: device.allocate(product_sums * 4, parts)?,
            attention_parts: device.allocate(attention_parts * 4, parts)?,
            best_parts: device.allocate(units::best_parts(rows_max) * 8, parts)?,
            best_tokens: device.allocate(rows_max * 4, "the tokens")?,
            exact: options.exact,
            units,
            graphs: HashMap::new(),
            greedy: false,
            weights,
            cache: Cache::new(&device, &program.kv, options.kv_blocks, format)?,
            kv_suffix,
            step: StepData::new(&device, &program, &limits)?,
            ropes: ropes(&device, &program)?,
            angles: rows_of(&angle_widths(&program), "the rotary tables")?,
            hadamards: hadamards(&device, &program)?,
            routings: routings(&device, &program, rows_max)?,
            scratch: [allocate(scratch, activations)?, allocate(scratch, activations)?],
            logits: allocate(logits_width(&program), "the logits")?,
            captures: rows_of(&capture_widths, "the captures")?,
            rows: 0,
            choices: 0,
            buffers: rows_of(&plan.slot_widths, activations)?,
            plan,
            limits,
            tables: SequenceTables::new(&program.kv, limits.sequences_max),
            chooser: Chooser::default(),
            in_flight: VecDeque::new(),
            boxes: [TokenBox::new(&device, rows_max)?, TokenBox::new(&device, rows_max)?],
            submitted: 0,
            logits_host: Vec::new(),
            captures_host: vec![Vec::new(); capture_widths.len()],
            device,
            program,
        };
        executor.prepare_kernels()?;
        Ok(executor)
    }

    /// The address of a value's rows.
    pub(crate) fn value(&self, value: Value) -> u64 {
        self.buffers[self.plan.slot(value)].address()
    }

    fn run_ops(&mut self, step: &Step) -> Result<(), BackendError> {
        let chosen = self.in_flight.iter().all(|it| it.finished).then(|| self.chooser.tokens());
        self.step.upload(step, chosen, &self.tables)?;
        (self.rows, self.choices) = (step.rows(), step.choices.len());
        let greedy = !step.choices.is_empty() && step.choices.iter().all(is_plain_greedy);
        self.greedy = greedy && self.captures.is_empty();
        let key = self.key();
        if key.rows > GRAPH_ROWS_MAX {
            return self.launch_all();
        }
        match self.graphs.get(&key) {
            Some(Some(graph)) => graph.launch(),
            Some(None) => {
                let graph = self.device.record(|| self.launch_all())?;
                graph.launch()?;
                self.graphs.insert(key, Some(graph));
                Ok(())
            }
            None => {
                if self.graphs.len() >= GRAPHS_MAX {
                    self.graphs.clear();
                }
                self.graphs.insert(key, None);
                self.launch_all()
            }
        }
    }

    fn key(&self) -> GraphKey {
        let (rows, choices) = (self.rows, self.choices);
        let (stride, tiles) = (self.step.stride(), self.step.tile_count());
        GraphKey { rows, choices, stride, tiles, greedy: self.greedy }
    }

    fn launch_all(&self) -> Result<(), BackendError> {
        self.rope_angles()?;
        self.units.iter().try_for_each(|unit| self.launch_unit(unit))?;
        if self.greedy { self.best() } else { Ok(()) }
    }

    /// Waits for the oldest step, and brings back what it made. What the device did not choose is
    /// chosen here.
    fn finish(&mut self) -> Result<(), BackendError> {
        let Some(front) = self.in_flight.front_mut().filter(|front| !front.finished) else {
            return Ok(());
        };
        front.finished = true;
        self.chooser.begin(&front.step);
        if let Some(index) = front.tokens {
            let tokens = self.boxes[index].wait(front.step.choices.len())?;
            let chosen = |token: &u32| (*token != u32::MAX).then_some(*token);
            self.chooser.accept(tokens.iter().map(chosen));
            return Ok(());
        }
        let (rows, choices) = (front.step.rows(), front.step.choices.len());
        self.logits_host.resize(choices * logits_width(&self.program), 0.0);
        self.logits.read(0, &mut self.logits_host)?;
        let widths = self.program.capture_widths();
        for ((host, memory), width) in self.captures_host.iter_mut().zip(&self.captures).zip(widths)
        {
            host.resize(rows * width, 0.0);
            memory.read(0, host)?;
        }
        self.device.synchronize()?;
        self.chooser.choose(&front.step, self.program.vocabulary, &mut self.logits_host);
        Ok(())
    }
}

/// Whether the largest logit is all that a choice asks for.
fn is_plain_greedy(choice: &Choice) -> bool {
    let greedy = choice.sampling.is_some_and(|sampling| {
        // Penalties without counts still see the tokens that rows of the step generate.
        sampling.temperature == 0.0 && !sampling.has_penalties()
    });
    let bias = choice.bias.as_ref().is_some_and(|bias| !bias.is_empty());
    let reported = choice.report.logits || choice.report.logprobs.is_some();
    greedy && !bias && choice.mask.is_none() && !reported
}

/// Logits of a row, if the program makes any.
fn logits_width(program: &Program) -> usize {
    if program.makes_logits() { program.vocabulary } else { 0 }
}

/// Elements a row of each scratch buffer: the widest of what is kept between two kernels.
fn scratch_elements(program: &Program) -> usize {
    let of = |op: &Op| match op {
        Op::AttendLatent { spec, .. } => spec.heads * spec.rank,
        Op::Route { spec, .. } => spec.experts,
        Op::Experts { spec, routing, .. } => per_token(program, routing.0) * spec.hidden,
        _ => 0,
    };
    program.ops.iter().map(of).max().unwrap_or(0)
}

/// Choices a row of a routing.
fn per_token(program: &Program, routing: u32) -> usize {
    let of = |op: &Op| match op {
        Op::Route { spec, out, .. } if out.0 == routing => Some(spec.experts_per_token),
        _ => None,
    };
    program.ops.iter().find_map(of).unwrap_or(0)
}

fn routings(
    device: &Arc<Device>,
    program: &Program,
    rows_max: usize,
) -> Result<Vec<Routed>, BackendError> {
    let of = |routing| {
        let per_token = per_token(program, routing);
        let bytes = rows_max * per_token * 4;
        let experts = device.allocate(bytes, "the routings")?;
        Ok(Routed { experts, weights: device.allocate(bytes, "the routings")?, per_token })
    };
    (0..program.routings as u32).map(of).collect()
}

fn ropes(device: &Arc<Device>, program: &Program) -> Result<Vec<Memory>, BackendError> {
    let table = |frequencies: &[f32]| {
        let memory = device.allocate(frequencies.len() * 4, "the rotary tables")?;
        memory.write(0, frequencies)?;
        Ok(memory)
    };
    let both = |rope: &RopeTable| [rope.frequencies(false), rope.frequencies(true)].concat();
    program.ropes.iter().map(|rope| table(&both(rope))).collect()
}

/// Elements a row of what `rope_angles` makes.
fn angle_widths(program: &Program) -> Vec<usize> {
    program.ropes.iter().map(|table| 2 * table.inverse_frequencies.len()).collect()
}

fn hadamards(
    device: &Arc<Device>,
    program: &Program,
) -> Result<BTreeMap<usize, Memory>, BackendError> {
    let mut found = BTreeMap::new();
    for op in &program.ops {
        let size = match op {
            Op::Transform { transform, .. } => transform.hadamard,
            Op::Experts { spec, .. } => spec.hidden_transform.hadamard,
            _ => None,
        };
        let Some(size) = size.filter(|size| !found.contains_key(size)) else { continue };
        let matrix = Hadamard::new(size)
            .ok_or_else(|| unsupported(format!("a Hadamard matrix of {size} elements")))?;
        // Row i of what the kernel reads is the image of unit vector i.
        let mut rows = vec![0f32; size * size];
        for (i, row) in rows.chunks_exact_mut(size).enumerate() {
            row[i] = 1.0;
            matrix.apply_row(row);
        }
        let memory = device.allocate(rows.len() * 4, "a Hadamard matrix")?;
        memory.write(0, &rows)?;
        found.insert(size, memory);
    }
    Ok(found)
}

impl Executor for CudaExecutor {
    fn program(&self) -> &Arc<Program> {
        &self.program
    }

    fn limits(&self) -> ExecutorLimits {
        self.limits
    }

    fn kv_format(&self) -> KvFormat {
        self.cache.format()
    }

    fn submit(&mut self, step: &Step) -> Result<(), BackendError> {
        if self.in_flight.len() == STEPS_IN_FLIGHT {
            let error = format!("{STEPS_IN_FLIGHT} steps are in flight already");
            return Err(StepError(error).into());
        }
        self.tables.accept(step, &self.program, &self.limits)?;
        self.device.bind()?;
        // The next step writes over the logits, and its tokens may hang on them.
        if self.in_flight.back().is_some_and(|last| last.tokens.is_none()) {
            self.finish()?;
        }
        self.run_ops(step)?;
        let tokens = self.greedy.then_some(self.submitted % STEPS_IN_FLIGHT);
        if let Some(index) = tokens {
            self.boxes[index].fetch(&self.best_tokens, step.choices.len())?;
        }
        self.submitted += 1;
        self.in_flight.push_back(InFlight { step: step.clone(), tokens, finished: false });
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        if self.in_flight.is_empty() {
            return Err(StepError("no step is in flight".to_owned()).into());
        }
        self.device.bind()?;
        let finished = self.finish();
        self.in_flight.pop_front();
        finished?;
        let vocabulary = self.program.vocabulary;
        let rows = self.chooser.logits_rows();
        Ok(StepOutput {
            tokens: self.chooser.tokens(),
            logprobs: self.chooser.logprobs(),
            logits: &self.logits_host[..rows * vocabulary],
            captures: self.captures_host.iter().map(Vec::as_slice).collect(),
        })
    }

    fn move_slots(&mut self, moves: &[SlotMove]) -> Result<(), BackendError> {
        self.tables.check_moves(moves, &self.program.kv)?;
        self.device.bind()?;
        for SlotMove { sequence, from, to } in moves {
            for group in 0..self.program.kv.groups.len() {
                let table = self.tables.table(*sequence, group);
                let slots = [*from as usize, *to as usize];
                self.cache.copy_slot(&self.device, group, table, slots)?;
            }
        }
        Ok(())
    }

    fn weight_bytes(&self) -> usize {
        self.weights.bytes()
    }

    fn kv_bytes(&self) -> usize {
        self.cache.bytes()
    }
}

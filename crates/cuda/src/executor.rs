//! `CudaExecutor`: a prepared program on the device.
//!
//! A step's kernels are submitted without waiting. Its tokens are chosen on the host when it is
//! collected, by the sampler that the reference uses; the logits of its choices come back for that.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_program::sampling::Chooser;
use lathe_program::{
    BackendError, BufferPlan, Executor, ExecutorLimits, ExecutorOptions, KvFormat, Op, Program,
    RopeTable, SequenceTables, SlotMove, Step, StepError, StepOutput, Value, WeightSource,
};
use lathe_tensor::hadamard::Hadamard;

use crate::cache::{self, Cache};
use crate::device::{Device, Memory};
use crate::step_data::StepData;
use crate::weights::{Weights, unsupported};

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
    /// Transposed matrices, by size.
    pub(crate) hadamards: BTreeMap<usize, Memory>,
    pub(crate) routings: Vec<Routed>,
    /// What an op of two kernels keeps between them.
    pub(crate) scratch: [Memory; 2],
    pub(crate) logits: Memory,
    pub(crate) captures: Vec<Memory>,
    /// Rows and choices of the step that runs.
    pub(crate) rows: usize,
    pub(crate) choices: usize,
    plan: BufferPlan,
    buffers: Vec<Memory>,
    limits: ExecutorLimits,
    tables: SequenceTables,
    chooser: Chooser,
    in_flight: Option<Step>,
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
        let rows_max = options.rows_max.max(1);
        let limits = ExecutorLimits {
            rows_max,
            sequences_max: rows_max,
            kv_blocks: options.kv_blocks,
            steps_in_flight: 1,
        };
        let kv_suffix = cache::suffix(format)
            .ok_or_else(|| unsupported(format!("a KV cache in {}", format.name())))?;
        let allocate = |elements: usize, what| device.allocate(rows_max * elements * 4, what);
        let rows_of = |widths: &[usize], what| -> Result<Vec<Memory>, BackendError> {
            widths.iter().map(|width| allocate(*width, what)).collect()
        };
        let plan = program.buffer_plan();
        let activations = "the activations";
        let capture_widths = program.capture_widths();
        let scratch = scratch_elements(&program);
        Ok(Self {
            weights: Weights::load(&device, &program, source)?,
            cache: Cache::new(&device, &program.kv, options.kv_blocks, format)?,
            kv_suffix,
            step: StepData::new(&device, &program, &limits)?,
            ropes: ropes(&device, &program)?,
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
            in_flight: None,
            logits_host: Vec::new(),
            captures_host: vec![Vec::new(); capture_widths.len()],
            device,
            program,
        })
    }

    /// The address of a value's rows.
    pub(crate) fn value(&self, value: Value) -> u64 {
        self.buffers[self.plan.slot(value)].address()
    }

    fn run_ops(&mut self, step: &Step) -> Result<(), BackendError> {
        self.chooser.begin(step);
        self.step.upload(step, self.chooser.row_tokens(), &self.tables)?;
        (self.rows, self.choices) = (step.rows(), step.choices.len());
        let program = Arc::clone(&self.program);
        program.ops.iter().try_for_each(|op| self.launch(op))
    }

    fn read_back(&mut self) -> Result<(), BackendError> {
        self.logits_host.resize(self.choices * logits_width(&self.program), 0.0);
        self.logits.read(0, &mut self.logits_host)?;
        let widths = self.program.capture_widths();
        for ((host, memory), width) in self.captures_host.iter_mut().zip(&self.captures).zip(widths)
        {
            host.resize(self.rows * width, 0.0);
            memory.read(0, host)?;
        }
        self.device.synchronize()
    }
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
        if self.in_flight.is_some() {
            return Err(StepError("1 step is in flight already".to_owned()).into());
        }
        self.tables.accept(step, &self.program, &self.limits)?;
        self.device.bind()?;
        self.run_ops(step)?;
        self.in_flight = Some(step.clone());
        Ok(())
    }

    fn collect(&mut self) -> Result<StepOutput<'_>, BackendError> {
        let step = self.in_flight.take();
        let step = step.ok_or_else(|| StepError("no step is in flight".to_owned()))?;
        self.device.bind()?;
        self.read_back()?;
        let vocabulary = self.program.vocabulary;
        self.chooser.choose(&step, vocabulary, &mut self.logits_host);
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

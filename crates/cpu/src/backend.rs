//! `CpuBackend`: prepares programs for this machine's processors.

use std::sync::Arc;

use lathe_program::{
    Backend, BackendError, Chooser, DeviceMemory, Executor, ExecutorLimits, ExecutorOptions,
    HostCollective, KvFormat, Missing, Op, Program, SequenceTables, SingleRank, WeightSource,
    check_program,
};
use lathe_tensor::Format;

use crate::attend::Attention;
use crate::attend::split::SplitProducts;
use crate::cache::KvCache;
use crate::executor::{Angles, CpuExecutor, State};
use crate::experts::{ChosenExperts, GroupScratch};
use crate::gang::{Gang, available_cores};
use crate::isa::Isa;
use crate::lanes::Width;
use crate::latent::{LatentScratch, LatentStage};
use crate::linear::Activations;
use crate::pack::PackedMatrix;
use crate::plan::{Buffers, Planner, attend_shape, unsupported};
use crate::profile::Profile;
use crate::ranks::Ranks;
use crate::stage::Stage;
use crate::weights::Weights;

/// Choices that are made with the backend.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// The instruction set. `None`: the one that `LATHE_ISA` names, else the strongest of the
    /// machine.
    pub isa: Option<Isa>,
}

/// The backend that runs programs on the CPU.
#[derive(Debug, Clone)]
pub struct CpuBackend {
    options: CpuOptions,
    collective: Arc<HostCollective>,
}

impl CpuBackend {
    /// The backend of a single rank, with these options.
    pub fn new(options: CpuOptions) -> Self {
        Self { options, collective: Arc::new(SingleRank) }
    }

    /// The same backend as one rank of several. Each rank has threads of its own, and its programs
    /// are one rank's programs.
    pub fn collective(self, collective: Arc<HostCollective>) -> Self {
        Self { collective, ..self }
    }
}

impl Backend for CpuBackend {
    fn name(&self) -> &'static str {
        "cpu"
    }

    fn supports(&self, program: &Program, options: &ExecutorOptions) -> Result<(), Missing> {
        let format = kv_format(options);
        let mut missing = Vec::new();
        let found = Isa::select(self.options.isa).map(drop);
        for result in [found, crate::cache::code::check(format, &program.kv)] {
            match result {
                Err(BackendError::Unsupported { feature, .. }) => missing.push(feature),
                Err(error) => missing.push(error.to_string()),
                Ok(()) => {}
            }
        }
        missing.extend(program.ops.iter().filter_map(unsupported));
        if missing.is_empty() { Ok(()) } else { Err(Missing(missing)) }
    }

    fn memory(&self) -> Result<DeviceMemory, BackendError> {
        DeviceMemory::of_host()
    }

    fn default_kv_format(&self, _: &Program, exact: bool) -> KvFormat {
        default_format(exact)
    }

    fn runs_format(&self, format: Format, columns: usize) -> Result<(), BackendError> {
        PackedMatrix::check(format, columns)
    }

    fn prepare(
        &self,
        program: Arc<Program>,
        weights: &dyn WeightSource,
        options: &ExecutorOptions,
    ) -> Result<Box<dyn Executor>, BackendError> {
        check_program(&program, &*self.collective)?;
        let isa = Isa::select(self.options.isa)?;
        let threads = options.threads.unwrap_or_else(|| available_cores().count).max(1);
        let rows_max = options.rows_max.max(1);
        let weights = Weights::load(&program, weights, isa, options.exact)?;
        let buffers = Buffers::new(&program, rows_max)?;
        let planner = Planner::new(&program, &weights, &buffers, options.exact, kv_format(options));
        let stages = planner.stages()?;
        let gang = Gang::one_of(self.collective.ranks(), threads);
        let ranks = Ranks::new(Arc::clone(&self.collective), &stages, rows_max);
        let state = state(&program, &stages, (gang, ranks), isa, rows_max, options)?;
        let latents = stages.iter().map(|stage| match stage {
            Stage::AttendLatent(latent) => latent.bytes(),
            _ => 0,
        });
        let weight_bytes = weights.bytes() + latents.sum::<usize>();
        Ok(Box::new(CpuExecutor {
            program,
            prefill_form: state.attention.has_prefill_form()
                || stages.iter().any(Stage::has_prefill_form),
            stages,
            weight_bytes,
            limits: ExecutorLimits {
                rows_max,
                sequences_max: rows_max,
                kv_blocks: options.kv_blocks,
                steps_in_flight: 1,
            },
            in_flight: None,
            state,
            _buffers: buffers,
        }))
    }
}

/// The format of the cache: the caller's choice, or the default.
fn kv_format(options: &ExecutorOptions) -> KvFormat {
    options.kv_format.unwrap_or(default_format(options.exact))
}

/// The format of the cache if the caller does not choose it. Halves would move logits of tiny
/// models ten times as far, which sends tokens to other experts.
fn default_format(exact: bool) -> KvFormat {
    if exact { KvFormat::F32 } else { KvFormat::Int16 }
}

fn state(
    program: &Program,
    stages: &[Stage],
    (gang, ranks): (Gang, Ranks),
    isa: Isa,
    rows_max: usize,
    options: &ExecutorOptions,
) -> Result<State, BackendError> {
    let width = Width::of(isa);
    let split = if options.exact { None } else { SplitProducts::of(isa) };
    let format = kv_format(options);
    let shapes: Vec<_> = program
        .ops
        .iter()
        .flat_map(|op| match op {
            Op::Attend { spec, .. } => vec![attend_shape(spec)],
            Op::AttendLatent { spec, .. } => LatentStage::shapes(spec).into(),
            _ => Vec::new(),
        })
        .collect();
    let latents = program.ops.iter().filter_map(|op| match op {
        Op::AttendLatent { spec, .. } => Some(spec),
        _ => None,
    });
    let angles =
        program.ropes.iter().map(|r| Angles::new(r, rows_max)).collect::<Result<_, _>>()?;
    let (routings, router) = routings(program, rows_max);
    let (activations, groups) = scratch(program, stages, &gang, &routings, rows_max);
    let capture_widths = program.capture_widths();
    Ok(State {
        width,
        cache: KvCache::new(&program.kv, format, options.kv_blocks)?,
        attention: Attention::new(
            (width, split),
            &shapes,
            gang.workers(),
            rows_max,
            program.context_max,
        )?,
        latent: LatentScratch::new(latents, rows_max)?,
        gang,
        ranks,
        activations,
        angles,
        routings,
        router,
        groups,
        logits: Vec::new(),
        logits_width: if stages.iter().any(makes_logits) { program.vocabulary } else { 0 },
        captures: capture_widths.iter().map(|w| vec![0.0; w * rows_max]).collect(),
        capture_widths,
        sequence_of: Vec::with_capacity(rows_max),
        prefill: Vec::with_capacity(rows_max),
        long_rope: Vec::with_capacity(rows_max),
        absorbed: Vec::with_capacity(rows_max),
        tables: SequenceTables::new(&program.kv, rows_max),
        chooser: Chooser::default(),
        profile: Profile::from_environment(),
    })
}

/// Memory for the inputs of products, and for grouping rows by expert.
fn scratch(
    program: &Program,
    stages: &[Stage],
    gang: &Gang,
    routings: &[ChosenExperts],
    rows_max: usize,
) -> (Activations, GroupScratch) {
    let mut groups = GroupScratch::default();
    let mut activations = Activations::new();
    // A small error may send a token to another expert, which is a large error.
    activations.set_tile_parts(if program.routings > 0 { 2 } else { 1 });
    let mut reserve = |operands, columns| activations.reserve(gang, operands, rows_max, columns);
    for stage in stages {
        match stage {
            Stage::Linear(linear) => reserve(linear.operands, linear.columns),
            Stage::Logits(logits) => reserve(logits.operands, logits.matrix.columns()),
            Stage::Route(route) => reserve(route.operands, route.input.width()),
            Stage::Experts(experts) => {
                groups.reserve(experts, rows_max, routings[experts.routing].per_row);
                reserve(experts.operands, experts.input.width());
                reserve(experts.down_operands, experts.spec.hidden);
            }
            _ => {}
        }
    }
    (activations, groups)
}

fn makes_logits(stage: &Stage) -> bool {
    matches!(stage, Stage::Logits(_))
}

/// Memory for every routing, and for a router's logits and ranks.
fn routings(program: &Program, rows_max: usize) -> (Vec<ChosenExperts>, Vec<f32>) {
    let mut routings: Vec<ChosenExperts> =
        (0..program.routings).map(|_| ChosenExperts::default()).collect();
    let mut router = 0;
    for op in &program.ops {
        if let Op::Route { spec, out, .. } = op {
            let pairs = rows_max * spec.experts_per_token;
            routings[out.0 as usize] = ChosenExperts {
                per_row: spec.experts_per_token,
                experts: vec![0; pairs],
                weights: vec![0.0; pairs],
            };
            router = router.max((rows_max + 1) * spec.experts);
        }
    }
    (routings, vec![0.0; router])
}

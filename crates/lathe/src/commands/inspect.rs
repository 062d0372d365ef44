//! `lathe inspect`: what a model is, the memory that it needs, and the least cost of a step on this
//! machine.

use std::path::Path;

use anyhow::Error;
use lathe_engine::score::Feed;
use lathe_model::adapter::Adapter;
use lathe_model::spec::ParameterCount;
use lathe_model::{DecoderSpec, Model};
use lathe_program::cost::{Bound, Cost, SequenceShape, StepShape, count};
use lathe_program::{Backend, KvFormat, Program};
use lathe_session::measure::experts::{self, ExpertTap, LayerLoad};
use lathe_session::measure::roofs::Roofs;
use lathe_session::measure::shape::Shape;
use lathe_session::{
    Need, Ranks, SessionError, backend, describe_adapter, encode_text, human_bytes, largest,
    memory, prepare_program, program_for, tokenizer_of,
};
use serde::Serialize;

use super::score::read_text;
use crate::arguments::{Global, InspectArguments};
use crate::commands::inspect_parallel::{self, Subject};
use crate::find::describe_shape;
use crate::output::{InputContext, bad_input, human_count, print, print_json};

#[derive(Serialize)]
struct InspectReport<'a> {
    model: &'a str,
    spec: &'a DecoderSpec,
    parameters: u64,
    active_parameters: u64,
    format: String,
    weight_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<AdapterReport<'a>>,
    kv_format: &'static str,
    kv_bytes_per_token: usize,
    kv_formats: Vec<KvCost>,
    context: usize,
    batch: usize,
    prefill: Step,
    decode: Step,
    machine: Option<Roofs>,
    memory: Option<Fit>,
    #[serde(skip_serializing_if = "Option::is_none")]
    parallel: Option<inspect_parallel::ParallelReport>,
    /// The load of experts for the text of `--experts`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    experts: Vec<LayerLoad>,
}

/// The adapter. Its bytes count as weights.
#[derive(Serialize)]
struct AdapterReport<'a> {
    path: &'a Path,
    matrices: usize,
    bytes: u64,
    #[serde(skip)]
    line: String,
}

/// The cost of one step and its least time.
#[derive(Serialize)]
struct Step {
    /// Rows of the step.
    tokens: usize,
    #[serde(flatten)]
    cost: Cost,
    /// Bytes of weights and cache that move to and from memory.
    bytes: u64,
    /// FLOPs per byte.
    intensity: f64,
    /// The roof that limits the step.
    bound: Option<Bound>,
    floor_ms: Option<f64>,
}

/// The cache's size in one format, and what fits with it.
#[derive(Serialize)]
struct KvCost {
    format: &'static str,
    /// Bytes for one token in all layers, if each position is kept.
    bytes_per_token: usize,
    /// Bytes of one sequence that reaches the context. Layers with a window keep only the window.
    bytes_at_context: usize,
    longest_context: Option<usize>,
    largest_batch: Option<usize>,
}

/// The sizes that fit in memory.
#[derive(Serialize)]
struct Fit {
    bytes: u64,
    /// With the given batch. `None` if the weights alone do not fit.
    longest_context: Option<usize>,
    /// With the given context.
    largest_batch: Option<usize>,
}

pub(super) fn run(global: &Global, arguments: &InspectArguments) -> Result<(), Error> {
    let shape =
        describe_shape(&arguments.model, arguments.format.as_deref(), &global.open_options())?;
    let spec = shape.spec();
    let (context, batch) = (arguments.context, arguments.batch);
    if context == 0 || batch == 0 {
        return Err(bad_input("--context and --batch are at least 1"));
    }
    let backend = backend(global.options().device)?;
    let memory = match &arguments.memory {
        Some(text) => Some(memory::parse_bytes(text).ok_or_else(|| {
            bad_input(format!("--memory {text}: expected a number of bytes such as 16G"))
        })?),
        None => memory::available_bytes(&*backend),
    };
    let program = program_for(spec, context)?;
    let kv_format = global.options().cache_format(&*backend, &program);
    let sizes = shape.sizes(&program)?;
    let parameters = ParameterCount::of(spec, &program);
    let measure = || Roofs::measure(&global.options(), &sizes);
    let roofs = (!arguments.no_measure).then(measure).transpose()?.flatten();
    let weight_bytes = sizes.total(&program);
    let subject = Subject { program: &program, sizes: &sizes, kv_format, context };
    let parallel = arguments.ranks.report(&subject, roofs.as_ref())?;
    let experts = match &arguments.experts {
        Some(text) => expert_loads(&*backend, global, &shape, text)?,
        None => Vec::new(),
    };
    let cost = |shape| count(&program, &shape, &|weight| sizes.of(weight), kv_format).total;
    let prefill = cost(prefill_shape(batch, context));
    let decode = cost(StepShape::decode(batch, context - 1));
    let held = Held { program: &program, weight_bytes, memory, context_max: spec.context_max };
    let report = InspectReport {
        model: shape.name(),
        spec,
        parameters: parameters.total,
        active_parameters: parameters.active,
        format: sizes.formats(),
        weight_bytes,
        adapter: shape.model().and_then(|model| model.adapter.as_ref()).map(AdapterReport::of),
        kv_format: kv_format.name(),
        kv_bytes_per_token: program.kv.bytes_per_token(kv_format),
        kv_formats: KvFormat::ALL.map(|format| held.cost(format, batch, context)).into(),
        context,
        batch,
        prefill: Step::of(prefill, batch * context, roofs.as_ref()),
        decode: Step::of(decode, batch, roofs.as_ref()),
        machine: roofs,
        memory: memory.map(|bytes| {
            let KvCost { longest_context, largest_batch, .. } =
                held.cost(kv_format, batch, context);
            Fit { bytes, longest_context, largest_batch }
        }),
        parallel,
        experts,
    };
    if global.json { print_json(&report) } else { print(&describe(&report)) }
}

/// Runs `text`, or the file that it names, and counts the tokens of each expert.
fn expert_loads(
    backend: &dyn Backend,
    global: &Global,
    shape: &Shape,
    text: &str,
) -> Result<Vec<LayerLoad>, Error> {
    let model = shape.model().ok_or_else(|| {
        bad_input("--experts runs the model: there are no weights, or --format asks for others")
    })?;
    let tokens = expert_tokens(model, text)?;
    let need = Need { context: tokens.len(), sequences: 1, rows_max: None };
    let program = program_for(&model.spec, tokens.len())?;
    let mut tap = ExpertTap::new(&program)
        .ok_or_else(|| bad_input(format!("--experts: {} has no experts", model.name)))?;
    let weights = model.weights(&program).bad_input()?;
    let mut executor =
        prepare_program(backend, &program, &weights, &global.options(), need, Ranks::default())?;
    let feed = Feed::new(&*executor, &tokens, tokens.len());
    let mut feed = feed.map_err(SessionError::from)?;
    loop {
        let rows = feed.rows();
        if rows == 0 {
            return Ok(tap.loads());
        }
        feed.run(&mut *executor, rows).map_err(SessionError::from)?;
        if tap.read(&*executor).is_none() {
            return Err(bad_input("--experts: this device does not tell where tokens went"));
        }
    }
}

/// The token ids of a text, of a text file, or of a file with a JSON array of ids.
fn expert_tokens(model: &Model, text: &str) -> Result<Vec<u32>, Error> {
    let path = Path::new(text);
    let content = if path.is_file() { read_text(path)? } else { text.to_owned() };
    let tokens = match serde_json::from_str(&content) {
        Ok(ids) if path.is_file() => ids,
        _ => encode_text(tokenizer_of(model)?, &content)?,
    };
    match tokens.is_empty() {
        true => Err(bad_input("--experts: no tokens")),
        false => Ok(tokens),
    }
}

impl<'a> AdapterReport<'a> {
    fn of(adapter: &'a Adapter) -> Self {
        AdapterReport {
            path: adapter.path(),
            matrices: adapter.matrices().len(),
            bytes: adapter.bytes(),
            line: describe_adapter(adapter),
        }
    }
}

impl Step {
    fn of(cost: Cost, tokens: usize, roofs: Option<&Roofs>) -> Self {
        let bytes = cost.memory_bytes();
        let roofline = roofs.map(|roofs| roofs.over(&cost));
        Self {
            tokens,
            cost,
            bytes,
            intensity: cost.flops as f64 / bytes.max(1) as f64,
            bound: roofline.map(|roofline| roofline.bound),
            floor_ms: roofline.map(|roofline| roofline.floor_ms),
        }
    }
}

/// A step of all prompts, with logits for the last token of each.
fn prefill_shape(batch: usize, context: usize) -> StepShape {
    let sequences = vec![SequenceShape { cached: 0, rows: context }; batch];
    StepShape { sequences, logits_rows: batch, ..StepShape::prefill(0, context) }
}

/// The most sequences. Rows of a step are counted in 32 bits.
const BATCH_MAX: usize = 1 << 20;

/// Everything that the memory must hold.
struct Held<'a> {
    program: &'a Program,
    weight_bytes: u64,
    memory: Option<u64>,
    context_max: usize,
}

impl Held<'_> {
    /// Counts whole pages, and the worst position of a window in them. The engine's pool needs as
    /// much to run such a sequence row by row.
    fn cost(&self, format: KvFormat, batch: usize, context: usize) -> KvCost {
        let layout = &self.program.kv;
        let fits = |batch: usize, context: usize| {
            let cache = (layout.bytes_for(context, format) as u64).saturating_mul(batch as u64);
            self.memory.is_some_and(|memory| self.weight_bytes.saturating_add(cache) <= memory)
        };
        KvCost {
            format: format.name(),
            bytes_per_token: layout.bytes_per_token(format),
            bytes_at_context: layout.bytes_for(context, format),
            longest_context: largest(self.context_max, |context| fits(batch, context)),
            largest_batch: largest(BATCH_MAX, |batch| fits(batch, context)),
        }
    }
}

fn describe(report: &InspectReport) -> String {
    let spec = report.spec;
    let (kinds, which) = spec.layer_kinds();
    let mut text = format!(
        "{}: {} layers of {} kind{}, width {}, vocabulary {}, context {}\n\
         parameters  {} ({} active a token), {} in {}\n\
         KV cache    {} a token in {}\n",
        report.model,
        which.len(),
        kinds.len(),
        if kinds.len() == 1 { "" } else { "s" },
        spec.width,
        spec.vocabulary,
        spec.context_max,
        human_count(report.parameters as f64),
        human_count(report.active_parameters as f64),
        human_bytes(report.weight_bytes),
        report.format,
        human_bytes(report.kv_bytes_per_token as u64),
        report.kv_format,
    );
    if let Some(adapter) = &report.adapter {
        text.push_str(&format!("among these {}\n", adapter.line));
    }
    if let Some(roofs) = &report.machine {
        text.push_str(&format!(
            "machine     {} threads: read {:.1} GB/s, copy {:.1} GB/s, matmul {}FLOP/s in {}\n",
            roofs.threads,
            roofs.read_gb_s,
            roofs.copy_gb_s,
            human_count(roofs.matmul_gflop_s * 1e9),
            roofs.matmul_numbers,
        ));
    }
    for (name, step) in [("prefill", &report.prefill), ("decode", &report.decode)] {
        text.push_str(&format!(
            "{name:<11} {} tokens, batch {} at context {}: {}FLOP, {} (weights {}, KV {}), {:.1} FLOP/byte",
            step.tokens,
            report.batch,
            report.context,
            human_count(step.cost.flops as f64),
            human_bytes(step.bytes),
            human_bytes(step.cost.weight_bytes),
            human_bytes(step.cost.kv_read_bytes + step.cost.kv_write_bytes),
            step.intensity,
        ));
        if let (Some(bound), Some(floor_ms)) = (step.bound, step.floor_ms) {
            let bound = if bound == Bound::Compute { "compute" } else { "memory" };
            text.push_str(&format!(": {bound}-bound, at least {floor_ms:.3} ms"));
        }
        text.push('\n');
    }
    describe_formats(&mut text, report);
    if let Some(fit) = &report.memory {
        text.push_str(&format!(
            "in {}     longest context {} at batch {}, largest batch {} at context {}\n",
            human_bytes(fit.bytes),
            show(fit.longest_context),
            report.batch,
            show(fit.largest_batch),
            report.context,
        ));
    }
    text.push_str(&report.parallel.as_ref().map_or(String::new(), inspect_parallel::describe));
    if !report.experts.is_empty() {
        text.push_str(&experts::table(&report.experts));
    }
    text
}

/// One line for each cache format.
fn describe_formats(text: &mut String, report: &InspectReport) {
    text.push_str(&format!(
        "cache       bytes a token   a sequence of {:<8} longest context   largest batch\n",
        report.context
    ));
    for cost in &report.kv_formats {
        text.push_str(&format!(
            "  {:<9} {:>13}   {:>22} {:>15} {:>15}\n",
            cost.format,
            cost.bytes_per_token,
            human_bytes(cost.bytes_at_context as u64),
            show(cost.longest_context),
            show(cost.largest_batch),
        ));
    }
}

/// The number that fits, or a word for none.
fn show(count: Option<usize>) -> String {
    count.map_or("none".to_owned(), |n| n.to_string())
}

#[cfg(test)]
mod tests {
    use super::largest;

    #[test]
    fn largest_that_fits() {
        assert_eq!(largest(100, |n| n <= 37), Some(37));
        assert_eq!(largest(100, |_| true), Some(100));
        assert_eq!(largest(100, |_| false), None);
        assert_eq!(largest(1, |n| n == 1), Some(1));
    }
}

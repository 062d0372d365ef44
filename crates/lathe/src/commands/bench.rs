//! `lathe bench`: the speed of prefill and decoding, and how near it is to the limit of the memory.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Error;
use lathe_engine::{Engine, EngineConfig};
use lathe_program::cost::{RoutingLoad, StepShape, count};
use lathe_program::{Backend, KvFormat, Program};
use lathe_session::measure::experts::{self, ExpertTap, LayerLoad};
use lathe_session::measure::roofs::Roofs;
use lathe_session::measure::shape::{Shape, Sizes};
use lathe_session::measure::steps::{self, StepTime};
use lathe_session::measure::timing::{self, Timing, Workload, growth_exponent, median};
use lathe_session::{
    Need, Options, Ranks, SessionError, backend, check_memory, human_bytes, memory, milliseconds,
    prepare_program, program_for,
};
use serde::Serialize;

use crate::arguments::{BenchArguments, Global, ParallelArguments};
use crate::find::{dummy_shape, open_shape};
use crate::output::{bad_input, print, print_json};
use crate::plot::{Curve, Mark, draw};

#[derive(Serialize)]
struct BenchReport {
    model: String,
    #[serde(flatten)]
    place: Place,
    format: String,
    prompt: usize,
    generate: usize,
    batch: usize,
    prefill_ms: f64,
    prefill_tokens_per_s: f64,
    step_ms: f64,
    decode_tokens_per_s: f64,
    /// Bytes of weights and cache that a step reads and writes, with the experts that were really
    /// chosen.
    bytes_per_step: u64,
    /// The expected bytes if each sequence's tokens choose experts as often as all tokens did,
    /// independently of other sequences.
    bytes_per_step_expected: u64,
    achieved_gb_s: f64,
    /// The measured read bandwidth of the memory. Null if it is not measured.
    measured_read_gb_s: Option<f64>,
    fraction_of_bandwidth: Option<f64>,
    load_ms: f64,
    peak_memory_bytes: Option<u64>,
    weight_bytes: usize,
    kv_bytes: usize,
    kv_format: &'static str,
    /// The load of experts in the timed decode steps.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    experts: Vec<LayerLoad>,
    #[serde(skip_serializing_if = "Option::is_none")]
    growth: Option<Growth>,
}

/// The device and its division.
#[derive(Serialize)]
struct Place {
    device: String,
    /// Threads of all ranks together.
    threads: usize,
    /// Ranks that the model is divided over. `ranks` has the same value.
    tensor_parallel: usize,
    /// Whether a rank has whole experts.
    expert_parallel: bool,
    ranks: usize,
}

/// The report of the first batch, with the other results that were asked for.
#[derive(Serialize)]
struct Whole<'a> {
    #[serde(flatten)]
    first: &'a BenchReport,
    #[serde(skip_serializing_if = "Option::is_none")]
    batches: Option<&'a [BenchReport]>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    steps: Vec<StepTime>,
}

/// The runs of one batch.
struct BatchRuns {
    workload: Workload,
    timings: Vec<Timing>,
    experts: Vec<LayerLoad>,
    growth: Option<Growth>,
}

/// A run with the cache next to one without.
#[derive(Serialize)]
struct Growth {
    /// Tokens generated so far.
    tokens: Vec<usize>,
    /// Milliseconds since the request, with the cache.
    cached_total_ms: Vec<f64>,
    /// Milliseconds since the request, with everything recomputed for each token.
    uncached_total_ms: Vec<f64>,
    /// Milliseconds of the step that made the token, with the cache.
    cached_step_ms: Vec<f64>,
    /// Milliseconds of the step that made the token, without the cache.
    uncached_step_ms: Vec<f64>,
    /// `e` of the best fit `total = constant * tokens^e` over the second half. 1 is linear growth.
    cached_exponent: f64,
    /// The same without the cache. 2 is quadratic growth.
    uncached_exponent: f64,
}

/// An engine to measure, with its load time.
struct Prepared {
    engine: Engine,
    load_ms: f64,
}

pub(super) fn run(global: &Global, arguments: &BenchArguments) -> Result<(), Error> {
    check(arguments)?;
    let shape = match arguments.dummy_weights {
        true => dummy_shape(&arguments.model, arguments.format.as_deref(), &global.open_options())?,
        false => open_shape(&arguments.model, &global.open_options())?,
    };
    let step_tokens = arguments.step_tokens.iter().copied().max().unwrap_or(0);
    let context = arguments.prompt + arguments.generate.max(step_tokens);
    let program = program_for(shape.spec(), context)?;
    let sequences = arguments.batch.iter().copied().max().unwrap_or(1);
    let need = Need { context, sequences, rows_max: None };
    let sizes = shape.sizes(&program)?;
    let (options, ranks) = (global.options(), arguments.parallel.ranks());
    let on = ranks.backend(options.device)?;
    let most = on.step_rows();
    if step_tokens > most {
        return Err(bad_input(format!("--step-tokens is {step_tokens}, expected at most {most}")));
    }
    check_memory(&*on, &program, sizes.total(&program), &options, need, ranks)?;
    let prepare = |kv_cache| prepare(&*on, &shape, &program, (options, ranks), need, kv_cache);
    let mut prepared = prepare(true)?;
    let mut runs = Vec::new();
    for &batch in &arguments.batch {
        runs.push(BatchRuns::measure(&mut prepared.engine, arguments, batch, arguments.repeat)?);
    }
    if arguments.no_kv_cache {
        let cached = runs.remove(0);
        drop(prepared);
        prepared = prepare(false)?;
        let mut run =
            BatchRuns::measure(&mut prepared.engine, arguments, cached.workload.batch, 1)?;
        run.growth = Some(Growth::of(&cached.timings[0], &run.timings[0]));
        runs.push(run);
    }
    let Prepared { engine, load_ms } = prepared;
    let mut executor = engine.into_executor();
    let steps = match arguments.step_tokens.as_slice() {
        [] => Vec::new(),
        sizes => steps::measure(&mut *executor, arguments.prompt, sizes)?,
    };
    let measured = Measured {
        device: backend(global.options().device)?.name(),
        parallel: arguments.parallel,
        weight_bytes: executor.weight_bytes(),
        kv_bytes: executor.kv_bytes(),
        kv_format: executor.kv_format(),
        load_ms,
        // Measuring the machine takes large buffers that are not the model's, so the peak is read
        // first.
        peak_memory_bytes: memory::peak_bytes(),
    };
    drop(executor);
    let roofs = Roofs::measure(&global.options(), &sizes)?;
    let report = |run| measured.report(&shape, &program, &sizes, roofs.as_ref(), run);
    let reports: Vec<BenchReport> = runs.into_iter().map(report).collect();
    let first = &reports[0];
    if let (Some(path), Some(growth)) = (&arguments.plot, &first.growth) {
        draw(path, &title(first), &growth.curves())?;
        say!("wrote {}", path.display());
    }
    let batches = (reports.len() > 1).then_some(reports.as_slice());
    if global.json {
        return print_json(&Whole { first, batches, steps });
    }
    let mut text: String = reports.iter().map(describe).collect();
    steps.iter().for_each(|step| text.push_str(&describe_step(step)));
    print(&text)
}

/// The data that all batches share.
struct Measured {
    device: &'static str,
    parallel: ParallelArguments,
    weight_bytes: usize,
    kv_bytes: usize,
    kv_format: KvFormat,
    load_ms: f64,
    peak_memory_bytes: Option<u64>,
}

impl Measured {
    fn report(
        &self,
        shape: &Shape,
        program: &Program,
        sizes: &Sizes,
        roofs: Option<&Roofs>,
        run: BatchRuns,
    ) -> BenchReport {
        let BatchRuns { workload, timings, experts, growth } = run;
        let Workload { prompt, generate, batch, .. } = workload;
        let steps: Vec<f64> = timings.iter().flat_map(|t| t.steps_ms.iter().copied()).collect();
        let prefills: Vec<f64> = timings.iter().map(|timing| timing.prefill_ms).collect();
        let (prefill_ms, step_ms) = (median(&prefills), median(&steps));
        let bytes = |routing| {
            let shape = StepShape { routing, ..StepShape::decode(batch, prompt + generate / 2) };
            let cost = count(program, &shape, &|weight| sizes.of(weight), self.kv_format);
            cost.total.memory_bytes()
        };
        let expected = bytes(experts::shares(program, &experts));
        let loads = timings.into_iter().flat_map(|timing| timing.loads);
        let real: Vec<u64> = loads.map(|load| bytes(RoutingLoad::Counted(load))).collect();
        let bytes_per_step = match real.len() as u64 {
            0 => expected,
            steps => real.iter().sum::<u64>() / steps,
        };
        let achieved_gb_s = bytes_per_step as f64 / step_ms / 1e6;
        BenchReport {
            model: shape.name().to_owned(),
            place: Place::of(self.device, roofs, self.parallel),
            format: sizes.formats(),
            prompt,
            generate,
            batch,
            prefill_ms,
            prefill_tokens_per_s: (prompt * batch) as f64 / prefill_ms * 1000.0,
            step_ms,
            decode_tokens_per_s: batch as f64 / step_ms * 1000.0,
            bytes_per_step,
            bytes_per_step_expected: expected,
            achieved_gb_s,
            measured_read_gb_s: roofs.map(|roofs| roofs.read_gb_s),
            fraction_of_bandwidth: roofs.map(|roofs| achieved_gb_s / roofs.read_gb_s),
            load_ms: self.load_ms,
            peak_memory_bytes: self.peak_memory_bytes,
            weight_bytes: self.weight_bytes,
            kv_bytes: self.kv_bytes,
            kv_format: self.kv_format.name(),
            experts,
            growth,
        }
    }
}

impl BatchRuns {
    /// Runs `batch` sequences `repeat` times, after a short warm-up run that does not count.
    fn measure(
        engine: &mut Engine,
        arguments: &BenchArguments,
        batch: usize,
        repeat: usize,
    ) -> Result<Self, Error> {
        let program = Arc::clone(engine.executor().program());
        let (prompt, generate) = (arguments.prompt, arguments.generate);
        let workload = Workload { prompt, generate, batch, vocabulary: program.vocabulary };
        let warm = Workload { prompt: prompt.min(16), generate: generate.min(4), ..workload };
        timing::run(engine, &warm, u64::MAX, None)?;
        let mut tap = ExpertTap::new(&program);
        let rounds = 0..repeat as u64;
        let timings = rounds.map(|round| timing::run(engine, &workload, round, tap.as_mut()));
        let timings = timings.collect::<Result<Vec<_>, SessionError>>()?;
        let experts = tap.map_or(Vec::new(), |tap| tap.loads());
        Ok(Self { workload, timings, experts, growth: None })
    }
}

/// An engine for one batch, with the load time of its model.
fn prepare(
    backend: &dyn Backend,
    shape: &Shape,
    program: &Arc<Program>,
    (options, ranks): (Options, Ranks),
    need: Need,
    kv_cache: bool,
) -> Result<Prepared, Error> {
    let start = Instant::now();
    let weights = shape.weights(program)?;
    let executor = prepare_program(backend, program, &*weights, &options, need, ranks)?;
    let config = EngineConfig {
        sequences_max: need.sequences,
        prefix_cache: false,
        kv_cache,
        ..EngineConfig::default()
    };
    let load_ms = milliseconds(start);
    Ok(Prepared { engine: Engine::new(executor, config)?, load_ms })
}

fn check(arguments: &BenchArguments) -> Result<(), Error> {
    let mut counts = vec![
        ("--prompt", arguments.prompt, 1),
        ("--generate", arguments.generate, 2),
        ("--repeat", arguments.repeat, 1),
    ];
    counts.extend(arguments.batch.iter().map(|&batch| ("--batch", batch, 1)));
    counts.extend(arguments.step_tokens.iter().map(|&tokens| ("--step-tokens", tokens, 1)));
    for (name, found, expected) in counts {
        if found < expected {
            return Err(bad_input(format!("{name} is {found}, expected at least {expected}")));
        }
    }
    if arguments.no_kv_cache && arguments.batch.len() > 1 {
        return Err(bad_input("--no-kv-cache compares one --batch, not a list"));
    }
    Ok(())
}

impl Place {
    fn of(device: &str, roofs: Option<&Roofs>, parallel: ParallelArguments) -> Self {
        Self {
            device: device.to_owned(),
            // One thread drives a GPU.
            threads: roofs.map_or(1, |roofs| roofs.threads),
            tensor_parallel: parallel.tensor_parallel.get(),
            expert_parallel: parallel.expert_parallel,
            ranks: parallel.tensor_parallel.get(),
        }
    }

    fn describe(&self) -> String {
        let ranks = match self.ranks {
            1 => String::new(),
            ranks => format!(" over {ranks} ranks"),
        };
        format!("{} with {} threads{ranks}", self.device, self.threads)
    }
}

impl Growth {
    fn of(cached: &Timing, uncached: &Timing) -> Self {
        let totals = |timing: &Timing| {
            let mut total = timing.prefill_ms;
            let steps = timing.steps_ms.iter().map(|step| {
                total += step;
                total
            });
            std::iter::once(timing.prefill_ms).chain(steps).collect::<Vec<f64>>()
        };
        let steps = |timing: &Timing| {
            std::iter::once(timing.prefill_ms).chain(timing.steps_ms.iter().copied()).collect()
        };
        let (cached_total_ms, uncached_total_ms) = (totals(cached), totals(uncached));
        let tokens: Vec<usize> = (1..=cached_total_ms.len()).collect();
        let exponent = |times: &[f64]| {
            let half = times.len() / 2;
            let counts: Vec<f64> = tokens[half..].iter().map(|&n| n as f64).collect();
            growth_exponent(&counts, &times[half..])
        };
        Self {
            cached_exponent: exponent(&cached_total_ms),
            uncached_exponent: exponent(&uncached_total_ms),
            cached_step_ms: steps(cached),
            uncached_step_ms: steps(uncached),
            tokens,
            cached_total_ms,
            uncached_total_ms,
        }
    }

    fn curves(&self) -> [Curve<'static>; 2] {
        let points = |times: &[f64]| {
            self.tokens.iter().zip(times).map(|(&n, ms)| (n as f64, ms / 1000.0)).collect()
        };
        [
            Curve {
                name: "with the KV cache",
                points: points(&self.cached_total_ms),
                mark: Mark::Line,
            },
            Curve {
                name: "without (--no-kv-cache)",
                points: points(&self.uncached_total_ms),
                mark: Mark::Line,
            },
        ]
    }

    /// The curves as a few lines of text.
    fn table(&self) -> String {
        let mut text =
            String::from("tokens   step ms: cached  uncached   total s: cached  uncached\n");
        let count = self.tokens.len();
        for part in 1..=8 {
            let index = (count * part / 8).saturating_sub(1);
            text.push_str(&format!(
                "{:>6} {:>16.2} {:>9.2} {:>17.3} {:>9.3}\n",
                self.tokens[index],
                self.cached_step_ms[index],
                self.uncached_step_ms[index],
                self.cached_total_ms[index] / 1000.0,
                self.uncached_total_ms[index] / 1000.0
            ));
        }
        text.push_str(&format!(
            "total time grows as tokens^{:.2} with the cache, tokens^{:.2} without\n",
            self.cached_exponent, self.uncached_exponent
        ));
        text
    }
}

fn title(report: &BenchReport) -> String {
    format!("{}: time to generate, with and without a KV cache", report.model)
}

fn describe_step(step: &StepTime) -> String {
    let StepTime { tokens, step_ms, relative_to_one } = step;
    format!("step of {tokens:>3} tokens: {step_ms:.3} ms, {relative_to_one:.2} of a step of one\n")
}

fn describe(report: &BenchReport) -> String {
    let measured = report.measured_read_gb_s.zip(report.fraction_of_bandwidth);
    let of_measured = measured.map_or_else(String::new, |(read_gb_s, fraction)| {
        format!(" of {read_gb_s:.1} GB/s measured: {:.0} %", fraction * 100.0)
    });
    let mut text = format!(
        "{} {} on {}, batch {}\n\
         prefill  {} tokens a prompt: {:.1} ms, {:.0} tokens/s\n\
         decode   {:.3} ms a step, {:.1} tokens/s\n\
         memory   {} a step, {:.1} GB/s{}\n\
         loaded in {:.0} ms, weights {}, KV cache {}\n",
        report.model,
        report.format,
        report.place.describe(),
        report.batch,
        report.prompt,
        report.prefill_ms,
        report.prefill_tokens_per_s,
        report.step_ms,
        report.decode_tokens_per_s,
        human_bytes(report.bytes_per_step),
        report.achieved_gb_s,
        of_measured,
        report.load_ms,
        human_bytes(report.weight_bytes as u64),
        human_bytes(report.kv_bytes as u64),
    );
    if let Some(peak) = report.peak_memory_bytes {
        text.push_str(&format!("peak memory {}\n", human_bytes(peak)));
    }
    if !report.experts.is_empty() {
        let expected = human_bytes(report.bytes_per_step_expected);
        text.push_str(&format!("independent sequences would read {expected} a step\n"));
        text.push_str(&experts::table(&report.experts));
    }
    if let Some(growth) = &report.growth {
        text.push_str(&growth.table());
    }
    text
}

//! `lathe bench`: how fast prefill and decoding are, and how near to what the memory allows.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Error;
use lathe_engine::{Engine, EngineConfig};
use lathe_program::Program;
use lathe_program::cost::{StepShape, count};
use serde::Serialize;

use crate::arguments::{BenchArguments, Global};
use crate::measure::{self, Timing, Workload, growth_exponent, median};
use crate::memory;
use crate::output::{bad_input, human_bytes, print, print_json};
use crate::plot::{Curve, draw};
use crate::roofs::Roofs;
use crate::session::{self, Need, ROWS_MAX, milliseconds};
use crate::shape::Shape;

#[derive(Serialize)]
struct Report {
    model: String,
    device: String,
    threads: usize,
    format: String,
    prompt: usize,
    generate: usize,
    batch: usize,
    prefill_ms: f64,
    prefill_tokens_per_s: f64,
    step_ms: f64,
    decode_tokens_per_s: f64,
    bytes_per_step: u64,
    achieved_gb_s: f64,
    measured_read_gb_s: f64,
    fraction_of_bandwidth: f64,
    load_ms: f64,
    peak_memory_bytes: Option<u64>,
    weight_bytes: usize,
    kv_bytes: usize,
    kv_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    growth: Option<Growth>,
}

/// A run with the cache next to one without.
#[derive(Serialize)]
struct Growth {
    /// Tokens generated so far.
    tokens: Vec<usize>,
    /// Time since the request, with the cache.
    cached_total_ms: Vec<f64>,
    /// Time since the request, everything computed again for each token.
    uncached_total_ms: Vec<f64>,
    /// Time of the step that made the token.
    cached_step_ms: Vec<f64>,
    /// Time of the step that made the token.
    uncached_step_ms: Vec<f64>,
    /// `e` of the best `total = constant * tokens^e` over the second half: 1 is linear growth.
    cached_exponent: f64,
    /// The same; 2 is quadratic growth.
    uncached_exponent: f64,
}

/// An engine to measure, and what it took to get it.
struct Prepared {
    engine: Engine,
    load_ms: f64,
}

/// Measures.
pub fn run(global: &Global, arguments: &BenchArguments) -> Result<(), Error> {
    check(arguments)?;
    let shape = match arguments.dummy_weights {
        true => Shape::dummy(&arguments.model, arguments.format.as_deref())?,
        false => Shape::open(&arguments.model)?,
    };
    let context = arguments.prompt + arguments.generate;
    let program = session::program_for(shape.spec(), context)?;
    let workload = Workload {
        prompt: arguments.prompt,
        generate: arguments.generate,
        batch: arguments.batch,
        vocabulary: program.vocabulary,
    };
    let need = Need { context, sequences: arguments.batch, rows_max: ROWS_MAX };
    let sizes = shape.sizes(&program)?;
    session::check_memory(&program, sizes.total(&program), global, need)?;
    let prepare = |kv_cache| prepare(&shape, &program, global, need, kv_cache);
    let mut prepared = prepare(true)?;
    let mut timings = measured(&mut prepared.engine, &workload, arguments.repeat)?;
    let mut growth = None;
    if arguments.no_kv_cache {
        let cached = timings.swap_remove(0);
        drop(prepared);
        prepared = prepare(false)?;
        timings = measured(&mut prepared.engine, &workload, 1)?;
        growth = Some(Growth::of(&cached, &timings[0]));
    }
    let Prepared { engine, load_ms } = prepared;
    let (weight_bytes, kv_bytes) = (engine.executor().weight_bytes(), engine.executor().kv_bytes());
    let kv_format = engine.executor().kv_format();
    // Measuring the machine takes large buffers, which are not the model's.
    let peak_memory_bytes = memory::peak_bytes();
    drop(engine);
    let roofs = Roofs::measure(global, &sizes)?;
    let middle = StepShape::decode(arguments.batch, arguments.prompt + arguments.generate / 2);
    let cost = count(&program, &middle, &|weight| sizes.of(weight), kv_format).total;
    let steps: Vec<f64> = timings.iter().flat_map(|t| t.steps_ms.iter().copied()).collect();
    let prefills: Vec<f64> = timings.iter().map(|timing| timing.prefill_ms).collect();
    let (prefill_ms, step_ms) = (median(&prefills), median(&steps));
    let achieved_gb_s = cost.memory_bytes() as f64 / step_ms / 1e6;
    let report = Report {
        model: shape.name().to_owned(),
        device: session::backend(global.device)?.name().to_owned(),
        threads: roofs.threads,
        format: sizes.formats(),
        prompt: arguments.prompt,
        generate: arguments.generate,
        batch: arguments.batch,
        prefill_ms,
        prefill_tokens_per_s: (arguments.prompt * arguments.batch) as f64 / prefill_ms * 1000.0,
        step_ms,
        decode_tokens_per_s: arguments.batch as f64 / step_ms * 1000.0,
        bytes_per_step: cost.memory_bytes(),
        achieved_gb_s,
        measured_read_gb_s: roofs.read_gb_s,
        fraction_of_bandwidth: achieved_gb_s / roofs.read_gb_s,
        load_ms,
        peak_memory_bytes,
        weight_bytes,
        kv_bytes,
        kv_format: kv_format.name(),
        growth,
    };
    if let (Some(path), Some(growth)) = (&arguments.plot, &report.growth) {
        draw(path, &title(&report), &growth.curves())?;
        eprintln!("wrote {}", path.display());
    }
    if global.json { print_json(&report) } else { print(&describe(&report)) }
}

/// An engine for one batch, and how long its model took to load.
fn prepare(
    shape: &Shape,
    program: &Arc<Program>,
    global: &Global,
    need: Need,
    kv_cache: bool,
) -> Result<Prepared, Error> {
    let start = Instant::now();
    let weights = shape.weights(program)?;
    let (executor, options) = session::prepare_program(program, &*weights, global, need)?;
    let config = EngineConfig {
        rows_max: options.rows_max,
        sequences_max: need.sequences,
        kv_blocks: options.kv_blocks,
        prefix_cache: false,
        kv_cache,
        ..EngineConfig::default()
    };
    let load_ms = milliseconds(start);
    Ok(Prepared { engine: Engine::new(executor, config)?, load_ms })
}

fn check(arguments: &BenchArguments) -> Result<(), Error> {
    let counts = [
        ("--prompt", arguments.prompt, 1),
        ("--generate", arguments.generate, 2),
        ("--batch", arguments.batch, 1),
        ("--repeat", arguments.repeat, 1),
    ];
    for (name, found, expected) in counts {
        if found < expected {
            return Err(bad_input(format!("{name} is {found}, expected at least {expected}")));
        }
    }
    Ok(())
}

/// Times of `repeat` runs, after a short one that is not counted.
fn measured(engine: &mut Engine, workload: &Workload, repeat: usize) -> Result<Vec<Timing>, Error> {
    let warm = Workload {
        prompt: workload.prompt.min(16),
        generate: workload.generate.min(4),
        ..*workload
    };
    measure::run(engine, &warm, u64::MAX)?;
    (0..repeat as u64).map(|round| measure::run(engine, workload, round)).collect()
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
            Curve { name: "with the KV cache", points: points(&self.cached_total_ms) },
            Curve { name: "without (--no-kv-cache)", points: points(&self.uncached_total_ms) },
        ]
    }

    /// A few lines of the curves.
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

fn title(report: &Report) -> String {
    format!("{}: time to generate, with and without a KV cache", report.model)
}

fn describe(report: &Report) -> String {
    let mut text = format!(
        "{} {} on {} with {} threads, batch {}\n\
         prefill  {} tokens a prompt: {:.1} ms, {:.0} tokens/s\n\
         decode   {:.3} ms a step, {:.1} tokens/s\n\
         memory   {} a step, {:.1} GB/s of {:.1} GB/s measured: {:.0} %\n\
         loaded in {:.0} ms, weights {}, KV cache {}\n",
        report.model,
        report.format,
        report.device,
        report.threads,
        report.batch,
        report.prompt,
        report.prefill_ms,
        report.prefill_tokens_per_s,
        report.step_ms,
        report.decode_tokens_per_s,
        human_bytes(report.bytes_per_step),
        report.achieved_gb_s,
        report.measured_read_gb_s,
        report.fraction_of_bandwidth * 100.0,
        report.load_ms,
        human_bytes(report.weight_bytes as u64),
        human_bytes(report.kv_bytes as u64),
    );
    if let Some(peak) = report.peak_memory_bytes {
        text.push_str(&format!("peak memory {}\n", human_bytes(peak)));
    }
    if let Some(growth) = &report.growth {
        text.push_str(&growth.table());
    }
    text
}

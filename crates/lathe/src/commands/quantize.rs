//! `lathe quantize`: a model in fewer bits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error};
use clap::Args;
use lathe_cpu::pack::PackedMatrix;
use lathe_model::export::{
    ExportError, GgufOptions, PackedLayout, Replacement, ReplacementError, to_gguf_replacing,
    to_packed,
};
use lathe_program::{BackendError, Program, Weight};
use lathe_quant::calibrate::Calibration;
use lathe_quant::inputs::with_inputs;
use lathe_quant::job::{self, CoverageReport, Job, PreparedReport, WeightReport};
use lathe_quant::recipe::{Prefix, Recipe, activations_named, activations_of, format_named};
use lathe_quant::{QuantError, technique};
use lathe_tensor::packed::can_pack;
use lathe_tensor::{Format, GgmlType, Tensor};
use serde::Serialize;

use super::score::read_text;
use crate::arguments::{Device, Global};
use crate::output::{InputContext, bad_input, human_bytes, print, print_json};
use crate::prompt::encode_text;
use crate::session::{self, Opened, bytes_under, milliseconds};

/// Tokens of calibration that see one another.
const WINDOW: usize = 512;
/// Tokens of calibration if the caller does not say.
const CALIBRATION_TOKENS: usize = 16 * 1024;

#[derive(Debug, Args)]
#[command(after_help = technique::help())]
pub struct QuantizeArguments {
    /// Folder of plain floats, .gguf file, catalogue name or Hub id
    pub model: String,
    /// A folder (compressed-tensors pack-quantized) or a .gguf file; must not exist
    pub out: PathBuf,
    /// A TOML file that lists techniques, their parameters and the tensors that they are for
    #[arg(long, value_name = "FILE", required_unless_present = "format",
          conflicts_with_all = ["format", "method"])]
    pub recipe: Option<PathBuf>,
    /// w4a16, w8a16, q4_0, q8_0, q4_k, ... or a format's own name such as int4-g64-bf16-asym
    #[arg(long, value_name = "F")]
    pub format: Option<String>,
    /// Techniques joined by +: rtn, clip, gptq, awq, awq+gptq, imatrix
    #[arg(long, value_name = "M", default_value = "rtn")]
    pub method: String,
    /// A text, or a JSON array of token ids, on which inputs of layers are measured
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Tokens of it to use at most, from its start, in windows of 512
    #[arg(long, value_name = "N", default_value_t = CALIBRATION_TOKENS, requires = "calibration")]
    pub calibration_tokens: usize,
    /// What inputs of quantized matrices are rounded to while the model runs: int4-token,
    /// int8-token, fp8-token, mxfp8, mxfp4 or nvfp4
    #[arg(long, value_name = "F", conflicts_with = "recipe")]
    pub activations: Option<String>,
    /// Write the floats that codes stand for: to measure formats that have no file of their own
    #[arg(long)]
    pub dense: bool,
    /// Weights that share a scale, in place of the format's own number
    #[arg(long, value_name = "N")]
    pub group: Option<u32>,
}

/// What is printed, and recorded beside the weights.
#[derive(Serialize)]
struct Provenance<'a> {
    model: &'a str,
    path: &'a Path,
    layout: &'static str,
    format: String,
    bytes: u64,
    calibration_tokens: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    calibration: Option<&'a Path>,
    quantize_ms: f64,
    lathe: &'static str,
    recipe: String,
    prepared: Vec<PreparedReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    expert_tokens: Vec<CoverageReport>,
    tensors: Vec<WeightReport>,
}

/// Quantizes.
pub fn run(global: &Global, arguments: &QuantizeArguments) -> Result<(), Error> {
    let out = &arguments.out;
    if out.exists() {
        return Err(bad_input(format!("{}: it exists already", out.display())));
    }
    let recipe = recipe(arguments)?;
    let to_file = out.extension().is_some_and(|kind| kind == "gguf");
    check_layout(&recipe, to_file, out, arguments.dense)?;
    let mut opened = session::open(&arguments.model)?;
    opened.model.spec = quantized(with_inputs(&opened.model.spec, &recipe))?;
    let model = &opened.model;
    let program = session::program_for(&model.spec, model.spec.context_max)?;
    let weights = model.weights(&program).bad_input()?;
    let layout = match to_file {
        true => None,
        false => Some(PackedLayout::new(model, &weights).bad_input()?),
    };
    check_targets(&program, &recipe, layout.as_ref())?;
    if to_file && !model.spec.inputs.is_empty() {
        return Err(bad_input("a GGUF file cannot say what is done to inputs, expected a folder"));
    }
    // Dense matrices run everywhere; calibration runs through codes unless the prefix is float.
    if !arguments.dense || (recipe.needs_calibration() && recipe.prefix == Prefix::Quantized) {
        check_device(global.device, &program, &recipe)?;
    }
    let tokens = calibration_tokens(arguments, &opened, &recipe)?;

    let mut meter = Meter::new();
    let progress = |now: job::Progress| meter.tell(now.done, now.total);
    let mut job = quantized(Job::new(&weights, &recipe, tokens.is_some(), progress))?;
    eprintln!("quantizing to {}", recipe.format);
    if let Some(tokens) = &tokens {
        let backend = session::backend(global.device)?;
        let calibration = Calibration {
            backend: &*backend,
            tokens,
            window: WINDOW,
            threads: global.threads.map(usize::from),
            exact: global.exact,
            kv_format: global.kv_format,
        };
        quantized(job.calibrate(&model.spec, &calibration))?;
    }
    match &layout {
        Some(layout) if arguments.dense => {
            write_folder(layout, out, &mut Dense(&mut job), &recipe)?;
        }
        Some(layout) => write_folder(layout, out, &mut job, &recipe)?,
        None => exported(to_gguf_replacing(model, out, &gguf_options(&recipe), &mut job))?,
    }
    let report = Provenance {
        model: &model.name,
        path: out,
        layout: if to_file { "gguf" } else { "compressed-tensors" },
        format: recipe.format.to_string(),
        bytes: bytes_under(out),
        calibration_tokens: tokens.as_ref().map_or(0, Vec::len),
        calibration: arguments.calibration.as_deref().filter(|_| tokens.is_some()),
        quantize_ms: milliseconds(opened.started),
        lathe: env!("CARGO_PKG_VERSION"),
        recipe: recipe.to_toml(),
        prepared: std::mem::take(&mut job.prepared),
        expert_tokens: std::mem::take(&mut job.coverage),
        tensors: std::mem::take(&mut job.reports),
    };
    record(&report, out, to_file)?;
    if global.json { print_json(&report) } else { print(&describe(&report)) }
}

fn recipe(arguments: &QuantizeArguments) -> Result<Recipe, Error> {
    if let Some(path) = &arguments.recipe {
        return Recipe::parse(&read_text(path)?, arguments.group).bad_input_in(path.display());
    }
    let name = arguments.format.as_deref().unwrap_or_default();
    let format = format_named(name, arguments.group).bad_input()?;
    let activations = arguments.activations.as_deref().map(activations_named).transpose();
    let activations = activations.bad_input()?.or(activations_of(name));
    let recipe = Recipe::simple(format, &arguments.method).bad_input()?;
    recipe.with_activations(activations).bad_input()
}

/// Which files can hold which formats.
fn check_layout(recipe: &Recipe, to_file: bool, out: &Path, dense: bool) -> Result<(), Error> {
    let (format, out) = (recipe.format, out.display());
    match (format, to_file) {
        (_, true) if dense => Err(bad_input(format!("{out}: --dense writes a folder"))),
        (Format::Scaled(_), false) if dense => Ok(()),
        (Format::Ggml(_), true) => Ok(()),
        (Format::Scaled(scaled), false) if can_pack(&scaled) => Ok(()),
        (Format::Ggml(_), false) => {
            Err(bad_input(format!("{out}: {format} is a format of GGUF, expected a name in .gguf")))
        }
        (_, true) => Err(bad_input(format!(
            "{out}: {format} is none of GGUF's formats, expected one such as q4_0 or q4_k"
        ))),
        _ => Err(bad_input(format!(
            "{format} cannot be written yet, expected int4 or int8 with a scale a group or a row, \
             or a format of GGUF"
        ))),
    }
}

/// Refuses tensors that the layout cannot replace before anything is computed.
fn check_targets(
    program: &Program,
    recipe: &Recipe,
    layout: Option<&PackedLayout<'_>>,
) -> Result<(), Error> {
    let targets = job::targets(program, recipe).bad_input()?;
    let cannot =
        |weight: &&lathe_program::Weight| layout.is_some_and(|it| !it.can_replace(**weight));
    match targets.keys().find(cannot) {
        None => Ok(()),
        Some(weight) => Err(bad_input(format!(
            "tensor {} is part of a larger tensor of the file, which pack-quantized cannot replace; \
             a recipe can `keep` it",
            program.weight(*weight).name
        ))),
    }
}

/// Refuses what the device could not run afterwards; the reference runs every format.
fn check_device(device: Device, program: &Program, recipe: &Recipe) -> Result<(), Error> {
    if device == Device::Reference {
        return Ok(());
    }
    for weight in job::targets(program, recipe).bad_input()?.keys() {
        let decl = program.weight(*weight);
        let columns = decl.shape.last().copied().unwrap_or(1);
        PackedMatrix::check(recipe.format, columns).bad_input_in(format!(
            "tensor {} could only be run, and quantized, with --device reference",
            decl.name
        ))?;
    }
    Ok(())
}

/// The text that layers are to see, if the recipe needs one.
fn calibration_tokens(
    arguments: &QuantizeArguments,
    opened: &Opened,
    recipe: &Recipe,
) -> Result<Option<Vec<u32>>, Error> {
    let path = match &arguments.calibration {
        Some(path) => path,
        None if recipe.needs_calibration() => {
            return Err(bad_input("this recipe needs --calibration FILE (a text or token ids)"));
        }
        None => return Ok(None),
    };
    let text = read_text(path)?;
    let mut tokens = match text.trim_start().starts_with('[') {
        true => serde_json::from_str::<Vec<u32>>(&text).bad_input_in(path.display())?,
        false => encode_text(opened.tokenizer()?, &text)?,
    };
    tokens.truncate(arguments.calibration_tokens);
    Ok(Some(tokens))
}

/// Embedding and head stay in 8 bits: they are rounded without a technique.
fn gguf_options(recipe: &Recipe) -> GgufOptions {
    let embedding = Some(Format::Ggml(GgmlType::Q8_0));
    GgufOptions { format: recipe.format, embedding }
}

/// The floats that a job's codes stand for.
struct Dense<'a, 'b>(&'a mut Job<'b>);

impl Replacement for Dense<'_, '_> {
    fn format(&self, weight: Weight) -> Option<Format> {
        let format = self.0.format(weight)?;
        // Products of a code and its scales have more digits than bf16.
        Some(if matches!(format, Format::Float(_)) { format } else { Format::F32 })
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        let tensor = self.0.tensor(weight)?;
        if matches!(tensor.format, Format::Float(_)) {
            return Ok(tensor);
        }
        Ok(Tensor::from_f32_vec(tensor.shape.clone(), tensor.to_f32()))
    }
}

/// Writes under a temporary name, so that a folder under its own name is always whole.
fn write_folder(
    layout: &PackedLayout<'_>,
    out: &Path,
    job: &mut dyn Replacement,
    recipe: &Recipe,
) -> Result<(), Error> {
    let mut partial = out.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let _ = fs::remove_dir_all(&partial);
    let written = exported(to_packed(layout, &partial, job)).and_then(|()| {
        let path = partial.join("recipe.toml");
        fs::write(&path, recipe.to_toml()).with_context(|| path.display().to_string())
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    written?;
    fs::rename(&partial, out).with_context(|| out.display().to_string())
}

/// What was done, beside the weights: never in `config.json`.
fn record(report: &Provenance<'_>, out: &Path, to_file: bool) -> Result<(), Error> {
    let beside = |name: &str| match to_file {
        true => out.with_extension(name),
        false => out.join(name),
    };
    let write = |path: PathBuf, text: String| {
        fs::write(&path, text).with_context(|| path.display().to_string())
    };
    if to_file {
        write(beside("recipe.toml"), report.recipe.clone())?;
    }
    let text = serde_json::to_string_pretty(report)? + "\n";
    write(beside("provenance.json"), text)
}

fn describe(report: &Provenance<'_>) -> String {
    let count = report.tensors.len();
    let mean = |of: fn(&WeightReport) -> Option<f64>| {
        let values: Vec<f64> = report.tensors.iter().filter_map(of).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let mut text = format!(
        "{}: {} in {:.1} s, {count} matrices in {}",
        report.path.display(),
        human_bytes(report.bytes),
        report.quantize_ms / 1000.0,
        report.format
    );
    if let Some(db) = mean(|it| Some(it.report.sqnr_db)) {
        text.push_str(&format!(", {db:.2} dB of signal over noise"));
    }
    if let Some(error) = mean(|it| it.report.output_error) {
        text.push_str(&format!(", outputs off by {:.3} %", error * 100.0));
    }
    let unseen = |it: &CoverageReport| it.tokens.iter().filter(|tokens| **tokens == 0).count();
    let unseen: usize = report.expert_tokens.iter().map(unseen).sum();
    if unseen > 0 {
        text.push_str(&format!(", {unseen} experts that no router chose"));
    }
    text + "\n"
}

/// What is wrong with recipes, shapes and tokens is the caller's mistake; a device that fails is
/// not.
fn quantized<T>(result: Result<T, QuantError>) -> Result<T, Error> {
    match result {
        Err(error @ QuantError::Backend(BackendError::Unsupported { .. })) => {
            Err(error).bad_input_in("calibration")
        }
        Err(error @ QuantError::Backend(_)) => Err(error.into()),
        other => other.bad_input(),
    }
}

/// What the target cannot hold is the caller's mistake; a disk that fails is not.
fn exported(result: Result<(), ExportError>) -> Result<(), Error> {
    match result {
        Err(error @ ExportError::Io { .. }) => Err(error.into()),
        other => other.bad_input(),
    }
}

/// Says on stderr how far it is and how long the rest may take.
struct Meter {
    start: Instant,
    told: Instant,
}

impl Meter {
    fn new() -> Self {
        let now = Instant::now();
        Meter { start: now, told: now }
    }

    fn tell(&mut self, done: usize, total: usize) {
        if self.told.elapsed() < Duration::from_secs(5) && done < total {
            return;
        }
        self.told = Instant::now();
        let share = done as f64 / total.max(1) as f64;
        let spent = self.start.elapsed().as_secs_f64();
        let left = spent / share.max(1e-9) - spent;
        eprintln!("{:.0} %, {spent:.0} s, about {left:.0} s left", share * 100.0);
    }
}

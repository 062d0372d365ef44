//! `lathe quantize`: a model in fewer bits.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Error};
use lathe_model::Model;
use lathe_model::adapter::OWN_FOLDER;
use lathe_model::export::{
    ExportError, GgufOptions, Integers, LowRank, PackedLayout, to_adapter, to_gguf_replacing,
    to_packed,
};
use lathe_model::spec::DecoderSpec;
use lathe_model::weights::ModelWeights;
use lathe_program::{Backend, BackendError, Program, Weight};
use lathe_quant::budget::planned;
use lathe_quant::calibrate::Calibration;
use lathe_quant::explain::Explanation;
use lathe_quant::inputs::with_inputs;
use lathe_quant::job::{self, CoverageReport, Job, PreparedReport, WeightReport};
use lathe_quant::recipe::{Recipe, activations_named, activations_of, format_named};
use lathe_quant::targets::targets;
use lathe_quant::{Correction, QuantError};
use lathe_session::{
    Opened, backend, bytes_under, check_format, encode_text, human_bytes, milliseconds, program_for,
};
use lathe_tensor::{ActivationFormat, Format, GgmlType};
use serde::Serialize;

use super::score::read_text;
use crate::arguments::{Device, EXPLAIN_TOKENS, Global, QuantizeArguments};
use crate::explanation;
use crate::find::open;
use crate::output::{InputContext, bad_input, print, print_json};

/// Tokens of calibration that see one another.
const WINDOW: usize = 512;

/// What is printed, and recorded beside the weights.
#[derive(Serialize)]
struct Provenance<'a> {
    model: &'a str,
    path: &'a Path,
    layout: &'static str,
    format: String,
    bytes: u64,
    calibration_tokens: usize,
    /// Of the weights that are quantized: scales, and what corrects them, are counted.
    bits_per_weight: f64,
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

/// What is printed: with `--explain`, what was found too. Beside the weights that is a file of its
/// own.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    provenance: &'a Provenance<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<&'a Explanation>,
}

/// What OUT is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// compressed-tensors.
    Folder,
    /// GGUF.
    File,
    /// No weights: the report of `--explain`.
    Page,
}

impl Target {
    fn of(arguments: &QuantizeArguments) -> Result<Self, Error> {
        let extension = arguments.out.extension();
        if extension.is_some_and(|kind| kind == "html") {
            let alone =
                || bad_input(format!("{}: a report needs --explain", arguments.out.display()));
            return if arguments.explain { Ok(Target::Page) } else { Err(alone()) };
        }
        let gguf = extension.is_some_and(|kind| kind == "gguf");
        Ok(if gguf { Target::File } else { Target::Folder })
    }

    fn layout(self) -> &'static str {
        match self {
            Target::Folder => "compressed-tensors",
            Target::File => "gguf",
            Target::Page => "none",
        }
    }
}

/// Quantizes.
pub(super) fn run(global: &Global, arguments: &QuantizeArguments) -> Result<(), Error> {
    let out = &arguments.out;
    let target = Target::of(arguments)?;
    check_new(out, target)?;
    let recipe = recipe(arguments)?;
    check_layout(&recipe, target, out)?;
    let mut opened = open(&arguments.model, &global.open_options())?;
    opened.refuse_adapter("quantize")?;
    opened.model.spec = quantized(with_inputs(&opened.model.spec, &recipe))?;
    let model = &opened.model;
    let program = program_for(&model.spec, model.spec.context_max)?;
    let weights = model.weights(&program).bad_input()?;
    let layout = layout_of(target, &recipe, model, &weights)?;
    let recipe = if target == Target::File { with_fallbacks(&program, recipe)? } else { recipe };
    check_targets(&program, &recipe, layout.as_ref())?;
    if target == Target::File && !model.spec.inputs.is_empty() {
        return Err(bad_input("a GGUF file cannot say what is done to inputs, expected a folder"));
    }
    check_device(global.device, &program, &recipe)?;
    let text = read_tokens(arguments, &opened, &recipe)?;
    let backend = backend(global.device.into())?;
    let recipe = plan(
        &recipe,
        &weights,
        model,
        text.as_ref().map(|it| runs(global, &*backend, &it.calibration)),
    )?;

    let mut meter = Meter::new();
    let mut job = quantized(Job::new(&weights, &recipe, text.is_some(), |now| meter.tell(now)))?;
    eprintln!("quantizing to {}", formats(&recipe));
    let resume = beside(out, ".quantizing");
    if let Some(text) = &text {
        if resume.exists() {
            eprintln!("going on from {}", resume.display());
        }
        let calibration = runs(global, &*backend, &text.calibration);
        quantized(job.calibrate_resumable(&model.spec, &calibration, &resume))?;
    }
    let measured = text.as_ref().filter(|_| arguments.explain);
    let measured = measured.map(|text| runs(global, &*backend, &text.explain));
    let explanation = measured.map(|text| explain(&mut job, &model.spec, &text)).transpose()?;
    match (&layout, target) {
        (Some(layout), _) => write_folder(layout, &program, out, &mut job, &recipe)?,
        (None, Target::Page) => {}
        (None, _) => exported(to_gguf_replacing(model, out, &gguf_options(&recipe), &mut job))?,
    }
    if let Some(explanation) = &explanation {
        write_explanation(&model.name, explanation, out, target)?;
    }
    let report = Provenance {
        model: &model.name,
        path: out,
        layout: target.layout(),
        format: formats(&recipe),
        bytes: bytes_under(out),
        bits_per_weight: quantized(job.bits_per_weight())?,
        calibration_tokens: text.as_ref().map_or(0, |it| it.calibration.len()),
        calibration: arguments.calibration.as_deref().filter(|_| text.is_some()),
        quantize_ms: milliseconds(opened.started),
        lathe: env!("CARGO_PKG_VERSION"),
        recipe: recipe.to_toml(),
        prepared: std::mem::take(&mut job.prepared),
        expert_tokens: std::mem::take(&mut job.coverage),
        tensors: std::mem::take(&mut job.reports),
    };
    drop(job);
    finish(global, &report, explanation.as_ref(), target, &resume)
}

/// The layout of a folder, if one is to be written.
fn layout_of<'a>(
    target: Target,
    recipe: &Recipe,
    model: &'a Model,
    weights: &ModelWeights<'_>,
) -> Result<Option<PackedLayout<'a>>, Error> {
    if target != Target::Folder {
        return Ok(None);
    }
    // Products of 8-bit integers are what engines read bytes for.
    let integers = match recipe.activations {
        Some(ActivationFormat::Int8Token) => Integers::Bytes,
        _ => Integers::Words,
    };
    Ok(Some(PackedLayout::new(model, weights).bad_input()?.with_integers(integers)))
}

/// Records, removes what a later run would have gone on from, and says what was done.
fn finish(
    global: &Global,
    report: &Provenance<'_>,
    explanation: Option<&Explanation>,
    target: Target,
    resume: &Path,
) -> Result<(), Error> {
    if target != Target::Page {
        record(report, report.path, target == Target::File)?;
    }
    if resume.exists() {
        fs::remove_dir_all(resume).with_context(|| resume.display().to_string())?;
    }
    if global.json {
        return print_json(&Printed { provenance: report, explanation });
    }
    let found = explanation.map(explanation::table).unwrap_or_default();
    print(&(describe(report) + &found))
}

/// Nothing that exists is written over.
fn check_new(out: &Path, target: Target) -> Result<(), Error> {
    let numbers = (target == Target::Page).then(|| out.with_extension("json"));
    let exists = [Some(out.to_owned()), numbers].into_iter().flatten().find(|it| it.exists());
    match exists {
        Some(path) => Err(bad_input(format!("{}: it exists already", path.display()))),
        None => Ok(()),
    }
}

/// How a text is run.
fn runs<'a>(global: &Global, backend: &'a dyn Backend, tokens: &'a [u32]) -> Calibration<'a> {
    Calibration {
        backend,
        tokens,
        window: WINDOW,
        threads: global.threads.map(usize::from),
        exact: global.exact,
        kv_format: global.kv_format,
    }
}

/// The recipe with a format for each layer, if it has a budget.
fn plan(
    recipe: &Recipe,
    weights: &ModelWeights<'_>,
    model: &Model,
    text: Option<Calibration<'_>>,
) -> Result<Recipe, Error> {
    let Some(text) = text.filter(|_| recipe.budget.is_some()) else { return Ok(recipe.clone()) };
    let tokens = &text.tokens[..text.tokens.len().min(EXPLAIN_TOKENS)];
    eprintln!("measuring each layer in each format on {} tokens", tokens.len());
    let mut meter = Meter::new();
    let mut progress = |now| meter.tell(now);
    let text = Calibration { tokens, ..text };
    quantized(planned(weights, recipe, &model.spec, &text, &mut progress))
}

fn explain(
    job: &mut Job<'_>,
    spec: &DecoderSpec,
    text: &Calibration<'_>,
) -> Result<Explanation, Error> {
    eprintln!("measuring on {} tokens", text.tokens.len());
    let mut meter = Meter::new();
    quantized(job.explain(spec, text, &mut |now| meter.tell(now)))
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

/// Every format that a recipe may use, each once.
fn all_formats(recipe: &Recipe) -> Vec<Format> {
    let of_tensors = recipe.formats.iter().map(|(_, format)| *format);
    let of_budget = recipe.budget.iter().flat_map(|budget| &budget.formats).copied();
    let mut all: Vec<Format> =
        [recipe.format].into_iter().chain(of_tensors).chain(of_budget).collect();
    all.sort_unstable();
    all.dedup();
    all
}

fn formats(recipe: &Recipe) -> String {
    let names: Vec<String> = all_formats(recipe).iter().map(Format::to_string).collect();
    names.join(", ")
}

/// Which files can hold which formats; a folder's layout says the rest ([`check_targets`]).
fn check_layout(recipe: &Recipe, target: Target, out: &Path) -> Result<(), Error> {
    let out = out.display();
    if let Some(technique) = recipe.corrects().filter(|_| target == Target::File) {
        return Err(bad_input(format!(
            "{out}: {} writes an adapter beside the weights, which a GGUF file has no place for, expected a \
             folder",
            technique.name
        )));
    }
    for format in &all_formats(recipe) {
        match (format, target) {
            (_, Target::Page)
            | (Format::Ggml(_), Target::File)
            | (Format::Scaled(_), Target::Folder) => {}
            (Format::Ggml(_), Target::Folder) => {
                return Err(bad_input(format!(
                    "{out}: {format} is a format of GGUF, expected a name in .gguf"
                )));
            }
            (_, Target::File) => {
                return Err(bad_input(format!(
                    "{out}: {format} is none of GGUF's formats, expected one such as q4_0 or q4_k"
                )));
            }
            (Format::Float(_), Target::Folder) => {
                return Err(bad_input(format!(
                    "{format} quantizes nothing, expected integers or small floats with scales; \
                     `lathe convert` writes plain floats"
                )));
            }
        }
    }
    Ok(())
}

/// Refuses tensors that the layout cannot replace before anything is computed.
fn check_targets(
    program: &Program,
    recipe: &Recipe,
    layout: Option<&PackedLayout<'_>>,
) -> Result<(), Error> {
    let targets = targets(program, recipe).bad_input()?;
    let Some(layout) = layout else { return Ok(()) };
    for weight in targets.keys() {
        // A budget has yet to choose.
        let formats = match &recipe.budget {
            Some(budget) => budget.formats.clone(),
            None => vec![recipe.format_of(&program.weight(*weight).name)],
        };
        if quantized(recipe.correction_of(&program.weight(*weight).name))?.is_some() {
            layout.module(program, *weight).bad_input()?;
        }
        for format in formats {
            layout
                .check(program, *weight, format)
                .bad_input_in("a recipe can `keep` a tensor as it is")?;
        }
    }
    Ok(())
}

/// The recipe with a format of blocks of 32 for each tensor whose rows are no multiple of the 256
/// that its format asks for: the one that llama.cpp's `tensor_type_fallback` takes.
fn with_fallbacks(program: &Program, mut recipe: Recipe) -> Result<Recipe, Error> {
    // A budget has yet to choose.
    if recipe.budget.is_some() {
        return Ok(recipe);
    }
    for weight in targets(program, &recipe).bad_input()?.into_keys() {
        let decl = program.weight(weight);
        let columns = decl.shape.last().copied().unwrap_or(1);
        let format = recipe.format_of(&decl.name);
        let fallback = match format {
            Format::Ggml(GgmlType::Q4_K) => GgmlType::Q5_0,
            Format::Ggml(GgmlType::Q5_K) => GgmlType::Q5_1,
            Format::Ggml(GgmlType::Q6_K) => GgmlType::Q8_0,
            Format::Ggml(GgmlType::IQ4_XS) => GgmlType::IQ4_NL,
            _ => continue,
        };
        if !columns.is_multiple_of(format.block_len()) {
            recipe.formats.push((decl.name.clone(), Format::Ggml(fallback)));
        }
    }
    Ok(recipe)
}

/// Refuses what the device could not run afterwards; the reference runs every format.
fn check_device(device: Device, program: &Program, recipe: &Recipe) -> Result<(), Error> {
    for weight in targets(program, recipe).bad_input()?.keys() {
        let decl = program.weight(*weight);
        let columns = decl.shape.last().copied().unwrap_or(1);
        check_format(device.into(), recipe.format_of(&decl.name), columns).bad_input_in(
            format!(
                "tensor {} could only be run, and quantized, with --device reference",
                decl.name
            ),
        )?;
    }
    Ok(())
}

/// The text that layers are to see.
struct Text {
    calibration: Vec<u32>,
    /// Behind it: what errors are measured on.
    explain: Vec<u32>,
}

/// The text that layers are to see, if the recipe needs one.
fn read_tokens(
    arguments: &QuantizeArguments,
    opened: &Opened,
    recipe: &Recipe,
) -> Result<Option<Text>, Error> {
    let path = match &arguments.calibration {
        Some(path) => path,
        None if recipe.needs_calibration() => {
            return Err(bad_input("this recipe needs --calibration FILE (a text or token ids)"));
        }
        None => return Ok(None),
    };
    let text = read_text(path)?;
    let mut calibration = match text.trim_start().starts_with('[') {
        true => serde_json::from_str::<Vec<u32>>(&text).bad_input_in(path.display())?,
        false => encode_text(opened.tokenizer()?, &text)?,
    };
    let held_out = if arguments.explain { arguments.explain_tokens } else { 0 };
    if arguments.explain && held_out < 2 {
        return Err(bad_input(format!("--explain-tokens is {held_out}, expected at least 2")));
    }
    let Some(most) = calibration.len().checked_sub(held_out).filter(|most| *most > 0) else {
        return Err(bad_input(format!(
            "{}: {} tokens, expected more than --explain-tokens {held_out}, which are not calibrated with",
            path.display(),
            calibration.len()
        )));
    };
    let explain = calibration.split_off(most.min(arguments.calibration_tokens));
    Ok(Some(Text { calibration, explain: explain[..held_out].to_vec() }))
}

/// Beside the weights, or alone: a page, and the same numbers for programs.
fn write_explanation(
    model: &str,
    found: &Explanation,
    out: &Path,
    target: Target,
) -> Result<(), Error> {
    let (page, numbers) = match target {
        Target::Folder => (out.join("report.html"), out.join("report.json")),
        Target::File => (out.with_extension("report.html"), out.with_extension("report.json")),
        Target::Page => (out.to_owned(), out.with_extension("json")),
    };
    write_whole(&numbers, &(serde_json::to_string_pretty(found)? + "\n"))?;
    write_whole(&page, &explanation::html(model, found)?)
}

/// Writes under a temporary name and renames.
fn write_whole(path: &Path, text: &str) -> Result<(), Error> {
    let partial = beside(path, ".partial");
    fs::write(&partial, text)
        .and_then(|()| fs::rename(&partial, path))
        .with_context(|| path.display().to_string())
}

/// Embedding and head stay in 8 bits: they are rounded without a technique.
fn gguf_options(recipe: &Recipe) -> GgufOptions {
    let embedding = Some(Format::Ggml(GgmlType::Q8_0));
    GgufOptions { format: recipe.format, embedding }
}

/// Writes under a temporary name, so that a folder under its own name is always whole.
fn write_folder(
    layout: &PackedLayout<'_>,
    program: &Program,
    out: &Path,
    job: &mut Job<'_>,
    recipe: &Recipe,
) -> Result<(), Error> {
    let partial = beside(out, ".partial");
    let _ = fs::remove_dir_all(&partial);
    let written = exported(to_packed(layout, &partial, job)).and_then(|()| {
        let parts = job.corrections().iter();
        let part = |(weight, it): (&Weight, _)| low_rank(*weight, it);
        let parts: Vec<LowRank<'_>> = parts.map(part).collect();
        if !parts.is_empty() {
            let base = out.display().to_string();
            exported(to_adapter(layout, program, &partial.join(OWN_FOLDER), &base, &parts))?;
        }
        let path = partial.join("recipe.toml");
        fs::write(&path, recipe.to_toml()).with_context(|| path.display().to_string())
    });
    if written.is_err() {
        let _ = fs::remove_dir_all(&partial);
    }
    written?;
    fs::rename(&partial, out).with_context(|| out.display().to_string())
}

fn low_rank(weight: Weight, Correction { a, b, .. }: &Correction) -> LowRank<'_> {
    LowRank { weight, a, b }
}

/// The path with more behind its name.
fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    PathBuf::from(name)
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
        "{}: {} in {:.1} s, {count} matrices in {} ({:.2} bits a weight)",
        report.path.display(),
        human_bytes(report.bytes),
        report.quantize_ms / 1000.0,
        report.format,
        report.bits_per_weight
    );
    let corrections = report.tensors.iter().filter_map(|it| it.correction.as_ref());
    let bytes: usize = corrections.map(|it| it.bytes).sum();
    if bytes > 0 {
        text.push_str(&format!(", an adapter of {} among them", human_bytes(bytes as u64)));
    }
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
    /// What was done before: by an earlier run.
    from: Option<usize>,
}

impl Meter {
    fn new() -> Self {
        let now = Instant::now();
        Meter { start: now, told: now, from: None }
    }

    fn tell(&mut self, now: job::Progress) {
        let job::Progress { done, total } = now;
        let from = *self.from.get_or_insert(done);
        if self.told.elapsed() < Duration::from_secs(5) && done < total {
            return;
        }
        self.told = Instant::now();
        let share = done as f64 / total.max(1) as f64;
        let spent = self.start.elapsed().as_secs_f64();
        let left = match done - from {
            0 => String::new(),
            ours => format!(", about {:.0} s left", spent * (total - done) as f64 / ours as f64),
        };
        eprintln!("{:.0} %, {spent:.0} s{left}", share * 100.0);
    }
}

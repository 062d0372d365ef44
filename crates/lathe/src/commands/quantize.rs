//! `lathe quantize`: writes a model in fewer bits.

mod check;
mod kept;
mod meter;
mod report;
mod text;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error};
use lathe_model::Model;
use lathe_model::adapter::OWN_FOLDER;
use lathe_model::export::{
    Contents, ExportError, GgufOptions, Integers, LowRank, PackedLayout, to_adapter,
    to_gguf_replacing, to_packed,
};
use lathe_model::spec::DecoderSpec;
use lathe_model::weights::ModelWeights;
use lathe_program::{Backend, BackendError, Program, Weight};
use lathe_quant::budget::planned;
use lathe_quant::calibrate::Calibration;
use lathe_quant::explain::Explanation;
use lathe_quant::inputs::with_inputs;
use lathe_quant::job::{Job, remove_finished_layers};
use lathe_quant::recipe::{Recipe, activations_named, activations_of, format_named};
use lathe_quant::targets::targets;
use lathe_quant::{Correction, QuantError};
use lathe_session::{backend, bytes_under, milliseconds, program_for};
use lathe_tensor::{Format, GgmlType};

use self::check::{
    check_device, check_floats, check_inputs, check_layout, check_reader, check_targets,
    with_fallbacks,
};
use self::kept::with_kept;
use self::meter::Meter;
use self::report::{Provenance, finish, quantized_share, readers_of, record};
use self::text::read_tokens;
use super::score::read_text;
use crate::arguments::{EXPLAIN_TOKENS, Global, QuantizeArguments};
use crate::explanation;
use crate::find::open;
use crate::output::{InputContext, bad_input};
use crate::staging::Staging;

/// Tokens of a window of calibration. Tokens of different windows do not attend to each other.
const WINDOW: usize = 512;

/// The kind of OUT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// A compressed-tensors folder.
    Folder,
    /// A GGUF file.
    File,
    /// A page with the report of `--explain`, without weights.
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

    /// The path of the result while it is made.
    fn path_in(self, staging: &Staging) -> PathBuf {
        match self {
            Target::Folder => staging.folder().to_owned(),
            Target::File | Target::Page => staging.file(),
        }
    }

    fn layout(self) -> &'static str {
        match self {
            Target::Folder => "compressed-tensors",
            Target::File => "gguf",
            Target::Page => "none",
        }
    }
}

pub(super) fn run(global: &Global, arguments: &QuantizeArguments) -> Result<(), Error> {
    let out = &arguments.out;
    let target = Target::of(arguments)?;
    check_new(arguments, target)?;
    let recipe = recipe(arguments)?;
    check_layout(&recipe, target, out)?;
    let mut opened = open(&arguments.model, &global.open_options())?;
    opened.refuse_adapter("quantize")?;
    let recipe = match target {
        Target::Folder => with_kept(&opened.model, recipe)?,
        _ => recipe,
    };
    opened.model.spec = quantized(with_inputs(&opened.model.spec, &recipe))?;
    let model = &opened.model;
    let program = program_for(&model.spec, model.spec.context_max)?;
    let weights = model.weights(&program).bad_input()?;
    let layout = layout_of(target, &recipe, model, &weights)?;
    let recipe = if target == Target::File { with_fallbacks(&program, recipe)? } else { recipe };
    check_targets(&program, &recipe, layout.as_ref())?;
    check_inputs(target, model)?;
    check_device(global.device, &program, &recipe)?;
    check_floats(model, &weights, &recipe, arguments.allow_requantize)?;
    let text = read_tokens(arguments, &opened, &recipe)?;
    let backend = backend(global.device.into())?;
    let measured = text.as_ref().map(|it| runs(global, &*backend, &it.calibration));
    let recipe = plan(&recipe, &weights, model, measured)?;

    let mut meter = Meter::new();
    let mut job = quantized(Job::new(&weights, &recipe, text.is_some(), |now| meter.tell(now)))?;
    let contents = contents(target, layout.as_ref(), &program, &job)?;
    if let Some(contents) = &contents {
        check_reader(arguments.reader.map(Into::into), contents)?;
    }
    say!("quantizing to {}", formats(&recipe));
    let staging = Staging::begin(out)?;
    let resume = staging.beside(".quantizing");
    if let Some(text) = &text {
        if resume.exists() {
            say!("going on from {}", resume.display());
        }
        let calibration = runs(global, &*backend, &text.calibration);
        quantized(job.calibrate_resumable(&model.spec, &calibration, &resume))?;
    }
    let measured = text.as_ref().filter(|_| arguments.explain);
    let measured = measured.map(|text| runs(global, &*backend, &text.explain));
    let explanation = measured.map(|text| explain(&mut job, &model.spec, &text)).transpose()?;
    let staged = target.path_in(&staging);
    match (&layout, target) {
        (Some(layout), _) => write_folder(layout, &program, (&staged, out), &mut job, &recipe)?,
        (None, Target::Page) => {}
        _ => exported(to_gguf_replacing(model, &staged, &gguf_options(&recipe), &mut job))?,
    }
    if let Some(explanation) = &explanation {
        write_explanation(&model.name, explanation, &staged, target)?;
    }
    let share = quantized_share(model, &weights, targets(&program, &recipe)?.keys())?;
    let mut report = Provenance::new(model, arguments, target, &recipe);
    report.bytes = bytes_under(&staged);
    report.readers = contents.as_ref().map(readers_of);
    report.calibration_tokens = text.as_ref().map_or(0, |it| it.calibration.len());
    report.calibration = arguments.calibration.as_deref().filter(|_| text.is_some());
    report.quantize_ms = milliseconds(opened.started);
    report.add(job, share).bad_input()?;
    deliver(staging, target, &report)?;
    if text.is_some() {
        remove_finished_layers(&resume).with_context(|| resume.display().to_string())?;
    }
    finish(global, &report, explanation.as_ref())
}

/// The layout of the folder. `None` if OUT is no folder.
fn layout_of<'a>(
    target: Target,
    recipe: &Recipe,
    model: &'a Model,
    weights: &ModelWeights<'_>,
) -> Result<Option<PackedLayout<'a>>, Error> {
    if target != Target::Folder {
        return Ok(None);
    }
    let integers = Integers::beside(recipe.activations);
    Ok(Some(PackedLayout::new(model, weights).bad_input()?.with_integers(integers)))
}

/// The properties of the result that readers differ in. `None` if no weights are written.
fn contents(
    target: Target,
    layout: Option<&PackedLayout<'_>>,
    program: &Program,
    job: &Job<'_>,
) -> Result<Option<Contents>, Error> {
    Ok(match (target, layout) {
        (Target::File, _) => Some(Contents::Gguf),
        (_, Some(layout)) => Some(layout.contents(program, job).bad_input()?),
        _ => None,
    })
}

/// Puts the report beside the weights, and the result in its place.
fn deliver(staging: Staging, target: Target, report: &Provenance<'_>) -> Result<(), Error> {
    if target != Target::Page {
        record(report, &target.path_in(&staging), target == Target::File)?;
    }
    match target {
        Target::Folder => staging.finish_folder(),
        Target::File | Target::Page => staging.finish_files(),
    }
}

/// Refuses to overwrite an existing path. The recipe that was given may lie where the result's
/// recipe would: it stays.
fn check_new(arguments: &QuantizeArguments, target: Target) -> Result<(), Error> {
    let out: PathBuf = arguments.out.components().collect();
    let beside: &[&str] = match (target, arguments.explain) {
        (Target::Folder, _) => &[],
        (Target::Page, _) => &["json"],
        (Target::File, false) => &["recipe.toml", "provenance.json"],
        (Target::File, true) => &["recipe.toml", "provenance.json", "report.html", "report.json"],
    };
    let given = arguments.recipe.as_ref().and_then(|path| path.canonicalize().ok());
    let all = beside.iter().map(|extension| out.with_extension(extension));
    let mut all = [out.clone()].into_iter().chain(all);
    let taken = |path: &PathBuf| path.exists() && path.canonicalize().ok() != given;
    match all.find(taken) {
        Some(path) => Err(bad_input(format!("{}: it exists already", path.display()))),
        None => Ok(()),
    }
}

/// The settings to run a text with.
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
    say!("measuring each layer in each format on {} tokens", tokens.len());
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
    say!("measuring on {} tokens", text.tokens.len());
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

/// Every format that a recipe may use, without repetitions.
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

/// Writes the explanation beside the weights, or alone: an HTML page, and the same numbers as JSON.
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
    write(&numbers, &(serde_json::to_string_pretty(found)? + "\n"))?;
    write(&page, &explanation::html(model, found)?)
}

fn write(path: &Path, text: &str) -> Result<(), Error> {
    fs::write(path, text).with_context(|| path.display().to_string())
}

/// Embedding and head are rounded to 8 bits without a technique.
fn gguf_options(recipe: &Recipe) -> GgufOptions {
    let embedding = Some(Format::Ggml(GgmlType::Q8_0));
    GgufOptions { format: recipe.format, embedding }
}

/// Writes the folder `to` with the recipe in it. An adapter in it names `out` as its base.
fn write_folder(
    layout: &PackedLayout<'_>,
    program: &Program,
    (to, out): (&Path, &Path),
    job: &mut Job<'_>,
    recipe: &Recipe,
) -> Result<(), Error> {
    exported(to_packed(layout, to, job))?;
    let parts = job.corrections().iter();
    let part = |(weight, it): (&Weight, _)| low_rank(*weight, it);
    let parts: Vec<LowRank<'_>> = parts.map(part).collect();
    if !parts.is_empty() {
        let base = out.display().to_string();
        exported(to_adapter(layout, program, &to.join(OWN_FOLDER), &base, &parts))?;
    }
    write(&to.join("recipe.toml"), &recipe.to_toml())
}

fn low_rank(weight: Weight, Correction { a, b, .. }: &Correction) -> LowRank<'_> {
    LowRank { weight, a, b }
}

/// Errors of recipes, shapes and tokens are bad input. A failing device is not.
fn quantized<T>(result: Result<T, QuantError>) -> Result<T, Error> {
    match result {
        Err(error @ QuantError::Backend(BackendError::Unsupported { .. })) => {
            Err(error).bad_input_in("calibration")
        }
        Err(error @ QuantError::Backend(_)) => Err(error.into()),
        other => other.bad_input(),
    }
}

/// If the target cannot hold the model, that is bad input. A failing disk is not.
fn exported(result: Result<(), ExportError>) -> Result<(), Error> {
    match result {
        Err(error @ ExportError::Io { .. }) => Err(error.into()),
        other => other.bad_input(),
    }
}

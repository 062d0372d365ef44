//! The report that `lathe quantize` prints and records beside the weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Error};
use lathe_model::Model;
use lathe_model::checkpoint::CheckpointError;
use lathe_model::export::{Contents, Reader};
use lathe_model::weights::ModelWeights;
use lathe_program::Weight;
use lathe_quant::QuantError;
use lathe_quant::explain::Explanation;
use lathe_quant::job::{CoverageReport, Job, PreparedReport, WeightReport};
use lathe_quant::recipe::Recipe;
use lathe_session::human_bytes;
use serde::Serialize;

use super::{Target, formats};
use crate::arguments::{Global, QuantizeArguments};
use crate::explanation;
use crate::output::{print, print_json};

/// The report that is printed and recorded beside the weights.
#[derive(Serialize)]
pub(super) struct Provenance<'a> {
    pub(super) model: &'a str,
    pub(super) path: &'a Path,
    pub(super) layout: &'static str,
    pub(super) format: String,
    pub(super) bytes: u64,
    pub(super) calibration_tokens: usize,
    /// Mean bits of the quantized weights, with scales and corrections.
    pub(super) bits_per_weight: f64,
    /// The share of the model's bytes that are in quantized matrices.
    pub(super) quantized_share: f64,
    /// For each reader, why it cannot run the result, or null if it can. `None` if no weights are
    /// written.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) readers: Option<Readers>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) calibration: Option<&'a Path>,
    pub(super) quantize_ms: f64,
    pub(super) lathe: &'static str,
    pub(super) recipe: String,
    pub(super) prepared: Vec<PreparedReport>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) expert_tokens: Vec<CoverageReport>,
    pub(super) tensors: Vec<WeightReport>,
}

impl<'a> Provenance<'a> {
    /// The part of the report that is known before the job.
    pub(super) fn new(
        model: &'a Model,
        arguments: &'a QuantizeArguments,
        target: Target,
        recipe: &Recipe,
    ) -> Self {
        Provenance {
            model: &model.name,
            path: &arguments.out,
            layout: target.layout(),
            format: formats(recipe),
            bytes: 0,
            calibration_tokens: 0,
            bits_per_weight: 0.0,
            quantized_share: 0.0,
            readers: None,
            calibration: None,
            quantize_ms: 0.0,
            lathe: env!("CARGO_PKG_VERSION"),
            recipe: recipe.to_toml(),
            prepared: Vec::new(),
            expert_tokens: Vec::new(),
            tensors: Vec::new(),
        }
    }

    /// Adds the results of `job`, which quantized `share` of the model's bytes.
    ///
    /// # Errors
    /// If a weight is corrected twice.
    pub(super) fn add(&mut self, job: Job<'_>, share: f64) -> Result<(), QuantError> {
        self.quantized_share = share;
        self.bits_per_weight = job.bits_per_weight()?;
        let reports = job.into_reports();
        self.prepared = reports.prepared;
        self.expert_tokens = reports.coverage;
        self.tensors = reports.tensors;
        Ok(())
    }
}

/// For each reader's name, why it cannot run the result.
pub(super) type Readers = BTreeMap<&'static str, Option<String>>;

/// The readers of `contents`.
pub(super) fn readers_of(contents: &Contents) -> Readers {
    Reader::ALL.into_iter().map(|reader| (reader.name(), reader.refusal(contents))).collect()
}

/// The bytes of the tensors of `targets` over the bytes of all tensors of the model.
///
/// # Errors
/// If a tensor cannot be read.
pub(super) fn quantized_share<'a>(
    model: &Model,
    weights: &ModelWeights<'_>,
    targets: impl Iterator<Item = &'a Weight>,
) -> Result<f64, CheckpointError> {
    let quantized: BTreeSet<&String> =
        targets.flat_map(|weight| weights.tensors_of(*weight)).collect();
    let (mut ours, mut all) = (0usize, 0usize);
    for name in model.checkpoint.whole_names() {
        let tensor = model.checkpoint.tensor(&name)?;
        let bytes = tensor.codes.len() + tensor.scales.len() + tensor.zeros.len();
        all += bytes;
        ours += if quantized.contains(&name) { bytes } else { 0 };
    }
    Ok(ours as f64 / all.max(1) as f64)
}

/// The printed report. With `--explain` it contains the explanation, which is otherwise a file
/// beside the weights.
#[derive(Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    provenance: &'a Provenance<'a>,
    #[serde(skip_serializing_if = "Option::is_none")]
    explanation: Option<&'a Explanation>,
}

/// Prints a summary.
pub(super) fn finish(
    global: &Global,
    report: &Provenance<'_>,
    explanation: Option<&Explanation>,
) -> Result<(), Error> {
    if global.json {
        return print_json(&Printed { provenance: report, explanation });
    }
    let found = explanation.map(explanation::table).unwrap_or_default();
    print(&(describe(report) + &found))
}

/// Records the report in a file beside the weights, never in `config.json`.
pub(super) fn record(report: &Provenance<'_>, out: &Path, to_file: bool) -> Result<(), Error> {
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
        "{}: {} in {:.1} s, {count} matrices, {:.1} % of the model's bytes, in {} ({:.2} bits a \
         weight)",
        report.path.display(),
        human_bytes(report.bytes),
        report.quantize_ms / 1000.0,
        report.quantized_share * 100.0,
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
    text + "\n" + &report.readers.as_ref().map_or(String::new(), describe_readers)
}

fn describe_readers(readers: &Readers) -> String {
    let run = readers.iter().filter(|(_, refusal)| refusal.is_none());
    let names: Vec<&str> = std::iter::once("lathe").chain(run.map(|(name, _)| *name)).collect();
    let alone = if names.len() == 1 { " alone" } else { "" };
    let mut text = format!("runs in {}{alone}\n", names.join(", "));
    for (name, refusal) in readers {
        if let Some(refusal) = refusal {
            text.push_str(&format!("not in {name}: {refusal}\n"));
        }
    }
    text
}

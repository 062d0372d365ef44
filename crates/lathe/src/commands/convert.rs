//! `lathe convert`: a model in another file layout or number format.

use std::path::Path;

use anyhow::Error;
use lathe_model::Model;
use lathe_model::export::{ExportError, GgufOptions, HuggingFaceOptions, to_gguf, to_hugging_face};
use lathe_program::WeightRole;
use lathe_session::measure::shape::Sizes;
use lathe_session::{bytes_under, human_bytes, milliseconds, program_for};
use lathe_tensor::Format;
use serde::Serialize;

use crate::arguments::{ConvertArguments, Global, OutputLayout};
use crate::find::open;
use crate::output::{InputContext, bad_input, print, print_json};
use crate::staging::Staging;

#[derive(Serialize)]
struct ConvertReport<'a> {
    model: &'a str,
    path: &'a Path,
    layout: &'static str,
    bytes: u64,
    convert_ms: f64,
}

pub(super) fn run(global: &Global, arguments: &ConvertArguments) -> Result<(), Error> {
    let out = &arguments.out;
    if out.exists() {
        return Err(bad_input(format!("{}: it exists already", out.display())));
    }
    let format = arguments.format.as_deref().map(Format::parse).transpose();
    let format = format.bad_input_in("--format")?;
    let opened = open(&arguments.model, &global.open_options())?;
    opened.refuse_adapter("convert")?;
    let model = &opened.model;
    let staging = Staging::begin(out)?;
    let layout = match arguments.to {
        OutputLayout::Gguf => {
            let options = gguf_options(model, format)?;
            say!("writing {}, matrices in {}", out.display(), options.format);
            exported(to_gguf(model, &staging.file(), &options))?;
            staging.finish_files()?;
            "gguf"
        }
        OutputLayout::Safetensors => {
            let options = folder_options(format)?;
            say!("writing {}", out.display());
            exported(to_hugging_face(model, staging.folder(), &options))?;
            staging.finish_folder()?;
            "safetensors"
        }
    };
    let (bytes, convert_ms) = (bytes_under(out), milliseconds(opened.started));
    if global.json {
        return print_json(&ConvertReport {
            model: &model.name,
            path: out,
            layout,
            bytes,
            convert_ms,
        });
    }
    print(&format!("{}: {} in {:.1} s\n", out.display(), human_bytes(bytes), convert_ms / 1000.0))
}

/// All matrices in `format`. Without `format`, they take the format that most of them have, and the
/// embedding keeps its own.
fn gguf_options(model: &Model, format: Option<Format>) -> Result<GgufOptions, Error> {
    if let Some(format) = format {
        return Ok(GgufOptions { format, embedding: None });
    }
    let program = program_for(&model.spec, model.spec.context_max)?;
    let sizes = Sizes::of_model(model, &program)?;
    let linear = |role| matches!(role, WeightRole::Linear | WeightRole::Experts);
    let format = sizes.main_format_of(&program, linear);
    let embedding = sizes.main_format_of(&program, |role| role == WeightRole::Embedding);
    Ok(GgufOptions { format, embedding: Some(embedding) })
}

fn folder_options(format: Option<Format>) -> Result<HuggingFaceOptions, Error> {
    let float = match format {
        None => None,
        Some(Format::Float(float)) => Some(float),
        Some(other) => {
            return Err(bad_input(format!(
                "--format {other}: plain safetensors hold f32, f16 or bf16; use --to gguf"
            )));
        }
    };
    Ok(HuggingFaceOptions { float, ..HuggingFaceOptions::default() })
}

/// If the target cannot hold the model, that is bad input. A failing disk is not.
fn exported(result: Result<(), ExportError>) -> Result<(), Error> {
    match result {
        Err(error @ ExportError::Io { .. }) => Err(error.into()),
        other => other.bad_input(),
    }
}

//! Checks that run before anything is computed.

use std::path::Path;

use anyhow::Error;
use lathe_model::Model;
use lathe_model::export::{Contents, PackedLayout, Reader};
use lathe_model::weights::ModelWeights;
use lathe_program::Program;
use lathe_quant::recipe::Recipe;
use lathe_quant::targets::{check_fused, targets};
use lathe_session::check_format;
use lathe_tensor::{Format, GgmlType};

use super::{Target, all_formats, quantized};
use crate::arguments::Device;
use crate::output::{InputContext, bad_input};

/// Checks that the kind of file can hold the formats. [`check_targets`] checks the folder's layout.
pub(super) fn check_layout(recipe: &Recipe, target: Target, out: &Path) -> Result<(), Error> {
    let out = out.display();
    if let Some(technique) = recipe.corrects().filter(|_| target == Target::File) {
        return Err(bad_input(format!(
            "{out}: {} writes an adapter beside the weights, which a GGUF file has no place for, \
             expected a folder",
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

/// Refuses tensors that the layout cannot replace.
pub(super) fn check_targets(
    program: &Program,
    recipe: &Recipe,
    layout: Option<&PackedLayout<'_>>,
) -> Result<(), Error> {
    let targets = targets(program, recipe).bad_input()?;
    let Some(layout) = layout else { return Ok(()) };
    check_fused(program, recipe).bad_input()?;
    for weight in targets.keys() {
        // With a budget, the formats are not chosen yet.
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

/// Some formats need rows of a multiple of 256. A tensor with other rows gets a format of blocks of
/// 32: the one of llama.cpp's `tensor_type_fallback`.
pub(super) fn with_fallbacks(program: &Program, mut recipe: Recipe) -> Result<Recipe, Error> {
    // With a budget, the formats are not chosen yet.
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

/// Refuses formats that the device cannot run. The reference runs every format.
pub(super) fn check_device(
    device: Device,
    program: &Program,
    recipe: &Recipe,
) -> Result<(), Error> {
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

/// Refuses changes of inputs that the target cannot store.
pub(super) fn check_inputs(target: Target, model: &Model) -> Result<(), Error> {
    match target == Target::File && !model.spec.inputs.is_empty() {
        true => Err(bad_input("a GGUF file cannot say what is done to inputs, expected a folder")),
        false => Ok(()),
    }
}

/// Refuses contents that the chosen reader cannot run.
pub(super) fn check_reader(reader: Option<Reader>, contents: &Contents) -> Result<(), Error> {
    let Some(reader) = reader else { return Ok(()) };
    match reader.refusal(contents) {
        None => Ok(()),
        Some(reason) => {
            Err(bad_input(format!("--for {}: {}, {reason}", reader.name(), contents.describe())))
        }
    }
}

/// Refuses to round weights that are quantized already, unless the caller allows it.
pub(super) fn check_floats(
    model: &Model,
    weights: &ModelWeights<'_>,
    recipe: &Recipe,
    allowed: bool,
) -> Result<(), Error> {
    for weight in targets(weights.program(), recipe).bad_input()?.keys() {
        for name in weights.tensors_of(*weight) {
            let format = model.checkpoint.tensor(name).bad_input()?.format;
            if matches!(format, Format::Float(_)) {
                continue;
            }
            let found = format!("tensor {name} is quantized already, to {format}");
            if allowed {
                say!("warning: {found}, and is rounded a second time");
                return Ok(());
            }
            return Err(bad_input(format!(
                "{found}: rounding it again loses more than rounding the original, expected a \
                 model of floats, or --allow-requantize"
            )));
        }
    }
    Ok(())
}

//! The matrices that stay as they are in a recipe that names no tensors: those that the folder's
//! layout cannot hold, and those that engines run as one with them.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::Error;
use lathe_model::Model;
use lathe_model::export::PackedLayout;
use lathe_program::{Op, Program, Weight};
use lathe_quant::recipe::{Recipe, TechniqueStep};
use lathe_quant::targets::{fused, targets};
use lathe_quant::technique::Stage;
use lathe_session::program_for;
use lathe_tensor::{Format, ScaledFormat};

use super::{Target, layout_of};
use crate::output::InputContext;

/// `recipe` for `model`, which also keeps what the folder cannot hold, with a line on stderr. A
/// recipe that names its tensors is unchanged, because everything that it names must be possible.
pub(super) fn with_kept(model: &Model, recipe: Recipe) -> Result<Recipe, Error> {
    // A model with transformed inputs is refused by a later check.
    let named = recipe.tensors.is_some() || recipe.budget.is_some();
    if named || !model.spec.inputs.is_empty() {
        return Ok(recipe);
    }
    let program = program_for(&model.spec, model.spec.context_max)?;
    let program = &*program;
    let weights = model.weights(program).bad_input()?;
    let Some(layout) = layout_of(Target::Folder, &recipe, model, &weights)? else {
        return Ok(recipe);
    };
    let wanted: BTreeSet<Weight> = targets(program, &recipe).bad_input()?.into_keys().collect();
    let mut reasons = refused(program, &layout, &recipe, &wanted);
    if wanted.iter().all(|weight| reasons.contains_key(weight)) {
        // No target would be left. The checks that follow say why.
        return Ok(recipe);
    }
    for set in fused(program) {
        if let Some(other) = set.iter().find(|weight| reasons.contains_key(weight)).copied() {
            let reason = format!("run as one with {}", program.weight(other).name);
            for weight in set.into_iter().filter(|weight| wanted.contains(weight)) {
                reasons.entry(weight).or_insert_with(|| reason.clone());
            }
        }
    }
    let mut recipe = keep(program, recipe, &reasons);
    limit_corrections(program, &layout, &mut recipe, &wanted, &reasons);
    Ok(recipe)
}

/// A correction is an adapter of a module. So a step without tensor names applies to the matrices
/// that are modules.
fn limit_corrections(
    program: &Program,
    layout: &PackedLayout<'_>,
    recipe: &mut Recipe,
    wanted: &BTreeSet<Weight>,
    kept: &BTreeMap<Weight, String>,
) {
    let quantized = wanted.iter().filter(|weight| !kept.contains_key(weight));
    let (modules, others): (Vec<Weight>, Vec<Weight>) =
        quantized.partition(|weight| layout.module(program, **weight).is_ok());
    if others.is_empty() || modules.is_empty() {
        return;
    }
    let names = modules.iter().map(|weight| program.weight(*weight).name.clone());
    let names: Vec<String> = names.collect();
    let corrects = |step: &&mut TechniqueStep| step.technique.stage == Stage::Correct;
    for step in recipe.steps.iter_mut().filter(corrects).filter(|step| step.tensors.is_none()) {
        let patterns: BTreeSet<String> = others
            .iter()
            .map(|weight| program.weight(*weight))
            .map(|decl| pattern_of(&decl.name, decl.layer))
            .collect();
        let patterns: Vec<String> = patterns.into_iter().collect();
        let name = step.technique.name;
        say!("{name} corrects no {}: they are no modules", patterns.join(", "));
        step.tensors = Some(names.clone());
    }
}

/// For each of `wanted` that cannot be what `recipe` says, the reason.
fn refused(
    program: &Program,
    layout: &PackedLayout<'_>,
    recipe: &Recipe,
    wanted: &BTreeSet<Weight>,
) -> BTreeMap<Weight, String> {
    let mxfp4 = Format::Scaled(ScaledFormat::MXFP4);
    let format_of = |weight: &Weight| recipe.format_of(&program.weight(*weight).name);
    let blocks = wanted.iter().any(|it| layout.is_in_blocks(*it) && format_of(it) == mxfp4);
    let reason = |weight: &Weight| {
        if blocks && !layout.is_in_blocks(*weight) {
            return Some("that layout has floats beside experts in MXFP4".to_owned());
        }
        let weighed = program.ops.iter().any(|op| match op {
            Op::Experts { spec, .. } => {
                spec.weigh_input && [spec.gate, spec.up, spec.down].contains(weight)
            }
            _ => false,
        });
        let rounding = recipe.rounding_of(&program.weight(*weight).name);
        if weighed && rounding.is_ok_and(|step| step.needs_calibration()) {
            return Some("its input depends on the router's weights".to_owned());
        }
        layout.check(program, *weight, format_of(weight)).err().map(|error| error.to_string())
    };
    wanted.iter().filter_map(|weight| Some((*weight, reason(weight)?))).collect()
}

/// `recipe`, which also keeps the weights of `reasons`. Prints a line to stderr for each pattern.
fn keep(program: &Program, mut recipe: Recipe, reasons: &BTreeMap<Weight, String>) -> Recipe {
    let mut told: BTreeMap<String, &String> = BTreeMap::new();
    for (weight, reason) in reasons {
        let decl = program.weight(*weight);
        told.entry(pattern_of(&decl.name, decl.layer)).or_insert(reason);
        recipe.keep.push(decl.name.clone());
    }
    for (pattern, reason) in told {
        say!("kept as it is: {pattern} ({reason})");
    }
    recipe
}

/// The name of a weight, with a star in place of its layer's number.
fn pattern_of(name: &str, layer: Option<u32>) -> String {
    let Some(layer) = layer else { return name.to_owned() };
    match name.strip_prefix(&format!("layers.{layer}.")) {
        Some(rest) => format!("layers.*.{rest}"),
        None => name.to_owned(),
    }
}

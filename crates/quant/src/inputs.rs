//! Adds what a recipe does to the inputs of matrices (rotations, rounding) to the model's spec.
//! Calibration runs the program of that spec, and the `config.json` of the result describes it.

use std::collections::BTreeMap;

use lathe_model::DecoderSpec;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::InputTransform;

use crate::error::QuantError;
use crate::recipe::Recipe;
use crate::targets::targets;
use crate::technique::Apply;

/// `spec` with the transforms that `recipe` applies to inputs.
///
/// # Errors
/// If the recipe does not fit the model, or the model has transforms already.
pub fn with_inputs(spec: &DecoderSpec, recipe: &Recipe) -> Result<DecoderSpec, QuantError> {
    if !spec.inputs.is_empty() {
        let message = "the model's inputs are transformed already, expected plain ones";
        return Err(QuantError::Recipe(message.to_owned()));
    }
    let options = LowerOptions::new(spec.context_max);
    let program = lower(spec, &options)?;
    let mut inputs = BTreeMap::new();
    for (weight, op) in targets(&program, recipe)? {
        let mut transform =
            InputTransform { format: recipe.activations, ..InputTransform::default() };
        for step in &recipe.steps {
            if let Apply::Inputs(block_of) = step.technique.apply {
                transform.hadamard = block_of(&program, weight, op, &step.parameters);
            }
        }
        if !transform.is_nothing() {
            inputs.insert(program.weight(weight).name.clone(), transform);
        }
    }
    let spec = DecoderSpec { inputs, ..spec.clone() };
    // Lowering once finds combinations that are not possible.
    lower(&spec, &options)?;
    Ok(spec)
}

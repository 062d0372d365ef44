//! The matrices that a recipe quantizes.

use std::collections::BTreeMap;

use lathe_program::{Op, Program, Weight, WeightRole};

use crate::error::QuantError;
use crate::recipe::{Recipe, matches};

/// The matrices that a recipe quantizes, with the op that reads each.
///
/// # Errors
/// If a pattern names nothing, or names what cannot be quantized.
pub fn targets(program: &Program, recipe: &Recipe) -> Result<BTreeMap<Weight, usize>, QuantError> {
    let mut readers: BTreeMap<Weight, usize> = BTreeMap::new();
    for (index, op) in program.ops.iter().enumerate() {
        match op {
            Op::Linear { parts, .. } => {
                for part in parts {
                    readers.entry(part.weight).or_insert(index);
                }
            }
            Op::Experts { spec, .. } => {
                readers.extend([spec.gate, spec.up, spec.down].map(|weight| (weight, index)));
            }
            _ => {}
        }
    }
    let lists = [recipe.tensors.as_ref(), Some(&recipe.keep)];
    let of_steps = recipe.steps.iter().filter_map(|step| step.tensors.as_ref());
    let of_formats = recipe.formats.iter().map(|(pattern, _)| pattern);
    for pattern in lists.into_iter().flatten().chain(of_steps).flatten().chain(of_formats) {
        if !program.weights.iter().any(|decl| matches(pattern, &decl.name)) {
            return Err(QuantError::Recipe(format!("no tensor is called `{pattern}`")));
        }
    }
    let mut found = BTreeMap::new();
    for (index, decl) in program.weights.iter().enumerate() {
        let weight = Weight(index as u32);
        let named =
            recipe.tensors.as_ref().map(|list| list.iter().any(|it| matches(it, &decl.name)));
        let kept = recipe.keep.iter().any(|it| matches(it, &decl.name));
        let linear = decl.role == WeightRole::Linear && readers.contains_key(&weight);
        if kept || !named.unwrap_or(linear) {
            continue;
        }
        // Vectors that a pattern for a whole layer sweeps along stay what they are.
        let exact = recipe.tensors.iter().flatten().any(|it| *it == decl.name);
        match readers.get(&weight) {
            Some(op) if linear || decl.role == WeightRole::Experts => {
                found.insert(weight, *op);
            }
            _ if exact => {
                let role = format!("{:?}", decl.role).to_lowercase();
                return Err(QuantError::Recipe(format!(
                    "tensor {} ({role}) cannot be quantized here, expected linear layers or experts",
                    decl.name
                )));
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Err(QuantError::Recipe("it quantizes no tensor of this model".to_owned()));
    }
    Ok(found)
}

//! What a folder's `quantization_config` says of inputs: `input_activations` and `transform_config`
//! of compressed-tensors.

use std::collections::BTreeMap;

use lathe_program::{InputTransform, Program};
use serde_json::{Value, json};

use super::ExportError;
use super::compressed::{TARGET, module_of};
use crate::checkpoint::inputs::arguments;

/// Adds `inputs`, by canonical name of the matrix, to `config`, whose groups are of the matrices
/// in `sources`: for each, the tensors of the file that it is made of.
///
/// # Errors
/// If some of those matrices have inputs in another format than others.
pub(super) fn declare(
    config: &mut Value,
    inputs: &BTreeMap<String, InputTransform>,
    program: &Program,
    sources: &BTreeMap<usize, Vec<String>>,
) -> Result<(), ExportError> {
    let of = |index: &usize| inputs.get(&program.weights[*index].name).copied().unwrap_or_default();
    let mut formats: Vec<_> = sources.keys().map(|index| of(index).format).collect();
    formats.dedup();
    let refuse = |feature: String| Err(ExportError::Feature { feature, target: TARGET });
    let known = sources.keys().filter(|index| !of(index).is_nothing()).count();
    if formats.len() > 1 || known != inputs.len() {
        return refuse("a model whose quantized matrices do not all read inputs alike".to_owned());
    }
    if let Some(format) = formats.into_iter().flatten().next() {
        for group in
            config["config_groups"].as_object_mut().into_iter().flat_map(|it| it.values_mut())
        {
            group["input_activations"] = arguments(format);
        }
    }
    let mut blocks: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (index, tensors) in sources {
        if let Some(block) = of(index).hadamard {
            let modules = tensors.iter().map(|tensor| module_of(tensor));
            blocks.entry(block).or_default().extend(modules);
        }
    }
    let groups = blocks.into_iter().map(|(block, mut modules)| {
        modules.sort_unstable();
        modules.dedup();
        let apply =
            json!([{"targets": modules, "location": "input", "inverse": false, "ignore": []}]);
        let scheme = json!({"type": "hadamard", "apply": apply, "randomize": false,
                            "requires_grad": false, "head_dim": block});
        (format!("hadamard_{block}"), scheme)
    });
    let groups: serde_json::Map<String, Value> = groups.collect();
    if !groups.is_empty() {
        config["transform_config"] = json!({ "config_groups": groups });
    }
    Ok(())
}

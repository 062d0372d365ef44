//! What a folder's `quantization_config` says of inputs: `input_activations` and `transform_config`
//! of compressed-tensors.

use std::collections::BTreeMap;

use lathe_program::{InputTransform, Program};
use lathe_tensor::ActivationFormat;
use serde_json::{Value, json};

use super::ExportError;
use super::encode::{TARGET, module_of};
use crate::checkpoint::inputs::{arguments, stored_arguments};

/// How the inputs of all quantized matrices are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InputRounding {
    pub(super) format: ActivationFormat,
    /// Whether scales that calibration found are stored beside the matrices.
    pub(super) stored: bool,
}

impl InputRounding {
    /// compressed-tensors' `QuantizationArgs`.
    pub(super) fn arguments(self) -> Value {
        if self.stored { stored_arguments(self.format) } else { arguments(self.format) }
    }

    /// The tensor of a module that holds the scale.
    pub(super) fn scale_name(self, module: &str) -> String {
        match self.format {
            ActivationFormat::Nvfp4 => format!("{module}.input_global_scale"),
            _ => format!("{module}.input_scale"),
        }
    }
}

/// What the inputs of the quantized matrices are rounded to. `inputs` is by canonical name of the
/// matrix, `sources` has the tensors of the file that each quantized matrix is made of, and
/// `stored` says whether the scales are stored.
///
/// # Errors
/// If some of those matrices have inputs in another format than others.
pub(super) fn format_of_all(
    inputs: &BTreeMap<String, InputTransform>,
    program: &Program,
    sources: &BTreeMap<usize, Vec<String>>,
    stored: bool,
) -> Result<Option<InputRounding>, ExportError> {
    let of = |index: &usize| inputs.get(&program.weights[*index].name).copied().unwrap_or_default();
    let mut formats: Vec<_> = sources.keys().map(|index| of(index).format).collect();
    formats.dedup();
    let refuse = |feature: String| Err(ExportError::Feature { feature, target: TARGET });
    let known = sources.keys().filter(|index| !of(index).is_nothing()).count();
    if formats.len() > 1 || known != inputs.len() {
        return refuse("a model whose quantized matrices do not all read inputs alike".to_owned());
    }
    let format = formats.into_iter().flatten().next();
    Ok(format.map(|format| InputRounding { format, stored }))
}

/// The `transform_config` of the inputs that are rotated while the model runs, if there are some.
pub(super) fn transforms(
    inputs: &BTreeMap<String, InputTransform>,
    program: &Program,
    sources: &BTreeMap<usize, Vec<String>>,
) -> Option<Value> {
    let mut blocks: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    for (index, tensors) in sources {
        let transform = inputs.get(&program.weights[*index].name);
        if let Some(block) = transform.and_then(|it| it.hadamard) {
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
    (!groups.is_empty()).then(|| json!({ "config_groups": groups }))
}

//! The `quantization_config` of a folder that was written.

use std::collections::BTreeMap;

use lathe_tensor::{Block, Element, ScaleType, ScaledFormat, ZeroPoint};
use serde_json::{Value, json};

use super::inputs::InputRounding;
use crate::checkpoint::{Encoding, MIXED};

/// The modules of each format, and how it lies.
pub(super) type Groups = BTreeMap<(ScaledFormat, Encoding), Modules>;

/// The modules of a group.
#[derive(Debug, Default)]
pub(super) struct Modules {
    pub(super) names: Vec<String>,
    /// Whether experts are among them.
    pub(super) experts: bool,
}

/// The object that compressed-tensors reads; it refuses keys of a group that it does not know.
/// `inputs` is what the inputs of every quantized matrix are rounded to.
///
/// The group with the most modules is for all linear layers. The others name their modules, and
/// names come before classes. A group with experts comes first: transformers reads all experts by
/// the first group.
pub(super) fn compressed_tensors(
    groups: &Groups,
    ignored: &[String],
    inputs: Option<InputRounding>,
) -> Value {
    let largest = groups.iter().max_by_key(|(_, modules)| modules.names.len()).map(|(key, _)| *key);
    let mut names: Vec<&str> = groups.keys().map(|(_, encoding)| encoding.name()).collect();
    names.sort_unstable();
    names.dedup();
    let format = if let [one] = names.as_slice() { one } else { MIXED };
    let mut list = serde_json::Map::new();
    let (first, rest): (Vec<_>, Vec<_>) = groups.iter().partition(|(_, modules)| modules.experts);
    for (index, ((format, encoding), modules)) in first.into_iter().chain(rest).enumerate() {
        let linear = [String::from("Linear")];
        let all = largest == Some((*format, *encoding));
        let targets = if all { linear.as_slice() } else { modules.names.as_slice() };
        // compressed-tensors guesses a format that is not given from weights and inputs, and takes
        // `int-quantized` for integers that meet integers, however they are packed. vLLM reads
        // experts in `pack-quantized` only where the group itself says so.
        let group = json!({
            "targets": targets,
            "format": encoding.name(),
            "weights": weights(format),
            "input_activations": inputs.map(InputRounding::arguments),
            "output_activations": null,
        });
        list.insert(format!("group_{index}"), group);
    }
    json!({
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignored,
        "config_groups": list,
    })
}

/// A group's weights.
fn weights(format: &ScaledFormat) -> Value {
    let (strategy, group_size) = match format.block {
        Block::Group(size) if format.scale == ScaleType::E4M3Global => {
            ("tensor_group", json!(size))
        }
        Block::Group(size) => ("group", json!(size)),
        Block::Channel => ("channel", Value::Null),
        Block::Tensor => ("tensor", Value::Null),
        Block::Tile(..) => ("block", Value::Null),
    };
    let mut weights = json!({
        "num_bits": format.element.bits(),
        "type": if matches!(format.element, Element::Int(_)) { "int" } else { "float" },
        "symmetric": format.zero == ZeroPoint::None,
        "strategy": strategy,
        "group_size": group_size,
        "dynamic": false,
    });
    if let Block::Tile(rows, columns) = format.block {
        weights["block_structure"] = json!([rows, columns]);
    }
    match format.scale {
        ScaleType::E8M0 => weights["scale_dtype"] = "torch.uint8".into(),
        ScaleType::E4M3Global => weights["scale_dtype"] = "torch.float8_e4m3fn".into(),
        ScaleType::F32 | ScaleType::F16 | ScaleType::BF16 => {}
    }
    weights
}

/// gpt-oss's: what is not experts is not converted.
pub(super) fn mxfp4_experts() -> Value {
    json!({
        "quant_method": "mxfp4",
        "modules_to_not_convert": [
            "model.layers.*.self_attn",
            "model.layers.*.mlp.router",
            "model.embed_tokens",
            "lm_head",
        ],
    })
}

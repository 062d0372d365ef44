//! What a compressed-tensors `quantization_config` says is done to inputs while a model runs:
//! `input_activations` of its groups, and online rotations of its `transform_config`.
//!
//! compressed-tensors 0.20: `quantization/quant_args.py`, `transform/transform_args.py`.

use lathe_program::InputTransform;
use lathe_tensor::ActivationFormat;
use serde_json::{Value, json};

use super::quantization::section;
use super::scheme::refuse;
use super::targets::Targets;
use crate::config::Config;
use crate::spec::SpecError;

/// An online rotation of the inputs of some modules.
#[derive(Debug, Clone)]
struct Rotation {
    targets: Targets<()>,
    ignored: Targets<()>,
    /// Elements of a block.
    block: usize,
}

/// How inputs are rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rounding {
    format: ActivationFormat,
    /// Whether the files store the scale.
    stored: bool,
}

/// What is done to the input of one module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModuleInput {
    /// All but a scale that the files store.
    pub transform: InputTransform,
    /// How the name of that scale's tensor ends, behind the module's: `input_scale`, the step of a
    /// code, or `input_global_scale`, what NVFP4's scales are divided by.
    pub stored_scale: Option<&'static str>,
}

/// The part of a `quantization_config` that speaks of inputs.
#[derive(Debug, Clone, Default)]
pub struct InputScheme {
    /// What each group's inputs are rounded to, if that is one of [`ActivationFormat`].
    formats: Targets<Option<Rounding>>,
    /// Modules whose inputs are not rounded, whatever group they are in.
    ignored: Targets<()>,
    rotations: Vec<Rotation>,
}

impl InputScheme {
    /// What a `config.json` says; nothing, if its method is another one.
    ///
    /// # Errors
    /// If it asks for something that is not supported, which the error names.
    pub fn from_hf_config(config: &Value) -> Result<Self, SpecError> {
        let Some(c) = section(&Config::new(config, "")?)? else {
            return Ok(Self::default());
        };
        if c.text("quant_method")?.is_some_and(|method| method != "compressed-tensors") {
            return Ok(Self::default());
        }
        let mut all = InputScheme {
            ignored: Targets::of(&c.texts("ignore")?.unwrap_or_default(), ())?,
            ..Self::default()
        };
        if let Some(groups) = c.object("config_groups")? {
            for name in groups.given() {
                let Some(group) = groups.object(name)? else { continue };
                // Formats that nothing here rounds to are for engines whose products need them:
                // inputs then stay as they are, which no weight depends on.
                let inputs = group.object("input_activations")?;
                let format = inputs.and_then(|inputs| rounding(&inputs));
                for target in group.texts("targets")?.unwrap_or_default() {
                    all.formats.add(target, format)?;
                }
            }
        }
        let transforms = c.object("transform_config")?;
        let groups = transforms.map(|it| it.object("config_groups")).transpose()?.flatten();
        if let Some(groups) = groups {
            for name in groups.given() {
                let Some(group) = groups.object(name)? else { continue };
                rotation(&group, &mut all.rotations)?;
            }
        }
        Ok(all)
    }

    /// Whether it says nothing.
    pub fn is_empty(&self) -> bool {
        self.rotations.is_empty() && self.formats.values().all(Option::is_none)
    }

    /// What is done to the input of the module called `name`.
    ///
    /// # Errors
    /// If two rotations are for it, or an expression cannot be evaluated.
    pub fn of_module(&self, name: &str) -> Result<ModuleInput, SpecError> {
        let rounding = match self.ignored.find(name)? {
            Some(()) => None,
            None => self.formats.find(name)?.flatten(),
        };
        let mut hadamard = None;
        for Rotation { targets, ignored, block } in &self.rotations {
            if targets.find(name)?.is_none() || ignored.find(name)?.is_some() {
                continue;
            }
            if hadamard.replace(*block).is_some() {
                return refuse(format!("config with two groups for the input of {name}"));
            }
        }
        let stored = rounding.filter(|rounding| rounding.stored);
        let stored_scale = stored.map(|rounding| match rounding.format {
            ActivationFormat::Nvfp4 => "input_global_scale",
            _ => "input_scale",
        });
        let format = rounding.map(|rounding| rounding.format);
        let transform = InputTransform { hadamard, format, scale: None };
        Ok(ModuleInput { transform, stored_scale })
    }
}

/// The rounding that a scheme's arguments name, if it is to one of [`ActivationFormat`].
fn rounding(c: &Config<'_>) -> Option<Rounding> {
    let stored = [false, true].into_iter();
    let all = stored.flat_map(|stored| ActivationFormat::ALL.map(|it| (it, stored)));
    let known = all.filter(|(format, stored)| !stored || format.takes_scale());
    let found = known.into_iter().find(|(format, stored)| {
        let expected = if *stored { stored_arguments(*format) } else { arguments(*format) };
        expected.as_object().into_iter().flatten().all(|(key, value)| {
            // A group's scales are bytes in MX formats alone; files of older versions do not say.
            let optional = matches!(key.as_str(), "scale_dtype" | "symmetric");
            match c.get(key) {
                Some(found) => {
                    found == value || (key == "scale_dtype" && is_same_type(found, value))
                }
                None => value.is_null() || optional,
            }
        })
    });
    found.map(|(format, stored)| Rounding { format, stored })
}

/// The same as [`arguments`], where the scale is stored: one for a whole tensor (`dynamic: false`),
/// or NVFP4's second one (`"local"`: those of blocks are the row's own).
pub(crate) fn stored_arguments(format: ActivationFormat) -> Value {
    let mut arguments = arguments(format);
    match format {
        ActivationFormat::Nvfp4 => arguments["dynamic"] = "local".into(),
        _ => {
            arguments["dynamic"] = false.into();
            arguments["strategy"] = "tensor".into();
        }
    }
    arguments
}

/// `uint8` and `torch.uint8`.
fn is_same_type(found: &Value, expected: &Value) -> bool {
    let plain = |value: &Value| {
        value.as_str().map(|text| text.strip_prefix("torch.").unwrap_or(text).to_owned())
    };
    plain(found) == plain(expected)
}

/// compressed-tensors' `QuantizationArgs` of a format. NVFP4's second scale is made from the row
/// (`dynamic: true`); `"local"` means one that calibration found.
pub(crate) fn arguments(format: ActivationFormat) -> Value {
    let token = |bits: u32, kind: &str| {
        json!({"num_bits": bits, "type": kind, "symmetric": true, "strategy": "token",
               "group_size": null, "dynamic": true})
    };
    let mx = |bits: u32| {
        json!({"num_bits": bits, "type": "float", "symmetric": true, "strategy": "group",
               "group_size": 32, "dynamic": true, "scale_dtype": "torch.uint8"})
    };
    match format {
        ActivationFormat::Int4Token => token(4, "int"),
        ActivationFormat::Int8Token => token(8, "int"),
        ActivationFormat::Fp8Token => token(8, "float"),
        ActivationFormat::Mxfp8 => mx(8),
        ActivationFormat::Mxfp4 => mx(4),
        ActivationFormat::Nvfp4 => json!({
            "num_bits": 4, "type": "float", "symmetric": true, "strategy": "tensor_group",
            "group_size": 16, "dynamic": true, "scale_dtype": "torch.float8_e4m3fn"}),
    }
}

/// The online parts of one `TransformScheme`. Those of weights are folded in already.
fn rotation(group: &Config<'_>, rotations: &mut Vec<Rotation>) -> Result<(), SpecError> {
    let kind = group.text("type")?.unwrap_or("(none given)");
    let randomize = group.flag("randomize")?.unwrap_or(false);
    let block = group.size("head_dim")?;
    let applied = group.get("apply").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
    for entry in applied {
        let entry = Config::new(entry, "transform_config.apply.")?;
        match entry.text("location")? {
            Some("weight_input" | "weight_output") => continue,
            Some("input") => {}
            found => return refuse(format!("transform at `{}`", found.unwrap_or("(none given)"))),
        }
        if kind != "hadamard" || randomize {
            let random = if randomize { "randomized " } else { "" };
            return refuse(format!("{random}transform of type `{kind}` while the model runs"));
        }
        let Some(block) = block.filter(|block| *block > 0) else {
            return refuse("transform of whole rows (head_dim is not given)");
        };
        // Sylvester's matrices, and those of even Paley kind, are not all symmetric; an inverse
        // is the same rotation only where they are.
        if entry.flag("inverse")?.unwrap_or(false) && !block.is_power_of_two() {
            return refuse(format!("inverse of a transform of {block} elements"));
        }
        rotations.push(Rotation {
            targets: Targets::of(&entry.texts("targets")?.unwrap_or_default(), ())?,
            ignored: Targets::of(&entry.texts("ignore")?.unwrap_or_default(), ())?,
            block,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheme(config: Value) -> Result<InputScheme, SpecError> {
        InputScheme::from_hf_config(&json!({ "quantization_config": config }))
    }

    #[test]
    fn every_format_is_read_as_it_is_written() {
        for format in ActivationFormat::ALL {
            let config = json!({
                "quant_method": "compressed-tensors",
                "ignore": ["lm_head", "re:.*layers\\.1\\."],
                "config_groups": {"group_0": {
                    "targets": ["Linear"], "weights": {}, "input_activations": arguments(format)}},
                "transform_config": {"config_groups": {"R4": {
                    "type": "hadamard", "head_dim": 32, "apply": [
                        {"targets": ["re:.*down_proj$"], "location": "input"},
                        {"targets": ["re:.*down_proj$"], "location": "weight_input",
                         "inverse": true}]}}},
            });
            let scheme = scheme(config).unwrap();
            let of = |name: &str| scheme.of_module(name).unwrap().transform;
            let plain = InputTransform { format: Some(format), ..InputTransform::default() };
            assert_eq!(of("model.layers.0.mlp.up_proj"), plain);
            let rotated = InputTransform { hadamard: Some(32), ..plain };
            assert_eq!(of("model.layers.0.mlp.down_proj"), rotated);
            assert!(of("lm_head").is_nothing() && of("model.layers.1.mlp.up_proj").is_nothing());
        }
    }

    #[test]
    fn stored_scales_are_asked_for_by_their_names() {
        for (format, ending) in [
            (ActivationFormat::Nvfp4, "input_global_scale"),
            (ActivationFormat::Fp8Token, "input_scale"),
            (ActivationFormat::Int8Token, "input_scale"),
        ] {
            let config = json!({
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {
                    "targets": ["Linear"], "input_activations": stored_arguments(format)}}});
            let found = scheme(config).unwrap().of_module("model.layers.0.mlp.up_proj").unwrap();
            assert_eq!((found.transform.format, found.stored_scale), (Some(format), Some(ending)));
        }
    }

    #[test]
    fn what_is_not_supported_is_named() {
        let group = |inputs: Value| {
            json!({"quant_method": "compressed-tensors",
                   "config_groups": {"g": {"targets": ["Linear"], "input_activations": inputs}}})
        };
        // NVFP4 has scales of blocks, which no file stores.
        let mut stored = arguments(ActivationFormat::Nvfp4);
        stored["dynamic"] = json!(false);
        assert!(scheme(group(stored)).unwrap().is_empty());
        let mut six = arguments(ActivationFormat::Int8Token);
        six["num_bits"] = json!(6);
        assert!(scheme(group(six)).unwrap().is_empty());
        let transform = |scheme: Value| {
            json!({"quant_method": "compressed-tensors",
                   "transform_config": {"config_groups": {"t": scheme}}})
        };
        let at = |location: &str| json!([{"targets": ["Linear"], "location": location}]);
        for (config, expected) in [
            (
                transform(json!({"type": "hadamard", "head_dim": 8, "apply": at("q_attn")})),
                "`q_attn`",
            ),
            (transform(json!({"type": "hadamard", "apply": at("input")})), "whole rows"),
            (transform(json!({"type": "random-matrix", "apply": at("input")})), "`random-matrix`"),
            (group(json!(3)), "input_activations` is 3"),
        ] {
            let error = scheme(config).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}

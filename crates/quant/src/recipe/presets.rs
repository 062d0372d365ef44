//! Presets: the names of formats that people ask for, and what they mean here.

use lathe_tensor::suggest::one_of;
use lathe_tensor::{ActivationFormat, Block, Element, Format, ScaledFormat};

use super::wrong;
use crate::error::QuantError;

/// A short name for a weight format and, for some, an input format.
#[derive(Debug, Clone, Copy)]
pub struct Preset {
    /// The name.
    pub name: &'static str,
    /// The format of weights.
    pub format: &'static str,
    /// The format that inputs are rounded to.
    pub activations: Option<ActivationFormat>,
}

const fn preset(
    name: &'static str,
    format: &'static str,
    activations: Option<ActivationFormat>,
) -> Preset {
    Preset { name, format, activations }
}

/// Every preset.
pub static PRESETS: [Preset; 26] = [
    preset("w4a16", "int4-g128-bf16", None),
    preset("w8a16", "int8-channel-bf16", None),
    preset("w4a4", "int4-g128-bf16", Some(ActivationFormat::Int4Token)),
    preset("w4a8", "int4-g128-bf16", Some(ActivationFormat::Int8Token)),
    preset("w8a8", "int8-channel-bf16", Some(ActivationFormat::Int8Token)),
    preset("w8a8-fp8", "f8e4m3-channel-bf16", Some(ActivationFormat::Fp8Token)),
    preset("int8", "int8-channel-bf16", None),
    preset("fp8", "f8e4m3-channel-bf16", None),
    preset("fp8_tensor", "f8e4m3-tensor-bf16", None),
    preset("fp8_channel", "f8e4m3-channel-bf16", None),
    preset("fp8_block", "f8e4m3-tile128x128-bf16", None),
    preset("mxfp8", "f8e4m3-g32-e8m0", None),
    preset("mxfp6", "f6e2m3-g32-e8m0", None),
    preset("mxfp4", "f4e2m1-g32-e8m0", None),
    preset("mxfp4-a4", "f4e2m1-g32-e8m0", Some(ActivationFormat::Mxfp4)),
    preset("mxfp4-a8", "f4e2m1-g32-e8m0", Some(ActivationFormat::Mxfp8)),
    preset("nvfp4", "f4e2m1-g16-e4m3global", None),
    preset("nvfp4-a4", "f4e2m1-g16-e4m3global", Some(ActivationFormat::Nvfp4)),
    preset("q4_0", "q4_0", None),
    preset("q5_0", "q5_0", None),
    preset("q8_0", "q8_0", None),
    preset("q4_k", "q4_k", None),
    preset("q5_k", "q5_k", None),
    preset("q6_k", "q6_k", None),
    preset("iq4_nl", "iq4_nl", None),
    preset("iq4_xs", "iq4_xs", None),
];

/// The format that a preset or a format's own name means. `group` replaces the group size.
///
/// # Errors
/// If there is no such format, or its group size is fixed.
pub fn format_named(name: &str, group: Option<u32>) -> Result<Format, QuantError> {
    let lower = name.to_lowercase();
    let preset = PRESETS.iter().find(|preset| preset.name == lower);
    let format =
        Format::parse(preset.map_or(lower.as_str(), |preset| preset.format)).map_err(|_| {
            let presets: Vec<&str> = PRESETS.iter().map(|preset| preset.name).collect();
            let presets = one_of(name, &presets);
            wrong(format!(
                "unknown format `{name}`, expected a name like int4-g64-bf16 or {presets}"
            ))
        })?;
    match (format, group) {
        (format, None) => Ok(format),
        (Format::Scaled(scaled), Some(size @ 1..)) if matches!(scaled.element, Element::Int(_)) => {
            Ok(Format::Scaled(ScaledFormat { block: Block::Group(size), ..scaled }))
        }
        (format, Some(group)) => {
            Err(wrong(format!("groups of {group}: {format} has no groups of a free size")))
        }
    }
}

/// The input format of a preset. `None` if `name` is no preset or has none.
pub fn activations_of(name: &str) -> Option<ActivationFormat> {
    let lower = name.to_lowercase();
    PRESETS.iter().find(|preset| preset.name == lower)?.activations
}

/// The format of activations called `name`.
///
/// # Errors
/// If there is none. The message lists the names.
pub fn activations_named(name: &str) -> Result<ActivationFormat, QuantError> {
    ActivationFormat::parse(&name.to_lowercase()).ok_or_else(|| {
        let known = one_of(name, &ActivationFormat::ALL.map(ActivationFormat::name));
        wrong(format!("unknown format of activations `{name}`, expected {known}"))
    })
}

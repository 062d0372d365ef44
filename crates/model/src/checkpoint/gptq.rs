//! GPTQ checkpoints (AutoGPTQ, GPTQModel): codes packed along inputs, `[inputs * bits / 32,
//! outputs]`.
//!
//! Format `gptq` stores words of zero points with one less in every code; `gptq_v2` stores them as
//! they are. 3-bit codes are a stream that runs across words; of those, writers of the first format
//! disagree about what "one less" is, and it is refused.

use lathe_tensor::Tensor;
use lathe_tensor::safetensors::Checkpoint as SafetensorsFiles;
use rayon::prelude::*;
use serde_json::Value;

use super::integers::{CODES, Integers, SCALES, ZEROS, code_at, in_order, words};
use super::naming::Naming;
use super::{CheckpointError, unlike};
use crate::config::Config;
use crate::spec::SpecError;

const ORDER: &str = "g_idx";

pub(super) static NAMING: Naming =
    Naming { whole: "weight", codes: &[CODES], beside: &[ZEROS, SCALES, ORDER] };

/// What a `quantization_config` whose method is `gptq` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GptqScheme {
    /// Bits of a code: 2, 3, 4 or 8.
    pub bits: u8,
    /// Inputs that share a scale; `None` for all.
    pub group: Option<u32>,
    /// What has to be added to words of zero points.
    pub zero_offset: u32,
    /// Whether inputs have groups in the order of their activations, which `g_idx` gives.
    pub ordered: bool,
}

impl GptqScheme {
    /// What a configuration of AutoRound says, whose files are packed as GPTQ's.
    pub(super) fn from_auto_round(c: &Config<'_>) -> Result<Self, SpecError> {
        let packing = c.text("packing_format")?.unwrap_or("(none given)");
        if packing != "auto_round:auto_gptq" {
            return Err(SpecError::feature(format!("AutoRound packing `{packing}`")));
        }
        if let Some(type_) = c.text("data_type")?.filter(|it| *it != "int") {
            return Err(SpecError::feature(format!("AutoRound data_type `{type_}`")));
        }
        let modules = c.object("extra_config")?;
        for module in modules.iter().flat_map(Config::given) {
            let own = modules.and_then(|it| it.object(module).ok().flatten());
            let bits = own.and_then(|own| own.size("bits").ok().flatten());
            // Modules of 16 bits and more lie as plain tensors.
            if bits.is_none_or(|bits| bits < 16) {
                let what = format!("AutoRound extra_config of module {module}");
                return Err(SpecError::feature(what));
            }
        }
        Self::from_hf_config(c)
    }

    pub(super) fn from_hf_config(c: &Config<'_>) -> Result<Self, SpecError> {
        let refuse = |what: String| Err(SpecError::feature(format!("GPTQ {what}")));
        let bits = match c.need("bits")? {
            bits @ (2 | 3 | 4 | 8) => bits as u8,
            bits => return refuse(format!("weights of {bits} bits")),
        };
        let format = c.text("checkpoint_format")?.or(c.text("format")?).unwrap_or("gptq");
        let zero_offset = match (format, bits) {
            ("gptq", 2) => 0x5555_5555,
            ("gptq", 4) => 0x1111_1111,
            ("gptq", 8) => 0x0101_0101,
            ("gptq_v2", _) => 0,
            (other, _) => return refuse(format!("checkpoint format `{other}` of {bits} bits")),
        };
        if c.flag("is_marlin_format")? == Some(true) {
            return refuse("checkpoint format `marlin`".to_owned());
        }
        if let Some(word) = c.text("pack_dtype")?.filter(|word| *word != "int32") {
            return refuse(format!("words of type {word}"));
        }
        if c.object("dynamic")?.is_some_and(|rules| rules.given().any(|it| !it.starts_with("-:"))) {
            return refuse("formats of single modules (`dynamic`)".to_owned());
        }
        let group = group_of(c.get("group_size"))?;
        let ordered = c.flag("desc_act")?.unwrap_or(false);
        Ok(GptqScheme { bits, group, zero_offset, ordered })
    }
}

/// `group_size`: -1 is a whole row.
pub(super) fn group_of(value: Option<&Value>) -> Result<Option<u32>, SpecError> {
    match value.and_then(Value::as_i64) {
        Some(-1) => Ok(None),
        Some(size @ 1..=65536) => Ok(Some(size as u32)),
        _ => {
            let found = value.map_or("nothing".to_owned(), Value::to_string);
            Err(SpecError::value("quantization_config.group_size", found, "-1 or a size"))
        }
    }
}

/// `[outputs, inputs]`.
pub(super) fn shape(
    files: &SafetensorsFiles,
    name: &str,
    scheme: &GptqScheme,
) -> Result<Vec<usize>, CheckpointError> {
    let codes = NAMING.part(name, CODES);
    if !files.contains(&codes) {
        return Ok(files.raw(name)?.shape.clone());
    }
    let (raw, bits) = (files.raw(&codes)?, usize::from(scheme.bits));
    let refuse = || unlike(&codes, raw, format!("I32 [inputs * {bits} / 32, outputs]"));
    let &[words, outputs] = raw.shape.as_slice() else { return Err(refuse()) };
    // Without outputs, words may be any number.
    match words.checked_mul(32) {
        Some(all) if all.is_multiple_of(bits) => Ok(vec![outputs, all / bits]),
        _ => Err(refuse()),
    }
}

pub(super) fn tensor(
    files: &SafetensorsFiles,
    name: &str,
    scheme: &GptqScheme,
) -> Result<Tensor, CheckpointError> {
    let part = |ending| NAMING.part(name, ending);
    if !files.contains(&part(CODES)) {
        return Ok(files.tensor(name)?);
    }
    let shape = shape(files, name, scheme)?;
    let (outputs, inputs, bits) = (shape[0], shape[1], usize::from(scheme.bits));
    let (packed, _) = words(&part(CODES), files.raw(&part(CODES))?)?;
    let mut codes = vec![0; outputs * inputs];
    if inputs > 0 {
        codes.par_chunks_mut(inputs).enumerate().for_each(|(output, row)| {
            let word = |index: usize| packed[index * outputs + output];
            row.iter_mut().enumerate().for_each(|(input, code)| *code = code_at(word, input, bits));
        });
    }
    let zeros_raw = files.raw(&part(ZEROS))?;
    let (packed, [groups, along]) = words(&part(ZEROS), zeros_raw)?;
    if along * 32 < outputs * bits {
        let expected = format!("I32 [groups, {outputs} * {bits} / 32]");
        return Err(unlike(&part(ZEROS), zeros_raw, expected));
    }
    let mut zeros = Vec::with_capacity(groups * outputs);
    for group in 0..groups {
        let word = |at: usize| packed[group * along + at].wrapping_add(scheme.zero_offset);
        zeros.extend((0..outputs).map(|output| code_at(word, output, bits)));
    }
    let scales_name = part(SCALES);
    let integers = Integers {
        name,
        shape: [outputs, inputs],
        bits,
        codes,
        zeros,
        scales: (&scales_name, files.raw(&scales_name)?),
        group: scheme.group.map(|size| size as usize),
    };
    let tensor = integers.tensor()?;
    match scheme.ordered || files.contains(&part(ORDER)) {
        true => in_order(files, name, &part(ORDER), tensor),
        false => Ok(tensor),
    }
}

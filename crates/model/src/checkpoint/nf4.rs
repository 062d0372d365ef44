//! bitsandbytes' 4-bit tables (NF4 of QLoRA, arXiv 2305.14314, and its FP4): codes in `weight`, the
//! scale of each block in `weight.absmax`, itself in eight bits with scales if "double quantized".
//!
//! No format of [`Tensor`] has a table of its own, so weights become, when they are read, the
//! floats that the library multiplies by: `table[code] * absmax` in `f32`, rounded to the type that
//! the checkpoint names. Memory is that of the model before it was quantized.

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype, RawTensor};
use lathe_tensor::{Bytes, FloatType, Format, Tensor, codec};
use rayon::prelude::*;
use serde_json::Value;

use super::naming::Naming;
use super::planes::expect;
use super::{CheckpointError, at, unlike};
use crate::config::Config;
use crate::spec::SpecError;

const STATES: [&str; 2] = [".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4"];

pub(super) static NAMING: Naming = Naming {
    whole: "",
    codes: &[],
    beside: &[".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATES[0], STATES[1]],
};

/// Refuses what a configuration asks for that is not supported.
pub(super) fn check(c: &Config<'_>) -> Result<(), SpecError> {
    match c.flag("load_in_4bit")?.or(c.flag("_load_in_4bit")?) {
        Some(true) => Ok(()),
        _ => Err(SpecError::feature("bitsandbytes configuration without load_in_4bit")),
    }
}

/// Whether a configuration asks for LLM.int8().
pub(super) fn is_of_eight_bits(c: &Config<'_>) -> Result<bool, SpecError> {
    Ok(c.flag("load_in_8bit")?.or(c.flag("_load_in_8bit")?) == Some(true))
}

/// What `quant_state` says of a weight.
struct State {
    shape: Vec<usize>,
    float: FloatType,
    block: usize,
    /// Blocks whose scales share a scale, and what is added to all scales.
    nested: Option<(usize, f32)>,
}

/// Whether `name` is quantized, and the name of what says how.
fn state_name(files: &SafetensorsFiles, name: &str) -> Option<String> {
    let all = STATES.iter().map(|ending| NAMING.part(name, ending));
    all.into_iter().find(|state| files.contains(state))
}

impl State {
    fn read(files: &SafetensorsFiles, name: &str) -> Result<State, CheckpointError> {
        let raw = files.raw(name)?;
        expect(name, raw, &[Dtype::U8])?;
        let wrong = |key: &str| unlike(name, raw, format!("JSON with a usable `{key}`"));
        let json: Value = serde_json::from_slice(&raw.bytes).map_err(|_| wrong("shape"))?;
        let size = |key: &str| {
            let found = json.get(key).and_then(Value::as_u64).filter(|size| *size > 0);
            found.and_then(|size| usize::try_from(size).ok())
        };
        let shape = json.get("shape").and_then(Value::as_array).and_then(|list| {
            let sizes = list.iter().map(|it| it.as_u64().and_then(|it| usize::try_from(it).ok()));
            sizes.collect::<Option<Vec<usize>>>()
        });
        let float = match json.get("dtype").and_then(Value::as_str) {
            Some("float32") => FloatType::F32,
            Some("float16") => FloatType::F16,
            Some("bfloat16") => FloatType::BF16,
            _ => return Err(wrong("dtype")),
        };
        let nested = match json.get("nested_offset") {
            None | Some(Value::Null) => None,
            Some(offset) => {
                let offset = offset.as_f64().ok_or_else(|| wrong("nested_offset"))? as f32;
                Some((size("nested_blocksize").ok_or_else(|| wrong("nested_blocksize"))?, offset))
            }
        };
        Ok(State {
            shape: shape.ok_or_else(|| wrong("shape"))?,
            float,
            block: size("blocksize").ok_or_else(|| wrong("blocksize"))?,
            nested,
        })
    }
}

pub(super) fn shape(files: &SafetensorsFiles, name: &str) -> Result<Vec<usize>, CheckpointError> {
    match state_name(files, name) {
        Some(state) => Ok(State::read(files, &state)?.shape),
        None => Ok(files.raw(name)?.shape.clone()),
    }
}

pub(super) fn tensor(files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
    let Some(state) = state_name(files, name) else { return Ok(files.tensor(name)?) };
    let state = State::read(files, &state)?;
    let codes = files.raw(name)?;
    expect(name, codes, &[Dtype::U8])?;
    let elements = state.shape.iter().try_fold(1usize, |all, size| all.checked_mul(*size));
    let elements = elements.filter(|count| count.div_ceil(2) == codes.bytes.len());
    let Some(elements) = elements else {
        return Err(unlike(name, codes, format!("two codes a byte of {:?}", state.shape)));
    };
    let table = floats(files, &NAMING.part(name, ".quant_map"), 16)?;
    let scales = scales(files, name, &state, elements.div_ceil(state.block))?;
    let mut values = vec![0f32; elements];
    // Blocks are runs of elements, whatever rows they lie in; the high half of a byte comes first.
    values.par_chunks_mut(state.block).zip(scales).enumerate().for_each(|(block, (out, scale))| {
        for (i, value) in out.iter_mut().enumerate() {
            let at = block * state.block + i;
            let code = codes.bytes[at / 2] >> (4 * (1 - at % 2)) & 15;
            *value = table[usize::from(code)] * scale;
        }
    });
    let format = Format::Float(state.float);
    let bytes = Bytes::new(codec::quantize(format, &values));
    Tensor::new(state.shape, format, bytes).map_err(at(name))
}

/// One scale a block.
fn scales(
    files: &SafetensorsFiles,
    name: &str,
    state: &State,
    blocks: usize,
) -> Result<Vec<f32>, CheckpointError> {
    let scales_name = NAMING.part(name, ".absmax");
    let Some((nested_block, offset)) = state.nested else {
        return floats(files, &scales_name, blocks);
    };
    let codes = files.raw(&scales_name)?;
    expect(&scales_name, codes, &[Dtype::U8])?;
    if codes.bytes.len() != blocks {
        return Err(unlike(&scales_name, codes, format!("U8 [{blocks}]")));
    }
    let table = floats(files, &NAMING.part(name, ".nested_quant_map"), 256)?;
    let count = blocks.div_ceil(nested_block);
    let nested = floats(files, &NAMING.part(name, ".nested_absmax"), count)?;
    let scale =
        |(at, code): (usize, &u8)| table[usize::from(*code)] * nested[at / nested_block] + offset;
    Ok(codes.bytes.iter().enumerate().map(scale).collect())
}

/// `count` numbers of `f32`.
fn floats(files: &SafetensorsFiles, name: &str, count: usize) -> Result<Vec<f32>, CheckpointError> {
    let raw: &RawTensor = files.raw(name)?;
    match (raw.dtype, raw.bytes.as_chunks::<4>()) {
        (Dtype::F32, (numbers, [])) if numbers.len() == count => {
            Ok(numbers.iter().map(|number| f32::from_le_bytes(*number)).collect())
        }
        _ => Err(unlike(name, raw, format!("F32 [{count}]"))),
    }
}

//! NVIDIA ModelOpt's unified checkpoints: NVFP4 and fp8 under the name `weight`, with
//! `weight_scale` and, for NVFP4, the multiplier `weight_scale_2`.
//!
//! `config.json` names the method and its algorithm, or `hf_quant_config.json` beside it does.
//! Which of the two encodings a tensor has is told by its type: layers of a mixed checkpoint
//! differ. Scales of a cache are not used.

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{
    ActivationFormat, Block, Bytes, Element, GlobalScale, ScaledFormat, Tensor, ZeroPoint,
};

use super::naming::Naming;
use super::planes::{self, Beside, expect, float_scale, scalar, shape_of_bytes};
use super::{CheckpointError, unlike};
use crate::config::Config;
use crate::spec::SpecError;

const SCALE: &str = "weight_scale";
const SCALE_2: &str = "weight_scale_2";
const INPUT_SCALE: &str = "input_scale";

pub(super) static NAMING: Naming = Naming {
    whole: "weight",
    codes: &[],
    beside: &[SCALE, SCALE_2, INPUT_SCALE, "k_scale", "v_scale"],
};

/// Algorithms whose weights are read here. Others change inputs (AWQ's `pre_quant_scale`,
/// SVDQuant's second product) or have integers.
const ALGORITHMS: [&str; 6] =
    ["NVFP4", "W4A16_NVFP4", "FP8", "FP8_PB_WO", "FP8_PER_CHANNEL_PER_TOKEN", "MIXED_PRECISION"];

/// Refuses what a configuration asks for that is not supported.
pub(super) fn check(c: &Config<'_>) -> Result<(), SpecError> {
    let one = |c: &Config<'_>| -> Result<(), SpecError> {
        let algorithm = c.text("quant_algo")?.unwrap_or("(none given)");
        if !ALGORITHMS.contains(&algorithm) {
            return Err(SpecError::feature(format!("ModelOpt algorithm `{algorithm}`")));
        }
        match c.size("group_size")? {
            Some(size) if algorithm.ends_with("NVFP4") && size != 16 => {
                Err(SpecError::feature(format!("ModelOpt {algorithm} in groups of {size}")))
            }
            _ => Ok(()),
        }
    };
    one(c)?;
    let Some(layers) = c.object("quantized_layers")? else { return Ok(()) };
    for name in layers.given() {
        layers.object(name)?.as_ref().map_or(Ok(()), one)?;
    }
    Ok(())
}

/// How the inputs of `module` are rounded, if their scale is stored. Of fp8 it is the step of a
/// code, and of NVFP4 the largest number over 6 * 448, whose reciprocal is the divisor.
pub(super) fn stored_input(
    files: &SafetensorsFiles,
    module: &str,
) -> Result<Option<(ActivationFormat, f32)>, CheckpointError> {
    let (weight, name) = (format!("{module}.weight"), format!("{module}.{INPUT_SCALE}"));
    if !files.contains(&name) {
        return Ok(None);
    }
    let scale = match files.tensor(&name)?.to_f32()[..] {
        [scale] => scale,
        _ => return Err(unlike(&name, files.raw(&name)?, "one number")),
    };
    Ok(Some(match files.raw(&weight)?.dtype {
        Dtype::U8 => (ActivationFormat::Nvfp4, scale.recip()),
        _ => (ActivationFormat::Fp8Token, scale),
    }))
}

/// Whether `name` lies as codes and scales.
fn is_quantized(files: &SafetensorsFiles, name: &str) -> bool {
    name.ends_with(NAMING.whole) && files.contains(&NAMING.part(name, SCALE))
}

pub(super) fn shape(files: &SafetensorsFiles, name: &str) -> Result<Vec<usize>, CheckpointError> {
    let raw = files.raw(name)?;
    match raw.dtype {
        Dtype::U8 if is_quantized(files, name) => shape_of_bytes(name, raw, 4),
        _ => Ok(raw.shape.clone()),
    }
}

pub(super) fn tensor(files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
    if !is_quantized(files, name) {
        return Ok(files.tensor(name)?);
    }
    let codes = files.raw(name)?;
    expect(name, codes, &[Dtype::U8, Dtype::F8_E4M3])?;
    let scales_name = NAMING.part(name, SCALE);
    let scales = files.raw(&scales_name)?;
    let zeros = Bytes::new(Vec::new());
    if codes.dtype == Dtype::U8 {
        expect(&scales_name, scales, &[Dtype::F8_E4M3])?;
        let global = GlobalScale::Multiply(vec![scalar(files, &NAMING.part(name, SCALE_2))?]);
        let shape = shape_of_bytes(name, codes, 4)?;
        let beside = Beside { scales_name: &scales_name, scales, zeros, global };
        return planes::tensor(name, shape, ScaledFormat::NVFP4, codes, beside);
    }
    let shape = shape_of_bytes(name, codes, 8)?;
    let real: Vec<usize> = scales.shape.iter().copied().filter(|size| *size != 1).collect();
    let block = match real.as_slice() {
        [] => Block::Tensor,
        [rows] if *rows == shape[0] => Block::Channel,
        // ModelOpt's blocks are squares of 128.
        [rows, columns]
            if [shape[0].div_ceil(128), shape[1].div_ceil(128)] == [*rows, *columns] =>
        {
            Block::Tile(128, 128)
        }
        _ => return Err(unlike(&scales_name, scales, "a scale of the tensor, rows or 128 x 128")),
    };
    let scale = float_scale(&scales_name, scales)?;
    let format = ScaledFormat { element: Element::F8E4M3, block, scale, zero: ZeroPoint::None };
    let beside = Beside { scales_name: &scales_name, scales, zeros, global: GlobalScale::One };
    planes::tensor(name, shape, format, codes, beside)
}

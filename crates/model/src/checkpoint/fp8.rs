//! fp8 e4m3: DeepSeek-V3's, with one multiplier a tile in `*_scale_inv`, and that of AutoFP8 and of
//! transformers without tiles, with one multiplier a matrix or a row.

use lathe_tensor::codec::element::e8m0_to_f32;
use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype, RawTensor};
use lathe_tensor::{
    ActivationFormat, Block, Bytes, Element, Format, GlobalScale, ScaleType, ScaledFormat, Tensor,
    ZeroPoint,
};

use super::naming::Naming;
use super::{CheckpointError, at, unlike};
use crate::config::Config;
use crate::spec::SpecError;

pub(super) static NAMING: Naming = Naming { whole: "", codes: &[], beside: &["_scale_inv"] };

/// Names of the multiplier of a whole matrix.
const WHOLE_SCALES: [&str; 2] = ["weight_scale", "weight_scale_inv"];

pub(super) static OF_TENSORS: Naming = Naming {
    whole: "weight",
    codes: &[],
    beside: &[WHOLE_SCALES[0], WHOLE_SCALES[1], INPUT_SCALES[0], INPUT_SCALES[1]],
};

/// Refuses another format of eight bits.
pub(super) fn check(c: &Config<'_>) -> Result<(), SpecError> {
    match c.text("fmt")?.filter(|element| *element != "e4m3") {
        Some(element) => Err(SpecError::feature(format!("fp8 format `{element}`"))),
        None => Ok(()),
    }
}

/// fp8 codes with one multiplier a matrix or a row; other tensors are plain.
pub(super) fn with_one_scale(
    files: &SafetensorsFiles,
    name: &str,
) -> Result<Tensor, CheckpointError> {
    let codes = files.raw(name)?;
    if codes.dtype != Dtype::F8_E4M3 {
        return Ok(files.tensor(name)?);
    }
    let names = WHOLE_SCALES.map(|ending| OF_TENSORS.part(name, ending));
    let there = names.iter().find(|scale| files.contains(scale)).unwrap_or(&names[0]);
    let scales = widened(files, there)?;
    let block = match scales.len() / 4 {
        1 => Block::Tensor,
        rows if codes.shape.first() == Some(&rows) => Block::Channel,
        _ => return Err(unlike(there, files.raw(there)?, "one scale, or one a row")),
    };
    of_scales(name, codes, block, scales)
}

/// Names of the step of a whole matrix's inputs.
const INPUT_SCALES: [&str; 2] = ["input_scale", "activation_scale"];

/// The step of the inputs of `module`, if it is stored (`activation_scheme: "static"`).
pub(super) fn stored_input(
    files: &SafetensorsFiles,
    module: &str,
) -> Result<Option<(ActivationFormat, f32)>, CheckpointError> {
    let names = INPUT_SCALES.map(|ending| format!("{module}.{ending}"));
    let Some(name) = names.iter().find(|name| files.contains(name)) else { return Ok(None) };
    match files.tensor(name)?.to_f32()[..] {
        [scale] => Ok(Some((ActivationFormat::Fp8Token, scale))),
        _ => Err(unlike(name, files.raw(name)?, "one number")),
    }
}

/// Rows and columns of a tile.
pub(super) fn tile(c: &Config<'_>) -> Result<(u32, u32), SpecError> {
    check(c)?;
    match c.sizes("weight_block_size")?.as_deref() {
        Some(&[rows, columns]) if (1..=4096).contains(&rows) && (1..=4096).contains(&columns) => {
            Ok((rows as u32, columns as u32))
        }
        found => Err(SpecError::feature(format!("fp8 weight_block_size {found:?}"))),
    }
}

/// fp8 codes with one multiplier a tile; other tensors are plain.
pub(super) fn tensor(
    files: &SafetensorsFiles,
    name: &str,
    (rows, columns): (u32, u32),
) -> Result<Tensor, CheckpointError> {
    let codes = files.raw(name)?;
    if codes.dtype != Dtype::F8_E4M3 {
        return Ok(files.tensor(name)?);
    }
    let scales = widened(files, &NAMING.part(name, "_scale_inv"))?;
    of_scales(name, codes, Block::Tile(rows, columns), scales)
}

fn of_scales(
    name: &str,
    codes: &RawTensor,
    block: Block,
    scales: Bytes,
) -> Result<Tensor, CheckpointError> {
    let format = Format::Scaled(ScaledFormat {
        element: Element::F8E4M3,
        block,
        scale: ScaleType::F32,
        zero: ZeroPoint::None,
    });
    let (shape, none) = (codes.shape.clone(), Bytes::new(Vec::new()));
    Tensor::new_scaled(shape, format, codes.bytes.clone(), scales, none, GlobalScale::One)
        .map_err(at(name))
}

/// Scales as `f32`: they may be stored in fewer bits, or as powers of two (`ue8m0`).
fn widened(files: &SafetensorsFiles, name: &str) -> Result<Bytes, CheckpointError> {
    let raw = files.raw(name)?;
    let values = match raw.dtype {
        Dtype::F8_E8M0 => raw.bytes.iter().map(|code| e8m0_to_f32(*code)).collect(),
        _ => files.tensor(name)?.to_f32(),
    };
    Ok(Bytes::new(values.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<u8>>()))
}

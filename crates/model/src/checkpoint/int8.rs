//! bitsandbytes' LLM.int8() (arXiv 2208.07339): codes of eight bits in `weight`, the largest
//! magnitude of each row in `SCB`.
//!
//! `weight = code * SCB / 127`, which the library's own `int8_vectorwise_dequant` computes. The
//! library also rounds inputs, but for outliers, to eight bits; inputs stay as they are here.

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{
    Block, Bytes, Element, Format, GlobalScale, ScaleType, ScaledFormat, Tensor, ZeroPoint,
};

use super::naming::Naming;
use super::planes::expect;
use super::{CheckpointError, at, unlike};

const LARGEST: &str = "SCB";

pub(super) static NAMING: Naming =
    Naming { whole: "weight", codes: &[], beside: &[LARGEST, "weight_format"] };

/// 1 / 127 as the library writes it.
const STEP: f32 = 7.874_016e-3;

pub(super) fn tensor(files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
    let largest_name = NAMING.part(name, LARGEST);
    if !name.ends_with(NAMING.whole) || !files.contains(&largest_name) {
        return Ok(files.tensor(name)?);
    }
    let codes = files.raw(name)?;
    expect(name, codes, &[Dtype::I8])?;
    let largest = files.raw(&largest_name)?;
    expect(&largest_name, largest, &[Dtype::F32])?;
    if largest.shape.iter().product::<usize>() != codes.shape.first().copied().unwrap_or(0) {
        return Err(unlike(&largest_name, largest, "one number a row"));
    }
    let numbers = largest.bytes.as_chunks::<4>().0.iter().map(|it| f32::from_le_bytes(*it));
    let scales: Vec<u8> = numbers.flat_map(|largest| (largest * STEP).to_le_bytes()).collect();
    let format = Format::Scaled(ScaledFormat {
        element: Element::Int(8),
        block: Block::Channel,
        scale: ScaleType::F32,
        zero: ZeroPoint::None,
    });
    let (shape, none) = (codes.shape.clone(), Bytes::new(Vec::new()));
    let scales = Bytes::new(scales);
    Tensor::new_scaled(shape, format, codes.bytes.clone(), scales, none, GlobalScale::One)
        .map_err(at(name))
}

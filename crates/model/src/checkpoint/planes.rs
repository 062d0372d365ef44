//! Codes that lie in a tensor of their own just as [`Tensor`] has them, with their scales beside.

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype, RawTensor};
use lathe_tensor::{Bytes, Format, GlobalScale, ScaleType, ScaledFormat, Tensor};

use super::{CheckpointError, at, unlike};

/// What belongs to a matrix's codes.
pub(super) struct Beside<'a> {
    /// The scales' name, for messages.
    pub scales_name: &'a str,
    /// Scales, in the format's type and in the order of its grid.
    pub scales: &'a RawTensor,
    /// Zero points, one byte each in the scales' order; empty in symmetric formats.
    pub zeros: Bytes,
    /// NVFP4's second scale.
    pub global: GlobalScale,
}

/// The matrix called `name` of `shape` in `format`.
pub(super) fn tensor(
    name: &str,
    shape: Vec<usize>,
    format: ScaledFormat,
    codes: &RawTensor,
    beside: Beside<'_>,
) -> Result<Tensor, CheckpointError> {
    check_grid(&shape, &format, beside.scales_name, beside.scales)?;
    let (codes, scales) = (codes.bytes.clone(), beside.scales.bytes.clone());
    Tensor::new_scaled(shape, Format::Scaled(format), codes, scales, beside.zeros, beside.global)
        .map_err(at(name))
}

/// Refuses scales that lie in another order than the format's grid; dimensions of 1 do not matter.
fn check_grid(
    shape: &[usize],
    format: &ScaledFormat,
    name: &str,
    scales: &RawTensor,
) -> Result<(), CheckpointError> {
    let real = |shape: &[usize]| shape.iter().copied().filter(|d| *d != 1).collect::<Vec<_>>();
    let grid = format.grid(shape).map(|grid| [grid.rows, grid.columns]);
    match grid {
        Some(grid) if real(&grid) == real(&scales.shape) => Ok(()),
        grid => Err(unlike(name, scales, format!("scales of shape {:?}", grid.unwrap_or([0, 0])))),
    }
}

/// The type of scales that are stored as floats.
pub(super) fn float_scale(name: &str, scales: &RawTensor) -> Result<ScaleType, CheckpointError> {
    match scales.dtype {
        Dtype::F32 => Ok(ScaleType::F32),
        Dtype::F16 => Ok(ScaleType::F16),
        Dtype::BF16 => Ok(ScaleType::BF16),
        _ => Err(unlike(name, scales, "F32, F16 or BF16")),
    }
}

/// Refuses a tensor of another type.
pub(super) fn expect(name: &str, raw: &RawTensor, types: &[Dtype]) -> Result<(), CheckpointError> {
    if types.contains(&raw.dtype) {
        return Ok(());
    }
    let types: Vec<&str> = types.iter().map(|dtype| dtype.name()).collect();
    Err(unlike(name, raw, types.join(" or ")))
}

/// `[rows, columns]` of codes of `bits` bits in bytes.
pub(super) fn shape_of_bytes(
    name: &str,
    raw: &RawTensor,
    bits: usize,
) -> Result<Vec<usize>, CheckpointError> {
    let refuse = || unlike(name, raw, format!("[rows, bytes] of codes of {bits} bits"));
    let &[rows, bytes] = raw.shape.as_slice() else { return Err(refuse()) };
    // Without rows, bytes may be any number.
    match bytes.checked_mul(8) {
        Some(all) if all.is_multiple_of(bits) => Ok(vec![rows, all / bits]),
        _ => Err(refuse()),
    }
}

/// A single `f32`.
pub(super) fn scalar(files: &SafetensorsFiles, name: &str) -> Result<f32, CheckpointError> {
    let raw = files.raw(name)?;
    match (raw.dtype, raw.bytes.as_chunks::<4>()) {
        (Dtype::F32, ([number], [])) => Ok(f32::from_le_bytes(*number)),
        _ => Err(unlike(name, raw, "one F32")),
    }
}

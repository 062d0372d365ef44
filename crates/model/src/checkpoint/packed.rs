//! compressed-tensors' `pack-quantized`: integers in words, with a scale a group or a row.

use lathe_tensor::packed::{PackedPlanes, unpack};
use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{Bytes, ScaledFormat, Tensor, ZeroPoint};

use super::planes::{expect, float_scale};
use super::scheme::{NAMING, Scheme};
use super::{CheckpointError, at, unlike};

/// Codes, scales and zero points as one tensor.
pub(super) fn read(
    files: &SafetensorsFiles,
    name: &str,
    scheme: Scheme,
) -> Result<Tensor, CheckpointError> {
    let part = |ending| NAMING.part(name, ending);
    let codes = files.raw(&part("weight_packed"))?;
    expect(&part("weight_packed"), codes, &[Dtype::I32])?;
    let shape = shape_of(files, name)?;
    let scales = files.raw(&part("weight_scale"))?;
    let scale = float_scale(&part("weight_scale"), scales)?;
    let zeros = match scheme.zero {
        ZeroPoint::None => Bytes::new(Vec::new()),
        ZeroPoint::Int => {
            let zeros = files.raw(&part("weight_zero_point"))?;
            expect(&part("weight_zero_point"), zeros, &[Dtype::I32])?;
            zeros.bytes.clone()
        }
    };
    let Scheme { element, block, zero, .. } = scheme;
    let format = ScaledFormat { element, block, scale, zero };
    let planes = PackedPlanes { codes: codes.bytes.clone(), scales: scales.bytes.clone(), zeros };
    unpack(shape, &format, &planes).map_err(at(name))
}

/// `[rows, columns]` of the weight, which its packed codes alone do not tell.
pub(super) fn shape_of(
    files: &SafetensorsFiles,
    name: &str,
) -> Result<[usize; 2], CheckpointError> {
    let part = NAMING.part(name, "weight_shape");
    let raw = files.raw(&part)?;
    let number = |bytes: &[u8]| match raw.dtype {
        Dtype::I64 => i64::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
        _ => i32::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
    };
    let (true, 2) =
        (matches!(raw.dtype, Dtype::I64 | Dtype::I32), raw.bytes.len() / raw.dtype.bytes())
    else {
        return Err(unlike(&part, raw, "I64 [2]"));
    };
    let (rows, columns) = raw.bytes.split_at(raw.dtype.bytes());
    match (number(rows), number(columns)) {
        (Some(rows), Some(columns)) => Ok([rows, columns]),
        _ => Err(CheckpointError::Encoding {
            name: part,
            found: format!("{:?}", &raw.bytes[..]),
            expected: "two sizes, not negative".to_owned(),
        }),
    }
}

//! gpt-oss's MXFP4 experts: `*_blocks` of two codes a byte and `*_scales` of powers of two.

use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{Bytes, Format, GlobalScale, ScaledFormat, Tensor};

use super::naming::Naming;
use super::{CheckpointError, at, found, unlike};

pub(super) static NAMING: Naming = Naming { whole: "_blocks", codes: &[], beside: &["_scales"] };

/// `[.., groups, 16]` bytes of two codes each, with one power of two a group; other tensors are
/// plain.
pub(super) fn tensor(files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
    if !name.ends_with(NAMING.whole) {
        return Ok(files.tensor(name)?);
    }
    let blocks = files.raw(name)?;
    let scales_name = NAMING.part(name, "_scales");
    let scales = files.raw(&scales_name)?;
    let (Dtype::U8, [leading @ .., groups, 16]) = (blocks.dtype, blocks.shape.as_slice()) else {
        return Err(unlike(name, blocks, "U8 [.., groups, 16]"));
    };
    let mut shape = leading.to_vec();
    shape.push(*groups);
    if scales.dtype != Dtype::U8 || scales.shape != shape {
        return Err(unlike(&scales_name, scales, found(Dtype::U8, &shape)));
    }
    // 32 codes a group: no overflow, for the file has a byte for every two.
    *shape.last_mut().expect("groups") = groups * 32;
    let format = Format::Scaled(ScaledFormat::MXFP4);
    let (codes, scales, none) =
        (blocks.bytes.clone(), scales.bytes.clone(), Bytes::new(Vec::new()));
    Tensor::new_scaled(shape, format, codes, scales, none, GlobalScale::One).map_err(at(name))
}

//! Formats whose scales lie in planes of their own: `value = (code - zero) * scale`, times the
//! tensor's global multiplier for NVFP4.

use half::{bf16, f16};

use super::element;
use crate::format::{ScaleType, ScaledFormat, ZeroPoint};
use crate::tensor::Tensor;

/// Dequantizes one row of the `[rows, columns]` view; `tensor.format` is `format`.
pub(crate) fn dequantize_row(tensor: &Tensor, format: &ScaledFormat, row: usize, out: &mut [f32]) {
    let grid = tensor.grid(format);
    let (row_bytes, bits) = (tensor.row_bytes(), format.element.bits());
    let codes = &tensor.codes[row * row_bytes..][..row_bytes];
    let first = grid.row_start(row);
    for (block, out) in out.chunks_mut(grid.block_columns).enumerate() {
        let scale = scale_at(tensor, format.scale, first + block);
        let zero = match format.zero {
            ZeroPoint::None => 0.0,
            ZeroPoint::Int => f32::from(tensor.zeros[first + block] as i8),
        };
        for (i, out) in out.iter_mut().enumerate() {
            let code = unpack(codes, block * grid.block_columns + i, bits);
            *out = (element::to_f32(format.element, code) - zero) * scale;
        }
    }
}

/// The multiplier of block `index`, the global one included.
fn scale_at(tensor: &Tensor, scale: ScaleType, index: usize) -> f32 {
    let bytes = &tensor.scales[index * scale.bytes()..][..scale.bytes()];
    match scale {
        ScaleType::F32 => f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]),
        ScaleType::F16 => f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ScaleType::BF16 => bf16::from_le_bytes([bytes[0], bytes[1]]).to_f32(),
        ScaleType::E8M0 => element::e8m0_to_f32(bytes[0]),
        ScaleType::E4M3Global => element::f8e4m3_to_f32(bytes[0]) * tensor.global_scale,
    }
}

/// Code `index` of `bits` bits (at most 8), packed low bits first.
pub fn unpack(codes: &[u8], index: usize, bits: usize) -> u8 {
    let (byte, shift) = (index * bits / 8, index * bits % 8);
    let next = if shift + bits > 8 { codes[byte + 1] } else { 0 };
    let window = u16::from(codes[byte]) | u16::from(next) << 8;
    ((window >> shift) & ((1 << bits) - 1)) as u8
}

//! `PackedFormat`: number formats of matrices in fragment order (`kernels/product.cuh`), and how a
//! checkpoint's tensor gets there.

use std::sync::Arc;

use lathe_program::BackendError;
use lathe_tensor::{Block, Element, FloatType, Format, ScaleType, ScaledFormat, Tensor, ZeroPoint};

use crate::device::{Device, Memory};
use crate::parameters::{Pack, PackCodes};

/// Outputs of a tile and columns of a block.
pub(crate) const TILE: usize = 16;
pub(crate) const BLOCK_COLUMNS: usize = 32;

/// Columns that 16 bytes of each lane hold as four-bit integers, and codes of a chunk of them.
const INT4_UNIT_COLUMNS: usize = 64;
const INT4_CHUNK_UNITS: usize = 16;
/// Codes of a chunk of the ring.
const CHUNK_BYTES: usize = 8192;

/// What activations of products with e4m3 are multiplied by, and scales of their outputs
/// (`widen_fp8` divides by 2^120).
const FP8_ACTIVATIONS: f32 = (1u128 << 96) as f32;
const FP8_SCALES: f32 = (1u32 << 24) as f32;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PackedFormat {
    Bf16,
    /// e4m3 with a scale for each output.
    Fp8,
    /// Four-bit integers. Units of 64 columns share a scale; 0: an output has one.
    Int4 {
        group_units: usize,
        /// Whether scales of groups are `f16`, not `bf16`.
        half_scales: bool,
    },
}

impl PackedFormat {
    /// The format that holds a checkpoint's numbers exactly, if there is one for rows of `columns`.
    pub(crate) fn of(format: Format, columns: usize) -> Option<PackedFormat> {
        let whole = |unit| columns.is_multiple_of(unit);
        match format {
            Format::Float(FloatType::BF16) => whole(BLOCK_COLUMNS).then_some(PackedFormat::Bf16),
            Format::Scaled(scaled) if scaled.zero == ZeroPoint::None => match scaled.element {
                Element::F8E4M3 => {
                    let block = matches!(scaled.block, Block::Tensor | Block::Channel);
                    (block && is_float(scaled.scale) && whole(BLOCK_COLUMNS))
                        .then_some(PackedFormat::Fp8)
                }
                Element::Int(4) if whole(INT4_UNIT_COLUMNS) => int4(&scaled, columns),
                _ => None,
            },
            _ => None,
        }
    }

    /// In the names of kernels.
    pub(crate) fn name(self) -> &'static str {
        match self {
            PackedFormat::Bf16 => "bf16",
            PackedFormat::Fp8 => "fp8",
            PackedFormat::Int4 { .. } => "int4",
        }
    }

    /// `group_units` and `half_scales` of the kernels.
    pub(crate) fn groups(self) -> (u32, u32) {
        match self {
            PackedFormat::Int4 { group_units, half_scales } => {
                (group_units as u32, u32::from(half_scales))
            }
            _ => (0, 0),
        }
    }

    /// What activations are multiplied by.
    pub(crate) fn activation_factor(self) -> f32 {
        if self == PackedFormat::Fp8 { FP8_ACTIVATIONS } else { 1.0 }
    }

    /// Bytes of a chunk of the ring.
    pub(crate) fn chunk_bytes(self) -> usize {
        CHUNK_BYTES + self.scale_bytes(INT4_CHUNK_UNITS)
    }

    fn scale_bytes(self, units: usize) -> usize {
        match self {
            PackedFormat::Int4 { group_units: 1.., .. } => {
                units.div_ceil(self.groups().0 as usize) * TILE * 2
            }
            _ => 0,
        }
    }

    /// Bytes of a block of 32 columns, without scales.
    pub(crate) fn block_bytes(self) -> usize {
        match self {
            PackedFormat::Bf16 => 1024,
            PackedFormat::Fp8 => 512,
            PackedFormat::Int4 { .. } => 256,
        }
    }

    /// Bytes of a tile of rows of `width`.
    pub(crate) fn tile_bytes(self, width: usize) -> usize {
        let codes = width / BLOCK_COLUMNS * self.block_bytes();
        let units = width / INT4_UNIT_COLUMNS;
        let (chunks, rest) = (units / INT4_CHUNK_UNITS, units % INT4_CHUNK_UNITS);
        codes + chunks * self.scale_bytes(INT4_CHUNK_UNITS) + self.scale_bytes(rest)
    }
}

fn is_float(scale: ScaleType) -> bool {
    matches!(scale, ScaleType::F32 | ScaleType::F16 | ScaleType::BF16)
}

fn int4(scaled: &ScaledFormat, columns: usize) -> Option<PackedFormat> {
    match (scaled.block, scaled.scale) {
        (Block::Tensor | Block::Channel, scale) if is_float(scale) => {
            Some(PackedFormat::Int4 { group_units: 0, half_scales: false })
        }
        (Block::Group(group), ScaleType::F16 | ScaleType::BF16) => {
            let (group, half_scales) = (group as usize, scaled.scale == ScaleType::F16);
            let group_units = group / INT4_UNIT_COLUMNS;
            // A group lies in one chunk.
            let fits = group.is_multiple_of(INT4_UNIT_COLUMNS)
                && group_units > 0
                && INT4_CHUNK_UNITS.is_multiple_of(group_units)
                && columns.is_multiple_of(group);
            fits.then_some(PackedFormat::Int4 { group_units, half_scales })
        }
        _ => None,
    }
}

/// A matrix in fragment order.
pub(crate) struct PackedMatrix {
    pub(crate) codes: Memory,
    /// `f32`, of the outputs.
    pub(crate) scales: Option<Memory>,
}

/// Lays a matrix `[outputs, width]` out.
pub(crate) fn pack(
    device: &Arc<Device>,
    tensor: &Tensor,
    format: PackedFormat,
) -> Result<PackedMatrix, BackendError> {
    let what = "the weights";
    let (outputs, width) = (tensor.shape[0], tensor.shape[1]);
    let rows = device.allocate(tensor.codes.len(), what)?;
    rows.write(0, &tensor.codes[..])?;
    let (tiles, tile_bytes) = (outputs.div_ceil(TILE), format.tile_bytes(width));
    let codes = device.allocate(tiles * tile_bytes, what)?;
    let words = (tiles * width / BLOCK_COLUMNS * format.block_bytes() / 4) as u64;
    let (outputs_32, width_32) = (outputs as u32, width as u32);
    let shape = ([1024, 1], (256, 0));
    if format == PackedFormat::Bf16 {
        let (rows, out) = (rows.address(), codes.address());
        let parameters = Pack { rows, out, words, outputs: outputs_32, width: width_32 };
        device.launch("pack_bf16", shape.0, shape.1, &parameters)?;
        return Ok(PackedMatrix { codes, scales: None });
    }
    let groups = format.groups().0;
    let of_groups = (groups > 0).then(|| device.allocate(tensor.scales.len(), what)).transpose()?;
    if let Some(memory) = &of_groups {
        memory.write(0, &tensor.scales[..])?;
    }
    let parameters = PackCodes {
        codes: rows.address(),
        scales: of_groups.as_ref().map_or(0, Memory::address),
        out: codes.address(),
        words,
        outputs: outputs_32,
        width: width_32,
        row_bytes: tensor.row_bytes() as u32,
        tile_bytes: tile_bytes as u32,
        group_units: groups,
    };
    device.launch(&format!("pack_{}", format.name()), shape.0, shape.1, &parameters)?;
    let scales = match groups {
        0 => {
            let values = output_scales(tensor, format);
            let memory = device.allocate(values.len() * 4, what)?;
            memory.write(0, &values)?;
            Some(memory)
        }
        _ => None,
    };
    // What the kernel reads is freed after it.
    device.synchronize()?;
    Ok(PackedMatrix { codes, scales })
}

/// A scale for each output.
fn output_scales(tensor: &Tensor, format: PackedFormat) -> Vec<f32> {
    let Format::Scaled(scaled) = tensor.format else { return Vec::new() };
    let factor = if format == PackedFormat::Fp8 { FP8_SCALES } else { 1.0 };
    let bytes = &tensor.scales[..];
    let value = |i: usize| match scaled.scale {
        ScaleType::F16 => half::f16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        ScaleType::BF16 => half::bf16::from_le_bytes([bytes[2 * i], bytes[2 * i + 1]]).to_f32(),
        _ => {
            f32::from_le_bytes([bytes[4 * i], bytes[4 * i + 1], bytes[4 * i + 2], bytes[4 * i + 3]])
        }
    };
    let one = scaled.block == Block::Tensor;
    (0..tensor.shape[0]).map(|row| value(if one { 0 } else { row }) * factor).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(name: &str, columns: usize) -> Option<PackedFormat> {
        PackedFormat::of(Format::parse(name).expect("a format"), columns)
    }

    #[test]
    fn formats_have_a_place_or_none() {
        assert_eq!(of("bf16", 64), Some(PackedFormat::Bf16));
        assert_eq!(of("f8e4m3-channel-bf16", 96), Some(PackedFormat::Fp8));
        assert_eq!(of("f8e4m3-tile128x128-f32", 256), None);
        let int4 = |group_units, half_scales| Some(PackedFormat::Int4 { group_units, half_scales });
        assert_eq!(of("int4-g128-bf16", 4096), int4(2, false));
        assert_eq!(of("int4-g64-f16", 576), int4(1, true));
        assert_eq!(of("int4-channel-f32", 64), int4(0, false));
        for (name, columns) in
            [("int4-g32-f16", 64), ("int4-g128-f32", 128), ("int4-g128-bf16-asym", 128)]
        {
            assert_eq!(of(name, columns), None, "{name}");
        }
    }

    #[test]
    fn tiles_hold_codes_and_scales() {
        let int4 = PackedFormat::Int4 { group_units: 2, half_scales: false };
        assert_eq!(int4.chunk_bytes(), 8192 + 256);
        assert_eq!(int4.tile_bytes(4096), 4 * int4.chunk_bytes());
        // One chunk and a quarter.
        assert_eq!(int4.tile_bytes(1280), 1280 * 8 + 10 * 32);
        assert_eq!(PackedFormat::Fp8.tile_bytes(4096), 4096 * 16);
        assert_eq!(PackedFormat::Bf16.tile_bytes(96), 96 * 32);
    }
}

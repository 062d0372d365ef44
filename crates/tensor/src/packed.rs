//! The planes of compressed-tensors' `pack-quantized`: integers of 4 or 8 bits in words of 32 bits.
//!
//! A code is stored with `2^(bits - 1)` added. Element `i` of a row lies at bit `i * bits`, low
//! bits first. Rows are filled up to whole words with zeros. Zero points are packed the same way,
//! but down the rows: word `w` of a column of groups holds the zero points of `32 / bits` rows from
//! row `w * 32 / bits` on.

use crate::bytes::Bytes;
use crate::error::TensorError;
use crate::format::{Block, Element, Format, ScaleType, ScaledFormat, ZeroPoint};
use crate::tensor::{GlobalScale, Tensor};

/// Bytes of a word.
const WORD: usize = 4;

/// One weight as `pack-quantized` files have it.
#[derive(Debug, Clone)]
pub struct PackedPlanes {
    /// `[rows, words]` little-endian words.
    pub codes: Bytes,
    /// `[rows, groups]` in the format's scale type.
    pub scales: Bytes,
    /// `[zero_rows, groups]` little-endian words. Empty in symmetric formats.
    pub zeros: Bytes,
}

/// Whether the planes can represent `format`: integers of 4 or 8 bits, plain scales, and one scale
/// for each group of a row or for each row.
pub fn can_pack(format: &ScaledFormat) -> bool {
    let bits = matches!(format.element, Element::Int(4 | 8));
    let block = matches!(format.block, Block::Group(_) | Block::Channel);
    let scale = matches!(format.scale, ScaleType::F32 | ScaleType::F16 | ScaleType::BF16);
    bits && block && scale
}

/// Words that `count` codes of `bits` bits take.
pub fn words(count: usize, bits: usize) -> usize {
    count.div_ceil(32 / bits)
}

/// The top bits of the codes in a byte. Flipping them turns two's complement codes into codes with
/// an offset, and back.
fn top_bits(bits: usize) -> u8 {
    if bits == 4 { 0x88 } else { 0x80 }
}

fn refuse(format: &ScaledFormat) -> TensorError {
    TensorError::UnknownFormat { name: format!("{format} in pack-quantized planes") }
}

/// The planes of a `[rows, columns]` tensor.
///
/// # Errors
/// If [`can_pack`] says no, or the tensor is a stack of matrices.
pub fn pack(tensor: &Tensor) -> Result<PackedPlanes, TensorError> {
    let Format::Scaled(format) = tensor.format else {
        return Err(TensorError::UnknownFormat { name: tensor.format.to_string() });
    };
    if !can_pack(&format) || tensor.shape.len() != 2 {
        return Err(refuse(&format));
    }
    let (rows, columns, bits) = (tensor.rows(), tensor.columns(), format.element.bits());
    let (row_bytes, top) = (tensor.row_bytes(), top_bits(bits));
    let packed_bytes = words(columns, bits) * WORD;
    let mut codes = vec![0u8; rows * packed_bytes];
    for row in 0..rows {
        let out = &mut codes[row * packed_bytes..][..row_bytes];
        out.copy_from_slice(&tensor.codes[row * row_bytes..][..row_bytes]);
        out.iter_mut().for_each(|byte| *byte ^= top);
        if bits == 4 && columns % 2 == 1 {
            // The unused half of the last byte.
            out[row_bytes - 1] &= 15;
        }
    }
    let zeros = match format.zero {
        ZeroPoint::None => Vec::new(),
        ZeroPoint::Int => pack_zeros(&tensor.zeros, rows, bits),
    };
    Ok(PackedPlanes {
        codes: Bytes::new(codes),
        scales: tensor.scales.clone(),
        zeros: Bytes::new(zeros),
    })
}

fn pack_zeros(zeros: &[u8], rows: usize, bits: usize) -> Vec<u8> {
    let (groups, each) = (zeros.len() / rows.max(1), 32 / bits);
    let mut packed = vec![0u32; words(rows, bits) * groups];
    let mask = (1u32 << bits) - 1;
    for (index, &zero) in zeros.iter().enumerate() {
        let (row, group) = (index / groups, index % groups);
        let code = (u32::from(zero) ^ 1 << (bits - 1)) & mask;
        packed[row / each * groups + group] |= code << (row % each * bits);
    }
    packed.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// The tensor of shape `[rows, columns]` that the planes hold.
///
/// # Errors
/// If [`can_pack`] says no, or a plane is not as long as shape and format say.
pub fn unpack(
    shape: [usize; 2],
    format: &ScaledFormat,
    planes: &PackedPlanes,
) -> Result<Tensor, TensorError> {
    let whole = Format::Scaled(*format);
    let (grid, true) = (format.grid(&shape), can_pack(format)) else {
        return Err(refuse(format));
    };
    let [rows, columns] = shape;
    let overflow = || TensorError::Overflow { shape: shape.to_vec() };
    let grid = grid.ok_or_else(overflow)?;
    let (bits, row_bytes) = (format.element.bits(), whole.row_bytes(columns)?);
    whole.bytes_for(&shape)?;
    let packed_bytes = words(columns, bits) * WORD;
    let expected = packed_bytes.checked_mul(rows).ok_or_else(overflow)?;
    if planes.codes.len() != expected {
        let (shape, found) = (shape.to_vec(), planes.codes.len());
        return Err(TensorError::Size { shape, format: whole, expected, found });
    }
    let mut codes = vec![0u8; rows * row_bytes];
    for row in 0..rows {
        let out = &mut codes[row * row_bytes..][..row_bytes];
        out.copy_from_slice(&planes.codes[row * packed_bytes..][..row_bytes]);
        out.iter_mut().for_each(|byte| *byte ^= top_bits(bits));
        if bits == 4 && columns % 2 == 1 {
            out[row_bytes - 1] &= 15;
        }
    }
    let zeros = match format.zero {
        ZeroPoint::None => Vec::new(),
        ZeroPoint::Int => {
            let expected = words(rows, bits) * grid.columns * WORD;
            if planes.zeros.len() != expected {
                let (what, shape, found) =
                    ("bytes of packed zero points", shape.to_vec(), planes.zeros.len());
                return Err(TensorError::Side { what, shape, format: whole, expected, found });
            }
            unpack_zeros(&planes.zeros, rows, grid.columns, bits)
        }
    };
    let (codes, zeros) = (Bytes::new(codes), Bytes::new(zeros));
    let scales = planes.scales.clone();
    Tensor::new_scaled(shape.to_vec(), whole, codes, scales, zeros, GlobalScale::One)
}

fn unpack_zeros(packed: &[u8], rows: usize, groups: usize, bits: usize) -> Vec<u8> {
    let each = 32 / bits;
    let words = packed.as_chunks::<WORD>().0;
    let mut zeros = Vec::with_capacity(rows * groups);
    for row in 0..rows {
        for group in 0..groups {
            let word = u32::from_le_bytes(words[row / each * groups + group]);
            let code = word >> (row % each * bits) & ((1 << bits) - 1);
            zeros.push((code as i32 - (1 << (bits - 1))) as i8 as u8);
        }
    }
    zeros
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::scaled::{E8m0Rounding, quantize};

    fn format(bits: u8, block: Block, zero: ZeroPoint) -> ScaledFormat {
        ScaledFormat { element: Element::Int(bits), block, scale: ScaleType::BF16, zero }
    }

    #[test]
    fn planes_are_read_back() {
        for bits in [4, 8] {
            for block in [Block::Group(16), Block::Channel] {
                for zero in [ZeroPoint::None, ZeroPoint::Int] {
                    // 11 rows do not fill the words of zero points. 48 columns do not fill the
                    // words of codes.
                    let shape = [11, 48];
                    let format = format(bits, block, zero);
                    let values: Vec<f32> =
                        (0..11 * 48).map(|i| (i * 37 % 101) as f32 / 50.0 - 0.7).collect();
                    let tensor =
                        quantize(&shape, &format, &values, E8m0Rounding::default()).unwrap();
                    let planes = pack(&tensor).unwrap();
                    assert_eq!(planes.codes.len(), 11 * words(48, bits.into()) * 4);
                    let back = unpack(shape, &format, &planes).unwrap();
                    assert_eq!(back.to_f32(), tensor.to_f32(), "{format}");
                    let mut short = planes.clone();
                    short.codes = short.codes.slice(0..8);
                    assert!(matches!(
                        unpack(shape, &format, &short),
                        Err(TensorError::Size { found: 8, .. })
                    ));
                }
            }
        }
    }

    #[test]
    fn words_by_hand() {
        // Codes -8, -7, .. 0 and a scale of 1: stored as 0, 1, .. 8.
        let codes = vec![0x98, 0xba, 0xdc, 0xfe, 0x00];
        let format = format(4, Block::Channel, ZeroPoint::None);
        let scale = half::bf16::from_f32(1.0).to_le_bytes().to_vec();
        let tensor = Tensor::new_scaled(
            vec![1, 9],
            Format::Scaled(format),
            Bytes::new(codes),
            Bytes::new(scale),
            Bytes::new(Vec::new()),
            GlobalScale::One,
        )
        .unwrap();
        assert_eq!(tensor.to_f32(), [-8.0, -7.0, -6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0]);
        let planes = pack(&tensor).unwrap();
        assert_eq!(&planes.codes[..], [0x10, 0x32, 0x54, 0x76, 0x08, 0, 0, 0]);
        let back = unpack([1, 9], &format, &planes).unwrap();
        assert_eq!(back.to_f32(), tensor.to_f32());
    }
}

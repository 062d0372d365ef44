//! Formats whose scales lie in planes of their own: `value = (code - zero) * scale`, and for NVFP4
//! times the global scale of the matrix.

use std::borrow::Cow;

use rayon::prelude::*;

pub use super::nearest::{encode_block, round_block, round_each};
pub use super::scale::{BlockScale, E8m0Rounding, Span, encode, fit, fit_shrunken, round};
use super::{element, scale};
use crate::bytes::Bytes;
use crate::error::TensorError;
use crate::format::{Element, Format, ScaleGrid, ScaleType, ScaledFormat, ZeroPoint};
use crate::tensor::{GlobalScale, Tensor};

/// Dequantizes one row of the `[rows, columns]` view. `tensor.format` is `format`.
pub(crate) fn dequantize_row(tensor: &Tensor, format: &ScaledFormat, row: usize, out: &mut [f32]) {
    let grid = tensor.grid(format);
    let (row_bytes, bits) = (tensor.row_bytes(), format.element.bits());
    let codes = &tensor.codes[row * row_bytes..][..row_bytes];
    let values = element::table(format.element);
    let (first, bytes) = (grid.row_start(row), format.scale.bytes());
    let matrix = row / grid.matrix_rows;
    for (block, out) in out.chunks_mut(grid.block_columns).enumerate() {
        let stored = scale::load(format.scale, &tensor.scales[(first + block) * bytes..][..bytes]);
        let scale = tensor.global.apply(matrix, stored);
        let zero = match format.zero {
            ZeroPoint::None => 0.0,
            ZeroPoint::Int => f32::from(tensor.zeros[first + block] as i8),
        };
        let start = block * grid.block_columns;
        let value = |code: u8| (values[usize::from(code)] - zero) * scale;
        match bits {
            8 => out.iter_mut().zip(&codes[start..]).for_each(|(out, &code)| *out = value(code)),
            4 => {
                let nibble = |i: usize| codes[i / 2] >> (4 * (i % 2)) & 15;
                out.iter_mut().enumerate().for_each(|(i, out)| *out = value(nibble(start + i)));
            }
            _ => {
                let code = |i| unpack(codes, start + i, bits);
                out.iter_mut().enumerate().for_each(|(i, out)| *out = value(code(i)));
            }
        }
    }
}

/// Code `index` of `bits` bits (at most 8), packed low bits first.
pub fn unpack(codes: &[u8], index: usize, bits: usize) -> u8 {
    let (byte, shift) = (index * bits / 8, index * bits % 8);
    let next = if shift + bits > 8 { codes[byte + 1] } else { 0 };
    let window = u16::from(codes[byte]) | u16::from(next) << 8;
    ((window >> shift) & ((1 << bits) - 1)) as u8
}

/// Packs one row: the low `bits` bits of each code, low bits first. `out` is long enough.
pub fn pack(codes: &[u8], bits: usize, out: &mut [u8]) {
    out.fill(0);
    if bits == 8 {
        return out[..codes.len()].copy_from_slice(codes);
    }
    if bits == 4 {
        let nibbles = |pair: &[u8]| pair[0] & 15 | pair.get(1).map_or(0, |high| high << 4);
        return out.iter_mut().zip(codes.chunks(2)).for_each(|(out, pair)| *out = nibbles(pair));
    }
    for (index, &code) in codes.iter().enumerate() {
        let (byte, shift) = (index * bits / 8, index * bits % 8);
        let window = u16::from(code & ((1u16 << bits) - 1) as u8) << shift;
        out[byte] |= window as u8;
        if shift + bits > 8 {
            out[byte + 1] |= (window >> 8) as u8;
        }
    }
}

/// Rounds `values` to nearest in `format`. Each block has the scale of [`fit`], and each matrix its
/// [`global_scale`].
///
/// # Errors
/// If the shape does not fit the format.
///
/// # Panics
/// If `values` is not as long as the shape says.
pub fn quantize(
    shape: &[usize],
    format: &ScaledFormat,
    values: &[f32],
    rounding: E8m0Rounding,
) -> Result<Tensor, TensorError> {
    let grid = checked_grid(shape, format)?;
    let global = global_scale(format, largest_of_each(&grid, values).into_iter());
    quantize_under(shape, format, values, global, rounding)
}

/// As [`quantize`], with a global scale that the caller chose.
///
/// # Errors
/// If the shape does not fit the format, or the global scale is not what the format asks for.
///
/// # Panics
/// If `values` is not as long as the shape says, or a matrix lacks its global scale.
pub fn quantize_under(
    shape: &[usize],
    format: &ScaledFormat,
    values: &[f32],
    global: GlobalScale,
    rounding: E8m0Rounding,
) -> Result<Tensor, TensorError> {
    let grid = checked_grid(shape, format)?;
    assert_eq!(values.len(), shape.iter().product::<usize>(), "values fill the shape");
    let blocks: Vec<BlockScale> = (0..grid.len())
        .into_par_iter()
        .with_min_len(16)
        .map(|block| {
            let matrix = block / (grid.rows * grid.columns);
            let unit = global.apply(matrix, 1.0);
            fit(format, &block_values(shape, &grid, block, values), unit, rounding)
        })
        .collect();
    quantize_with(shape, format, values, &blocks, global)
}

/// Rounds `values` to nearest. The caller chooses one scale and zero point a block, in the order of
/// [`ScaleGrid`]. Scales are rounded to what the format stores ([`round`]).
///
/// # Errors
/// If the shape does not fit the format, or the global scale is not what the format asks for.
///
/// # Panics
/// If there are not as many values or blocks as the shape says.
pub fn quantize_with(
    shape: &[usize],
    format: &ScaledFormat,
    values: &[f32],
    blocks: &[BlockScale],
    global: GlobalScale,
) -> Result<Tensor, TensorError> {
    let grid = checked_grid(shape, format)?;
    let columns = shape.last().copied().unwrap_or(1);
    let mut codes = vec![0u8; values.len()];
    assert_eq!(blocks.len(), grid.len(), "a scale for each block");
    if !values.is_empty() {
        let rows = codes.par_chunks_mut(columns).zip(values.par_chunks(columns)).enumerate();
        rows.for_each(|(row, (codes, values))| {
            let (first, matrix) = (grid.row_start(row), row / grid.matrix_rows);
            let parts = codes.chunks_mut(grid.block_columns);
            for (i, (codes, values)) in parts.zip(values.chunks(grid.block_columns)).enumerate() {
                let block = blocks[first + i];
                let step = global.apply(matrix, round(format.scale, block.scale));
                encode_block(format.element, values, step, block.zero, codes);
            }
        });
    }
    assemble(shape, format, &codes, blocks, global)
}

/// Makes a tensor of codes (one a byte, row-major) and scales that an algorithm chose.
///
/// # Errors
/// If the shape does not fit the format, or the global scale is not what the format asks for.
///
/// # Panics
/// If there are not as many codes or blocks as the shape says.
pub fn assemble(
    shape: &[usize],
    format: &ScaledFormat,
    codes: &[u8],
    blocks: &[BlockScale],
    global: GlobalScale,
) -> Result<Tensor, TensorError> {
    let grid = checked_grid(shape, format)?;
    let packed_bytes = Format::Scaled(*format).bytes_for(shape)?;
    let columns = shape.last().copied().unwrap_or(1);
    assert_eq!(codes.len(), shape.iter().product::<usize>(), "codes fill the shape");
    assert_eq!(blocks.len(), grid.len(), "a scale for each block");
    let mut packed = vec![0; packed_bytes];
    if !codes.is_empty() {
        let row_bytes = Format::Scaled(*format).row_bytes(columns)?;
        let rows = packed.par_chunks_mut(row_bytes).zip(codes.par_chunks(columns));
        rows.for_each(|(out, codes)| pack(codes, format.element.bits(), out));
    }
    let stored = |b: &BlockScale| scale::store(format.scale, b.scale);
    let bytes = format.scale.bytes();
    let scales: Vec<u8> = blocks.iter().flat_map(|b| stored(b).into_iter().take(bytes)).collect();
    let zeros: Vec<u8> = match format.zero {
        ZeroPoint::None => Vec::new(),
        ZeroPoint::Int => blocks.iter().map(|b| b.zero as u8).collect(),
    };
    let planes = (Bytes::new(packed), Bytes::new(scales), Bytes::new(zeros));
    Tensor::new_scaled(
        shape.to_vec(),
        Format::Scaled(*format),
        planes.0,
        planes.1,
        planes.2,
        global,
    )
}

fn checked_grid(shape: &[usize], format: &ScaledFormat) -> Result<ScaleGrid, TensorError> {
    Format::Scaled(*format).bytes_for(shape)?;
    format.grid(shape).ok_or_else(|| TensorError::Overflow { shape: shape.to_vec() })
}

/// The global scale with which the largest number of a matrix gets the largest block scale.
/// `largest` has the largest magnitude of each matrix. It is the divisor `448 * 6 / largest`, as
/// compressed-tensors stores it. [`GlobalScale::One`] for formats without a global scale.
pub fn global_scale(format: &ScaledFormat, largest: impl Iterator<Item = f32>) -> GlobalScale {
    if format.scale != ScaleType::E4M3Global {
        return GlobalScale::One;
    }
    GlobalScale::Divide(largest.map(|largest| global_divisor(format, largest)).collect())
}

/// [`global_scale`] of one matrix, for a format that has one.
pub fn global_divisor(format: &ScaledFormat, largest: f32) -> f32 {
    let unit = element::max(Element::F8E4M3) * element::max(format.element);
    match unit / largest {
        divisor if divisor.is_normal() && divisor.recip().is_normal() => divisor,
        // A matrix of zeros, or of numbers that are too small to scale, needs no scale.
        _ => 1.0,
    }
}

/// The largest magnitude of each matrix of a stack.
fn largest_of_each(grid: &ScaleGrid, values: &[f32]) -> Vec<f32> {
    let matrix_len = (values.len() / grid.matrices.max(1)).max(1);
    let largest = |matrix: &[f32]| matrix.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let mut all: Vec<f32> = values.par_chunks(matrix_len).map(largest).collect();
    all.resize(grid.matrices, 0.0);
    all
}

/// The numbers of one block. It is a slice if they are contiguous.
fn block_values<'a>(
    shape: &[usize],
    grid: &ScaleGrid,
    block: usize,
    values: &'a [f32],
) -> Cow<'a, [f32]> {
    let columns = shape.last().copied().unwrap_or(1);
    let (matrix, within) = (block / (grid.rows * grid.columns), block % (grid.rows * grid.columns));
    let (down, along) = (within / grid.columns, within % grid.columns);
    let first_row = matrix * grid.matrix_rows + down * grid.block_rows;
    let rows = first_row..((matrix + 1) * grid.matrix_rows).min(first_row + grid.block_rows);
    let left = along * grid.block_columns;
    let right = columns.min(left + grid.block_columns);
    if right - left == columns || rows.len() == 1 {
        return Cow::Borrowed(
            &values[rows.start * columns + left..(rows.end - 1) * columns + right],
        );
    }
    Cow::Owned(
        rows.flat_map(|row| &values[row * columns + left..row * columns + right])
            .copied()
            .collect(),
    )
}

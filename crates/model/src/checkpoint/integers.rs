//! Integers whose files have inputs down and outputs along (GPTQ, AWQ), and columns whose groups
//! are in the order of their activations (`g_idx`).

use lathe_tensor::codec::scaled;
use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype, RawTensor};
use lathe_tensor::{
    Block, Bytes, Element, Format, GlobalScale, ScaledFormat, Tensor, TensorError, ZeroPoint,
};
use rayon::prelude::*;

use super::planes::float_scale;
use super::{CheckpointError, at, found, unlike};

/// Endings of GPTQ's and AWQ's tensors in place of `weight`.
pub(super) const CODES: &str = "qweight";
pub(super) const ZEROS: &str = "qzeros";
pub(super) const SCALES: &str = "scales";

/// A matrix of unsigned integers with a scale a group: `value = (code - zero) * scale`.
pub(super) struct Integers<'a> {
    /// Its name, for messages.
    pub name: &'a str,
    /// Outputs and inputs.
    pub shape: [usize; 2],
    /// Bits of a code.
    pub bits: usize,
    /// `[outputs, inputs]`, one a byte.
    pub codes: Vec<u8>,
    /// `[groups, outputs]`, one a byte.
    pub zeros: Vec<u8>,
    /// Name and tensor of the scales, `[groups, outputs]` of floats.
    pub scales: (&'a str, &'a RawTensor),
    /// Inputs that share a scale; `None` for all.
    pub group: Option<usize>,
}

impl Integers<'_> {
    /// The tensor: codes and zero points with `2^(bits - 1)` less. Codes of less than four bits
    /// become codes of four, which stand for the same numbers.
    pub(super) fn tensor(self) -> Result<Tensor, CheckpointError> {
        let [rows, columns] = self.shape;
        let (scales_name, scales) = self.scales;
        let scale = float_scale(scales_name, scales)?;
        let block = match self.group {
            Some(size) if size < columns => Block::Group(size as u32),
            _ => Block::Channel,
        };
        let element = Element::Int(if self.bits > 4 { 8 } else { 4 });
        let middle = 1u8 << (self.bits - 1);
        let zero = match self.zeros.iter().all(|zero| *zero == middle) {
            true => ZeroPoint::None,
            false => ZeroPoint::Int,
        };
        let format = ScaledFormat { element, block, scale, zero };
        let groups = format.grid(&self.shape).map_or(0, |grid| grid.columns);
        let shape = [groups, rows];
        if scales.shape != shape {
            return Err(unlike(scales_name, scales, found(scales.dtype, &shape)));
        }
        if self.zeros.len() != groups * rows {
            let (shape, format) = (self.shape.to_vec(), Format::Scaled(format));
            let (what, expected) = ("zero points", groups * rows);
            let found = self.zeros.len();
            return Err(at(self.name)(TensorError::Side { what, shape, format, expected, found }));
        }
        let row_bytes = Format::Scaled(format).row_bytes(columns).map_err(at(self.name))?;
        let mut codes = vec![0; rows * row_bytes];
        if row_bytes > 0 {
            let rows = codes.par_chunks_mut(row_bytes).zip(self.codes.par_chunks(columns));
            rows.for_each(|(out, row)| {
                let signed: Vec<u8> = row.iter().map(|code| code.wrapping_sub(middle)).collect();
                scaled::pack(&signed, element.bits(), out);
            });
        }
        let zeros = match zero {
            ZeroPoint::None => Vec::new(),
            ZeroPoint::Int => {
                let signed: Vec<u8> = self.zeros.iter().map(|it| it.wrapping_sub(middle)).collect();
                transposed(&signed, [groups, rows], 1)
            }
        };
        let scales = transposed(&scales.bytes, [groups, rows], scales.dtype.bytes());
        let (codes, scales, zeros) = (Bytes::new(codes), Bytes::new(scales), Bytes::new(zeros));
        let (shape, format) = (self.shape.to_vec(), Format::Scaled(format));
        Tensor::new_scaled(shape, format, codes, scales, zeros, GlobalScale::One)
            .map_err(at(self.name))
    }
}

/// `[columns, rows]` of a `[rows, columns]` matrix with elements of `bytes` bytes.
fn transposed(from: &[u8], [rows, columns]: [usize; 2], bytes: usize) -> Vec<u8> {
    let mut to = Vec::with_capacity(from.len());
    for column in 0..columns {
        for row in 0..rows {
            to.extend_from_slice(&from[(row * columns + column) * bytes..][..bytes]);
        }
    }
    to
}

/// The words of an I32 tensor of two dimensions, with its shape.
pub(super) fn words(
    name: &str,
    raw: &RawTensor,
) -> Result<(Vec<u32>, [usize; 2]), CheckpointError> {
    let (Dtype::I32, &[rows, columns]) = (raw.dtype, raw.shape.as_slice()) else {
        return Err(unlike(name, raw, "I32 [rows, words]"));
    };
    let words = raw.bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word));
    Ok((words.collect(), [rows, columns]))
}

/// Code `index` of `bits` bits (at most 8) in a stream of words, low bits first.
pub(super) fn code_at(word: impl Fn(usize) -> u32, index: usize, bits: usize) -> u8 {
    let (first, shift) = (index * bits / 32, index * bits % 32);
    let low = word(first) >> shift;
    let code = if shift + bits > 32 { low | word(first + 1) << (32 - shift) } else { low };
    (code & ((1 << bits) - 1)) as u8
}

/// `tensor`, whose scales are those of groups of columns by number, with the groups that `order`
/// (`g_idx`) gives its columns.
///
/// Columns whose groups are runs of neighbours after all stay codes. Others (GPTQ with `desc_act`)
/// become `f32`, which holds each product of code and scale without rounding, in eight times the
/// memory: no format here has scales of columns in any order.
pub(super) fn in_order(
    files: &SafetensorsFiles,
    name: &str,
    order: &str,
    tensor: Tensor,
) -> Result<Tensor, CheckpointError> {
    let Format::Scaled(format @ ScaledFormat { block: Block::Group(size), .. }) = tensor.format
    else {
        return Ok(tensor);
    };
    let (columns, size) = (tensor.columns(), size as usize);
    let raw = files.raw(order)?;
    if raw.dtype != Dtype::I32 || raw.shape != [columns] {
        return Err(unlike(order, raw, found(Dtype::I32, &[columns])));
    }
    let groups = raw.bytes.as_chunks::<4>().0.iter().map(|group| i32::from_le_bytes(*group));
    let groups: Vec<i32> = groups.collect();
    // Old versions of compressed-tensors write -1 where there is no order.
    let plain = groups.iter().enumerate().all(|(column, group)| *group == (column / size) as i32);
    if plain || groups.contains(&-1) {
        return Ok(tensor);
    }
    let mut sorted: Vec<usize> = (0..columns).collect();
    sorted.sort_by_key(|column| groups[*column]);
    let whole = |(at, column): (usize, &usize)| groups[*column] == (at / size) as i32;
    if !sorted.iter().enumerate().all(whole) {
        return Err(unlike(order, raw, format!("{size} columns for each group")));
    }
    let (bits, row_bytes) = (format.element.bits(), tensor.row_bytes());
    let mut codes = vec![0; tensor.codes.len()];
    let rows = codes.par_chunks_mut(row_bytes).zip(tensor.codes.par_chunks(row_bytes));
    rows.for_each(|(out, row)| {
        let row: Vec<u8> = sorted.iter().map(|it| scaled::unpack(row, *it, bits)).collect();
        scaled::pack(&row, bits, out);
    });
    let shape = tensor.shape.clone();
    let (scales, zeros) = (tensor.scales.clone(), tensor.zeros.clone());
    let codes = Bytes::new(codes);
    let grouped =
        Tensor::new_scaled(shape.clone(), tensor.format, codes, scales, zeros, tensor.global)
            .map_err(at(name))?
            .to_f32();
    let mut values = vec![0.0; grouped.len()];
    let rows = values.par_chunks_mut(columns).zip(grouped.par_chunks(columns));
    rows.for_each(|(out, row)| {
        sorted.iter().zip(row).for_each(|(column, value)| out[*column] = *value);
    });
    Ok(Tensor::from_f32_vec(shape, values))
}

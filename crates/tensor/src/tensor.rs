//! `Tensor`: a shape, a format and the bytes.

use std::ops::Range;

use rayon::prelude::*;

use crate::bytes::Bytes;
use crate::codec;
use crate::error::TensorError;
use crate::format::{Block, FloatType, Format, ScaleGrid, ScaleType, ScaledFormat, ZeroPoint};

/// With fewer elements than this a second thread does not pay.
const PARALLEL_ELEMENTS_MIN: usize = 1 << 16;

/// A read-only tensor in memory. The last dimension is contiguous. For weights it is the input
/// dimension, and the blocks of every format run along it.
#[derive(Debug, Clone)]
pub struct Tensor {
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// How the numbers are stored.
    pub format: Format,
    /// Plain floats or GGUF blocks, row-major. For `Format::Scaled` the codes, packed low bits
    /// first along a row. Each row starts on a byte.
    pub codes: Bytes,
    /// Scales of `Format::Scaled`, `[rows, blocks]` in the scale's type (see [`ScaleGrid`] for
    /// tiles and stacks of matrices). Empty in other formats.
    pub scales: Bytes,
    /// Zero points of `ZeroPoint::Int` as `i8`, in the order of the scales. Empty in other formats.
    pub zeros: Bytes,
    /// The factor of every scale of a matrix (`ScaleType::E4M3Global`).
    pub global: GlobalScale,
}

/// The second scale of NVFP4: one `f32` for each `[rows, columns]` matrix of a stack.
///
/// Some checkpoints store the factor and others its inverse. Each is kept as it is, because a
/// reciprocal would be rounded, and dequantized weights must agree bit for bit with the format's
/// own reader.
#[derive(Debug, Clone, PartialEq)]
pub enum GlobalScale {
    /// The format has no global scale.
    One,
    /// `scale * global` (ModelOpt's `weight_scale_2`).
    Multiply(Vec<f32>),
    /// `scale / global` (compressed-tensors' `weight_global_scale`).
    Divide(Vec<f32>),
}

impl GlobalScale {
    /// The factor of a block of matrix `matrix` whose stored scale is `scale`.
    pub fn apply(&self, matrix: usize, scale: f32) -> f32 {
        match self {
            GlobalScale::One => scale,
            GlobalScale::Multiply(global) => scale * global[matrix],
            GlobalScale::Divide(global) => scale / global[matrix],
        }
    }

    /// The number of matrices that it has a scale for.
    fn len(&self) -> usize {
        match self {
            GlobalScale::One => 0,
            GlobalScale::Multiply(global) | GlobalScale::Divide(global) => global.len(),
        }
    }

    fn only(&self, matrix: usize) -> GlobalScale {
        match self {
            GlobalScale::One => GlobalScale::One,
            GlobalScale::Multiply(global) => GlobalScale::Multiply(vec![global[matrix]]),
            GlobalScale::Divide(global) => GlobalScale::Divide(vec![global[matrix]]),
        }
    }
}

/// The bytes of scales, the bytes of zero points and the number of global scales of a tensor.
fn side_lengths(shape: &[usize], format: Format) -> Result<[usize; 3], TensorError> {
    let Format::Scaled(format) = format else { return Ok([0; 3]) };
    let overflow = || TensorError::Overflow { shape: shape.to_vec() };
    let grid = format.grid(shape).ok_or_else(overflow)?;
    let zeros = if format.zero == ZeroPoint::Int { grid.len() } else { 0 };
    let globals = if format.scale == ScaleType::E4M3Global { grid.matrices } else { 0 };
    Ok([grid.len() * format.scale.bytes(), zeros, globals])
}

/// `f32` numbers as the owner of bytes. So the bytes stay aligned.
struct FloatBytes(Vec<f32>);

impl AsRef<[u8]> for FloatBytes {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl Tensor {
    /// A tensor of plain floats or GGUF blocks.
    ///
    /// # Errors
    /// If `codes` is not exactly as long as shape and format say.
    pub fn new(shape: Vec<usize>, format: Format, codes: Bytes) -> Result<Tensor, TensorError> {
        let none = Bytes::new(Vec::new());
        Self::new_scaled(shape, format, codes, none.clone(), none, GlobalScale::One)
    }

    /// A tensor in any format, with its scales, zero points and global multiplier.
    ///
    /// # Errors
    /// If a plane is not exactly as long as shape and format say.
    pub fn new_scaled(
        shape: Vec<usize>,
        format: Format,
        codes: Bytes,
        scales: Bytes,
        zeros: Bytes,
        global: GlobalScale,
    ) -> Result<Tensor, TensorError> {
        let expected = format.bytes_for(&shape)?;
        if codes.len() != expected {
            return Err(TensorError::Size { shape, format, expected, found: codes.len() });
        }
        let needed = side_lengths(&shape, format)?;
        for (what, found, expected) in [
            ("bytes of scales", scales.len(), needed[0]),
            ("bytes of zero points", zeros.len(), needed[1]),
            ("global scales", global.len(), needed[2]),
        ] {
            if found != expected {
                return Err(TensorError::Side { what, shape, format, expected, found });
            }
        }
        Ok(Tensor { shape, format, codes, scales, zeros, global })
    }

    /// An `f32` tensor with these numbers, copied.
    ///
    /// # Panics
    /// If `values` is not exactly as long as the shape says.
    pub fn from_f32(shape: &[usize], values: &[f32]) -> Tensor {
        Self::from_f32_vec(shape.to_vec(), values.to_vec())
    }

    /// An `f32` tensor that owns these numbers.
    ///
    /// # Panics
    /// If `values` is not exactly as long as the shape says.
    pub fn from_f32_vec(shape: Vec<usize>, values: Vec<f32>) -> Tensor {
        Self::new(shape, Format::F32, Bytes::new(FloatBytes(values)))
            .expect("values fill the shape")
    }

    /// Rows of the tensor seen as a matrix: the product of all dimensions but the last.
    pub fn rows(&self) -> usize {
        self.shape[..self.shape.len().saturating_sub(1)].iter().product()
    }

    /// Elements of a row: the last dimension, or 1 for a scalar.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Elements in all.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Bytes in all: codes, scales and zero points.
    pub fn byte_len(&self) -> usize {
        self.codes.len() + self.scales.len() + self.zeros.len()
    }

    /// The numbers without a copy, if they are `f32` and aligned, on a little-endian machine.
    pub fn as_f32(&self) -> Option<&[f32]> {
        let readable = self.format == Format::F32 && cfg!(target_endian = "little");
        readable.then(|| bytemuck::try_cast_slice(&self.codes).ok()).flatten()
    }

    /// Every number, row-major. Large tensors are converted by all threads.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        let (rows, columns) = (self.rows(), self.columns());
        if out.is_empty() {
            return out;
        }
        if out.len() < PARALLEL_ELEMENTS_MIN {
            self.rows_into(0..rows, &mut out);
        } else if rows == 1 {
            out = self.single_row_to_f32();
        } else {
            let chunk_rows = (PARALLEL_ELEMENTS_MIN / columns).max(1);
            out.par_chunks_mut(chunk_rows * columns).enumerate().for_each(|(i, part)| {
                let start = i * chunk_rows;
                self.rows_into(start..start + part.len() / columns, part);
            });
        }
        out
    }

    fn single_row_to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        match self.format {
            Format::Scaled(_) => self.row_into(0, &mut out),
            format => {
                let chunk = PARALLEL_ELEMENTS_MIN.next_multiple_of(format.block_len());
                let chunk_bytes = format.row_bytes(chunk).expect("whole blocks");
                out.par_chunks_mut(chunk)
                    .zip(self.codes.par_chunks(chunk_bytes))
                    .for_each(|(part, codes)| codec::dequantize(format, codes, part));
            }
        }
        out
    }

    /// Dequantizes row `row` of the `[rows, columns]` view into `out`.
    ///
    /// # Panics
    /// If there is no such row or `out` is not one row long.
    pub fn row_into(&self, row: usize, out: &mut [f32]) {
        assert_eq!(out.len(), self.columns(), "one row");
        self.rows_into(row..row + 1, out);
    }

    /// Dequantizes rows `rows` of the `[rows, columns]` view into `out`.
    ///
    /// # Panics
    /// If there are no such rows or `out` is not exactly as long as they are.
    pub fn rows_into(&self, rows: Range<usize>, out: &mut [f32]) {
        assert!(rows.start <= rows.end && rows.end <= self.rows(), "rows within the tensor");
        assert_eq!(out.len(), rows.len() * self.columns(), "as many numbers as the rows have");
        match self.format {
            Format::Scaled(format) => {
                for (row, out) in rows.zip(out.chunks_mut(self.columns().max(1))) {
                    codec::scaled::dequantize_row(self, &format, row, out);
                }
            }
            format => {
                let bytes = self.row_bytes();
                codec::dequantize(format, &self.codes[rows.start * bytes..rows.end * bytes], out);
            }
        }
    }

    /// Bytes of `codes` that one row takes.
    pub fn row_bytes(&self) -> usize {
        self.format.row_bytes(self.columns()).expect("checked when the tensor was made")
    }

    /// Rows `rows` of the `[rows, columns]` view, as a `[n, columns]` tensor, without a copy.
    ///
    /// # Errors
    /// If there are no such rows, or if they would cut a block that spans rows (tiles) or
    /// belong to several matrices with blocks of their own.
    pub fn slice_rows(&self, rows: Range<usize>) -> Result<Tensor, TensorError> {
        let refuse = |reason| TensorError::Rows {
            rows: rows.clone(),
            shape: self.shape.clone(),
            format: self.format,
            reason,
        };
        if rows.start > rows.end || rows.end > self.rows() {
            return Err(refuse("there are fewer rows"));
        }
        let bytes = self.row_bytes();
        let mut part = self.clone();
        part.shape = vec![rows.len(), self.columns()];
        part.codes = self.codes.slice(rows.start * bytes..rows.end * bytes);
        if let Format::Scaled(format) = self.format {
            let grid = self.grid(&format);
            let range = match rows.is_empty() {
                true => 0..0,
                false => slice_grid(&grid, format.block, &rows).map_err(refuse)?,
            };
            part.global = self.global_of_rows(&grid, &rows).map_err(refuse)?;
            let scale = format.scale.bytes();
            part.scales = self.scales.slice(range.start * scale..range.end * scale);
            if format.zero == ZeroPoint::Int {
                part.zeros = self.zeros.slice(range);
            }
        }
        Ok(part)
    }

    /// The given rows of the `[rows, columns]` view, in that order, copied into a
    /// `[rows.len(), columns]` tensor of the same format.
    ///
    /// # Errors
    /// If a row does not exist, or if a block spans rows (tiles, several matrices).
    pub fn gather_rows(&self, rows: &[usize]) -> Result<Tensor, TensorError> {
        let bounds = rows.iter().min().copied().unwrap_or(0)
            ..rows.iter().max().map_or(0, |&last| last.saturating_add(1));
        let refuse = |reason| TensorError::Rows {
            rows: bounds.clone(),
            shape: self.shape.clone(),
            format: self.format,
            reason,
        };
        if bounds.end > self.rows() {
            return Err(refuse("there are fewer rows"));
        }
        let gather = |plane: &Bytes, bytes: usize| {
            let mut out = Vec::with_capacity(rows.len() * bytes);
            rows.iter().for_each(|row| out.extend_from_slice(&plane[row * bytes..][..bytes]));
            Bytes::new(out)
        };
        let mut part = self.clone();
        part.shape = vec![rows.len(), self.columns()];
        part.codes = gather(&self.codes, self.row_bytes());
        if let Format::Scaled(format) = self.format {
            let grid = self.grid(&format);
            part.global = self.global_of_rows(&grid, &bounds).map_err(refuse)?;
            match format.block {
                Block::Channel | Block::Group(_) => {
                    part.scales = gather(&self.scales, grid.columns * format.scale.bytes());
                    if format.zero == ZeroPoint::Int {
                        part.zeros = gather(&self.zeros, grid.columns);
                    }
                }
                Block::Tensor if grid.matrices == 1 && !rows.is_empty() => {}
                Block::Tensor | Block::Tile(..) => {
                    return Err(refuse("a block spans several rows"));
                }
            }
        }
        Ok(part)
    }

    /// The same bytes under another shape.
    ///
    /// # Errors
    /// If the format does not give the new shape the same bytes in every plane.
    pub fn reshape(&self, shape: Vec<usize>) -> Result<Tensor, TensorError> {
        let (codes, scales, zeros) = (self.codes.clone(), self.scales.clone(), self.zeros.clone());
        Tensor::new_scaled(shape, self.format, codes, scales, zeros, self.global.clone())
    }

    /// The global scale of rows that all belong to one matrix.
    fn global_of_rows(
        &self,
        grid: &ScaleGrid,
        rows: &Range<usize>,
    ) -> Result<GlobalScale, &'static str> {
        if self.global == GlobalScale::One {
            return Ok(GlobalScale::One);
        }
        let (first, last) = (rows.start, rows.end.max(rows.start + 1) - 1);
        match (first / grid.matrix_rows, last / grid.matrix_rows) {
            (a, b) if a == b && a < self.global.len() => Ok(self.global.only(a)),
            _ => Err("they belong to several matrices"),
        }
    }

    /// The grid of scales that `format` has for this tensor's shape.
    pub(crate) fn grid(&self, format: &ScaledFormat) -> ScaleGrid {
        format.grid(&self.shape).expect("checked when the tensor was made")
    }
}

/// The grid of the scales of `rows`, or the reason why they cannot be separated.
fn slice_grid(
    grid: &ScaleGrid,
    block: Block,
    rows: &Range<usize>,
) -> Result<Range<usize>, &'static str> {
    let spans_rows = matches!(block, Block::Tensor | Block::Tile(..));
    if spans_rows {
        let last = rows.end - 1;
        if rows.start / grid.matrix_rows != last / grid.matrix_rows {
            return Err("they belong to several matrices");
        }
        let (start, end) = (rows.start % grid.matrix_rows, last % grid.matrix_rows + 1);
        let whole = matches!(block, Block::Tensor);
        let cut_end = end != grid.matrix_rows && !end.is_multiple_of(grid.block_rows);
        if !whole && (!start.is_multiple_of(grid.block_rows) || cut_end) {
            return Err("they cut a block that spans rows");
        }
    }
    let start = grid.row_start(rows.start);
    Ok(start..grid.row_start(rows.end - 1) + grid.columns)
}

impl From<FloatType> for Format {
    fn from(value: FloatType) -> Self {
        Format::Float(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::GgmlType;

    #[test]
    fn floats_go_in_and_out() {
        let values: Vec<f32> = (0..6).map(|i| i as f32 - 2.5).collect();
        let tensor = Tensor::from_f32(&[2, 3], &values);
        assert_eq!(tensor.to_f32(), values);
        assert_eq!(tensor.as_f32(), Some(values.as_slice()));
        assert_eq!(tensor.slice_rows(1..2).unwrap().to_f32(), &values[3..]);
        assert_eq!(tensor.gather_rows(&[1, 0, 1]).unwrap().shape, [3, 3]);
        assert_eq!(tensor.gather_rows(&[1, 1]).unwrap().to_f32()[3..], values[3..]);
        assert!(matches!(tensor.slice_rows(1..3), Err(TensorError::Rows { .. })));
        assert!(matches!(tensor.gather_rows(&[2]), Err(TensorError::Rows { .. })));
        assert_eq!(Tensor::from_f32(&[], &[7.0]).to_f32(), [7.0]);
        assert!(Tensor::from_f32(&[0, 4], &[]).to_f32().is_empty());
    }

    #[test]
    fn parallel_and_serial_agree() {
        let format = Format::Ggml(GgmlType::Q5_1);
        let codes: Vec<u8> = (0..(1 << 13) * 24).map(|i| (i * 37 % 113) as u8).collect();
        let flat = Tensor::new(vec![1 << 18], format, Bytes::new(codes.clone())).unwrap();
        let tall = Tensor::new(vec![1 << 10, 1 << 8], format, Bytes::new(codes)).unwrap();
        let all = tall.to_f32();
        assert_eq!(flat.to_f32(), all);
        let mut row = vec![0.0; 256];
        tall.row_into(777, &mut row);
        assert_eq!(row, all[777 * 256..778 * 256]);
    }

    #[test]
    fn wrong_sizes_are_refused() {
        let bytes = Bytes::new(vec![0u8; 17]);
        let q4 = Format::Ggml(GgmlType::Q4_0);
        assert!(matches!(
            Tensor::new(vec![32], q4, bytes),
            Err(TensorError::Size { expected: 18, found: 17, .. })
        ));
    }
}

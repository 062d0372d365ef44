//! Applies the turns of one weight, in `f64`, and rounds once.

use std::ops::Range;

use lathe_program::Weight;
use lathe_tensor::hadamard::Hadamard;
use lathe_tensor::{Format, Tensor};
use rayon::prelude::*;

use super::turns::Turn;

/// Numbers that are turned at once if no turn needs more. In `f64` these are a few megabytes.
const NUMBERS_AT_ONCE: usize = 1 << 19;

/// Hands out the numbers of `tensor` after `turns`, in parts and in order. `norm` loads the weights
/// of norms that are absorbed. A part is a whole matrix, or some of its rows if no turn mixes rows.
/// So little memory is needed beside what `take` keeps.
///
/// # Errors
/// Those of `norm`.
pub(crate) fn turned<E>(
    tensor: &Tensor,
    turns: &[Turn],
    norm: impl Fn(Weight) -> Result<Vec<f32>, E>,
    take: &mut dyn FnMut(&[f32]),
) -> Result<(), E> {
    let columns = tensor.shape.last().copied().unwrap_or(1).max(1);
    let total: usize = tensor.shape.iter().product();
    let mixes_rows = turns.iter().any(|turn| matches!(turn, Turn::Rows(_)));
    let rows = match (mixes_rows, tensor.shape.as_slice()) {
        (true, [.., rows, _]) => *rows,
        _ => (NUMBERS_AT_ONCE / columns).max(1),
    };
    let factors = |turn: &Turn| match turn {
        Turn::Absorb { norm: weight, offset } => {
            let weights = norm(*weight)?;
            Ok(weights.iter().map(|w| f64::from(*offset) + f64::from(*w)).collect())
        }
        _ => Ok(Vec::new()),
    };
    let factors = turns.iter().map(factors).collect::<Result<Vec<Vec<f64>>, E>>()?;
    let numbers = Numbers::new(tensor, columns);
    for first in (0..total / columns).step_by(rows) {
        let range = first..(first + rows).min(total / columns);
        let mut wide = numbers.rows(range);
        for (turn, factors) in turns.iter().zip(&factors) {
            apply(turn, factors, &mut wide, columns);
        }
        let narrow: Vec<f32> = wide.into_iter().map(|value| value as f32).collect();
        take(&narrow);
    }
    Ok(())
}

/// The numbers of a tensor by rows.
enum Numbers<'a> {
    /// Rows that can be decoded one by one.
    Rows(&'a Tensor),
    /// All numbers, because rows share scales, and the columns.
    All(Vec<f32>, usize),
}

impl<'a> Numbers<'a> {
    fn new(tensor: &'a Tensor, columns: usize) -> Self {
        match tensor.format {
            Format::Float(_) | Format::Ggml(_) if tensor.shape.len() > 1 => Numbers::Rows(tensor),
            _ => Numbers::All(tensor.to_f32(), columns),
        }
    }

    fn rows(&self, rows: Range<usize>) -> Vec<f64> {
        let wide = |values: &[f32]| values.iter().map(|value| f64::from(*value)).collect();
        match self {
            Numbers::Rows(tensor) => {
                wide(&tensor.slice_rows(rows).expect("rows of the tensor").to_f32())
            }
            Numbers::All(values, columns) => {
                wide(&values[rows.start * columns..rows.end * columns])
            }
        }
    }
}

/// Applies one turn to some rows, or to a whole matrix if it mixes rows.
fn apply(turn: &Turn, factors: &[f64], wide: &mut [f64], columns: usize) {
    match turn {
        Turn::Absorb { .. } => {
            wide.par_chunks_mut(columns).for_each(|row| {
                row.iter_mut().zip(factors).for_each(|(value, factor)| *value *= factor);
            });
        }
        Turn::Neutral { offset } => wide.fill(1.0 - f64::from(*offset)),
        Turn::Columns(matrix) => {
            wide.par_chunks_mut(columns).for_each(|row| matrix.turn(row));
        }
        Turn::Hadamard(block) => {
            let matrix = Hadamard::new(*block).expect("a valid program's block has a matrix");
            wide.par_chunks_mut(columns).for_each(|row| {
                row.chunks_exact_mut(matrix.size()).for_each(|block| matrix.apply_row(block));
            });
        }
        Turn::Rows(matrix) => {
            let rows = wide.len() / columns;
            turn_rows(wide, rows, columns, |column| matrix.turn(column));
        }
    }
}

/// `Q^T W`: turns each column as `Orthogonal::turn` turns a row.
fn turn_rows(values: &mut [f64], rows: usize, columns: usize, turn: impl Fn(&mut [f64]) + Sync) {
    let mut transposed = vec![0.0; values.len()];
    transposed.par_chunks_mut(rows).enumerate().for_each(|(column, out)| {
        out.iter_mut().enumerate().for_each(|(row, out)| *out = values[row * columns + column]);
        turn(out);
    });
    values.par_chunks_mut(columns).enumerate().for_each(|(row, out)| {
        out.iter_mut().enumerate().for_each(|(column, out)| *out = transposed[column * rows + row]);
    });
}

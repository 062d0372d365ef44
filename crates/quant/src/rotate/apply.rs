//! The turns of one weight, computed in `f64` and rounded once.

use lathe_tensor::hadamard::Hadamard;
use rayon::prelude::*;

use super::turns::Turn;

/// `values` of `shape` after `turns`; `norm` has the weights of norms that are absorbed.
pub(crate) fn turned<E>(
    shape: &[usize],
    values: &[f32],
    turns: &[Turn],
    norm: impl Fn(lathe_program::Weight) -> Result<Vec<f32>, E>,
) -> Result<Vec<f32>, E> {
    let mut wide: Vec<f64> = values.iter().map(|value| f64::from(*value)).collect();
    let columns = shape.last().copied().unwrap_or(1).max(1);
    for turn in turns {
        match turn {
            Turn::Absorb { norm: weight, offset } => {
                let factors: Vec<f64> =
                    norm(*weight)?.iter().map(|w| f64::from(*offset) + f64::from(*w)).collect();
                wide.par_chunks_mut(columns).for_each(|row| {
                    row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor);
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
                let rows = shape[shape.len() - 2];
                for matrix_values in wide.chunks_mut(rows * columns) {
                    turn_rows(matrix_values, rows, columns, |column| matrix.turn(column));
                }
            }
        }
    }
    Ok(wide.into_iter().map(|value| value as f32).collect())
}

/// `Q^T W`: each column turned as a row is.
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

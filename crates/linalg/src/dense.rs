//! Matrix products and Cholesky factors on all threads. Nearly all of the work is products of
//! blocks, for which `matrixmultiply` (behind `ndarray`) has kernels.

use std::iter::Sum;
use std::ops::Range;

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayBase, ArrayView2, ArrayViewMut2, Axis, Ix2, LinalgScalar, RawData, Slice};
use rayon::prelude::*;

/// Columns that are factored together, and rows that are the work of one thread.
const PANEL: usize = 96;

/// A matrix is not positive definite: the pivot of this row is not positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPositive(pub usize);

/// Row-major `values` as an `[n, n]` matrix.
///
/// # Panics
/// If `values` does not have `n * n` elements.
pub fn square<T>(values: &[T], n: usize) -> ArrayView2<'_, T> {
    ArrayView2::from_shape((n, n), values).expect("a square matrix")
}

/// Some rows and columns of a view.
///
/// # Panics
/// If they are outside the view.
pub fn part<S: RawData>(
    mut view: ArrayBase<S, Ix2>,
    rows: Range<usize>,
    columns: Range<usize>,
) -> ArrayBase<S, Ix2> {
    view.slice_axis_inplace(Axis(0), Slice::from(rows));
    view.slice_axis_inplace(Axis(1), Slice::from(columns));
    view
}

/// Rows of [`add_product`] that are the work of one thread.
const ROWS_TOGETHER: usize = 48;

/// Adds `a b` to the row-major `out`, on all threads.
///
/// # Panics
/// If `out` is not `[rows of a, columns of b]`.
pub fn add_product<T: LinalgScalar + Send + Sync>(
    a: ArrayView2<'_, T>,
    b: ArrayView2<'_, T>,
    out: &mut [T],
) {
    let columns = b.ncols();
    assert_eq!(out.len(), a.nrows() * columns, "a matrix of that shape");
    let blocks = out.par_chunks_mut((ROWS_TOGETHER * columns).max(1)).with_max_len(1);
    blocks.enumerate().for_each(|(at, out)| {
        let (first, rows) = (at * ROWS_TOGETHER, out.len() / columns);
        let mut out = ArrayViewMut2::from_shape((rows, columns), out).expect("whole rows");
        let a = part(a, first..first + rows, 0..a.ncols());
        general_mat_mul(T::one(), &a, &b, T::one(), &mut out);
    });
}

/// `a b`, row-major, on all threads.
pub fn product(a: ArrayView2<'_, f64>, b: ArrayView2<'_, f64>) -> Vec<f64> {
    let (rows, columns) = (a.nrows(), b.ncols());
    let mut out = vec![0.0; rows * columns];
    add_product(a, b, &mut out);
    out
}

/// The dot product. It keeps `LANES` partial sums, so that vectors can hold them.
#[inline]
pub fn dot<T: LinalgScalar + Sum, const LANES: usize>(a: &[T], b: &[T]) -> T {
    let mut lanes = [T::zero(); LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..LANES {
            lanes[i] = lanes[i] + a[i] * b[i];
        }
    }
    let rest: T = a_rest.iter().zip(b_rest).map(|(a, b)| *a * *b).sum();
    lanes.into_iter().sum::<T>() + rest
}

/// Replaces the lower triangle of the symmetric `[n, n]` matrix by its Cholesky factor `L`, `A = L
/// L^T`. The part above the diagonal is not read, and is written only within diagonal blocks.
///
/// # Errors
/// If the matrix is not positive definite. It is then partly overwritten.
///
/// # Panics
/// If `matrix` is not `[n, n]`.
pub fn cholesky(matrix: &mut [f64], n: usize) -> Result<(), NotPositive> {
    assert_eq!(matrix.len(), n * n, "a square matrix");
    for start in (0..n).step_by(PANEL) {
        let width = PANEL.min(n - start);
        let (panel, below) = matrix[start * n..].split_at_mut(width * n);
        bring_up_to_date(panel, None, n, start, width);
        for row in 0..width {
            let (above, this) = panel.split_at_mut(row * n);
            let this = &mut this[start..start + width];
            solve_row(this, above, n, start, row);
            let pivot = this[row] - dot::<f64, 8>(&this[..row], &this[..row]);
            if pivot.is_nan() || pivot <= 0.0 || pivot.is_infinite() {
                return Err(NotPositive(start + row));
            }
            this[row] = pivot.sqrt();
        }
        below.par_chunks_mut(PANEL * n).with_max_len(1).for_each(|rows| {
            bring_up_to_date(rows, Some(panel), n, start, width);
            for this in rows.chunks_mut(n) {
                solve_row(&mut this[start..start + width], panel, n, start, width);
            }
        });
    }
    Ok(())
}

/// Subtracts the contribution of all earlier columns from columns `start .. start + width` of
/// `rows`. `panel` has the rows of those columns; `None` means that they are `rows` themselves.
fn bring_up_to_date(rows: &mut [f64], panel: Option<&[f64]>, n: usize, start: usize, width: usize) {
    let rows = ArrayViewMut2::from_shape((rows.len() / n, n), rows).expect("whole rows");
    let (before, behind) = rows.split_at(Axis(1), start);
    let mut columns = part(behind, 0..before.nrows(), 0..width);
    match panel {
        None => general_mat_mul(-1.0, &before, &before.t(), 1.0, &mut columns),
        Some(panel) => {
            let panel = ArrayView2::from_shape((width, n), panel).expect("whole rows");
            let panel = part(panel, 0..width, 0..start);
            general_mat_mul(-1.0, &before, &panel.t(), 1.0, &mut columns);
        }
    }
}

/// Solves the first `end` columns of one row of a panel's factor. The rows of `panel` meet the
/// diagonal at column `start`.
fn solve_row(this: &mut [f64], panel: &[f64], n: usize, start: usize, end: usize) {
    for column in 0..end {
        let other = &panel[column * n + start..][..=column];
        this[column] =
            (this[column] - dot::<f64, 8>(&this[..column], &other[..column])) / other[column];
    }
}

/// The inverse of a lower triangular factor, row-major, with zeros above the diagonal. The part
/// above the factor's diagonal is not read.
///
/// # Panics
/// If `factor` is not `[n, n]`.
pub fn inverse_of_lower(factor: &[f64], n: usize) -> Vec<f64> {
    let factor = square(factor, n);
    let starts: Vec<usize> = (0..n).step_by(PANEL).collect();
    let corner = |start: &usize| small_inverse(factor, *start, PANEL.min(n - start));
    let corners: Vec<Vec<f64>> = starts.par_iter().map(corner).collect();
    let mut inverse = vec![0.0; n * n];
    let mut whole = ArrayViewMut2::from_shape((n, n), &mut inverse).expect("a square matrix");
    let panels: Vec<ArrayViewMut2<'_, f64>> = whole.axis_chunks_iter_mut(Axis(1), PANEL).collect();
    // Columns of the inverse are independent: a panel of them is the work of one thread.
    panels.into_par_iter().with_max_len(1).enumerate().for_each(|(at, mut panel)| {
        let (first, width) = (starts[at], panel.ncols());
        let corner_of = |at: usize, size: usize| {
            ArrayView2::from_shape((size, size), &corners[at]).expect("a square matrix")
        };
        part(panel.view_mut(), first..first + width, 0..width).assign(&corner_of(at, width));
        for (below, start) in starts.iter().enumerate().skip(at + 1) {
            let end = n.min(start + PANEL);
            let known = part(factor, *start..end, first..*start);
            let sum = known.dot(&part(panel.view(), first..*start, 0..width));
            let mut out = part(panel.view_mut(), *start..end, 0..width);
            general_mat_mul(-1.0, &corner_of(below, end - start), &sum, 0.0, &mut out);
        }
    });
    inverse
}

/// The inverse of the triangle of `size` rows that begins at `start` on the diagonal.
fn small_inverse(factor: ArrayView2<'_, f64>, start: usize, size: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; size * size];
    for i in 0..size {
        let pivot = factor[[start + i, start + i]];
        let (above, row) = inverse.split_at_mut(i * size);
        for k in 0..i {
            let share = factor[[start + i, start + k]];
            let known = &above[k * size..][..=k];
            row.iter_mut().zip(known).for_each(|(sum, x)| *sum -= share * x);
        }
        row[..i].iter_mut().for_each(|sum| *sum /= pivot);
        row[i] = 1.0 / pivot;
    }
    inverse
}

/// The upper Cholesky factor `U` of the inverse of a positive definite matrix, `A^-1 = U^T U`,
/// row-major.
///
/// Let `J` reverse the order of indexes, and `J A J = L L^T`. Then `U = J L^-1 J`. So neither the
/// inverse nor a second factorization is needed.
///
/// # Errors
/// If the matrix is not positive definite.
///
/// # Panics
/// If `matrix` is not `[n, n]`.
pub fn upper_factor_of_inverse(matrix: &[f64], n: usize) -> Result<Vec<f64>, NotPositive> {
    assert_eq!(matrix.len(), n * n, "a square matrix");
    let mut reversed: Vec<f64> = matrix.iter().rev().copied().collect();
    cholesky(&mut reversed, n).map_err(|NotPositive(row)| NotPositive(n - 1 - row))?;
    let mut upper = inverse_of_lower(&reversed, n);
    upper.reverse();
    Ok(upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `B B^T + n I`, which is far from singular.
    fn positive(n: usize) -> Vec<f64> {
        let b: Vec<f64> = (0..n * n).map(|i| ((i * 7919 % 1009) as f64 / 504.0) - 1.0).collect();
        let mut matrix = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                let diagonal = if i == j { n as f64 } else { 0.0 };
                matrix[i * n + j] = dot::<f64, 8>(&b[i * n..][..n], &b[j * n..][..n]) + diagonal;
            }
        }
        matrix
    }

    #[test]
    fn the_factor_of_the_inverse_inverts() {
        for n in [1, 2, 7, 64, 96, 97, 250] {
            let matrix = positive(n);
            let upper = upper_factor_of_inverse(&matrix, n).unwrap();
            // U^T U A = 1.
            for i in 0..n {
                for j in 0..n {
                    let mut sum = 0.0;
                    for k in 0..n {
                        let inverse: f64 =
                            (0..=i.min(k)).map(|m| upper[m * n + i] * upper[m * n + k]).sum();
                        sum += inverse * matrix[k * n + j];
                    }
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((sum - expected).abs() < 1e-10, "{n}: {i} {j} {sum}");
                }
            }
            assert!((1..n).all(|i| upper[i * n..][..i].iter().all(|x| *x == 0.0)));
        }
    }

    #[test]
    fn a_singular_matrix_is_refused() {
        let mut matrix = positive(5);
        for i in 0..5 {
            (matrix[10 + i], matrix[i * 5 + 2]) = (0.0, 0.0);
        }
        assert_eq!(upper_factor_of_inverse(&matrix, 5), Err(NotPositive(2)));
        assert_eq!(cholesky(&mut [f64::NAN], 1), Err(NotPositive(0)));
    }
}

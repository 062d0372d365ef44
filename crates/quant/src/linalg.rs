//! The little dense algebra that techniques need, in `f64`, on all threads.

use rayon::prelude::*;

/// Columns that are factored together; rows below them are then independent of one another.
const PANEL: usize = 64;

/// A matrix is not positive definite: the pivot of this row is not positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPositive(pub usize);

pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut lanes = [0f64; 8];
    let (a_whole, a_rest) = a.as_chunks::<8>();
    let (b_whole, b_rest) = b.as_chunks::<8>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..8 {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f64>() + rest
}

/// Replaces the lower triangle of the symmetric `[n, n]` matrix by its Cholesky factor `L`,
/// `A = L L^T`; what is above the diagonal is not read or written.
///
/// # Errors
/// If the matrix is not positive definite; it is overwritten in part then.
pub fn cholesky(matrix: &mut [f64], n: usize) -> Result<(), NotPositive> {
    assert_eq!(matrix.len(), n * n, "a square matrix");
    for start in (0..n).step_by(PANEL) {
        let end = n.min(start + PANEL);
        for row in start..end {
            let (above, rest) = matrix.split_at_mut(row * n);
            let this = &mut rest[..n];
            solve_row(this, above, n, start, row);
            let pivot = this[row] - dot(&this[..row], &this[..row]);
            if pivot.is_nan() || pivot <= 0.0 || pivot.is_infinite() {
                return Err(NotPositive(row));
            }
            this[row] = pivot.sqrt();
        }
        let (above, below) = matrix.split_at_mut(end * n);
        below.par_chunks_mut(n).for_each(|this| solve_row(this, above, n, start, end));
    }
    Ok(())
}

/// Columns `start .. end` of a row of the factor, given the rows of `above` that they meet.
fn solve_row(this: &mut [f64], above: &[f64], n: usize, start: usize, end: usize) {
    for column in start..end {
        let other = &above[column * n..][..n];
        this[column] = (this[column] - dot(&this[..column], &other[..column])) / other[column];
    }
}

/// The inverse of a lower triangular factor, transposed: row `j` of the result is column `j` of
/// `L^-1`, zero before `j`.
pub fn inverse_of_lower(factor: &[f64], n: usize) -> Vec<f64> {
    let mut inverse = vec![0.0; n * n];
    inverse.par_chunks_mut(n).enumerate().for_each(|(j, column)| {
        column[j] = 1.0 / factor[j * n + j];
        for i in j + 1..n {
            let row = &factor[i * n..][..n];
            column[i] = -dot(&row[j..i], &column[j..i]) / row[i];
        }
    });
    inverse
}

/// The upper Cholesky factor `U` of the inverse of a positive definite matrix,
/// `A^-1 = U^T U`, row-major. With `J` the reversal of indexes and `J A J = L L^T`,
/// `U = J L^-1 J`: neither the inverse nor a second factorization is needed.
///
/// # Errors
/// If the matrix is not positive definite.
pub fn upper_factor_of_inverse(matrix: &[f64], n: usize) -> Result<Vec<f64>, NotPositive> {
    assert_eq!(matrix.len(), n * n, "a square matrix");
    let mut reversed: Vec<f64> = matrix.iter().rev().copied().collect();
    cholesky(&mut reversed, n).map_err(|NotPositive(row)| NotPositive(n - 1 - row))?;
    let columns = inverse_of_lower(&reversed, n);
    let mut upper = vec![0.0; n * n];
    upper.par_chunks_mut(n).enumerate().for_each(|(a, row)| {
        for (b, out) in row.iter_mut().enumerate().skip(a) {
            *out = columns[(n - 1 - b) * n + n - 1 - a];
        }
    });
    Ok(upper)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `B B^T + n I`, far from singular.
    fn positive(n: usize) -> Vec<f64> {
        let b: Vec<f64> = (0..n * n).map(|i| ((i * 7919 % 1009) as f64 / 504.0) - 1.0).collect();
        let mut matrix = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..n {
                let diagonal = if i == j { n as f64 } else { 0.0 };
                matrix[i * n + j] = dot(&b[i * n..][..n], &b[j * n..][..n]) + diagonal;
            }
        }
        matrix
    }

    #[test]
    fn the_factor_of_the_inverse_inverts() {
        for n in [1, 2, 7, 64, 65, 150] {
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

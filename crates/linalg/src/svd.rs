//! The leading singular vectors of a matrix by randomized subspace iteration (Halko, Martinsson and
//! Tropp, arXiv 0909.4061). It iterates on the product of the matrix with its transpose, on the
//! shorter side.
//!
//! Quantization errors have spectra without gaps. Plain powers hardly separate the leading vectors
//! of such a spectrum from the rest. So a Chebyshev polynomial takes their place between two
//! Rayleigh-Ritz steps (Zhou and Saad, "A Chebyshev-Davidson Algorithm", 2007). It is small on all
//! eigenvalues below the block. Everything is in `f64`, from a fixed seed. No result depends on the
//! number of threads.

use ndarray::ArrayView2;
use rayon::prelude::*;

use lathe_tensor::random::SplitMix64;

use crate::dense::{dot, product, square};

/// Vectors that are iterated beyond the rank that is asked for.
const OVERSAMPLING: usize = 10;
/// The highest degree of the polynomial between two Rayleigh-Ritz steps.
const DEGREE: usize = 8;
/// The largest growth of the largest eigenvalue relative to one below the block. With more growth,
/// `f64` would lose the smaller ones.
const GROWTH: f64 = 1e12;
/// The most Rayleigh-Ritz steps.
const STEPS: usize = 12;
/// The iteration ends when a step increases the leading vectors' share of the squares by less than
/// this.
const TOLERANCE: f64 = 1e-7;
/// The most sweeps of Jacobi's method. It converges quadratically, in about six.
const SWEEPS: usize = 40;
const SEED: u64 = 0x6c6f_7772_616e_6b00;

fn view(values: &[f64], columns: usize) -> ArrayView2<'_, f64> {
    let rows = values.len() / columns.max(1);
    ArrayView2::from_shape((rows, columns), values).expect("whole rows")
}

/// The `rank` leading left singular vectors of the row-major `[rows, columns]` `matrix`: `[rank,
/// rows]`, orthonormal, the largest first. If the matrix has a lower rank, the last vectors carry
/// nothing of it and may be zeros.
///
/// # Panics
/// If the matrix has another shape, or has fewer rows or columns than `rank`.
pub fn leading_left(matrix: &[f64], rows: usize, columns: usize, rank: usize) -> Vec<f64> {
    assert_eq!(matrix.len(), rows * columns, "a matrix of that shape");
    assert!(rank <= rows.min(columns), "no more vectors than there are");
    let matrix = view(matrix, columns);
    if rows <= columns {
        return leading_eigenvectors(&product(matrix, matrix.t()), rows, rank);
    }
    let right = leading_eigenvectors(&product(matrix.t(), matrix), columns, rank);
    let mut left = product(view(&right, columns), matrix.t());
    orthonormalize(&mut left, rows);
    left
}

/// The `rank` leading eigenvectors of the symmetric, positive semidefinite `[n, n]` `matrix`,
/// `[rank, n]`.
fn leading_eigenvectors(matrix: &[f64], n: usize, rank: usize) -> Vec<f64> {
    let size = n.min(rank + OVERSAMPLING);
    let matrix = square(matrix, n);
    let mut vectors = vec![0.0; size * n];
    if size == n {
        (0..n).for_each(|i| vectors[i * n + i] = 1.0);
    } else {
        let mut random = SplitMix64::new(SEED);
        vectors.fill_with(|| random.normal());
        orthonormalize(&mut vectors, n);
    }
    let mut held = 0.0;
    for _ in 0..STEPS {
        let values = rayleigh_ritz(&mut vectors, matrix);
        let now: f64 = values[..rank].iter().sum();
        let converged = now - held <= TOLERANCE * now;
        if size == n || converged {
            break;
        }
        held = now;
        vectors = filtered(vectors, matrix, (values[0], values[size - 1]));
        orthonormalize(&mut vectors, n);
    }
    vectors.truncate(rank * n);
    vectors
}

/// Replaces orthonormal `vectors`, `[k, n]`, by the best approximations of eigenvectors of `matrix`
/// within their span. Returns their eigenvalues, the largest first.
fn rayleigh_ritz(vectors: &mut [f64], matrix: ArrayView2<'_, f64>) -> Vec<f64> {
    let n = matrix.nrows();
    let (values, turn) = {
        let vectors = view(vectors, n);
        let image = product(vectors, matrix);
        symmetric_eigen(product(view(&image, n), vectors.t()), vectors.nrows())
    };
    let turned = product(square(&turn, values.len()), view(vectors, n));
    vectors.copy_from_slice(&turned);
    values
}

/// Applies `T((2 / cut) G - 1)` to each of `vectors`, where `T` is Chebyshev's polynomial. It is at
/// most one on eigenvalues below `cut` and grows fast above, up to `largest`. If `cut` is nearly
/// zero, applies `G` once.
fn filtered(
    vectors: Vec<f64>,
    matrix: ArrayView2<'_, f64>,
    (largest, cut): (f64, f64),
) -> Vec<f64> {
    let n = matrix.nrows();
    let image = |vectors: &[f64]| product(view(vectors, n), matrix);
    // `T(x)` of degree `d` is about `(2 x)^d / 2`.
    let degree = (GROWTH.ln() / (4.0 * largest / cut).ln()) as usize;
    if cut <= 0.0 || degree < 2 {
        return image(&vectors);
    }
    let mut before = vectors;
    let mut now = image(&before);
    now.par_iter_mut().zip(&before).for_each(|(now, before)| *now = 2.0 * *now / cut - before);
    for _ in 1..degree.min(DEGREE) {
        let mut next = image(&now);
        next.par_iter_mut().zip(&now).zip(&before).for_each(|((next, now), before)| {
            *next = 2.0 * (2.0 * *next / cut - now) - before;
        });
        (before, now) = (now, next);
    }
    now
}

/// QR of `vectors`, `[k, n]`, by the modified Gram-Schmidt process, which runs twice for full
/// precision. Vectors that depend on those before them become zeros.
fn orthonormalize(vectors: &mut [f64], n: usize) {
    for at in 0..vectors.len() / n.max(1) {
        let (before, rest) = vectors.split_at_mut(at * n);
        let this = &mut rest[..n];
        let whole = dot::<f64, 8>(this, this).sqrt();
        for _ in 0..2 {
            for other in before.chunks_exact(n) {
                let share = dot::<f64, 8>(this, other);
                this.iter_mut().zip(other).for_each(|(a, b)| *a -= share * b);
            }
        }
        let length = dot::<f64, 8>(this, this).sqrt();
        let kept = if length > 1e-13 * whole { 1.0 / length } else { 0.0 };
        this.iter_mut().for_each(|x| *x *= kept);
    }
}

/// The eigenvalues of a symmetric `[k, k]` matrix, largest first, and its eigenvectors as rows.
/// Jacobi's method by rows (Golub and Van Loan, section 8.5).
fn symmetric_eigen(mut matrix: Vec<f64>, k: usize) -> (Vec<f64>, Vec<f64>) {
    let mut vectors = vec![0.0; k * k];
    (0..k).for_each(|i| vectors[i * k + i] = 1.0);
    let whole: f64 = dot::<f64, 8>(&matrix, &matrix);
    for _ in 0..SWEEPS {
        let mut off = 0.0;
        for p in 0..k {
            for q in p + 1..k {
                let (a, b, both) = (matrix[p * k + p], matrix[q * k + q], matrix[p * k + q]);
                off += both * both;
                if both == 0.0 {
                    continue;
                }
                let theta = (b - a) / (2.0 * both);
                let t = theta.signum() / (theta.abs() + (theta * theta + 1.0).sqrt());
                let cosine = 1.0 / (t * t + 1.0).sqrt();
                let turn = (cosine, t * cosine);
                turn_rows(&mut matrix, k, (p, q), turn);
                for row in matrix.chunks_exact_mut(k) {
                    (row[p], row[q]) =
                        (turn.0 * row[p] - turn.1 * row[q], turn.1 * row[p] + turn.0 * row[q]);
                }
                turn_rows(&mut vectors, k, (p, q), turn);
            }
        }
        if off <= 1e-28 * whole {
            break;
        }
    }
    let mut order: Vec<usize> = (0..k).collect();
    order.sort_by(|a, b| matrix[b * k + b].total_cmp(&matrix[a * k + a]));
    let values = order.iter().map(|i| matrix[i * k + i]).collect();
    (values, order.iter().flat_map(|i| &vectors[i * k..][..k]).copied().collect())
}

/// Rows `p` and `q > p` become `c p - s q` and `s p + c q`.
fn turn_rows(matrix: &mut [f64], k: usize, (p, q): (usize, usize), (c, s): (f64, f64)) {
    let (before, behind) = matrix.split_at_mut(q * k);
    for (x, y) in before[p * k..][..k].iter_mut().zip(&mut behind[..k]) {
        (*x, *y) = (c * *x - s * *y, s * *x + c * *y);
    }
}

/// All singular values of the row-major `[rows, columns]` `matrix`, largest first, by the one-sided
/// Jacobi method (Hestenes 1958) on the rows. Exact and slow, for small matrices.
pub fn singular_values(matrix: &[f64], rows: usize, columns: usize) -> Vec<f64> {
    let mut all: Vec<Vec<f64>> = matrix.chunks(columns).map(<[f64]>::to_vec).collect();
    let inner = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    for _ in 0..60 {
        let mut worst = 0f64;
        for p in 0..rows {
            for q in p + 1..rows {
                let (a, b) = (inner(&all[p], &all[p]), inner(&all[q], &all[q]));
                let both = inner(&all[p], &all[q]);
                if both.abs() <= 1e-300 {
                    continue;
                }
                worst = worst.max(both.abs() / (a * b).sqrt().max(1e-300));
                let zeta = (b - a) / (2.0 * both);
                let t = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                let (c, s) = (1.0 / t.hypot(1.0), t / t.hypot(1.0));
                for column in 0..columns {
                    let (x, y) = (all[p][column], all[q][column]);
                    (all[p][column], all[q][column]) = (c * x - s * y, s * x + c * y);
                }
            }
        }
        if worst < 1e-14 {
            break;
        }
    }
    let mut values: Vec<f64> = all.iter().map(|row| inner(row, row).sqrt()).collect();
    values.sort_by(|a, b| b.total_cmp(a));
    values.truncate(rows.min(columns));
    values
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn random(rows: usize, columns: usize, seed: u64) -> Vec<f64> {
        let mut random = ChaCha8Rng::seed_from_u64(seed);
        let mut normal = || (0..12).map(|_| random.random::<f32>()).sum::<f32>() - 6.0;
        (0..rows * columns).map(|_| f64::from(normal())).collect()
    }

    /// The squares of `matrix` outside the space of `left`.
    fn outside(matrix: &[f64], rows: usize, columns: usize, left: &[f64]) -> f64 {
        let matrix = view(matrix, columns);
        let inside = product(view(left, rows), matrix);
        let projected = product(view(left, rows).t(), view(&inside, columns));
        let pairs = matrix.iter().zip(&projected);
        pairs.map(|(a, b)| (a - b).powi(2)).sum()
    }

    /// The theorem of Eckart and Young: the remaining error is the sum of the other singular
    /// values' squares. Noise has a spectrum without gaps.
    #[test]
    fn what_is_left_is_the_tail_of_the_spectrum() {
        for (rows, columns) in [(60, 60), (40, 90), (90, 40), (1, 7), (7, 1), (30, 200)] {
            let matrix = random(rows, columns, 5);
            let values = singular_values(&matrix, rows, columns);
            let most = rows.min(columns);
            let mut before = f64::INFINITY;
            for rank in [1, 2, 5, 16, 25, most].into_iter().filter(|rank| *rank <= most) {
                let left = leading_left(&matrix, rows, columns, rank);
                assert_eq!(left.len(), rank * rows);
                let found = outside(&matrix, rows, columns, &left);
                let tail: f64 = values[rank..].iter().map(|x| x * x).sum();
                let all: f64 = values.iter().map(|x| x * x).sum();
                let at = format!("{rows}x{columns}, {rank}: {found} {tail}");
                assert!(found >= tail - 1e-11 * all && found - tail < 1e-5 * all, "{at}");
                assert!(found <= before, "{at}");
                before = found;
                for i in 0..rank {
                    for j in 0..=i {
                        let found =
                            dot::<f64, 8>(&left[i * rows..][..rows], &left[j * rows..][..rows]);
                        assert!((found - f64::from(u8::from(i == j))).abs() < 1e-10, "{i} {j}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_matrix_of_low_rank_is_found_whole() {
        let (rows, columns) = (70, 50);
        let (a, b) = (random(rows, 3, 1), random(3, columns, 2));
        let matrix = product(view(&a, 3), view(&b, columns));
        let all: f64 = matrix.iter().map(|x| x * x).sum();
        for rank in [3, 8] {
            let left = leading_left(&matrix, rows, columns, rank);
            assert!(outside(&matrix, rows, columns, &left) < 1e-20 * all);
        }
        assert!(outside(&matrix, rows, columns, &leading_left(&matrix, rows, columns, 2)) > 1e-3);
        // Zero matrices.
        for (rows, columns) in [(20, 30), (30, 20)] {
            let left = leading_left(&vec![0.0; 600], rows, columns, 4);
            assert!(left.len() == 4 * rows && left.iter().all(|x| x.abs() <= 1.0));
        }
    }

    /// Singular values over ten orders of magnitude: a polynomial that grows fast must not drown
    /// the smaller ones.
    #[test]
    fn steep_spectra_are_found_too() {
        let n = 64;
        let (left, right) = (random(n, n, 3), random(n, n, 4));
        let (mut left, mut right) = (left, right);
        orthonormalize(&mut left, n);
        orthonormalize(&mut right, n);
        let values: Vec<f64> = (0..n).map(|i| 10f64.powf(-(i as f64) / 6.0)).collect();
        let scaled: Vec<f64> = left
            .chunks(n)
            .zip(&values)
            .flat_map(|(row, s)| row.iter().map(move |x| x * s))
            .collect();
        let matrix = product(view(&scaled, n).t(), view(&right, n));
        for rank in [1, 6, 20] {
            let found = outside(&matrix, n, n, &leading_left(&matrix, n, n, rank));
            let tail: f64 = values[rank..].iter().map(|x| x * x).sum();
            assert!((found - tail).abs() < 1e-3 * tail, "{rank}: {found} {tail}");
        }
    }
}

//! Fast orthonormal Hadamard transforms, also of sizes that are no powers of two.
//!
//! A size `n = m * 2^k` uses `H_m ⊗ H_{2^k}`. The matrix of the power of two is Sylvester's (as in
//! `scipy.linalg.hadamard`). The matrix of `m` is one of Paley's two constructions over a prime
//! field, which give 12, 20, 28, 36, 76, 108, 140, 148 and many more. The result is divided by
//! `sqrt(n)`, so the transform is a rotation.

use std::ops::{Add, Mul, Sub};

use rayon::prelude::*;

/// The largest dense factor. A row costs `n * m` additions, which must stay affordable.
const FACTOR_MAX: usize = 1024;

/// Columns that are multiplied by the dense factor together.
const TILE: usize = 8;

/// With fewer numbers than this a second thread does not pay.
const PARALLEL_ELEMENTS_MIN: usize = 1 << 15;

/// A float that can be transformed: `f32` or `f64`.
pub trait Real:
    Copy + Send + Sync + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self>
{
    /// The nearest number.
    fn from_f64(value: f64) -> Self;
}

impl Real for f32 {
    fn from_f64(value: f64) -> f32 {
        value as f32
    }
}

impl Real for f64 {
    fn from_f64(value: f64) -> f64 {
        value
    }
}

/// An orthonormal Hadamard matrix of one size.
#[derive(Debug, Clone)]
pub struct Hadamard {
    /// `factor` x `factor` signs, row-major, true for -1. Empty if `factor` is 1.
    negative: Vec<bool>,
    factor: usize,
    /// The power of two.
    power: usize,
}

impl Hadamard {
    /// The matrix of `size`, or `None` if no construction here gives one.
    pub fn new(size: usize) -> Option<Self> {
        if size == 0 {
            return None;
        }
        let odd = size >> size.trailing_zeros();
        if odd == 1 {
            return Some(Self { negative: Vec::new(), factor: 1, power: size });
        }
        // An order is a multiple of 4. The smallest multiple of the odd part costs least.
        let mut factor = odd.checked_mul(4)?;
        while factor <= FACTOR_MAX && size.is_multiple_of(factor) {
            if let Some(negative) = paley(factor) {
                return Some(Self { negative, factor, power: size / factor });
            }
            factor *= 2;
        }
        None
    }

    /// Rows and columns.
    pub fn size(&self) -> usize {
        self.factor * self.power
    }

    /// Replaces each row `x` of `rows` (of [`Hadamard::size`] numbers) by `x Hᵀ`, that is, by
    /// `H` applied to it as a column.
    ///
    /// # Panics
    /// If `rows` is no whole number of rows.
    pub fn apply<T: Real>(&self, rows: &mut [T]) {
        self.each_row(rows, false);
    }

    /// The inverse of [`Hadamard::apply`]: each row `x` becomes `x H`.
    ///
    /// # Panics
    /// If `rows` is no whole number of rows.
    pub fn apply_transposed<T: Real>(&self, rows: &mut [T]) {
        self.each_row(rows, true);
    }

    fn each_row<T: Real>(&self, rows: &mut [T], transposed: bool) {
        assert!(rows.len().is_multiple_of(self.size()), "whole rows");
        let one = |row: &mut [T]| self.transform_row(row, transposed);
        if rows.len() < PARALLEL_ELEMENTS_MIN {
            rows.chunks_exact_mut(self.size()).for_each(one);
        } else {
            rows.par_chunks_exact_mut(self.size()).for_each(one);
        }
    }

    /// [`Hadamard::apply`] of one row: without threads or memory of its own, and compiled with the
    /// instructions of whoever calls it.
    ///
    /// # Panics
    /// If `row` is not of [`Hadamard::size`].
    #[inline(always)]
    pub fn apply_row<T: Real>(&self, row: &mut [T]) {
        assert_eq!(row.len(), self.size(), "one row");
        self.transform_row(row, false);
    }

    #[inline(always)]
    fn transform_row<T: Real>(&self, row: &mut [T], transposed: bool) {
        let scale = T::from_f64(1.0 / (self.size() as f64).sqrt());
        for part in row.chunks_exact_mut(self.power) {
            butterflies(part);
        }
        if self.factor > 1 {
            self.mix(row, transposed);
        }
        row.iter_mut().for_each(|x| *x = *x * scale);
    }

    /// Multiplies by the dense factor across the parts of `power` numbers, some columns at a time.
    #[inline(always)]
    fn mix<T: Real>(&self, row: &mut [T], transposed: bool) {
        let (m, power) = (self.factor, self.power);
        let mut input = [T::from_f64(0.0); TILE * FACTOR_MAX];
        for start in (0..power).step_by(TILE) {
            let count = TILE.min(power - start);
            for (line, part) in input.chunks_exact_mut(TILE).zip(row.chunks_exact(power)) {
                line[..count].copy_from_slice(&part[start..][..count]);
            }
            for (i, part) in row.chunks_exact_mut(power).enumerate() {
                let mut sums = [T::from_f64(0.0); TILE];
                for (j, line) in input.chunks_exact(TILE).take(m).enumerate() {
                    let negative = self.negative[if transposed { j * m + i } else { i * m + j }];
                    for (sum, &x) in sums.iter_mut().zip(line) {
                        *sum = if negative { *sum - x } else { *sum + x };
                    }
                }
                part[start..][..count].copy_from_slice(&sums[..count]);
            }
        }
    }
}

/// Sylvester's transform of a power of two, in place, without normalization.
#[inline(always)]
fn butterflies<T: Real>(x: &mut [T]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

/// Signs of a Hadamard matrix of this order by either of Paley's constructions over a prime
/// field. R. E. A. C. Paley, "On Orthogonal Matrices", J. Math. Phys. 12 (1933).
fn paley(order: usize) -> Option<Vec<bool>> {
    let q = order - 1;
    if q % 4 == 3 && is_prime(q) {
        return Some(paley_first(q));
    }
    let q = order / 2 - 1;
    (q % 4 == 1 && is_prime(q)).then(|| paley_second(q))
}

/// `I + S` for the skew conference matrix `S` of order `q + 1`, `q ≡ 3 mod 4`.
fn paley_first(q: usize) -> Vec<bool> {
    let residues = squares(q);
    let order = q + 1;
    let sign = |i: usize, j: usize| match (i, j) {
        (0, _) => false,
        (_, 0) => true,
        _ if i == j => false,
        _ => !residues[(i + q - j) % q],
    };
    (0..order * order).map(|k| sign(k / order, k % order)).collect()
}

/// A symmetric conference matrix of order `q + 1`, `q ≡ 1 mod 4`, with each of its entries
/// replaced by a 2 x 2 block: ±1 by ±[[1, 1], [1, -1]], and 0 by [[1, -1], [-1, -1]].
fn paley_second(q: usize) -> Vec<bool> {
    let residues = squares(q);
    let order = 2 * (q + 1);
    let sign = |row: usize, column: usize| {
        let (i, j) = (row / 2, column / 2);
        let corner = row % 2 + column % 2;
        if i == j {
            return corner > 0;
        }
        let negative = i != 0 && j != 0 && !residues[(i + q - j) % q];
        negative != (corner == 2)
    };
    (0..order * order).map(|k| sign(k / order, k % order)).collect()
}

/// Which numbers modulo `q` are squares of numbers other than zero.
fn squares(q: usize) -> Vec<bool> {
    let mut residues = vec![false; q];
    (1..q).for_each(|x| residues[x * x % q] = true);
    residues
}

fn is_prime(n: usize) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The matrix itself, row by row.
    fn dense(h: &Hadamard) -> Vec<f64> {
        let n = h.size();
        let mut identity = vec![0.0; n * n];
        (0..n).for_each(|i| identity[i * n + i] = 1.0);
        // Row i becomes column i of H: the transposed matrix.
        h.apply(&mut identity);
        identity
    }

    #[test]
    fn rows_are_orthonormal_to_1e_12() {
        for size in [1, 2, 64, 12, 20, 28, 36, 24, 48, 76, 108, 140, 148, 12 * 8, 28 * 4, 36 * 16] {
            let h = Hadamard::new(size).unwrap_or_else(|| panic!("size {size}"));
            let matrix = dense(&h);
            let unit = 1.0 / (size as f64).sqrt();
            assert!(matrix.iter().all(|x| (x.abs() - unit).abs() < 1e-14), "{size}");
            for i in 0..size {
                for j in 0..=i {
                    let rows = matrix[i * size..][..size].iter().zip(&matrix[j * size..][..size]);
                    let dot: f64 = rows.map(|(a, b)| a * b).sum();
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((dot - expected).abs() < 1e-12, "{size}: rows {i}, {j}: {dot}");
                }
            }
        }
    }

    #[test]
    fn powers_of_two_are_sylvesters() {
        let matrix = dense(&Hadamard::new(16).unwrap());
        for (k, x) in matrix.iter().enumerate() {
            let sign = if ((k / 16) & (k % 16)).count_ones() % 2 == 0 { 1.0 } else { -1.0 };
            assert_eq!(*x, sign / 4.0);
        }
    }

    #[test]
    fn the_transposed_is_the_inverse() {
        for size in [8, 12, 20 * 4, 28 * 16, 36 * 16, 12 * 128, 28 * 512] {
            let h = Hadamard::new(size).unwrap();
            let start: Vec<f64> = (0..3 * size).map(|i| ((i * 37) % 101) as f64 - 50.0).collect();
            let mut x = start.clone();
            h.apply(&mut x);
            h.apply_transposed(&mut x);
            assert!(x.iter().zip(&start).all(|(a, b)| (a - b).abs() < 1e-11), "{size}");
            let mut single: Vec<f32> = start.iter().map(|&v| v as f32).collect();
            h.apply(&mut single);
            h.apply_transposed(&mut single);
            assert!(single.iter().zip(&start).all(|(a, b)| (f64::from(*a) - b).abs() < 1e-3));
        }
    }

    #[test]
    fn impossible_sizes_are_none() {
        for size in [0, 3, 6, 10, 18, 172] {
            assert!(Hadamard::new(size).is_none(), "{size}");
        }
        for size in [576, 1536, 5120, 8960, 9728, 13824, 14336, 18944, 25600, 29568] {
            assert!(Hadamard::new(size).is_some(), "{size}");
        }
    }
}

//! `d H d^T` for many rows `d` at once. If `H` is the mean of `x x^T` over inputs `x`, this is the
//! mean squared output error of an error `d` of a weight row.
//!
//! Only one triangle of `H` is multiplied, one panel of its columns at a time. The product of a
//! panel with all rows is one matrix product in `f32`. Its products with `d` are summed in `f64`.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use crate::dense::{dot, part, square};

/// Rows that are the work of one thread.
const ROWS_TOGETHER: usize = 96;
/// The widest panel of columns. Narrower panels skip more products above the diagonal.
const PANEL_MAX: usize = 128;
/// The narrowest panel. Below it the kernels of matrix products are inefficient.
const PANEL_MIN: usize = 32;

/// A symmetric `[n, n]` matrix, prepared for products with rows on both sides.
#[derive(Debug, Clone)]
pub struct Quadratic {
    n: usize,
    panel: usize,
    /// Row-major. In the panel of columns that begins at `start`, the rows before `start` are
    /// doubled and the panel's own rows are unchanged. The rows after them belong to a later panel
    /// and are not read.
    weights: Vec<f32>,
}

impl Quadratic {
    /// The matrix with `element(i, j)` in row `i`, column `j`. It is called for `i` up to the last
    /// row of the panel of `j`.
    pub fn new(n: usize, element: impl Fn(usize, usize) -> f64 + Sync) -> Self {
        let panel = (n / 4).clamp(PANEL_MIN, PANEL_MAX);
        let mut weights = vec![0f32; n * n];
        weights.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            let first = i / panel * panel;
            for (j, weight) in row.iter_mut().enumerate().skip(first) {
                let times = if j / panel == i / panel { 1.0 } else { 2.0 };
                *weight = (times * element(i, j)) as f32;
            }
        });
        Quadratic { n, panel, weights }
    }

    /// Rows and columns.
    pub fn width(&self) -> usize {
        self.n
    }

    /// `d H d^T` of each row `d` of `rows`, `[m, n]`, on the calling thread. `products` is scratch.
    ///
    /// # Panics
    /// If there is not one of `sums` for each row.
    pub fn each(&self, rows: &[f32], products: &mut Vec<f32>, sums: &mut [f64]) {
        let (n, m) = (self.n, sums.len());
        let rows = ArrayView2::from_shape((m, n), rows).expect("a row for each sum");
        let weights = square(&self.weights, n);
        sums.fill(0.0);
        for start in (0..n).step_by(self.panel) {
            let end = n.min(start + self.panel);
            products.resize(m * (end - start), 0.0);
            let mut product =
                ArrayViewMut2::from_shape((m, end - start), &mut products[..]).expect("its size");
            let panel = part(weights, 0..end, start..end);
            general_mat_mul(1.0, &part(rows, 0..m, 0..end), &panel, 0.0, &mut product);
            for ((sum, row), product) in
                sums.iter_mut().zip(rows.rows()).zip(products.chunks(end - start))
            {
                let row = &row.to_slice().expect("rows lie in one piece")[start..end];
                *sum += f64::from(dot::<f32, 16>(row, product));
            }
        }
    }

    /// The sum of `d H d^T` over the rows of `rows`, `[m, n]`, on all threads. If `H` is the mean
    /// of `x x^T`, this is the mean squared length of `D x`.
    ///
    /// # Panics
    /// If `rows` does not fill whole rows.
    pub fn sum(&self, rows: &[f32]) -> f64 {
        assert!(rows.len().is_multiple_of(self.n.max(1)), "whole rows");
        let some = |rows: &[f32]| {
            let mut sums = vec![0f64; rows.len() / self.n];
            self.each(rows, &mut Vec::new(), &mut sums);
            sums.iter().sum::<f64>()
        };
        let parts: Vec<f64> =
            rows.par_chunks((ROWS_TOGETHER * self.n).max(1)).with_max_len(1).map(some).collect();
        // Summed in order, so that the result does not depend on threads.
        parts.iter().sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_the_naive_sum() {
        for n in [1, 5, 31, 32, 33, 64, 100, 160, 530] {
            let number = |i: usize| (i * 7919 % 2003) as f64 / 1001.0 - 1.0;
            let element = |i: usize, j: usize| number(i.min(j) * 31 + i.max(j) * 17);
            let form = Quadratic::new(n, element);
            let rows: Vec<f32> = (0..100 * n).map(|i| number(i + 5) as f32).collect();
            let mut naive = Vec::new();
            for d in rows.chunks(n) {
                let mut sum = 0.0;
                for i in 0..n {
                    for j in 0..n {
                        sum += f64::from(d[i]) * element(i, j) * f64::from(d[j]);
                    }
                }
                naive.push(sum);
            }
            let mut sums = vec![f64::NAN; 100];
            form.each(&rows, &mut Vec::new(), &mut sums);
            for (found, expected) in sums.iter().zip(&naive) {
                assert!((found - expected).abs() < 1e-5 * n as f64, "{n}: {found} {expected}");
            }
            let (found, expected) = (form.sum(&rows), naive.iter().sum::<f64>());
            assert!((found - expected).abs() < 1e-4 * n as f64, "{n}: {found} {expected}");
        }
    }
}

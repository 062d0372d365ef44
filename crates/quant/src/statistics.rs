//! Statistics of the inputs of a linear group: `H = X^T X` and magnitudes of channels.
//!
//! Memory depends on the width alone, not on the number of tokens. The squared output error of a
//! changed weight is `|D X^T|^2 = tr(D H D^T)`. It depends on `H` alone, so no activations are
//! kept.

use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2, Axis, Slice};
use rayon::prelude::*;

use lathe_linalg::Quadratic;
use lathe_linalg::part;

/// Rows that are multiplied in `f32` before their products are added to the `f64` sums.
const CHUNK_ROWS: usize = 512;
/// Channels of a tile. One thread computes their products with all channels up to themselves.
const TILE: usize = 96;

/// Sums over all input rows `x` of a linear group.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    width: usize,
    rows: u64,
    /// The lower triangle of the sum of `x x^T`, row by row, or the diagonal alone.
    products: Vec<f64>,
    /// Sum of `|x|`.
    magnitudes: Vec<f64>,
    /// The largest `|x|`.
    largest: Vec<f32>,
}

/// The offset of row `row` in a packed lower triangle.
fn start_of(row: usize) -> usize {
    row * (row + 1) / 2
}

impl Statistics {
    /// Empty statistics for inputs of `width` channels.
    pub fn new(width: usize) -> Self {
        let (products, magnitudes) = (vec![0.0; start_of(width)], vec![0.0; width]);
        Statistics { width, rows: 0, products, magnitudes, largest: vec![0.0; width] }
    }

    /// The same without products of different channels. Techniques that weigh columns one by one
    /// need no more.
    pub fn without_products(width: usize) -> Self {
        let zeros = vec![0.0; width];
        let (products, magnitudes) = (zeros.clone(), zeros);
        Statistics { width, rows: 0, products, magnitudes, largest: vec![0.0; width] }
    }

    /// Whether products of different channels are kept.
    pub fn has_products(&self) -> bool {
        self.products.len() == start_of(self.width)
    }

    /// Channels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Rows seen.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds the rows of `data`, `[rows, width]`.
    ///
    /// # Panics
    /// If `data` does not fill whole rows.
    pub fn add(&mut self, data: &[f32]) {
        assert!(data.len().is_multiple_of(self.width), "whole rows");
        for chunk in data.chunks(CHUNK_ROWS * self.width) {
            self.add_chunk(chunk);
        }
    }

    fn add_chunk(&mut self, data: &[f32]) {
        let (width, rows) = (self.width, data.len() / self.width);
        self.rows += rows as u64;
        let all = ArrayView2::from_shape((rows, width), data).expect("whole rows");
        let tiles: Vec<Tile<'_>> = self.tiles().collect();
        // The longest rows come first, so that no thread ends with them alone.
        tiles.into_par_iter().rev().with_max_len(1).for_each(|tile| tile.add(all));
    }

    /// The sums, cut into tiles that threads update independently.
    fn tiles(&mut self) -> impl Iterator<Item = Tile<'_>> {
        let (width, all) = (self.width, self.has_products());
        let start_of = move |row: usize| if all { start_of(row) } else { row };
        let mut products = self.products.as_mut_slice();
        let magnitudes = self.magnitudes.chunks_mut(TILE);
        let columns = magnitudes.zip(self.largest.chunks_mut(TILE)).enumerate();
        columns.map(move |(tile, (magnitudes, largest))| {
            let (first, end) = (tile * TILE, width.min((tile + 1) * TILE));
            let (these, rest) =
                std::mem::take(&mut products).split_at_mut(start_of(end) - start_of(first));
            products = rest;
            Tile { first, products: these, all, magnitudes, largest }
        })
    }

    /// Adds statistics of other rows of the same channels.
    ///
    /// # Panics
    /// If the widths differ, or only one of the two has products.
    pub fn merge(&mut self, other: &Statistics) {
        assert_eq!(self.width, other.width, "the same channels");
        assert_eq!(self.products.len(), other.products.len(), "the same products");
        self.rows += other.rows;
        self.products.iter_mut().zip(&other.products).for_each(|(a, b)| *a += b);
        self.magnitudes.iter_mut().zip(&other.magnitudes).for_each(|(a, b)| *a += b);
        self.largest.iter_mut().zip(&other.largest).for_each(|(a, b)| *a = a.max(*b));
    }

    /// The mean of `x_i x_j`.
    ///
    /// # Panics
    /// If `i` and `j` differ and products of different channels are not kept.
    pub fn mean_product(&self, i: usize, j: usize) -> f64 {
        let at = match self.has_products() {
            true => start_of(i.max(j)) + i.min(j),
            false => {
                assert_eq!(i, j, "products of different channels are not kept");
                i
            }
        };
        self.products[at] / self.rows.max(1) as f64
    }

    /// The mean of `x x^T`, `[width, width]`, both triangles.
    pub fn hessian(&self) -> Vec<f64> {
        let n = self.width;
        let mut full = vec![0.0; n * n];
        full.par_chunks_mut(n.max(1)).enumerate().for_each(|(i, row)| {
            row.iter_mut().enumerate().for_each(|(j, mean)| *mean = self.mean_product(i, j));
        });
        full
    }

    /// The mean of each channel's square.
    pub fn squares(&self) -> Vec<f32> {
        (0..self.width).map(|channel| self.mean_product(channel, channel) as f32).collect()
    }

    /// The mean of each channel's magnitude.
    pub fn mean_magnitudes(&self) -> Vec<f64> {
        let rows = self.rows.max(1) as f64;
        self.magnitudes.iter().map(|sum| sum / rows).collect()
    }

    /// The largest magnitude of each channel.
    pub fn largest(&self) -> &[f32] {
        &self.largest
    }

    /// Whether all inputs were finite numbers.
    pub fn is_finite(&self) -> bool {
        self.magnitudes.iter().all(|sum| sum.is_finite())
    }

    /// The statistics of inputs whose channels are divided by `scales`.
    ///
    /// # Panics
    /// If there is not one scale for each channel.
    pub fn divided_by(&self, scales: &[f32]) -> Statistics {
        assert_eq!(scales.len(), self.width, "a scale a channel");
        let mut scaled = self.clone();
        for i in 0..self.width {
            scaled.magnitudes[i] /= f64::from(scales[i]);
            scaled.largest[i] /= scales[i];
            if !self.has_products() {
                scaled.products[i] /= f64::from(scales[i]).powi(2);
                continue;
            }
            for j in 0..=i {
                scaled.products[start_of(i) + j] /= f64::from(scales[i]) * f64::from(scales[j]);
            }
        }
        scaled
    }

    /// The mean of `x x^T` as a quadratic form. `tr(D H D^T)` is the mean squared output error `|D
    /// x|^2` of a weight error `D`.
    pub fn quadratic(&self) -> Quadratic {
        Quadratic::new(self.width, |i, j| self.mean_product(i, j))
    }
}

/// The sums of a few channels: their products with all channels up to themselves, or their squares
/// alone.
struct Tile<'a> {
    first: usize,
    products: &'a mut [f64],
    /// Whether they are products with other channels.
    all: bool,
    magnitudes: &'a mut [f64],
    largest: &'a mut [f32],
}

impl Tile<'_> {
    /// Adds some rows. `all` has every channel.
    fn add(self, all: ArrayView2<'_, f32>) {
        let (first, end) = (self.first, self.first + self.magnitudes.len());
        let columns = part(all, 0..all.nrows(), first..end);
        for row in columns.rows() {
            let row = row.to_slice().expect("rows lie in one piece");
            self.magnitudes.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
            self.largest.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(x.abs()));
            if !self.all {
                self.products.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x * x));
            }
        }
        if !self.all {
            return;
        }
        let mut product = vec![0f32; (end - first) * end];
        let view = ArrayViewMut2::from_shape((end - first, end), &mut product);
        let before = part(all, 0..all.nrows(), 0..end);
        general_mat_mul(1.0, &columns.t(), &before, 0.0, &mut view.expect("its size"));
        for (i, line) in product.chunks(end).enumerate() {
            let at = start_of(first + i) - start_of(first);
            let sums = &mut self.products[at..][..=first + i];
            sums.iter_mut().zip(line).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}

/// The mean of `(x_float - x) x^T` over rows that two models made from the same tokens. `x_float`
/// is an input in the float model, and `x` is the same input behind quantized layers. Row `i` is
/// channel `i` of the difference.
#[derive(Debug, Clone, PartialEq)]
pub struct Asymmetry {
    width: usize,
    rows: u64,
    products: Vec<f64>,
}

impl Asymmetry {
    /// Empty, for inputs of `width` channels.
    pub fn new(width: usize) -> Self {
        Asymmetry { width, rows: 0, products: vec![0.0; width * width] }
    }

    /// Adds rows of both models, `[rows, width]` each.
    ///
    /// # Panics
    /// If the lengths differ, or are not whole rows.
    pub fn add(&mut self, float: &[f32], quantized: &[f32]) {
        let width = self.width;
        assert_eq!(float.len(), quantized.len(), "the same rows of both");
        assert!(quantized.len().is_multiple_of(width), "whole rows");
        self.rows += (quantized.len() / width) as u64;
        let chunks = float.chunks(CHUNK_ROWS * width).zip(quantized.chunks(CHUNK_ROWS * width));
        for (float, quantized) in chunks {
            let shape = (quantized.len() / width, width);
            let difference: Vec<f32> = float.iter().zip(quantized).map(|(a, b)| a - b).collect();
            let left = ArrayView2::from_shape(shape, &difference).expect("whole rows");
            let right = ArrayView2::from_shape(shape, quantized).expect("whole rows");
            self.products.par_chunks_mut(TILE * width).enumerate().for_each(|(tile, sums)| {
                let rows = tile * TILE..width.min((tile + 1) * TILE);
                let part = left.slice_axis(Axis(1), Slice::from(rows));
                let product = part.t().dot(&right);
                sums.iter_mut().zip(&product).for_each(|(sum, x)| *sum += f64::from(*x));
            });
        }
    }

    /// The mean, `[width, width]`.
    pub fn mean(&self) -> Vec<f64> {
        let rows = self.rows.max(1) as f64;
        self.products.iter().map(|sum| sum / rows).collect()
    }

    /// The same for inputs whose channels are divided by `scales`.
    ///
    /// # Panics
    /// If there is not one scale for each channel.
    pub fn divided_by(&self, scales: &[f32]) -> Asymmetry {
        assert_eq!(scales.len(), self.width, "a scale a channel");
        let mut scaled = self.clone();
        for (row, a) in scaled.products.chunks_mut(self.width.max(1)).zip(scales) {
            let divided = row.iter_mut().zip(scales);
            divided.for_each(|(sum, b)| *sum /= f64::from(*a) * f64::from(*b));
        }
        scaled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(count: usize, seed: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 + seed * 104_729) % 2003) as f32 / 1001.0 - 1.0).collect()
    }

    #[test]
    fn sums_are_the_naive_ones_however_they_come() {
        let (rows, width) = (301, 37);
        let data = numbers(rows * width, 1);
        let mut all = Statistics::new(width);
        all.add(&data);
        let mut pieces = Statistics::new(width);
        let mut second = Statistics::new(width);
        pieces.add(&data[..100 * width]);
        second.add(&data[100 * width..]);
        pieces.merge(&second);
        assert_eq!(all.rows(), 301);
        let mut sizes = Statistics::without_products(width);
        sizes.add(&data[..100 * width]);
        let mut second = Statistics::without_products(width);
        second.add(&data[100 * width..]);
        sizes.merge(&second);
        assert!(all.has_products() && !sizes.has_products());
        assert_eq!((sizes.rows(), sizes.largest()), (301, all.largest()));
        let scales: Vec<f32> = (0..width).map(|i| 0.5 + i as f32).collect();
        for (sizes, all) in [(&sizes, &all), (&sizes.divided_by(&scales), &all.divided_by(&scales))]
        {
            for (found, expected) in sizes.squares().iter().zip(all.squares()) {
                assert!((found - expected).abs() < 1e-5 * expected, "{found} {expected}");
            }
        }
        let hessian = all.hessian();
        for i in 0..width {
            for j in 0..width {
                let naive: f64 = (0..rows)
                    .map(|r| f64::from(data[r * width + i]) * f64::from(data[r * width + j]))
                    .sum();
                for found in [hessian[i * width + j], pieces.hessian()[i * width + j]] {
                    assert!((found * rows as f64 - naive).abs() < 1e-4, "{found} {naive}");
                }
            }
            let magnitude: f64 = (0..rows).map(|r| f64::from(data[r * width + i].abs())).sum();
            assert!((all.mean_magnitudes()[i] * rows as f64 - magnitude).abs() < 1e-9);
        }
    }

    #[test]
    fn asymmetry_is_the_naive_mean() {
        let (rows, width) = (300, 101);
        let (float, quantized) = (numbers(rows * width, 4), numbers(rows * width, 5));
        let mut found = Asymmetry::new(width);
        found.add(&float[..40 * width], &quantized[..40 * width]);
        found.add(&float[40 * width..], &quantized[40 * width..]);
        let scales: Vec<f32> = (0..width).map(|i| 0.5 + i as f32 / 50.0).collect();
        let (mean, scaled) = (found.mean(), found.divided_by(&scales).mean());
        for i in (0..width).step_by(7) {
            for j in (0..width).step_by(5) {
                let one = |r: usize| {
                    let (at, of) = (r * width + i, r * width + j);
                    f64::from(float[at] - quantized[at]) * f64::from(quantized[of])
                };
                let naive = (0..rows).map(one).sum::<f64>() / rows as f64;
                assert!((mean[i * width + j] - naive).abs() < 1e-5);
                let naive = naive / f64::from(scales[i] * scales[j]);
                assert!((scaled[i * width + j] - naive).abs() < 1e-4);
            }
        }
    }

    #[test]
    fn the_output_error_is_that_of_the_outputs() {
        let (rows, width, out) = (64, 19, 21);
        let (data, difference) = (numbers(rows * width, 2), numbers(out * width, 3));
        let mut statistics = Statistics::new(width);
        statistics.add(&data);
        let mut naive = 0.0;
        for x in data.chunks(width) {
            for d in difference.chunks(width) {
                let y: f64 = x.iter().zip(d).map(|(x, d)| f64::from(*x) * f64::from(*d)).sum();
                naive += y * y / rows as f64;
            }
        }
        let found = statistics.quadratic().sum(&difference);
        assert!((found - naive).abs() < 1e-4 * naive, "{found} {naive}");
        // If inputs are divided and weights multiplied by the same scales, the outputs stay.
        let scales: Vec<f32> = (0..width).map(|i| 0.5 + i as f32).collect();
        let scaled: Vec<f32> =
            difference.iter().zip(scales.iter().cycle()).map(|(d, s)| d * s).collect();
        let found = statistics.divided_by(&scales).quadratic().sum(&scaled);
        assert!((found - naive).abs() < 1e-4 * naive, "{found} {naive}");
    }
}

//! What calibration keeps of the inputs of a linear group: `H = X^T X` and channel magnitudes.
//!
//! Memory depends on the width alone, never on how many tokens were seen. `H` is all that the
//! squared output error of a changed weight depends on, `|D X^T|^2 = tr(D H D^T)`, so that no
//! sample of activations has to be kept for it.

use ndarray::{Array2, ArrayView2, Axis, Slice};
use rayon::prelude::*;

/// Rows that are multiplied in `f32` before they are added to the sums in `f64`.
const CHUNK_ROWS: usize = 256;
/// Channels of a tile of products, one thread's work.
const TILE: usize = 96;
/// Output channels that share what is read of `H`.
const ROWS_TOGETHER: usize = 8;

/// Sums over the rows `x` of the inputs that a linear group saw.
#[derive(Debug, Clone, PartialEq)]
pub struct Statistics {
    width: usize,
    rows: u64,
    /// Lower triangle of the sum of `x x^T`, row after row.
    products: Vec<f64>,
    /// Sum of `|x|`.
    magnitudes: Vec<f64>,
    /// The largest `|x|`.
    largest: Vec<f32>,
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 16];
    let (a_whole, a_rest) = a.as_chunks::<16>();
    let (b_whole, b_rest) = b.as_chunks::<16>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..16 {
            lanes[i] += a[i] * b[i];
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    lanes.iter().sum::<f32>() + rest
}

/// Where row `row` of a packed lower triangle begins.
fn start_of(row: usize) -> usize {
    row * (row + 1) / 2
}

impl Statistics {
    /// Of inputs of `width` channels, none seen yet.
    pub fn new(width: usize) -> Self {
        let (products, magnitudes) = (vec![0.0; start_of(width)], vec![0.0; width]);
        Statistics { width, rows: 0, products, magnitudes, largest: vec![0.0; width] }
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
    /// If `data` is no whole number of rows.
    pub fn add(&mut self, data: &[f32]) {
        assert!(data.len().is_multiple_of(self.width), "whole rows");
        for chunk in data.chunks(CHUNK_ROWS * self.width) {
            self.add_chunk(chunk);
        }
    }

    fn add_chunk(&mut self, data: &[f32]) {
        let (width, rows) = (self.width, data.len() / self.width);
        self.rows += rows as u64;
        for row in data.chunks_exact(width) {
            self.magnitudes.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(x.abs()));
            self.largest.iter_mut().zip(row).for_each(|(most, x)| *most = most.max(x.abs()));
        }
        let all = ArrayView2::from_shape((rows, width), data).expect("whole rows");
        let tiles: Vec<(usize, usize)> = (0..width)
            .step_by(TILE)
            .flat_map(|row| (0..=row).step_by(TILE).map(move |column| (row, column)))
            .collect();
        let columns =
            |start: usize| all.slice_axis(Axis(1), Slice::from(start..width.min(start + TILE)));
        let products: Vec<Array2<f32>> = tiles
            .par_iter()
            .map(|(row, column)| columns(*row).t().dot(&columns(*column)))
            .collect();
        for ((row, column), product) in tiles.into_iter().zip(products) {
            for (i, line) in product.outer_iter().enumerate() {
                let below = (row + i + 1).saturating_sub(column).min(line.len());
                let sums = &mut self.products[start_of(row + i) + column..][..below];
                sums.iter_mut().zip(line).for_each(|(sum, x)| *sum += f64::from(*x));
            }
        }
    }

    /// Adds what other statistics of the same channels saw.
    ///
    /// # Panics
    /// If they are of another width.
    pub fn merge(&mut self, other: &Statistics) {
        assert_eq!(self.width, other.width, "the same channels");
        self.rows += other.rows;
        self.products.iter_mut().zip(&other.products).for_each(|(a, b)| *a += b);
        self.magnitudes.iter_mut().zip(&other.magnitudes).for_each(|(a, b)| *a += b);
        self.largest.iter_mut().zip(&other.largest).for_each(|(a, b)| *a = a.max(*b));
    }

    /// The mean of `x x^T`, `[width, width]`, both triangles.
    pub fn hessian(&self) -> Vec<f64> {
        let (n, rows) = (self.width, self.rows.max(1) as f64);
        let mut full = vec![0.0; n * n];
        for i in 0..n {
            for j in 0..=i {
                let mean = self.products[start_of(i) + j] / rows;
                full[i * n + j] = mean;
                full[j * n + i] = mean;
            }
        }
        full
    }

    /// The mean of each channel's square.
    pub fn squares(&self) -> Vec<f32> {
        let rows = self.rows.max(1) as f64;
        let mean = |channel: usize| (self.products[start_of(channel) + channel] / rows) as f32;
        (0..self.width).map(mean).collect()
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

    /// What would have been seen if each channel were divided by its scale.
    ///
    /// # Panics
    /// If there is not one scale a channel.
    pub fn divided_by(&self, scales: &[f32]) -> Statistics {
        assert_eq!(scales.len(), self.width, "a scale a channel");
        let mut scaled = self.clone();
        for i in 0..self.width {
            scaled.magnitudes[i] /= f64::from(scales[i]);
            scaled.largest[i] /= scales[i];
            for j in 0..=i {
                scaled.products[start_of(i) + j] /= f64::from(scales[i]) * f64::from(scales[j]);
            }
        }
        scaled
    }

    /// The lower triangle of the mean of `x x^T` in `f32`, for [`output_error`].
    pub fn triangle(&self) -> Vec<f32> {
        let rows = self.rows.max(1) as f64;
        self.products.iter().map(|sum| (sum / rows) as f32).collect()
    }
}

/// The mean of `(x_float - x) x^T` over rows that two models made of the same tokens: `x_float` is an input
/// in the model as it was, `x` the same one behind quantized layers. Row `i` is channel `i` of the difference.
#[derive(Debug, Clone, PartialEq)]
pub struct Asymmetry {
    width: usize,
    rows: u64,
    products: Vec<f64>,
}

impl Asymmetry {
    /// Of inputs of `width` channels, none seen yet.
    pub fn new(width: usize) -> Self {
        Asymmetry { width, rows: 0, products: vec![0.0; width * width] }
    }

    /// Adds rows of both models, `[rows, width]` each.
    ///
    /// # Panics
    /// If they are not as many, or no whole number of rows.
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

    /// What would have been seen if each channel were divided by its scale.
    ///
    /// # Panics
    /// If there is not one scale a channel.
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

/// `tr(D H D^T)` for the rows of `difference`, `[rows, width]`: the mean squared length of `D x`.
/// `triangle` is [`Statistics::triangle`].
///
/// # Panics
/// If the sizes do not fit.
pub fn output_error(difference: &[f32], triangle: &[f32], width: usize) -> f64 {
    assert_eq!(triangle.len(), start_of(width), "a triangle of that width");
    let rows_of = |rows: &[f32]| {
        let mut sum = 0f64;
        for i in 0..width {
            let of = &triangle[start_of(i)..][..=i];
            for row in rows.chunks_exact(width) {
                let below = 2.0 * dot(&of[..i], &row[..i]);
                sum += f64::from(row[i]) * f64::from(below + of[i] * row[i]);
            }
        }
        sum
    };
    difference.par_chunks(ROWS_TOGETHER * width).map(rows_of).sum()
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
        let found = output_error(&difference, &statistics.triangle(), width);
        assert!((found - naive).abs() < 1e-4 * naive, "{found} {naive}");
        // Inputs divided and weights multiplied by the same scales: the same outputs.
        let scales: Vec<f32> = (0..width).map(|i| 0.5 + i as f32).collect();
        let scaled: Vec<f32> =
            difference.iter().zip(scales.iter().cycle()).map(|(d, s)| d * s).collect();
        let found = output_error(&scaled, &statistics.divided_by(&scales).triangle(), width);
        assert!((found - naive).abs() < 1e-4 * naive, "{found} {naive}");
    }
}

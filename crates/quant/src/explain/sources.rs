//! Sources of the error of one quantized tensor.
//!
//! The weights are rounded several times, each time with one more limit of the format. The squared
//! error `E` of each round is compared with the round before. So the parts add up to the whole
//! error:
//!
//! | round | codes | scales | outlier channels |
//! |---|---|---|---|
//! | 0 | nearest, unlimited | `f32`, from the block's range | left out of sum and range |
//! | 1 | nearest, unlimited | `f32`, from the block's range | included |
//! | 2 | nearest, unlimited | from the range, as the format stores them | included |
//! | 3 | nearest, unlimited | those of the tensor | included |
//! | 4 | nearest, the format's | those of the tensor | included |
//! | 5 | those of the tensor | those of the tensor | included |
//!
//! `rounding = E0`, `outliers = E1 - E0`, `scale_format = E2 - E1`, `scale_choice = E3 - E2`,
//! `clipping = E4 - E3`, `codes = E5 - E4`.
//!
//! `D` is the rounded matrix less the exact one. `E` is `|D|^2` for weights. For outputs it is
//! `tr(D H D^T)` with `H = E[x x^T]`. Both are relative to the signal's own square. A part may be
//! negative: a searched scale has a smaller step and more clipping, and GPTQ's codes err more in
//! weights and less in outputs. GGUF's blocks search codes and scales together. For them rounds 2
//! to 4 are left out, and `scale_choice` is everything after round 1.
//!
//! Theory: between two neighbouring codes with distance `gap`, the error of rounding is uniform
//! with variance `gap^2 / 12`. For integers `gap` is the step; for floats it changes with the
//! number. For one scale this gives the textbook formula `6.02 b + 4.77 - 20 log10(peak / rms)` dB.

use lathe_tensor::codec::element;
use lathe_tensor::codec::scaled::{E8m0Rounding, encode, fit};
use lathe_tensor::{Bytes, Format, ScaleType, ScaledFormat, Tensor, ZeroPoint};
use serde::{Deserialize, Serialize};

use super::grid::{Grid, Steps};
use crate::statistics::Statistics;

/// A channel is an outlier if the root mean square of its input, or its largest weight, is more
/// than this many times that of the median channel. (LLM.int8, arXiv 2208.07339, calls 6 times the
/// standard deviation an outlier.)
pub const OUTLIER_FACTOR: f32 = 6.0;

/// The ratio in decibels that is reported if there is no noise.
const NO_NOISE_DB: f64 = 200.0;

/// Parts of a squared error, relative to the squared signal. They add up to `total`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Sources {
    /// The whole error.
    pub total: f64,
    /// Nearest codes with exact scales, without outlier channels.
    pub rounding: f64,
    /// The part of outlier channels: their own error, and the wider steps of numbers that share
    /// their scales.
    pub outliers: f64,
    /// The part of the scales' storage format. `None` if the format does not keep scales apart.
    pub scale_format: Option<f64>,
    /// The part of scales that differ from those of the range.
    pub scale_choice: f64,
    /// The part of numbers beyond the last code. `None` if the format does not keep scales apart.
    pub clipping: Option<f64>,
    /// The part of codes that are not the nearest.
    pub codes: f64,
}

impl Sources {
    /// The parts by name.
    pub fn parts(&self) -> [(&'static str, f64); 6] {
        [
            ("rounding", self.rounding),
            ("outliers", self.outliers),
            ("scale_format", self.scale_format.unwrap_or(0.0)),
            ("scale_choice", self.scale_choice),
            ("clipping", self.clipping.unwrap_or(0.0)),
            ("codes", self.codes),
        ]
    }

    /// The sum of the parts of both, with `other` times `weight`.
    pub(super) fn plus(self, other: &Sources, weight: f64) -> Sources {
        let both = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (None, None) => None,
            (a, b) => Some(a.unwrap_or(0.0) + weight * b.unwrap_or(0.0)),
        };
        Sources {
            total: self.total + weight * other.total,
            rounding: self.rounding + weight * other.rounding,
            outliers: self.outliers + weight * other.outliers,
            scale_format: both(self.scale_format, other.scale_format),
            scale_choice: self.scale_choice + weight * other.scale_choice,
            clipping: both(self.clipping, other.clipping),
            codes: self.codes + weight * other.codes,
        }
    }
}

/// An error beside its theoretical value.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// Signal over noise in decibels; 200 if there is no noise.
    pub sqnr_db: f64,
    /// The same for uniform noise with exact scales of each block's range.
    pub theory_sqnr_db: f64,
    /// The parts of the error.
    pub sources: Sources,
}

/// The error of one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TensorError {
    /// The error of the weights.
    pub weights: Measured,
    /// The error of the outputs, if inputs were observed.
    pub outputs: Option<Measured>,
    /// The number of outlier channels of the input.
    pub outlier_channels: usize,
    /// The largest weight over the root mean square, in decibels.
    pub peak_db: f64,
}

/// Signal over noise in decibels.
pub(super) fn decibels(signal: f64, noise: f64) -> f64 {
    match noise > 0.0 && signal > 0.0 {
        true => (10.0 * (signal / noise).log10()).min(NO_NOISE_DB),
        false => NO_NOISE_DB,
    }
}

/// Compares `tensor` with `values`, `[.., rows, columns]`, from which it was made.
///
/// # Panics
/// If `values` does not fill the tensor's shape, or `statistics` has another width.
pub fn explain_tensor(
    values: &[f32],
    tensor: &Tensor,
    statistics: Option<&Statistics>,
) -> TensorError {
    assert_eq!(values.len(), tensor.elements(), "values fill the shape");
    let columns = tensor.columns().max(1);
    let outlier = outlier_channels(values, columns, statistics);
    let form = statistics.map(Statistics::quadratic);
    let squares = statistics.map(Statistics::squares);
    let energy = |d: &[f32]| {
        let weights = d.iter().map(|d| f64::from(*d).powi(2)).sum::<f64>();
        [weights, form.as_ref().map_or(0.0, |it| it.sum(d))]
    };
    let signal = energy(values);
    let grid = Grid::new(tensor.format, &tensor.shape);
    let rounds = rounds(values, tensor, grid.as_ref(), &outlier, &energy);
    let theory = grid.map_or([0.0; 2], |grid| {
        let noise = grid.noise(values, &grid.fitted(values, &vec![false; columns]));
        let weights = noise.iter().map(|n| f64::from(*n)).sum::<f64>();
        let weighed = |squares: &Vec<f32>| {
            let pairs = noise.iter().zip(squares.iter().cycle());
            pairs.map(|(noise, square)| f64::from(*noise) * f64::from(*square)).sum::<f64>()
        };
        [weights, squares.as_ref().map_or(0.0, weighed)]
    });
    let measured = |of: usize| Measured {
        sqnr_db: decibels(signal[of], rounds[5][of]),
        theory_sqnr_db: decibels(signal[of], theory[of]),
        sources: parts(&rounds, of, signal[of], matches!(tensor.format, Format::Scaled(_))),
    };
    let peak = values.iter().fold(0f32, |most, value| most.max(value.abs()));
    let mean = signal[0] / values.len().max(1) as f64;
    TensorError {
        weights: measured(0),
        outputs: statistics.is_some().then(|| measured(1)),
        outlier_channels: outlier.iter().filter(|it| **it).count(),
        peak_db: decibels(f64::from(peak).powi(2), mean),
    }
}

type Energy<'a> = dyn Fn(&[f32]) -> [f64; 2] + 'a;

/// The errors of weights and outputs after each round of the table in this file's header.
fn rounds(
    values: &[f32],
    tensor: &Tensor,
    grid: Option<&Grid>,
    outlier: &[bool],
    energy: &Energy<'_>,
) -> [[f64; 2]; 6] {
    let found = tensor.to_f32();
    let actual: Vec<f32> = found.iter().zip(values).map(|(a, b)| a - b).collect();
    let last = energy(&actual);
    let Some(grid) = grid else { return [last; 6] };
    let ideal = energy(&grid.errors(values, &grid.fitted(values, &vec![false; outlier.len()])));
    let without = match outlier.contains(&true) {
        false => ideal,
        true => {
            let mut errors = grid.errors(values, &grid.fitted(values, outlier));
            let columns = errors.iter_mut().zip(outlier.iter().cycle());
            columns.filter(|(_, out)| **out).for_each(|(error, _)| *error = 0.0);
            energy(&errors)
        }
    };
    let Format::Scaled(format) = tensor.format else {
        return [without, ideal, ideal, last, last, last];
    };
    let stored = energy(&grid.errors(values, &stored_range(grid, &format, tensor, values)));
    let own = own_steps(grid, &format, tensor);
    let unbounded = energy(&grid.errors(values, &own));
    let nearest = energy(&grid.each(values, &own, |value, step, zero| {
        let code = encode(format.element, value, step, zero as i8);
        (element::to_f32(format.element, code) - zero) * step - value
    }));
    [without, ideal, stored, unbounded, nearest, last]
}

fn parts(rounds: &[[f64; 2]; 6], of: usize, signal: f64, scales_apart: bool) -> Sources {
    let share = |round: usize| if signal > 0.0 { rounds[round][of] / signal } else { 0.0 };
    let step = |round: usize| share(round) - share(round - 1);
    Sources {
        total: share(5),
        rounding: share(0),
        outliers: step(1),
        scale_format: scales_apart.then(|| step(2)),
        scale_choice: step(3),
        clipping: scales_apart.then(|| step(4)),
        codes: step(5),
    }
}

/// For each input channel, whether it is an outlier.
fn outlier_channels(values: &[f32], columns: usize, statistics: Option<&Statistics>) -> Vec<bool> {
    let mut largest = vec![0f32; columns];
    for row in values.chunks(columns) {
        largest.iter_mut().zip(row).for_each(|(most, value)| *most = most.max(value.abs()));
    }
    let sizes = statistics.map(|it| it.squares().iter().map(|x| x.sqrt()).collect::<Vec<f32>>());
    let mut found = vec![false; columns];
    for sizes in [Some(largest), sizes].into_iter().flatten() {
        let mut sorted = sizes.clone();
        sorted.sort_by(f32::total_cmp);
        let most = OUTLIER_FACTOR * sorted[columns / 2];
        if most > 0.0 {
            found.iter_mut().zip(&sizes).for_each(|(found, size)| *found |= *size > most);
        }
    }
    found
}

/// The steps of the range's scales, as the format stores them.
fn stored_range(grid: &Grid, format: &ScaledFormat, tensor: &Tensor, values: &[f32]) -> Steps {
    let columns = tensor.columns().max(1);
    let mut members: Vec<Vec<f32>> = vec![Vec::new(); grid.blocks.len()];
    for (row, values) in values.chunks(columns).enumerate() {
        let first = grid.blocks.row_start(row);
        for (at, part) in values.chunks(grid.blocks.block_columns).enumerate() {
            members[first + at].extend_from_slice(part);
        }
    }
    let a_matrix = grid.blocks.rows * grid.blocks.columns;
    let one = |(block, members): (usize, &Vec<f32>)| {
        let unit = tensor.global.apply(block / a_matrix.max(1), 1.0);
        let fitted = fit(format, members, unit, E8m0Rounding::Even);
        (fitted.scale * unit, f32::from(fitted.zero))
    };
    let (step, zero) = members.iter().enumerate().map(one).unzip();
    Steps { step, zero }
}

/// The steps of the tensor's own scales.
fn own_steps(grid: &Grid, format: &ScaledFormat, tensor: &Tensor) -> Steps {
    let count = grid.blocks.len();
    let plain = |float: Format| {
        Tensor::new(vec![count], float, Bytes::new(tensor.scales.to_vec()))
            .map_or_else(|_| vec![f32::NAN; count], |scales| scales.to_f32())
    };
    let stored: Vec<f32> = match format.scale {
        ScaleType::F32 => plain(Format::F32),
        ScaleType::F16 => plain(Format::F16),
        ScaleType::BF16 => plain(Format::BF16),
        ScaleType::E8M0 => tensor.scales.iter().map(|code| element::e8m0_to_f32(*code)).collect(),
        ScaleType::E4M3Global => tensor
            .scales
            .iter()
            .map(|code| element::to_f32(lathe_tensor::Element::F8E4M3, *code))
            .collect(),
    };
    let a_matrix = (grid.blocks.rows * grid.blocks.columns).max(1);
    let apply = |(block, scale): (usize, &f32)| tensor.global.apply(block / a_matrix, *scale);
    let zero = match format.zero {
        ZeroPoint::None => vec![0.0; count],
        ZeroPoint::Int => tensor.zeros.iter().map(|zero| f32::from(*zero as i8)).collect(),
    };
    Steps { step: stored.iter().enumerate().map(apply).collect(), zero }
}

#[cfg(test)]
mod tests;

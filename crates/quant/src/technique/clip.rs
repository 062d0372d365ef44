//! Optimal clipping: for each block the scale, among shrunken ones, whose rounding errs least.
//!
//! What "least" means is a choice: the squared error of the weights, the same with each column
//! weighed by the mean square of its input, or the squared error of the block's contribution to the
//! output, `d^T H d` with the block's own part of `H = E[x x^T]` (AWQ's clipping, arXiv 2306.00978).

use lathe_tensor::Format;
use lathe_tensor::codec::scaled::{BlockScale, assemble};
use rayon::prelude::*;

use super::{Apply, POWER_OF_TWO, Stage, Technique, power_of_two};
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, Outcome, Quantized, Scales};
use crate::parameters::{Kind, Parameter, Parameters};
use crate::statistics::Statistics;

const NAME: &str = "clip";

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "searches the scale of each block that errs least, saturating the largest numbers",
    requires: "integers or small floats with a scale a group or a row; calibration unless error = weight",
    conflicts: &["rtn", "gptq", "imatrix"],
    calibrated: false,
    parameters: &[
        Parameter {
            name: "error",
            kind: Kind::Choice(&["weight", "channel", "output"]),
            meaning: "what is least: errors of weights, weighed by channel, or of the block's output",
        },
        Parameter {
            name: "steps",
            kind: Kind::Whole { default: 20, least: 1, most: 1000 },
            meaning: "scales to try",
        },
        Parameter {
            name: "shrink",
            kind: Kind::Number { default: 0.5, least: 0.0, most: 0.95 },
            meaning: "how much of the range may be cut off at most",
        },
        POWER_OF_TWO,
    ],
    apply: Apply::Group(apply),
};

/// How errors of one block are weighed.
pub(super) enum Measure {
    /// Equally.
    Weight,
    /// By one number a column.
    Channel(Vec<f32>),
    /// By each block's part of the mean of `x x^T`, full squares one after the other.
    Output(Vec<Vec<f32>>),
}

impl Measure {
    /// The measure called `error` for blocks of `block_columns`.
    pub fn new(error: &str, statistics: Option<&Statistics>, block_columns: usize) -> Option<Self> {
        match error {
            "channel" => statistics.map(|it| Measure::Channel(it.squares())),
            "output" => statistics.map(|it| Measure::Output(squares_of(it, block_columns))),
            _ => Some(Measure::Weight),
        }
    }

    /// The measure called `error` for `matrix`, which `technique` rounds under `scales`.
    ///
    /// # Errors
    /// [`QuantError::Unobserved`] if it asks for statistics and there are none.
    pub fn of_inputs(
        technique: &'static str,
        error: &str,
        statistics: Option<&Statistics>,
        matrix: &Matrix<'_>,
        scales: &Scales,
    ) -> Result<Self, QuantError> {
        Measure::new(error, statistics, scales.block_columns)
            .ok_or_else(|| QuantError::Unobserved { technique, tensor: matrix.name.to_owned() })
    }

    /// The error of `difference` in block `block`, whose first column is `start`.
    fn of(&self, difference: &[f32], block: usize, start: usize) -> f64 {
        match self {
            Measure::Weight => difference.iter().map(|d| f64::from(d * d)).sum(),
            Measure::Channel(weights) => {
                let weighed = difference.iter().zip(&weights[start..]);
                weighed.map(|(d, w)| f64::from(d * d * w)).sum()
            }
            Measure::Output(squares) => {
                let rows = squares[block].chunks(difference.len()).zip(difference);
                let product = |row: &[f32]| -> f32 {
                    let mut lanes = [0f32; 8];
                    let (row_whole, row_rest) = row.as_chunks::<8>();
                    let (d_whole, d_rest) = difference.as_chunks::<8>();
                    for (r, d) in row_whole.iter().zip(d_whole) {
                        (0..8).for_each(|i| lanes[i] += r[i] * d[i]);
                    }
                    let rest: f32 = row_rest.iter().zip(d_rest).map(|(r, d)| r * d).sum();
                    lanes.iter().sum::<f32>() + rest
                };
                rows.map(|(row, d)| f64::from(product(row)) * f64::from(*d)).sum()
            }
        }
    }
}

/// The squares on the diagonal of the mean of `x x^T`.
fn squares_of(statistics: &Statistics, block_columns: usize) -> Vec<Vec<f32>> {
    let (n, hessian) = (statistics.width(), statistics.hessian());
    let square = |start: usize| {
        let end = n.min(start + block_columns);
        let rows = (start..end).flat_map(|i| &hessian[i * n + start..i * n + end]);
        rows.map(|value| *value as f32).collect()
    };
    (0..n).step_by(block_columns).map(square).collect()
}

/// Ratios from 1 down to `1 - shrink` in `steps` steps.
pub(super) fn shrinking(steps: usize, shrink: f64) -> Vec<f32> {
    (0..=steps).map(|step| (1.0 - shrink * step as f64 / steps as f64) as f32).collect()
}

/// The best scale of each block, row after row, among those of the block's range times `ratios`.
pub(super) fn search(
    scales: &Scales,
    matrix: &Matrix<'_>,
    measure: &Measure,
    ratios: &[f32],
) -> Vec<BlockScale> {
    let one_row = |values: &[f32]| -> Vec<BlockScale> {
        let parts = values.chunks(scales.block_columns).enumerate();
        let mut shrunken = vec![0f32; scales.block_columns];
        let mut difference = vec![0f32; scales.block_columns];
        let mut best_of = |block: usize, values: &[f32]| {
            let (shrunken, difference) =
                (&mut shrunken[..values.len()], &mut difference[..values.len()]);
            let mut best = (scales.fit(values), f64::INFINITY);
            for ratio in ratios {
                shrunken.iter_mut().zip(values).for_each(|(out, v)| *out = v * ratio);
                let candidate = scales.fit(shrunken);
                for (out, value) in difference.iter_mut().zip(values) {
                    *out = scales.nearest(*value, candidate).1 - value;
                }
                let error = measure.of(difference, block, block * scales.block_columns);
                if error < best.1 {
                    best = (candidate, error);
                }
            }
            best.0
        };
        parts.map(|(block, values)| best_of(block, values)).collect()
    };
    matrix.values.par_chunks(matrix.columns.max(1)).flat_map_iter(one_row).collect()
}

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    group.each(|matrix| {
        let scales = Scales::new(NAME, matrix, format)?.rounding(power_of_two(parameters));
        let error = parameters.choice("error");
        let measure = Measure::of_inputs(NAME, error, group.statistics, matrix, &scales)?;
        let (steps, shrink) = (parameters.whole("steps"), parameters.number("shrink"));
        let blocks = search(&scales, matrix, &measure, &shrinking(steps, shrink));
        under(&scales, matrix, &blocks, group.statistics)
    })
}

/// Every number to the nearest code under scales that are chosen.
pub(super) fn under(
    scales: &Scales,
    matrix: &Matrix<'_>,
    blocks: &[BlockScale],
    statistics: Option<&Statistics>,
) -> Result<Quantized, QuantError> {
    let codes: Vec<u8> = (matrix.values.par_chunks(matrix.columns.max(1)))
        .zip(blocks.par_chunks(scales.blocks.max(1)))
        .flat_map_iter(|(values, blocks)| {
            let of = |(i, v): (usize, &f32)| scales.nearest(*v, blocks[i / scales.block_columns]).0;
            values.iter().enumerate().map(of).collect::<Vec<u8>>()
        })
        .collect();
    let shape = [matrix.rows, matrix.columns];
    let tensor = assemble(&shape, &scales.format, &codes, blocks, scales.global.clone());
    Quantized::new(matrix, tensor, statistics)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, error_of, parameters};
    use super::*;

    fn weight_error(case: &super::super::tests::Case, format: &str, steps: i64) -> (f64, f64) {
        let format = Format::parse(format).unwrap();
        let settings = [("steps", toml::Value::Integer(steps))];
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &settings)).unwrap();
        let Outcome::Quantized(list) = outcome else { panic!("it rounds") };
        let found = list[0].tensor.to_f32();
        let error = |a: &f32, b: &f32| (f64::from(*a) - f64::from(*b)).powi(2);
        let ours = found.iter().zip(&case.values).map(|(a, b)| error(a, b)).sum();
        // The oracle: every ratio on a finer grid, in f64, of the block's largest number.
        let mut oracle = 0.0;
        for block in case.values.chunks(32) {
            let largest = block.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            let of = |ratio: f64| -> f64 {
                let step = ratio * largest / 7.5;
                let error = |v: &f32| {
                    let v = f64::from(*v);
                    ((v / step).round_ties_even().clamp(-8.0, 7.0) * step - v).powi(2)
                };
                block.iter().map(error).sum()
            };
            oracle += (0..=500).map(|i| of(1.0 - 0.001 * f64::from(i))).fold(f64::MAX, f64::min);
        }
        (ours, oracle)
    }

    #[test]
    fn the_search_comes_near_the_best_scale() {
        let case = case(24, 128, 6);
        let (coarse, oracle) = weight_error(&case, "int4-g32-f32", 20);
        let (fine, _) = weight_error(&case, "int4-g32-f32", 500);
        assert!(fine <= oracle * 1.001 && fine >= oracle * 0.999, "{fine} {oracle}");
        assert!(coarse >= fine && coarse < oracle * 1.05, "{coarse} {oracle}");
    }

    #[test]
    fn each_measure_is_least_under_itself() {
        let case = case(24, 128, 7);
        let of = |error: &str| {
            let settings = [("error", toml::Value::String(error.to_owned()))];
            error_of(NAME, &case, "int3-g32-f32", &settings)
        };
        let plain = error_of("rtn", &case, "int3-g32-f32", &[]);
        let (weight, channel, output) = (of("weight"), of("channel"), of("output"));
        assert!(
            channel < plain && output < plain && output < weight,
            "{plain} {weight} {channel} {output}"
        );
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let case = case(4, 64, 1);
        let mut group = case.group();
        group.statistics = None;
        let settings = parameters(&TECHNIQUE, &[("error", toml::Value::String("output".into()))]);
        let apply = |group: &Group<'_>, format: &str| {
            apply(group, Format::parse(format).unwrap(), &settings).unwrap_err().to_string()
        };
        assert!(apply(&group, "int4-g32-bf16").contains("needs calibration"));
        assert!(apply(&case.group(), "q4_0").contains("found q4_0"));
        assert!(apply(&case.group(), "int4-tile4x4-f32").contains("tile4x4"));
    }
}

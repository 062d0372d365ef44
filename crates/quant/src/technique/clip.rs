//! Optimal clipping: for each block the scale with the least rounding error, among shrunken scales.
//!
//! A parameter chooses the error: the squared error of the weights; the same with each column
//! weighted by the mean square of its input; the squared error of the block's contribution to the
//! output, `d^T H d` with the block's own part of `H = E[x x^T]` (AWQ's clipping, arXiv
//! 2306.00978); or the divergence of the rounded numbers' distribution ([`super::divergence`]).

use lathe_tensor::Format;
use lathe_tensor::codec::scaled::{BlockScale, Span, assemble};
use rayon::prelude::*;

use super::divergence::{self, Histogram};
use super::{Apply, POWER_OF_TWO, Stage, Technique, power_of_two};
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, Outcome, Quantized, Scales};
use crate::parameters::{Kind, Parameter, Parameters};
use crate::statistics::Statistics;
use lathe_linalg::Quadratic;

const NAME: &str = "clip";
/// Rows whose candidates are measured together. They are the work of one thread.
const ROWS_TOGETHER: usize = 8;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "searches the scale of each block that errs least, saturating the largest numbers",
    requires: "integers or small floats with a scale a group or a row; calibration if error = channel or output",
    conflicts: &["rtn", "gptq", "imatrix"],
    calibrated: false,
    products: false,
    parameters: &[
        Parameter {
            name: "error",
            kind: Kind::Choice(&["weight", "channel", "output", "kl"]),
            meaning: "what is least: errors of weights, weighed by channel, or of the block's output; or the \
                      KL divergence of a row's histogram",
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
    /// All alike.
    Weight,
    /// By one factor for each column.
    Channel(Vec<f32>),
    /// By each block's part of the mean of `x x^T`.
    Output(Vec<Quadratic>),
    /// By the change of the distribution of all numbers in the block.
    Divergence,
}

impl Measure {
    /// The measure called `error` for blocks of `block_columns`.
    pub(super) fn new(
        error: &str,
        statistics: Option<&Statistics>,
        block_columns: usize,
    ) -> Option<Self> {
        match error {
            "channel" => statistics.map(|it| Measure::Channel(it.squares())),
            "output" => statistics.map(|it| Measure::Output(blocks_of(it, block_columns))),
            "kl" => Some(Measure::Divergence),
            _ => Some(Measure::Weight),
        }
    }

    /// The measure called `error` for `matrix`, which `technique` rounds with `scales`.
    ///
    /// # Errors
    /// [`QuantError::Unobserved`] if the measure needs statistics and there are none.
    pub(super) fn of_inputs(
        technique: &'static str,
        error: &str,
        statistics: Option<&Statistics>,
        matrix: &Matrix<'_>,
        scales: &Scales,
    ) -> Result<Self, QuantError> {
        Measure::new(error, statistics, scales.block_columns)
            .ok_or_else(|| QuantError::Unobserved { technique, tensor: matrix.name.to_owned() })
    }

    /// The error of each row of `differences` in block `block`, whose first column is `start`.
    /// `scratch` is overwritten.
    fn of(
        &self,
        differences: &[f32],
        [block, start]: [usize; 2],
        scratch: &mut Vec<f32>,
        errors: &mut [f64],
    ) {
        let width = differences.len() / errors.len().max(1);
        let rows = differences.chunks(width.max(1)).zip(errors.iter_mut());
        match self {
            Measure::Weight => rows.for_each(|(row, error)| *error = sum(row, |_, d| d * d)),
            Measure::Channel(weights) => {
                let weights = &weights[start..start + width];
                rows.for_each(|(row, error)| *error = sum(row, |i, d| d * d * weights[i]));
            }
            Measure::Output(blocks) => blocks[block].each(differences, scratch, errors),
            Measure::Divergence => unreachable!("measured without differences"),
        }
    }
}

/// The sum of `term` over a row, in several lanes.
#[inline(always)]
fn sum(row: &[f32], term: impl Fn(usize, f32) -> f32) -> f64 {
    const LANES: usize = 8;
    let mut lanes = [0f64; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for (at, chunk) in whole.iter().enumerate() {
        (0..LANES).for_each(|i| lanes[i] += f64::from(term(at * LANES + i, chunk[i])));
    }
    let first = whole.len() * LANES;
    let rest = rest.iter().enumerate().map(|(i, d)| f64::from(term(first + i, *d)));
    lanes.iter().sum::<f64>() + rest.sum::<f64>()
}

/// The blocks on the diagonal of the mean of `x x^T`.
fn blocks_of(statistics: &Statistics, block_columns: usize) -> Vec<Quadratic> {
    let n = statistics.width();
    let block = |start: usize| {
        let width = block_columns.min(n - start);
        Quadratic::new(width, |i, j| statistics.mean_product(start + i, start + j))
    };
    (0..n).step_by(block_columns).map(block).collect()
}

/// Ratios from 1 down to `1 - shrink` in `steps` steps.
pub(super) fn shrinking(steps: usize, shrink: f64) -> Vec<f32> {
    (0..=steps).map(|step| (1.0 - shrink * step as f64 / steps as f64) as f32).collect()
}

/// The best scale of each block, row by row, among the scale of the block's range times each of
/// `ratios`.
pub(super) fn search(
    scales: &Scales,
    matrix: &Matrix<'_>,
    measure: &Measure,
    ratios: &[f32],
) -> Vec<BlockScale> {
    let columns = matrix.columns.max(1);
    let mut found = vec![BlockScale { scale: 0.0, zero: 0 }; matrix.rows * scales.blocks];
    found
        .par_chunks_mut((ROWS_TOGETHER * scales.blocks).max(1))
        .zip(matrix.values.par_chunks(ROWS_TOGETHER * columns))
        .for_each(|(found, values)| {
            let mut search = Search {
                scales,
                measure,
                ratios,
                candidates: Vec::new(),
                differences: Vec::new(),
                errors: Vec::new(),
                scratch: Vec::new(),
                histogram: matches!(measure, Measure::Divergence).then(Histogram::new),
            };
            for block in 0..scales.blocks {
                search.block(block, values, columns, found);
            }
        });
    found
}

/// The search in some rows, for one block of columns at a time. The errors of all candidates of all
/// rows are measured together.
struct Search<'a> {
    scales: &'a Scales,
    measure: &'a Measure,
    ratios: &'a [f32],
    /// The row and the scale of each candidate.
    candidates: Vec<(usize, BlockScale)>,
    differences: Vec<f32>,
    errors: Vec<f64>,
    scratch: Vec<f32>,
    /// Present if the distribution is the measure.
    histogram: Option<Histogram>,
}

impl Search<'_> {
    fn block(&mut self, block: usize, values: &[f32], columns: usize, found: &mut [BlockScale]) {
        let start = block * self.scales.block_columns;
        let width = self.scales.block_columns.min(columns - start);
        self.candidates.clear();
        self.differences.clear();
        self.errors.clear();
        for (row, values) in values.chunks(columns).enumerate() {
            let values = &values[start..start + width];
            let span = Span::of(values);
            // If no candidate has a finite error, the plain scale stays.
            found[row * self.scales.blocks + block] = self.scales.fit_shrunken(values, span, 1.0);
            if let Some(histogram) = &mut self.histogram {
                histogram.count(values);
            }
            let mut last = None;
            for ratio in self.ratios {
                let candidate = self.scales.fit_shrunken(values, span, *ratio);
                // Several ratios give the same power of two.
                if last.replace(candidate) == Some(candidate) {
                    continue;
                }
                self.candidates.push((row, candidate));
                if let Some(histogram) = &mut self.histogram {
                    self.errors.push(histogram.divergence(self.scales, candidate));
                    continue;
                }
                let at = self.differences.len();
                self.differences.resize(at + width, 0.0);
                let difference = &mut self.differences[at..];
                self.scales.round(values, candidate, difference);
                difference.iter_mut().zip(values).for_each(|(d, value)| *d -= value);
            }
        }
        if self.histogram.is_none() {
            self.errors.resize(self.candidates.len(), 0.0);
            let place = [block, start];
            self.measure.of(&self.differences, place, &mut self.scratch, &mut self.errors);
        }
        let mut least = vec![f64::INFINITY; values.len() / columns];
        for ((row, candidate), error) in self.candidates.iter().zip(&self.errors) {
            if *error < least[*row] {
                least[*row] = *error;
                found[row * self.scales.blocks + block] = *candidate;
            }
        }
    }
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
        let numbers = scales.block_columns.min(matrix.columns);
        if matches!(measure, Measure::Divergence) && numbers < divergence::LEAST {
            return Err(QuantError::Technique {
                technique: NAME,
                tensor: matrix.name.to_owned(),
                reason: format!(
                    "error = \"kl\" measures histograms: found {numbers} numbers a scale, expected {} or more",
                    divergence::LEAST
                ),
            });
        }
        let (steps, shrink) = (parameters.whole("steps"), parameters.number("shrink"));
        let blocks = search(&scales, matrix, &measure, &shrinking(steps, shrink));
        under(&scales, matrix, &blocks, group.statistics)
    })
}

/// Rounds every number to the nearest code with the chosen scales.
pub(super) fn under(
    scales: &Scales,
    matrix: &Matrix<'_>,
    blocks: &[BlockScale],
    statistics: Option<&Statistics>,
) -> Result<Quantized, QuantError> {
    let columns = matrix.columns.max(1);
    let mut codes = vec![0u8; matrix.values.len()];
    codes
        .par_chunks_mut(columns)
        .zip(matrix.values.par_chunks(columns))
        .zip(blocks.par_chunks(scales.blocks.max(1)))
        .for_each(|((codes, values), blocks)| {
            let parts = values.chunks(scales.block_columns).zip(blocks);
            for (codes, (values, block)) in codes.chunks_mut(scales.block_columns).zip(parts) {
                scales.encode(values, *block, codes);
            }
        });
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
        // The oracle: every ratio of a finer grid, in f64, of the block's largest number.
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

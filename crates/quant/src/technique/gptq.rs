//! GPTQ (arXiv 2210.17323): columns are rounded one after the other, and what each loses is made up
//! for by those that follow, as the inverse of `H = E[x x^T]` says.
//!
//! With the upper Cholesky factor `U` of `H^-1`, a column's error over `U[i][i]` goes to column `j` as
//! `-U[i][j]`. Rows of the weight do not meet, so that threads take some rows each; the rest of a
//! row is brought up to date once a block of columns, which keeps what is read of `U` in the cache.
//!
//! Scales come from clip's search by the error of outputs, unless a recipe says otherwise: under the
//! range of a block as it was, numbers that took over errors saturate, and KL to the base becomes
//! worse than that of rounding to nearest (docs/quantization.md). Damping is five times the paper's
//! for the same reason: what the text of the calibration does not show is left alone.

use lathe_tensor::Format;
use lathe_tensor::codec::scaled::{BlockScale, assemble};
use rayon::prelude::*;

use super::clip::{self, Measure};
use super::{Apply, POWER_OF_TWO, Stage, Technique, power_of_two};
use crate::error::QuantError;
use crate::linalg::{dot, upper_factor_of_inverse};
use crate::matrix::{Group, Matrix, Outcome, Quantized, Scales};
use crate::parameters::{Kind, Parameter, Parameters};
use crate::statistics::Statistics;

const NAME: &str = "gptq";
/// Rows of a weight that share what is read of the factor.
const ROWS_TOGETHER: usize = 16;
/// Times that the damping is raised before the Hessian is given up.
const DAMPINGS: usize = 8;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "rounds column by column, later columns make up for the error of earlier ones",
    requires: "calibration; integers or small floats with a scale a group or a row",
    conflicts: &["rtn", "clip", "imatrix"],
    calibrated: true,
    parameters: &PARAMETERS,
    apply: Apply::Group(apply),
};

/// What it shares with techniques that hand on errors in the same way.
pub(super) const PARAMETERS: [Parameter; 5] = [
    Parameter {
        name: "act_order",
        kind: Kind::Flag { default: true },
        meaning: "columns of the largest inputs first, under scales that are chosen before",
    },
    Parameter {
        name: "block_size",
        kind: Kind::Whole { default: 128, least: 1, most: 65536 },
        meaning: "columns after which the rest of a row is brought up to date",
    },
    Parameter {
        name: "damping",
        kind: Kind::Number { default: 0.05, least: 0.0, most: 10.0 },
        meaning: "part of the mean of H's diagonal that is added to it; raised if that is too little",
    },
    Parameter {
        name: "scales",
        kind: Kind::Choice(&["output", "range", "weight", "channel"]),
        meaning: "how scales are chosen: clip's search by that error, or the block's range",
    },
    POWER_OF_TWO,
];

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    round_columns(NAME, group, format, parameters, None)
}

/// Rounds the columns of a group one after the other for `technique`; with the mean of
/// `(x_float - x) x^T`, times what it counts, columns also hand on what their inputs lack (GPTAQ).
pub(super) fn round_columns(
    technique: &'static str,
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
    asymmetry: Option<&[f64]>,
) -> Result<Outcome, QuantError> {
    let Some(first) = group.matrices.first() else { return Ok(Outcome::Quantized(Vec::new())) };
    let scales =
        |matrix| Ok(Scales::new(technique, matrix, format)?.rounding(power_of_two(parameters)));
    let all = group.matrices.iter().map(scales).collect::<Result<Vec<_>, QuantError>>()?;
    let statistics = group.observed(technique, first.name)?;
    let factor = Factor::new(statistics, parameters, asymmetry);
    let factor = factor.ok_or_else(|| QuantError::Technique {
        technique,
        tensor: first.name.to_owned(),
        reason: "the products of its inputs are not finite".to_owned(),
    })?;
    let one = |(matrix, scales): (&Matrix<'_>, &Scales)| {
        let (codes, blocks) = round_all(matrix, scales, &factor, statistics, parameters);
        let shape = [matrix.rows, matrix.columns];
        let tensor = assemble(&shape, &scales.format, &codes, &blocks, scales.global.clone());
        let mut quantized = Quantized::new(matrix, tensor, Some(statistics))?;
        quantized.report.notes.extend(factor.note.clone());
        Ok(quantized)
    };
    let list = group.matrices.iter().zip(&all).map(one).collect::<Result<_, QuantError>>()?;
    Ok(Outcome::Quantized(list))
}

/// What of `H` the rounding needs.
struct Factor {
    /// Columns in the order in which they are rounded.
    order: Vec<usize>,
    /// Rows of `U` in that order, each divided by its diagonal: from the diagonal on.
    rows: Vec<f32>,
    /// Rows of GPTAQ's `P` in that order, if it is asked for.
    lacks: Option<Vec<f32>>,
    /// What had to be done to have a factor.
    note: Option<String>,
}

impl Factor {
    /// `None` if the Hessian cannot be factored whatever is added to its diagonal.
    fn new(
        statistics: &Statistics,
        parameters: &Parameters,
        asymmetry: Option<&[f64]>,
    ) -> Option<Self> {
        let n = statistics.width();
        let mut hessian = statistics.hessian();
        let mean = (0..n).map(|i| hessian[i * n + i]).sum::<f64>() / n.max(1) as f64;
        if !mean.is_finite() {
            return None;
        }
        let mean = if mean > 0.0 { mean } else { 1.0 };
        for i in 0..n {
            // A channel that is always zero: its column meets no other and is rounded to nearest.
            if hessian[i * n + i] <= 0.0 {
                hessian[i * n + i] = mean;
            }
        }
        let mut order: Vec<usize> = (0..n).collect();
        if parameters.flag("act_order") {
            order.sort_by(|a, b| hessian[b * n + b].total_cmp(&hessian[a * n + a]));
        }
        let ordered = permuted(&hessian, &order);
        let asked = parameters.number("damping");
        let mut damping = asked;
        for _ in 0..DAMPINGS {
            let mut damped = ordered.clone();
            (0..n).for_each(|i| damped[i * n + i] += damping * mean);
            if let Ok(upper) = upper_factor_of_inverse(&damped, n) {
                let raised = damping > asked;
                let note = format!(
                    "damping raised from {asked} to {damping}: H was not positive definite"
                );
                let lacks = asymmetry.map(|it| lacks_of(&permuted(it, &order), &upper, n));
                return Some(Factor {
                    rows: scaled_rows(&upper, n),
                    lacks,
                    order,
                    note: raised.then_some(note),
                });
            }
            damping = (damping * 10.0).max(1e-4);
        }
        None
    }

    /// Brings columns from `first` on up to date after column `i`: its error and its number.
    fn hand_on(&self, i: usize, first: usize, [error, number]: [f32; 2], ahead: &mut [f32]) {
        let skipped = first - i - 1;
        let shares = &self.after(i)[skipped..];
        ahead.iter_mut().zip(shares).for_each(|(value, share)| *value -= error * share);
        if let Some(lacks) = self.lacks_after(i) {
            let lacks = &lacks[skipped..];
            ahead.iter_mut().zip(lacks).for_each(|(value, lack)| *value += number * lack);
        }
    }

    /// What the input of column `i` lacks, a number for each column after it.
    fn lacks_after(&self, i: usize) -> Option<&[f32]> {
        let n = self.order.len();
        self.lacks.as_ref().map(|lacks| &lacks[i * n + i + 1..(i + 1) * n])
    }

    /// What column `i` of the order hands on, a number for each column after it.
    fn after(&self, i: usize) -> &[f32] {
        let n = self.order.len();
        &self.rows[i * n + i + 1..(i + 1) * n]
    }
}

/// Rows and columns of a square in another order.
fn permuted(square: &[f64], order: &[usize]) -> Vec<f64> {
    let n = order.len();
    order.iter().flat_map(|row| order.iter().map(|column| square[*row * n + *column])).collect()
}

/// GPTAQ's `P`: what is strictly above the diagonal of `A U^T`, times `U`.
fn lacks_of(asymmetry: &[f64], upper: &[f64], n: usize) -> Vec<f32> {
    let mut lacks = vec![0f32; n * n];
    lacks.par_chunks_mut(n).enumerate().for_each(|(i, out)| {
        let row = &asymmetry[i * n..][..n];
        let mut sums = vec![0f64; n];
        for k in i + 1..n {
            let of = &upper[k * n + k..(k + 1) * n];
            let product = dot(&row[k..], of);
            sums[k..].iter_mut().zip(of).for_each(|(sum, u)| *sum += product * u);
        }
        out.iter_mut().zip(sums).for_each(|(out, sum)| *out = sum as f32);
    });
    lacks
}

fn scaled_rows(upper: &[f64], n: usize) -> Vec<f32> {
    let row = |i: usize| (0..n).map(move |j| (upper[i * n + j] / upper[i * n + i]) as f32);
    (0..n).flat_map(row).collect()
}

/// Codes and scales of a whole matrix.
fn round_all(
    matrix: &Matrix<'_>,
    scales: &Scales,
    factor: &Factor,
    statistics: &Statistics,
    parameters: &Parameters,
) -> (Vec<u8>, Vec<BlockScale>) {
    let columns = matrix.columns;
    let how = parameters.choice("scales");
    let block_size = parameters.whole("block_size");
    // In the weight's own order a group's scale is chosen when its first column comes, from the
    // numbers that errors before it have changed; otherwise all are chosen at the start.
    let fixed = parameters.flag("act_order") || how != "range";
    let mut blocks = match how {
        _ if !fixed => vec![BlockScale { scale: 0.0, zero: 0 }; matrix.rows * scales.blocks],
        "range" => {
            let row = |values: &[f32]| {
                let parts = values.chunks(scales.block_columns);
                parts.map(|values| scales.fit(values)).collect::<Vec<_>>()
            };
            matrix.values.par_chunks(columns).flat_map_iter(row).collect()
        }
        error => {
            let measure = Measure::new(error, Some(statistics), scales.block_columns);
            let measure = measure.expect("every measure has its statistics");
            clip::search(scales, matrix, &measure, &clip::shrinking(20, 0.5))
        }
    };
    let mut codes = vec![0u8; matrix.values.len()];
    codes
        .par_chunks_mut(ROWS_TOGETHER * columns)
        .zip(blocks.par_chunks_mut(ROWS_TOGETHER * scales.blocks))
        .zip(matrix.values.par_chunks(ROWS_TOGETHER * columns))
        .for_each(|((codes, blocks), values)| {
            let mut part = Part { scales, factor, fixed, columns, codes, blocks };
            part.round(values, block_size);
        });
    (codes, blocks)
}

/// Some rows of a matrix.
struct Part<'a> {
    scales: &'a Scales,
    factor: &'a Factor,
    fixed: bool,
    columns: usize,
    codes: &'a mut [u8],
    blocks: &'a mut [BlockScale],
}

impl Part<'_> {
    fn round(&mut self, values: &[f32], block_size: usize) {
        let (columns, order) = (self.columns, &self.factor.order);
        let rows = values.len() / columns;
        let mut left: Vec<f32> = (0..rows)
            .flat_map(|row| order.iter().map(move |column| values[row * columns + column]))
            .collect();
        // What each column of the block hands on: its error, and its number before it was rounded.
        let mut errors = vec![[0f32; 2]; rows * block_size.min(columns)];
        let mut start = 0;
        while start < columns {
            let end = self.end_of_block(start, block_size);
            for i in start..end {
                for row in 0..rows {
                    let left = &mut left[row * columns..][..columns];
                    let handed = [self.round_one(row, i, left), left[i]];
                    errors[row * (end - start) + i - start] = handed;
                    self.factor.hand_on(i, i + 1, handed, &mut left[i + 1..end]);
                }
            }
            for i in start..end {
                for row in 0..rows {
                    let handed = errors[row * (end - start) + i - start];
                    let ahead = &mut left[row * columns + end..(row + 1) * columns];
                    self.factor.hand_on(i, end, handed, ahead);
                }
            }
            start = end;
        }
    }

    /// A group whose scale is chosen when its first column comes must be up to date by then: it
    /// does not reach out of the block.
    fn end_of_block(&self, start: usize, block_size: usize) -> usize {
        let end = self.columns.min(start + block_size);
        let whole = end / self.scales.block_columns * self.scales.block_columns;
        if !self.fixed && end < self.columns && whole > start { whole } else { end }
    }

    /// Rounds column `i` of the order in a row that holds the rest in that order; the error.
    fn round_one(&mut self, row: usize, i: usize, left: &[f32]) -> f32 {
        let column = self.factor.order[i];
        let block = column / self.scales.block_columns;
        let at = row * self.scales.blocks + block;
        if !self.fixed && column.is_multiple_of(self.scales.block_columns) {
            let end = left.len().min(i + self.scales.block_columns);
            self.blocks[at] = self.scales.fit(&left[i..end]);
        }
        let (code, value) = self.scales.nearest(left[i], self.blocks[at]);
        self.codes[row * self.columns + column] = code;
        left[i] - value
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Case, case, error_of, parameters};
    use super::*;

    fn flag(name: &str, value: bool) -> (&str, toml::Value) {
        (name, toml::Value::Boolean(value))
    }

    #[test]
    fn errors_of_outputs_are_below_round_to_nearest() {
        let case = case(48, 192, 3);
        for format in ["int4-g32-bf16", "int4-channel-f32", "int3-g64-f32-asym", "mxfp4", "nvfp4"] {
            let plain = error_of("rtn", &case, format, &[]);
            for order in [true, false] {
                let found = error_of(NAME, &case, format, &[flag("act_order", order)]);
                assert!(found < 0.7 * plain, "{format} {order}: {found} against {plain}");
            }
        }
    }

    /// The paper's update with an explicit inverse, in f64: after each column the rest is solved
    /// again with the inverse of what is left of H.
    fn naive(case: &Case, format: &str) -> Vec<f32> {
        let (n, mut rows) = (case.columns, Vec::new());
        let matrix = case.group().matrices[0];
        let scales = Scales::new(NAME, &matrix, Format::parse(format).unwrap()).unwrap();
        let mut hessian = case.statistics.hessian();
        let mean = (0..n).map(|i| hessian[i * n + i]).sum::<f64>() / n as f64;
        (0..n).for_each(|i| hessian[i * n + i] += 0.01 * mean);
        for row in case.values.chunks(n) {
            let mut left: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
            let mut inverse = invert(&hessian, n);
            let mut block = scales.fit(row);
            for i in 0..n {
                if i % scales.block_columns == 0 {
                    let group: Vec<f32> =
                        left[i..i + scales.block_columns].iter().map(|v| *v as f32).collect();
                    block = scales.fit(&group);
                }
                let value = f64::from(scales.nearest(left[i] as f32, block).1);
                rows.push(value as f32);
                let error = (left[i] - value) / inverse[i * n + i];
                for j in i + 1..n {
                    left[j] -= error * inverse[i * n + j];
                }
                // Column i leaves the inverse (equation 3).
                let pivot = inverse[i * n + i];
                let line: Vec<f64> = inverse[i * n..(i + 1) * n].to_vec();
                for a in i + 1..n {
                    for b in i + 1..n {
                        inverse[a * n + b] -= line[a] * line[b] / pivot;
                    }
                }
            }
        }
        rows
    }

    fn invert(matrix: &[f64], n: usize) -> Vec<f64> {
        let upper = upper_factor_of_inverse(matrix, n).unwrap();
        let element = |i: usize, j: usize| -> f64 {
            (0..=i.min(j)).map(|m| upper[m * n + i] * upper[m * n + j]).sum()
        };
        (0..n * n).map(|at| element(at / n, at % n)).collect()
    }

    #[test]
    fn it_is_the_papers_update_whatever_the_block_size() {
        let case = case(6, 96, 11);
        let format = "int4-g32-f32";
        let expected = naive(&case, format);
        for block_size in [1, 20, 96, 128] {
            let settings = [
                flag("act_order", false),
                ("scales", toml::Value::String("range".to_owned())),
                ("damping", toml::Value::Float(0.01)),
                ("block_size", toml::Value::Integer(block_size)),
            ];
            let outcome = apply(
                &case.group(),
                Format::parse(format).unwrap(),
                &parameters(&TECHNIQUE, &settings),
            );
            let Ok(Outcome::Quantized(list)) = outcome else { panic!("it rounds") };
            let found = list[0].tensor.to_f32();
            // A tie that rounding moved to the other side changes all that follows in its row.
            let same = found.iter().zip(&expected).filter(|(a, b)| (*a - *b).abs() < 1e-4).count();
            assert!(
                same * 100 >= expected.len() * 97,
                "{block_size}: {same} of {}",
                expected.len()
            );
        }
    }

    #[test]
    fn a_hessian_without_full_rank_gets_more_damping() {
        let mut case = case(8, 64, 2);
        let row: Vec<f32> = (0..64).map(|i| if i == 5 { 0.0 } else { (i % 7) as f32 }).collect();
        case.statistics = Statistics::new(64);
        case.statistics.add(&row);
        let settings = [("damping", toml::Value::Float(0.0))];
        let format = Format::parse("int4-g32-f32").unwrap();
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &settings)).unwrap();
        let Outcome::Quantized(list) = outcome else { panic!("it rounds") };
        assert!(list[0].report.notes[0].contains("damping raised from 0 to"));
        assert!(list[0].tensor.to_f32().iter().all(|v| v.is_finite()));
    }

    #[test]
    fn unobserved_layers_and_other_formats_are_refused() {
        let case = case(4, 64, 1);
        let mut group = case.group();
        let defaults = parameters(&TECHNIQUE, &[]);
        let format = Format::parse("int4-g32-f32").unwrap();
        let none = Statistics::new(64);
        for statistics in [None, Some(&none)] {
            group.statistics = statistics;
            let error = apply(&group, format, &defaults).unwrap_err().to_string();
            assert!(error.contains("layers.0.ffn.gate needs calibration"), "{error}");
        }
        let error = apply(&case.group(), Format::parse("q4_0").unwrap(), &defaults).unwrap_err();
        assert!(error.to_string().contains("found q4_0"));
    }
}

//! GPTQ (arXiv 2210.17323): rounds columns one after the other. The columns that follow compensate
//! the error of each, by the inverse of `H = E[x x^T]`.
//!
//! `U` is the upper Cholesky factor of `H^-1`. The error of column `i` over `U[i][i]` goes to
//! column `j` with the factor `-U[i][j]`. Rows of the weight are independent, so each thread takes
//! some rows, in which a column is a vector. The columns after a block are updated by one matrix
//! product.
//!
//! By default, scales come from clip's search by output error. With the plain range of a block,
//! numbers that received errors saturate, and the KL to the base becomes worse than that of
//! rounding to nearest (docs/quantization.md). The default damping is five times the paper's, so
//! that directions which the calibration text does not show change less.

use lathe_tensor::Format;
use lathe_tensor::codec::scaled::{BlockScale, assemble, round_each};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use super::clip::{self, Measure};
use super::{Apply, POWER_OF_TWO, Stage, Technique, damping, power_of_two};
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, Outcome, Quantized, Scales};
use crate::parameters::{Kind, Parameter, Parameters};
use crate::statistics::Statistics;
use lathe_linalg::{part, square, upper_factor_of_inverse};

const NAME: &str = "gptq";
/// Rows of a weight that are rounded together, in lanes. They are the work of one thread.
const ROWS_TOGETHER: usize = 32;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "rounds column by column, later columns make up for the error of earlier ones",
    requires: "calibration; integers or small floats with a scale a group or a row",
    conflicts: &["rtn", "clip", "imatrix"],
    calibrated: true,
    products: true,
    parameters: &PARAMETERS,
    apply: Apply::Group(apply),
};

/// The parameters that GPTQ shares with techniques of the same kind.
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
    damping::parameter(0.05),
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

/// Rounds the columns of a group one after the other for `technique`. If the scaled mean of
/// `(x_float - x) x^T` is given, columns also hand on the difference of their inputs (GPTAQ).
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
    let one = |(matrix, scales): (&Matrix<'_>, &Scales)| -> Result<Quantized, QuantError> {
        let (codes, blocks) = round_all(matrix, scales, &factor, statistics, parameters);
        let shape = [matrix.rows, matrix.columns];
        let tensor = assemble(&shape, &scales.format, &codes, &blocks, scales.global.clone());
        let mut quantized = Quantized::new(matrix, tensor, Some(statistics))?;
        quantized.report.notes.extend(factor.note.clone());
        Ok(quantized)
    };
    let list = group.matrices.par_iter().zip(&all).map(one).collect::<Result<_, _>>()?;
    Ok(Outcome::Quantized(list))
}

/// The factors of `H` that rounding needs.
struct Factor {
    /// Columns in the order in which they are rounded.
    order: Vec<usize>,
    /// Rows of `U` in that order, from the diagonal on. Each is divided by its diagonal element.
    rows: Vec<f32>,
    /// Rows of GPTAQ's `P` in that order, if asked for.
    lacks: Option<Vec<f32>>,
    /// A note, if the damping was raised.
    note: Option<String>,
}

impl Factor {
    /// `None` if `H` cannot be factored with any damping.
    fn new(
        statistics: &Statistics,
        parameters: &Parameters,
        asymmetry: Option<&[f64]>,
    ) -> Option<Self> {
        let n = statistics.width();
        let mut diagonal: Vec<f64> = (0..n).map(|i| statistics.mean_product(i, i)).collect();
        let mean = damping::mean_of(&diagonal)?;
        // A channel that is always zero has no products with others, and is rounded to nearest.
        diagonal.iter_mut().filter(|it| **it <= 0.0).for_each(|it| *it = mean);
        let mut order: Vec<usize> = (0..n).collect();
        if parameters.flag("act_order") {
            order.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
        }
        let ordered = in_order(&order, |i, j| match i == j {
            true => diagonal[i],
            false => statistics.mean_product(i, j),
        });
        let asked = parameters.number("damping");
        let (upper, note) =
            damping::damped(&ordered, n, mean, asked, |it| upper_factor_of_inverse(&it, n))?;
        let lacks =
            asymmetry.map(|it| lacks_of(&in_order(&order, |i, j| it[i * n + j]), &upper, n));
        Some(Factor { rows: scaled_rows(&upper, n), lacks, order, note })
    }

    /// Updates columns `i + 1 .. end` after column `i`. `left` has these columns, and `handed` what
    /// column `i` hands on.
    fn hand_on(&self, i: usize, end: usize, handed: &Handed, left: &mut [f32]) {
        let (n, lanes) = (self.order.len(), handed.lanes);
        let errors = handed.errors(i);
        let shares = &self.rows[i * n + i + 1..i * n + end];
        for (value, share) in left.chunks_exact_mut(lanes).zip(shares) {
            value.iter_mut().zip(errors).for_each(|(value, error)| *value -= error * share);
        }
        let Some(lacks) = &self.lacks else { return };
        let numbers = handed.numbers(i);
        for (value, lack) in left.chunks_exact_mut(lanes).zip(&lacks[i * n + i + 1..]) {
            value.iter_mut().zip(numbers).for_each(|(value, number)| *value += number * lack);
        }
    }

    /// Updates the columns from `end` on, which are `left`, after all columns of a block.
    fn hand_on_block(&self, end: usize, handed: &Handed, left: &mut [f32]) {
        let (n, lanes, start) = (self.order.len(), handed.lanes, handed.start);
        let ahead = ArrayViewMut2::from_shape((n - end, lanes), left);
        let mut ahead = ahead.expect("the columns behind the block");
        let mut product = |shares: &[f32], sign: f32, from: &[f32]| {
            let from = ArrayView2::from_shape((end - start, lanes), &from[..(end - start) * lanes]);
            let shares = part(square(shares, n), start..end, end..n);
            general_mat_mul(
                sign,
                &shares.t(),
                &from.expect("the block's columns"),
                1.0,
                &mut ahead,
            );
        };
        product(&self.rows, -1.0, &handed.errors);
        if let Some(lacks) = &self.lacks {
            product(lacks, 1.0, &handed.numbers);
        }
    }
}

/// What the columns of a block hand on: a vector of rows for each.
struct Handed {
    /// The block's first column.
    start: usize,
    /// Rows.
    lanes: usize,
    /// The rounding errors.
    errors: Vec<f32>,
    /// The numbers of the columns before rounding.
    numbers: Vec<f32>,
}

impl Handed {
    fn at(&self, i: usize) -> std::ops::Range<usize> {
        (i - self.start) * self.lanes..(i + 1 - self.start) * self.lanes
    }

    fn errors(&self, i: usize) -> &[f32] {
        &self.errors[self.at(i)]
    }

    fn numbers(&self, i: usize) -> &[f32] {
        &self.numbers[self.at(i)]
    }
}

/// Reorders rows and columns of a square matrix.
fn in_order(order: &[usize], element: impl Fn(usize, usize) -> f64 + Sync) -> Vec<f64> {
    let n = order.len();
    let mut square = vec![0f64; n * n];
    square.par_chunks_mut(n.max(1)).zip(order).for_each(|(row, i)| {
        row.iter_mut().zip(order).for_each(|(out, j)| *out = element(*i, *j));
    });
    square
}

/// GPTAQ's `P`: the part of `A U^T` strictly above the diagonal, times `U`.
fn lacks_of(asymmetry: &[f64], upper: &[f64], n: usize) -> Vec<f32> {
    let (asymmetry, upper) = (square(asymmetry, n), square(upper, n));
    let mut lacks = vec![0f32; n * n];
    lacks.par_chunks_mut(ROWS_TOGETHER * n).enumerate().for_each(|(at, out)| {
        let first = at * ROWS_TOGETHER;
        let rows = first..first + out.len() / n;
        // `U` is zero before its diagonal.
        let upper = part(upper, first..n, first..n);
        let mut product = part(asymmetry, rows, first..n).dot(&upper.t());
        for (i, mut row) in product.rows_mut().into_iter().enumerate() {
            row.iter_mut().take(i + 1).for_each(|below| *below = 0.0);
        }
        let product = product.dot(&upper);
        for (out, row) in out.chunks_mut(n).zip(product.rows()) {
            out[first..].iter_mut().zip(row).for_each(|(out, sum)| *out = *sum as f32);
        }
    });
    lacks
}

fn scaled_rows(upper: &[f64], n: usize) -> Vec<f32> {
    let mut rows = vec![0f32; n * n];
    rows.par_chunks_mut(n.max(1)).zip(upper.par_chunks(n.max(1))).enumerate().for_each(
        |(i, (row, upper))| {
            row.iter_mut().zip(upper).for_each(|(out, u)| *out = (u / upper[i]) as f32);
        },
    );
    rows
}

/// The codes and scales of a whole matrix.
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
    // In the weight's own order, a group's scale is chosen at its first column, from numbers that
    // already contain earlier errors. Otherwise all scales are chosen at the start.
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
            let mut part = Part::new(scales, factor, values, blocks, codes);
            if fixed {
                part.take_scales();
            }
            part.round(block_size, fixed);
        });
    (codes, blocks)
}

/// Some rows of a matrix, whose columns are rounded in order.
struct Part<'a> {
    scales: &'a Scales,
    factor: &'a Factor,
    /// Rows.
    lanes: usize,
    /// `[columns, rows]`: the current numbers, with the errors handed on so far.
    left: Vec<f32>,
    /// `[blocks, rows]`: the factors of the codes.
    steps: Vec<f32>,
    /// `[blocks, rows]`: zero points.
    zeros: Vec<f32>,
    /// `[rows, blocks]`.
    blocks: &'a mut [BlockScale],
    /// `[rows, columns]`, in the weight's own order.
    codes: &'a mut [u8],
}

impl<'a> Part<'a> {
    fn new(
        scales: &'a Scales,
        factor: &'a Factor,
        values: &[f32],
        blocks: &'a mut [BlockScale],
        codes: &'a mut [u8],
    ) -> Self {
        let columns = factor.order.len();
        let lanes = values.len() / columns;
        let mut left = vec![0f32; values.len()];
        for (of_column, column) in left.chunks_exact_mut(lanes).zip(&factor.order) {
            let rows = values[*column..].iter().step_by(columns);
            of_column.iter_mut().zip(rows).for_each(|(out, value)| *out = *value);
        }
        let (steps, zeros) = (vec![0f32; blocks.len()], vec![0f32; blocks.len()]);
        Part { scales, factor, lanes, left, steps, zeros, blocks, codes }
    }

    /// Sets `steps` and `zeros` from the scale of every block.
    fn take_scales(&mut self) {
        (0..self.scales.blocks).for_each(|block| self.take_scale(block));
    }

    fn take_scale(&mut self, block: usize) {
        for row in 0..self.lanes {
            let scale = self.blocks[row * self.scales.blocks + block];
            self.steps[block * self.lanes + row] = self.scales.step(scale);
            self.zeros[block * self.lanes + row] = f32::from(scale.zero);
        }
    }

    /// Chooses the scales of the block whose first column is `i`, from its current numbers.
    fn choose_scale(&mut self, i: usize) {
        let (width, lanes) = (self.scales.block_columns, self.lanes);
        let block = i / width;
        let left = &self.left[i * lanes..self.left.len().min((i + width) * lanes)];
        let mut values = Vec::with_capacity(width);
        for row in 0..lanes {
            values.clear();
            values.extend(left[row..].iter().step_by(lanes));
            self.blocks[row * self.scales.blocks + block] = self.scales.fit(&values);
        }
        self.take_scale(block);
    }

    fn round(&mut self, block_size: usize, fixed: bool) {
        let (columns, lanes) = (self.factor.order.len(), self.lanes);
        let room = block_size.min(columns) * lanes;
        let (errors, numbers) = (vec![0f32; room], vec![0f32; room]);
        let mut handed = Handed { start: 0, lanes, errors, numbers };
        while handed.start < columns {
            let end = self.end_of_block(handed.start, block_size, fixed);
            for i in handed.start..end {
                if !fixed && i.is_multiple_of(self.scales.block_columns) {
                    self.choose_scale(i);
                }
                self.round_column(i, &mut handed);
                let ahead = &mut self.left[(i + 1) * lanes..end * lanes];
                self.factor.hand_on(i, end, &handed, ahead);
            }
            self.factor.hand_on_block(end, &handed, &mut self.left[end * lanes..]);
            handed.start = end;
        }
    }

    /// The end of a block of columns. If a group's scale is chosen at its first column, the group
    /// must be up to date by then, so it does not cross the end of the block.
    fn end_of_block(&self, start: usize, block_size: usize, fixed: bool) -> usize {
        let columns = self.factor.order.len();
        let end = columns.min(start + block_size);
        let whole = end / self.scales.block_columns * self.scales.block_columns;
        if !fixed && end < columns && whole > start { whole } else { end }
    }

    /// Rounds column `i` of the order in all rows.
    fn round_column(&mut self, i: usize, handed: &mut Handed) {
        let (columns, lanes) = (self.factor.order.len(), self.lanes);
        let column = self.factor.order[i];
        let block = column / self.scales.block_columns;
        let (steps, zeros) = (&self.steps[block * lanes..], &self.zeros[block * lanes..]);
        let (at, left) = (handed.at(i), &self.left[i * lanes..(i + 1) * lanes]);
        let mut codes = [0u8; ROWS_TOGETHER];
        let (codes, errors) = (&mut codes[..lanes], &mut handed.errors[at.clone()]);
        let element = self.scales.format.element;
        round_each(element, left, &steps[..lanes], &zeros[..lanes], codes, errors);
        errors.iter_mut().zip(left).for_each(|(error, value)| *error = value - *error);
        handed.numbers[at].copy_from_slice(left);
        let out = self.codes[column..].iter_mut().step_by(columns);
        out.zip(codes).for_each(|(out, code)| *out = *code);
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Case, case, error_of, nearest, parameters};
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

    /// The paper's update with an explicit inverse, in f64. After each column it solves again with
    /// the inverse of the rest of H.
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
                let value = f64::from(nearest(&scales, left[i] as f32, block));
                rows.push(value as f32);
                let error = (left[i] - value) / inverse[i * n + i];
                for j in i + 1..n {
                    left[j] -= error * inverse[i * n + j];
                }
                // Removes column i from the inverse (equation 3).
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
            // If a tie rounds to the other side, everything after it in the row changes.
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

//! AWQ (arXiv 2306.00978): scales input channels up where activations are large, so that rounding
//! costs less there. The op before the group is scaled down by the same numbers.
//!
//! Scales are `magnitude^a` of the inputs, optionally over `magnitude^(1-a)` of the weights. `a` is
//! chosen so that rounding changes the group's outputs least, measured exactly by `tr(D H D^T)`.

use lathe_tensor::codec::scaled::{E8m0Rounding, quantize};
use lathe_tensor::{Format, Tensor};
use rayon::prelude::*;

use super::{Apply, Stage, Technique};
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, Outcome, check_shape};
use crate::parameters::{Kind, Parameter, Parameters};
use lathe_linalg::Quadratic;

const NAME: &str = "awq";
/// The largest ratio of a scale to the middle one. Scales beyond it are clipped.
const SCALE_MAX: f64 = 1e4;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Prepare,
    effect: "scales input channels by how large activations are; folded into the norm or matrix before",
    requires: "calibration; a format with scales apart; a norm, gated activation or attention before the group",
    conflicts: &[],
    calibrated: true,
    products: true,
    parameters: &[
        Parameter {
            name: "steps",
            kind: Kind::Whole { default: 20, least: 1, most: 1000 },
            meaning: "exponents to try",
        },
        Parameter {
            name: "rows",
            kind: Kind::Whole { default: 256, least: 1, most: 1_000_000 },
            meaning: "output channels of a matrix that the search looks at, at most",
        },
    ],
    apply: Apply::Group(apply),
};

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    let Some(first) = group.matrices.first() else { return Ok(Outcome::Scaled(Vec::new())) };
    let statistics = group.observed(NAME, first.name)?;
    for matrix in &group.matrices {
        check_shape(matrix, format)?;
    }
    let Format::Scaled(_) = format else {
        let reason = format!("found {format}, expected a format with scales of its own");
        return Err(QuantError::Technique {
            technique: NAME,
            tensor: first.name.to_owned(),
            reason,
        });
    };
    let samples: Vec<Sample> =
        group.matrices.iter().map(|it| Sample::new(it, parameters.whole("rows"))).collect();
    let mut magnitudes = statistics.mean_magnitudes();
    let mut weights = weight_magnitudes(&group.matrices, format);
    let mean = |all: &[f64]| all.iter().sum::<f64>() / all.len() as f64;
    group.join_tied(&mut magnitudes, mean);
    group.join_tied(&mut weights, mean);
    let form = statistics.quadratic();
    let steps = parameters.whole("steps");
    let scales_at = |(step, by_weight): (usize, bool)| match (step, by_weight) {
        (0, false) => vec![1f32; first.columns],
        _ => {
            let exponent = step as f64 / steps as f64;
            scales_of(&magnitudes, by_weight.then_some(&weights), exponent)
        }
    };
    // The first candidate changes nothing, so the search never ends worse than it began.
    let candidates: Vec<(usize, bool)> =
        (0..=steps).flat_map(|step| [(step, false), (step, true)]).collect();
    let error = |candidate: &(usize, bool)| -> Result<f64, QuantError> {
        let scales = scales_at(*candidate);
        samples.iter().map(|it| it.error(&scales, format, &form)).sum()
    };
    let errors: Vec<f64> =
        candidates.par_iter().with_max_len(1).map(error).collect::<Result<_, _>>()?;
    let mut best = (candidates[0], f64::INFINITY);
    for (candidate, error) in candidates.into_iter().zip(errors) {
        if error < best.1 {
            best = (candidate, error);
        }
    }
    Ok(Outcome::Scaled(scales_at(best.0)))
}

/// Some rows of a matrix, spread over it.
struct Sample {
    name: String,
    rows: usize,
    columns: usize,
    values: Vec<f32>,
    /// Rows of the matrix that each sampled row stands for.
    weight: f64,
}

impl Sample {
    fn new(matrix: &Matrix<'_>, rows_max: usize) -> Self {
        let rows = matrix.rows.min(rows_max);
        let row = |index: usize| {
            let at = index * matrix.rows / rows * matrix.columns;
            &matrix.values[at..at + matrix.columns]
        };
        let values = (0..rows).flat_map(row).copied().collect();
        let weight = matrix.rows as f64 / rows.max(1) as f64;
        Sample { name: matrix.name.to_owned(), rows, columns: matrix.columns, values, weight }
    }

    /// The output error if columns are multiplied by `scales`, rounded, and divided again.
    fn error(&self, scales: &[f32], format: Format, form: &Quadratic) -> Result<f64, QuantError> {
        let scaled: Vec<f32> = self
            .values
            .iter()
            .zip(scales.iter().cycle())
            .map(|(value, scale)| value * scale)
            .collect();
        let shape = [self.rows, self.columns];
        let tensor = round(&shape, format, &scaled)
            .map_err(|source| QuantError::Format { tensor: self.name.clone(), source })?;
        let mut difference = tensor.to_f32();
        for (row, values) in
            difference.chunks_mut(self.columns).zip(self.values.chunks(self.columns))
        {
            for ((out, value), scale) in row.iter_mut().zip(values).zip(scales) {
                *out = *out / scale - value;
            }
        }
        Ok(self.weight * form.sum(&difference))
    }
}

fn round(
    shape: &[usize],
    format: Format,
    values: &[f32],
) -> Result<Tensor, lathe_tensor::TensorError> {
    match &format {
        Format::Scaled(format) => quantize(shape, format, values, E8m0Rounding::Even),
        // Other formats were refused before.
        _ => Ok(Tensor::from_f32(shape, values)),
    }
}

/// For each column, the mean over all rows of its magnitude relative to the largest one of its
/// block.
fn weight_magnitudes(matrices: &[Matrix<'_>], format: Format) -> Vec<f64> {
    let columns = matrices[0].columns;
    let block = match format.block_len() {
        1 => columns,
        block => block,
    };
    let rows: usize = matrices.iter().map(|matrix| matrix.rows).sum();
    let sums = matrices.iter().flat_map(|matrix| matrix.values.chunks(columns)).fold(
        vec![0f64; columns],
        |mut sums, row| {
            for (sums, values) in sums.chunks_mut(block).zip(row.chunks(block)) {
                let largest = values.iter().fold(1e-12f32, |most, v| most.max(v.abs()));
                sums.iter_mut().zip(values).for_each(|(s, v)| *s += f64::from(v.abs() / largest));
            }
            sums
        },
    );
    sums.into_iter().map(|sum| sum / rows.max(1) as f64).collect()
}

/// `x^a`, or `x^a / w^(1 - a)`, normalised so that the geometric mean of the extremes is 1.
fn scales_of(magnitudes: &[f64], weights: Option<&Vec<f64>>, exponent: f64) -> Vec<f32> {
    let raw: Vec<f64> = (0..magnitudes.len())
        .map(|i| {
            let input = magnitudes[i].max(1e-8).powf(exponent);
            let weight = weights.map_or(1.0, |it| it[i].max(1e-8).powf(1.0 - exponent));
            (input / weight).max(1e-4)
        })
        .collect();
    let most = raw.iter().fold(0f64, |a, b| a.max(*b));
    let least = raw.iter().fold(f64::MAX, |a, b| a.min(*b));
    let middle = (most * least).sqrt();
    raw.iter().map(|scale| (scale / middle).clamp(1.0 / SCALE_MAX, SCALE_MAX) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Case, case, error_of, parameters};
    use super::*;

    /// The case after its channels were scaled.
    fn prepared(case: &Case, format: &str) -> Case {
        let format = Format::parse(format).unwrap();
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap();
        let Outcome::Scaled(scales) = outcome else { panic!("it scales") };
        let values = case.values.iter().zip(scales.iter().cycle()).map(|(v, s)| v * s).collect();
        let statistics = case.statistics.divided_by(&scales);
        Case { rows: case.rows, columns: case.columns, values, statistics }
    }

    #[test]
    fn errors_of_outputs_are_below_round_to_nearest() {
        let case = case(48, 192, 3);
        // Power-of-two scales leave less to gain.
        for (format, most) in [("int4-g32-bf16", 0.8), ("int3-g64-f32-asym", 0.8), ("mxfp4", 0.9)] {
            let plain = error_of("rtn", &case, format, &[]);
            let ready = prepared(&case, format);
            let found = error_of("rtn", &ready, format, &[]);
            assert!(found < most * plain, "{format}: {found} against {plain}");
            let both = error_of("gptq", &ready, format, &[]);
            assert!(both < found, "{format}: {both} against {found}");
        }
    }

    #[test]
    fn what_it_cannot_do_is_refused() {
        let case = case(4, 64, 1);
        let defaults = parameters(&TECHNIQUE, &[]);
        let error = apply(&case.group(), Format::parse("q4_0").unwrap(), &defaults).unwrap_err();
        assert!(error.to_string().contains("found q4_0"));
        let mut group = case.group();
        group.statistics = None;
        let format = Format::parse("int4-g32-f32").unwrap();
        let error = apply(&group, format, &defaults).unwrap_err().to_string();
        assert!(error.contains("needs calibration"), "{error}");
    }
}

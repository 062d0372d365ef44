//! A low-rank correction of the rounding error `E = W - Q`. The codes `Q` are final, and `B A` of
//! rank `r` runs beside the quantized matrix: `y = Q x + B A x`.
//!
//! `weighting = "none"` is the truncated singular value decomposition of `E` (ZeroQuant-V2, arXiv
//! 2303.08302; LQER without its scales, arXiv 2402.02446).
//!
//! `weighting = "inputs"` minimises the output error `E |(E - B A) x|^2`. With `H = E[x x^T] = L
//! L^T` this is the decomposition of `E L` (QERA-exact, arXiv 2410.06040; EoRA, arXiv 2410.21271):
//! `B A = U U^T E`, where `U` has the leading left singular vectors of `E L`. So `L` is not
//! inverted.
//!
//! With several `rounds`, codes are chosen again for `W - B A`, and then the correction for those
//! codes (LoftQ, arXiv 2310.08659). The round with the least loss is kept.

use lathe_tensor::{FloatType, Tensor};
use ndarray::linalg::general_mat_mul;
use ndarray::{ArrayView2, ArrayViewMut2};
use rayon::prelude::*;

use super::{Apply, Stage, Technique, damping};
use crate::correction::Correction;
use crate::error::QuantError;
use crate::matrix::{Group, Matrix};
use crate::parameters::{Kind, Parameter, Parameters};
use lathe_linalg::{cholesky, part, square};
use lathe_linalg::{leading_left, product};

const NAME: &str = "low-rank";
/// Columns of `L` that are multiplied together. The zeros above its diagonal are skipped.
const PANEL: usize = 96;
/// Rows of `E` that are the work of one thread.
const ROWS_TOGETHER: usize = 48;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Correct,
    effect: "adds two thin matrices beside each quantized one, for what rounding lost: a PEFT adapter",
    requires: "a technique that rounds before it; a folder; inputs that are not rounded; no experts; \
               calibration for weighting = \"inputs\"",
    // GPTAQ's codes compensate inputs that differ from the float model's. A correction towards `W
    // x` would undo that.
    conflicts: &["gptaq"],
    calibrated: false,
    products: false,
    parameters: &[
        Parameter {
            name: "rank",
            kind: Kind::Whole { default: 32, least: 1, most: 1 << 16 },
            meaning: "columns of the first matrix and rows of the second; at most those of the weight",
        },
        Parameter {
            name: "weighting",
            kind: Kind::Choice(&["inputs", "none"]),
            meaning: "whether the error of outputs is to be least, or that of weights",
        },
        Parameter {
            name: "dtype",
            kind: Kind::Choice(&["bf16", "f32"]),
            meaning: "of both matrices",
        },
        Parameter {
            name: "rounds",
            kind: Kind::Whole { default: 1, least: 1, most: 100 },
            meaning: "times that codes are chosen, again for what the correction leaves",
        },
        damping::parameter(0.01),
    ],
    apply: Apply::Errors(apply),
};

fn float_of(parameters: &Parameters) -> FloatType {
    match parameters.choice("dtype") {
        "f32" => FloatType::F32,
        _ => FloatType::BF16,
    }
}

fn rank_of(rows: usize, columns: usize, parameters: &Parameters) -> usize {
    parameters.whole("rank").min(rows).min(columns)
}

/// The number of rounds.
pub(crate) fn rounds_of(parameters: &Parameters) -> usize {
    parameters.whole("rounds")
}

/// Bits of the correction of a `[rows, columns]` matrix.
pub(crate) fn bits_of(rows: usize, columns: usize, parameters: &Parameters) -> f64 {
    let bits = lathe_tensor::Format::Float(float_of(parameters)).bits_per_weight();
    (rank_of(rows, columns, parameters) * (rows + columns)) as f64 * bits
}

fn apply(
    group: &Group<'_>,
    rounded: &[Tensor],
    rotation: Option<usize>,
    parameters: &Parameters,
) -> Result<Vec<(Correction, Option<String>)>, QuantError> {
    let Some(first) = group.matrices.first() else { return Ok(Vec::new()) };
    let factor = match parameters.choice("weighting") {
        "none" => None,
        _ => Some(factor_of(group, first, parameters)?),
    };
    let one = |(matrix, rounded): (&Matrix<'_>, &Tensor)| {
        let found = rounded.to_f32();
        let pairs = matrix.values.par_iter().zip(&found);
        let lost: Vec<f64> = pairs.map(|(w, q)| f64::from(*w) - f64::from(*q)).collect();
        let factor = factor.as_ref();
        let [a, b] = factors(&lost, matrix, factor.map(|it| it.0.as_slice()), parameters);
        let shape = [matrix.rows, matrix.columns];
        let correction = Correction::new(shape, a, &b, float_of(parameters), rotation);
        let at = |source| QuantError::Format { tensor: matrix.name.to_owned(), source };
        Ok((correction.map_err(at)?, factor.and_then(|it| it.1.clone())))
    };
    group.matrices.iter().zip(rounded).map(one).collect()
}

/// The lower triangular `L` of the damped `H = L L^T`, with zeros above its diagonal, and a note if
/// the damping was raised.
fn factor_of(
    group: &Group<'_>,
    first: &Matrix<'_>,
    parameters: &Parameters,
) -> Result<(Vec<f64>, Option<String>), QuantError> {
    let statistics = group.observed(NAME, first.name)?;
    let (n, hessian) = (statistics.width(), statistics.hessian());
    let diagonal: Vec<f64> = (0..n).map(|i| hessian[i * n + i]).collect();
    let asked = parameters.number("damping");
    let found = damping::mean_of(&diagonal).and_then(|mean| {
        damping::damped(&hessian, n, mean, asked, |mut it| cholesky(&mut it, n).map(|()| it))
    });
    let (mut factor, note) = found.ok_or_else(|| QuantError::Technique {
        technique: NAME,
        tensor: first.name.to_owned(),
        reason: "the products of its inputs are not finite".to_owned(),
    })?;
    factor.chunks_mut(n).enumerate().for_each(|(i, row)| row[i + 1..].fill(0.0));
    Ok((factor, note))
}

/// `A` and `B`, row-major. `B` has the leading left singular vectors `U` of `E L` (of `E` if there
/// is no `L`), and `A = U^T E`. Each column of `B` and its row of `A` are scaled to equal length,
/// so that rounding either costs the same.
fn factors(
    lost: &[f64],
    matrix: &Matrix<'_>,
    factor: Option<&[f64]>,
    parameters: &Parameters,
) -> [Vec<f64>; 2] {
    let (rows, columns) = (matrix.rows, matrix.columns);
    let rank = rank_of(rows, columns, parameters);
    let left = match factor {
        Some(factor) => leading_left(&times_lower(lost, factor, columns), rows, columns, rank),
        None => leading_left(lost, rows, columns, rank),
    };
    let view = |values| ArrayView2::from_shape((rank, rows), values).expect("a vector each");
    let errors = ArrayView2::from_shape((rows, columns), lost).expect("a matrix of that shape");
    let mut a = product(view(&left), errors);
    let mut b = vec![0.0; rows * rank];
    for (at, (row, left)) in a.chunks_mut(columns).zip(left.chunks(rows)).enumerate() {
        let length = row.iter().map(|x| x * x).sum::<f64>().sqrt().sqrt();
        if length > 0.0 {
            row.iter_mut().for_each(|x| *x /= length);
        }
        left.iter().enumerate().for_each(|(i, u)| b[i * rank + at] = u * length);
    }
    [a, b]
}

/// `E L`, where `L` is lower triangular.
fn times_lower(errors: &[f64], factor: &[f64], n: usize) -> Vec<f64> {
    let factor = square(factor, n);
    let mut out = vec![0.0; errors.len()];
    let parts = out.par_chunks_mut(ROWS_TOGETHER * n).zip(errors.par_chunks(ROWS_TOGETHER * n));
    parts.with_max_len(1).for_each(|(out, errors)| {
        let rows = errors.len() / n;
        let errors = ArrayView2::from_shape((rows, n), errors).expect("whole rows");
        let mut out = ArrayViewMut2::from_shape((rows, n), out).expect("whole rows");
        for start in (0..n).step_by(PANEL) {
            let end = n.min(start + PANEL);
            let panel = part(factor, start..n, start..end);
            let mut out = part(out.view_mut(), 0..rows, start..end);
            general_mat_mul(1.0, &part(errors, 0..rows, start..n), &panel, 0.0, &mut out);
        }
    });
    out
}

#[cfg(test)]
mod tests {
    use lathe_tensor::Format;

    use super::super::tests::{Case, case, parameters};
    use super::*;
    use crate::matrix::Outcome;
    use crate::statistics::Statistics;
    use crate::technique::find;
    use lathe_linalg::singular_values;

    fn rounded(case: &Case) -> Tensor {
        let technique = find("rtn").unwrap();
        let format = Format::parse("int3-g16-f32").unwrap();
        let found = (technique.group())(&case.group(), format, &parameters(technique, &[]));
        let Ok(Outcome::Quantized(mut list)) = found else { panic!("it rounds") };
        list.remove(0).tensor
    }

    /// `E`, and the part of it that the correction leaves.
    fn errors(case: &Case, rounded: &Tensor, correction: &Correction) -> [Vec<f64>; 2] {
        let mut found = rounded.to_f32();
        let lost = |found: &[f32]| {
            let pairs = case.values.iter().zip(found);
            pairs.map(|(w, q)| f64::from(*w) - f64::from(*q)).collect()
        };
        let before = lost(&found);
        correction.add_to(&mut found);
        [before, lost(&found)]
    }

    fn corrected(case: &Case, rounded: &Tensor, settings: &[(&str, toml::Value)]) -> Correction {
        let f32s = [("dtype", toml::Value::String("f32".into()))];
        let settings = parameters(&TECHNIQUE, &[&f32s, settings].concat());
        let found = apply(&case.group(), std::slice::from_ref(rounded), None, &settings).unwrap();
        found.into_iter().next().unwrap().0
    }

    fn rank(rank: i64) -> (&'static str, toml::Value) {
        ("rank", toml::Value::Integer(rank))
    }

    fn plain() -> (&'static str, toml::Value) {
        ("weighting", toml::Value::String("none".into()))
    }

    fn squares(values: &[f64]) -> f64 {
        values.iter().map(|x| x * x).sum()
    }

    /// The sum of `D H D^T` from its definition, with `damping` times the mean of the diagonal
    /// added.
    fn outputs(errors: &[f64], statistics: &Statistics, damping: f64) -> f64 {
        let (n, h) = (statistics.width(), statistics.hessian());
        let mean = (0..n).map(|i| h[i * n + i]).sum::<f64>() / n as f64;
        let row = |d: &[f64]| {
            let inner = |i: usize| d.iter().zip(&h[i * n..]).map(|(d, h)| d * h).sum::<f64>();
            (0..n).map(|i| d[i] * (inner(i) + damping * mean * d[i])).sum::<f64>()
        };
        errors.chunks(n).map(row).sum()
    }

    /// The symmetric square root of the damped `H` by the iteration of Denman and Beavers. It is
    /// another valid `L` than Cholesky's.
    fn root(statistics: &Statistics, damping: f64) -> Vec<f64> {
        let (n, mut y) = (statistics.width(), statistics.hessian());
        let mean = (0..n).map(|i| y[i * n + i]).sum::<f64>() / n as f64;
        (0..n).for_each(|i| y[i * n + i] += damping * mean);
        let mut z: Vec<f64> = (0..n * n).map(|i| f64::from(u8::from(i % (n + 1) == 0))).collect();
        for _ in 0..40 {
            let (yi, zi) = (inverse(&y, n), inverse(&z, n));
            y.iter_mut().zip(&zi).for_each(|(y, z)| *y = 0.5 * (*y + z));
            z.iter_mut().zip(&yi).for_each(|(z, y)| *z = 0.5 * (*z + y));
        }
        y
    }

    /// The inverse by Gauss-Jordan elimination with pivots.
    fn inverse(matrix: &[f64], n: usize) -> Vec<f64> {
        let mut rows: Vec<Vec<f64>> = (0..n)
            .map(|i| {
                let unit = (0..n).map(|j| f64::from(u8::from(i == j)));
                matrix[i * n..][..n].iter().copied().chain(unit).collect()
            })
            .collect();
        for at in 0..n {
            let pivot = (at..n).max_by(|a, b| rows[*a][at].abs().total_cmp(&rows[*b][at].abs()));
            rows.swap(at, pivot.unwrap());
            let divisor = rows[at][at];
            rows[at].iter_mut().for_each(|x| *x /= divisor);
            let this = rows[at].clone();
            for (other, row) in rows.iter_mut().enumerate() {
                let share = row[at];
                if other != at {
                    row.iter_mut().zip(&this).for_each(|(x, p)| *x -= share * p);
                }
            }
        }
        rows.iter().flat_map(|row| &row[n..]).copied().collect()
    }

    /// The theorem of Eckart and Young under both weightings: the remaining error is the tail of
    /// the spectrum of `E`, or of `E H^(1/2)`.
    #[test]
    fn what_is_left_is_least() {
        for (rows, columns) in [(24, 48), (48, 32)] {
            let case = case(rows, columns, 31);
            let tensor = rounded(&case);
            let damping = 0.01;
            let root = root(&case.statistics, damping);
            let [lost, _] = errors(&case, &tensor, &corrected(&case, &tensor, &[rank(1)]));
            let weighted = product(
                ArrayView2::from_shape((rows, columns), &lost).unwrap(),
                square(&root, columns),
            );
            let all =
                [singular_values(&lost, rows, columns), singular_values(&weighted, rows, columns)];
            let mut before = [f64::INFINITY; 2];
            for r in [1, 3, 8, 16, 24] {
                let [_, left] =
                    errors(&case, &tensor, &corrected(&case, &tensor, &[rank(r), plain()]));
                let [_, other] = errors(&case, &tensor, &corrected(&case, &tensor, &[rank(r)]));
                let found = [squares(&left), outputs(&other, &case.statistics, damping)];
                for (i, values) in all.iter().enumerate() {
                    let tail: f64 = values[r as usize..].iter().map(|x| x * x).sum();
                    let whole: f64 = values.iter().map(|x| x * x).sum();
                    let at = format!("{rows}x{columns} {i} {r}: {} {tail} {whole}", found[i]);
                    assert!((found[i] - tail).abs() < 1e-5 * whole, "{at}");
                    assert!(found[i] < before[i], "{at}");
                }
                before = found;
                // Each weighting is better by its own measure.
                if (3..24).contains(&r) {
                    assert!(outputs(&left, &case.statistics, damping) > found[1]);
                    assert!(squares(&other) > found[0]);
                }
            }
        }
    }

    /// A correction of rank three removes an error of rank three, whatever the inputs were.
    #[test]
    fn an_error_of_low_rank_is_recovered() {
        let mut case = case(40, 64, 32);
        let tensor = rounded(&case);
        let thin = |i: usize, j: usize| ((i * 31 + j * 17) % 13) as f32 / 13.0 - 0.4;
        let mut values = tensor.to_f32();
        for (index, value) in values.iter_mut().enumerate() {
            let (row, column) = (index / 64, index % 64);
            *value += (0..3).map(|k| 0.1 * thin(row, k) * thin(k + 5, column)).sum::<f32>();
        }
        case.values = values;
        for weighting in [None, Some(plain())] {
            let settings = [Some(rank(3)), weighting].into_iter().flatten().collect::<Vec<_>>();
            let [lost, left] = errors(&case, &tensor, &corrected(&case, &tensor, &settings));
            let (lost, left) = (squares(&lost), squares(&left));
            assert!(lost > 1e-2 && left < 1e-10 * lost, "{lost} {left}");
        }
    }

    /// A rank above that of the matrix is cut to it, and leaves no error.
    #[test]
    fn the_rank_ends_where_the_matrix_does() {
        let case = case(12, 32, 33);
        let tensor = rounded(&case);
        let correction = corrected(&case, &tensor, &[rank(4096)]);
        assert_eq!(
            (&correction.a.shape[..], &correction.b.shape[..]),
            (&[12, 32][..], &[12, 12][..])
        );
        let [lost, left] = errors(&case, &tensor, &correction);
        assert!(squares(&left) < 1e-10 * squares(&lost));
        let settings =
            parameters(&TECHNIQUE, &[rank(4096), ("dtype", toml::Value::String("bf16".into()))]);
        assert_eq!(bits_of(12, 32, &settings), (12 * (12 + 32) * 16) as f64);
    }

    /// Inputs that are always zero, or too few, make `H` singular. The observed directions are
    /// still corrected.
    #[test]
    fn inputs_that_show_too_little() {
        let mut case = case(16, 32, 34);
        let tensor = rounded(&case);
        let mut zeros = Statistics::new(32);
        zeros.add(&[0.0; 64]);
        case.statistics = zeros;
        let found = corrected(&case, &tensor, &[rank(4)]);
        let [_, left] = errors(&case, &tensor, &found);
        let [_, of_weights] =
            errors(&case, &tensor, &corrected(&case, &tensor, &[rank(4), plain()]));
        assert!((squares(&left) / squares(&of_weights) - 1.0).abs() < 1e-4);

        // Three samples without damping: rank three corrects everything that was observed.
        let mut few = Statistics::new(32);
        let sample = |i: usize| ((i * 7919) % 101) as f32 / 50.0 - 1.0;
        few.add(&(0..96).map(sample).collect::<Vec<f32>>());
        case.statistics = few;
        for damping in [0.0, 1e-4] {
            let settings = [rank(3), ("damping", toml::Value::Float(damping))];
            let [lost, left] = errors(&case, &tensor, &corrected(&case, &tensor, &settings));
            let of = |it: &[f64]| outputs(it, &case.statistics, 0.0);
            assert!(of(&left) < 1e-3 * of(&lost), "{damping}: {} {}", of(&left), of(&lost));
        }
        let mut unseen = case.group();
        unseen.statistics = None;
        let settings = parameters(&TECHNIQUE, &[]);
        let error = apply(&unseen, std::slice::from_ref(&tensor), None, &settings).unwrap_err();
        assert!(error.to_string().contains("layers.0.ffn.gate needs calibration"), "{error}");
        let mut infinite = Statistics::new(32);
        infinite.add(&[f32::MAX; 32]);
        infinite.add(&[f32::NAN; 32]);
        case.statistics = infinite;
        let error = apply(&case.group(), &[tensor], None, &settings).unwrap_err();
        assert!(error.to_string().contains("not finite"), "{error}");
    }

    /// If the input is rotated while the model runs, the file's `A` reads it before the rotation.
    #[test]
    fn a_reads_inputs_before_they_are_rotated() {
        let case = case(16, 48, 35);
        let tensor = rounded(&case);
        let settings =
            parameters(&TECHNIQUE, &[rank(4), ("dtype", toml::Value::String("f32".into()))]);
        let made = |rotation| {
            let found = apply(&case.group(), std::slice::from_ref(&tensor), rotation, &settings);
            found.unwrap().remove(0).0
        };
        let (plain, turned) = (made(None), made(Some(12)));
        let [_, expected] = errors(&case, &tensor, &plain);
        let [_, found] = errors(&case, &tensor, &turned);
        assert!(found.iter().zip(&expected).all(|(a, b)| (a - b).abs() < 1e-6));
        // A (H x), computed by hand, equals A' x.
        let x: Vec<f32> = (0..48).map(|i| (i * 5 % 11) as f32 - 4.0).collect();
        let mut rotated = x.clone();
        lathe_tensor::hadamard::Hadamard::new(12).unwrap().apply(&mut rotated);
        let dot = |row: &[f32], x: &[f32]| row.iter().zip(x).map(|(a, x)| a * x).sum::<f32>();
        for (plain, turned) in plain.a.to_f32().chunks(48).zip(turned.a.to_f32().chunks(48)) {
            assert!((dot(plain, &rotated) - dot(turned, &x)).abs() < 1e-4);
            assert!((dot(plain, &x) - dot(turned, &x)).abs() > 1e-4, "the rotation does something");
        }
    }
}

//! Factors of `H = E[x x^T]`. If the calibration text is too short, `H` is singular. So a part of
//! the mean of its diagonal is added to it, and more if that is not enough.

use crate::parameters::{Kind, Parameter};
use lathe_linalg::NotPositive;

/// How often the damping is raised before the matrix is given up.
const DAMPINGS: usize = 8;

/// The parameter of the damping, as techniques declare it.
pub(super) const fn parameter(default: f64) -> Parameter {
    Parameter {
        name: "damping",
        kind: Kind::Number { default, least: 0.0, most: 10.0 },
        meaning: "part of the mean of H's diagonal that is added to it; raised if that is too little",
    }
}

/// The unit of damping: the mean of the diagonal of `H`, or one if it is zero. `None` if it is not
/// finite.
pub(super) fn mean_of(diagonal: &[f64]) -> Option<f64> {
    let mean = diagonal.iter().sum::<f64>() / diagonal.len().max(1) as f64;
    mean.is_finite().then_some(if mean > 0.0 { mean } else { 1.0 })
}

/// Calls `factor` with the `[n, n]` `matrix` and `asked * mean` added to its diagonal. Returns the
/// factor, and a note if the damping was raised. `None` if no damping is enough.
pub(super) fn damped<T>(
    matrix: &[f64],
    n: usize,
    mean: f64,
    asked: f64,
    factor: impl Fn(Vec<f64>) -> Result<T, NotPositive>,
) -> Option<(T, Option<String>)> {
    let mut damping = asked;
    for _ in 0..DAMPINGS {
        let mut damped = matrix.to_vec();
        (0..n).for_each(|i| damped[i * n + i] += damping * mean);
        if let Ok(found) = factor(damped) {
            let note =
                format!("damping raised from {asked} to {damping}: H was not positive definite");
            return Some((found, (damping > asked).then_some(note)));
        }
        damping = (damping * 10.0).max(1e-4);
    }
    None
}

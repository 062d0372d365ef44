//! Factors of `H = E[x x^T]` where the text of the calibration did not show enough for one: part of
//! the mean of its diagonal is added to it, and more if that is too little.

use crate::parameters::{Kind, Parameter};
use lathe_linalg::NotPositive;

/// Times that the damping is raised before the matrix is given up.
const DAMPINGS: usize = 8;

/// How much is added to the diagonal, as techniques declare it.
pub(super) const fn parameter(default: f64) -> Parameter {
    Parameter {
        name: "damping",
        kind: Kind::Number { default, least: 0.0, most: 10.0 },
        meaning: "part of the mean of H's diagonal that is added to it; raised if that is too little",
    }
}

/// What damping is a part of: the mean of the diagonal of `H`, or one where nothing was seen.
/// `None` if it is not finite.
pub(super) fn mean_of(diagonal: &[f64]) -> Option<f64> {
    let mean = diagonal.iter().sum::<f64>() / diagonal.len().max(1) as f64;
    mean.is_finite().then_some(if mean > 0.0 { mean } else { 1.0 })
}

/// What `factor` makes of the `[n, n]` `matrix` with `asked * mean` added to its diagonal, and what
/// had to be done beside. `None` if it cannot be factored whatever is added.
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

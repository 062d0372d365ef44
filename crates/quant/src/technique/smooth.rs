//! SmoothQuant (arXiv 2211.10438): moves a part of the range of each input channel into the
//! weights, so that activations are easier to quantize. Equation 4: `s = max|x|^a / max|w|^(1-a)`.

use lathe_tensor::Format;

use super::{Apply, Stage, Technique};
use crate::error::QuantError;
use crate::matrix::{Group, Outcome};
use crate::parameters::{Kind, Parameter, Parameters};

const NAME: &str = "smooth";

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Prepare,
    effect: "moves a part of the range of each input channel into the weights (SmoothQuant)",
    requires: "calibration; a norm, a gated activation or an attention before the group",
    conflicts: &["awq"],
    calibrated: true,
    products: false,
    parameters: &[Parameter {
        name: "alpha",
        kind: Kind::Number { default: 0.5, least: 0.0, most: 1.0 },
        meaning: "how much of the inputs' range the weights take",
    }],
    apply: Apply::Group(apply),
};

fn apply(group: &Group<'_>, _: Format, parameters: &Parameters) -> Result<Outcome, QuantError> {
    let Some(first) = group.matrices.first() else { return Ok(Outcome::Scaled(Vec::new())) };
    let statistics = group.observed(NAME, first.name)?;
    let alpha = parameters.number("alpha");
    let mut weights = vec![0f64; first.columns];
    for row in group.matrices.iter().flat_map(|matrix| matrix.values.chunks(first.columns)) {
        weights.iter_mut().zip(row).for_each(|(most, w)| *most = most.max(f64::from(w.abs())));
    }
    let mut inputs: Vec<f64> = statistics.largest().iter().map(|x| f64::from(*x)).collect();
    let largest = |all: &[f64]| all.iter().copied().fold(0.0, f64::max);
    group.join_tied(&mut inputs, largest);
    group.join_tied(&mut weights, largest);
    let scale = |(x, w): (&f64, &f64)| {
        let (x, w) = (*x, *w);
        // A channel that is always zero, or whose weights are zero, keeps scale 1.
        if x <= 0.0 || w <= 0.0 { 1.0 } else { (x.powf(alpha) / w.powf(1.0 - alpha)) as f32 }
    };
    let scales: Vec<f32> = inputs.iter().zip(&weights).map(scale).collect();
    Ok(Outcome::Scaled(scales.into_iter().map(|s| s.clamp(1e-5, 1e5)).collect()))
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, parameters};
    use super::*;

    /// With exponent one half, inputs and weights of each channel end with the same range.
    #[test]
    fn ranges_of_inputs_and_weights_meet() {
        let case = case(16, 64, 3);
        let format = Format::parse("int8-channel-f32").unwrap();
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap();
        let Outcome::Scaled(scales) = outcome else { panic!("it scales") };
        let inputs = case.statistics.divided_by(&scales);
        for (channel, scale) in scales.iter().enumerate() {
            let column = case.values.iter().skip(channel).step_by(case.columns);
            let weight = column.fold(0f32, |most, w| most.max(w.abs())) * scale;
            let input = inputs.largest()[channel];
            assert!((weight / input - 1.0).abs() < 1e-5, "{channel}: {weight} {input}");
        }
        let all = parameters(&TECHNIQUE, &[("alpha", toml::Value::Float(1.0))]);
        let Ok(Outcome::Scaled(scales)) = apply(&case.group(), format, &all) else {
            panic!("it scales")
        };
        let inputs = case.statistics.divided_by(&scales);
        assert!(inputs.largest().iter().all(|x| (x - 1.0).abs() < 1e-5));
    }
}

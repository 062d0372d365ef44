//! GPTAQ (arXiv 2504.02692): GPTQ with another target. The target is the float layer's output for
//! the float model's input. The quantized layer reads the output of the quantized layers before it.
//!
//! Let `A = E[(x_float - x) x^T]` and `U` be the upper factor of `H^-1 = U^T U`. `P` is the part of
//! `A U^T` strictly above the diagonal, times `U`. Column `i` adds, beside its error, its number
//! times `P[i][j]` to column `j`. `alpha` scales this term; the authors' code uses 0.25.

use lathe_tensor::Format;

use super::{Apply, Stage, Technique, gptq};
use crate::error::QuantError;
use crate::matrix::{Group, Outcome};
use crate::parameters::{Kind, Parameter, Parameters};

const NAME: &str = "gptaq";
const SHARED: [Parameter; 5] = gptq::PARAMETERS;

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "gptq that also makes up for what quantized layers before it changed in its input",
    requires: "what gptq requires; prefix = \"quantized\"; a float stream beside the quantized one",
    conflicts: &["rtn", "clip", "imatrix", "gptq"],
    calibrated: true,
    products: true,
    parameters: &[
        SHARED[0],
        SHARED[1],
        SHARED[2],
        SHARED[3],
        SHARED[4],
        Parameter {
            name: "alpha",
            kind: Kind::Number { default: 0.25, least: 0.0, most: 1.0 },
            meaning: "how much of the inputs' difference from the float model's is made up for",
        },
    ],
    apply: Apply::Asymmetric(apply),
};

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    let Some(first) = group.matrices.first() else { return Ok(Outcome::Quantized(Vec::new())) };
    let asymmetry = group.asymmetry.ok_or_else(|| QuantError::Technique {
        technique: NAME,
        tensor: first.name.to_owned(),
        reason: "its input in the float model was not observed, expected a linear layer behind a \
                 quantized prefix"
            .to_owned(),
    })?;
    let alpha = parameters.number("alpha");
    let asymmetry: Vec<f64> = asymmetry.mean().into_iter().map(|x| alpha * x).collect();
    gptq::round_columns(NAME, group, format, parameters, Some(&asymmetry))
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::super::tests::{case, normal, parameters};
    use super::*;
    use crate::statistics::{Asymmetry, Statistics};

    /// Inputs of the float model, and the same with an error that correlates with them.
    fn inputs(rows: usize, columns: usize) -> (Vec<f32>, Vec<f32>) {
        let mut random = ChaCha8Rng::seed_from_u64(21);
        let mixing: Vec<f32> = (0..12 * columns).map(|_| normal(&mut random)).collect();
        let (mut float, mut quantized) = (Vec::new(), Vec::new());
        for _ in 0..rows {
            let hidden: Vec<f32> = (0..12).map(|_| normal(&mut random)).collect();
            let row: Vec<f32> = (0..columns)
                .map(|column| {
                    let shared: f32 =
                        (0..12).map(|f| hidden[f] * mixing[f * columns + column]).sum();
                    0.4 * shared + 0.5 * normal(&mut random)
                })
                .collect();
            for column in 0..columns {
                let other = row[(column * 5 + 1) % columns];
                quantized.push(0.85 * row[column] + 0.15 * other + 0.05 * normal(&mut random));
            }
            float.extend(row);
        }
        (float, quantized)
    }

    /// `E |Q x - W x_float|^2 / E |W x_float|^2`.
    fn error(found: &[f32], exact: &[f32], float: &[f32], quantized: &[f32], n: usize) -> f64 {
        let (mut error, mut whole) = (0.0, 0.0);
        for (float, quantized) in float.chunks(n).zip(quantized.chunks(n)) {
            for (found, exact) in found.chunks(n).zip(exact.chunks(n)) {
                let dot = |w: &[f32], x: &[f32]| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>();
                let (y, target) = (dot(found, quantized), dot(exact, float));
                error += f64::from(y - target).powi(2);
                whole += f64::from(target).powi(2);
            }
        }
        error / whole
    }

    #[test]
    fn outputs_come_nearer_to_the_float_models() {
        let mut case = case(24, 96, 13);
        let (float, quantized) = inputs(500, 96);
        case.statistics = Statistics::new(96);
        case.statistics.add(&quantized);
        let mut asymmetry = Asymmetry::new(96);
        asymmetry.add(&float, &quantized);
        let format = Format::parse("int4-g32-f32").unwrap();
        let rounded = |alpha: f64| {
            let settings = parameters(&TECHNIQUE, &[("alpha", toml::Value::Float(alpha))]);
            let group = Group { asymmetry: Some(&asymmetry), ..case.group() };
            let Ok(Outcome::Quantized(list)) = apply(&group, format, &settings) else {
                panic!("it rounds")
            };
            list[0].tensor.to_f32()
        };
        let of = |found: &[f32]| error(found, &case.values, &float, &quantized, 96);
        let technique = super::super::find("gptq").unwrap();
        let plain = (technique.group())(&case.group(), format, &parameters(technique, &[]));
        let Ok(Outcome::Quantized(plain)) = plain else { panic!("it rounds") };
        let plain = plain[0].tensor.to_f32();
        assert_eq!(rounded(0.0), plain, "without the difference it is GPTQ");
        let (quarter, all) = (of(&rounded(0.25)), of(&rounded(1.0)));
        let plain = of(&plain);
        assert!(quarter < plain && all < 0.9 * plain, "{all} {quarter} against {plain}");
    }

    #[test]
    fn unseen_inputs_are_refused() {
        let case = case(4, 64, 1);
        let format = Format::parse("int4-g32-f32").unwrap();
        let error = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap_err();
        assert!(error.to_string().contains("layers.0.ffn.gate"), "{error}");
    }
}

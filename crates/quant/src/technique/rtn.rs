//! Round-to-nearest: every number takes the nearest code, with a scale under which nothing is
//! clipped.

use lathe_tensor::codec::scaled;
use lathe_tensor::{Bytes, Format, Tensor, codec};

use super::{Apply, POWER_OF_TWO, Stage, Technique, power_of_two};
use crate::error::QuantError;
use crate::matrix::{Group, Outcome, Quantized, check_shape};
use crate::parameters::Parameters;

pub(super) static TECHNIQUE: Technique = Technique {
    name: "rtn",
    stage: Stage::Round,
    effect: "rounds each number to the nearest code; nothing saturates",
    requires: "nothing",
    conflicts: &["clip", "gptq", "imatrix"],
    calibrated: false,
    products: false,
    parameters: &[POWER_OF_TWO],
    apply: Apply::Group(apply),
};

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    let rounding = power_of_two(parameters);
    group.each(|matrix| {
        check_shape(matrix, format)?;
        let shape = [matrix.rows, matrix.columns];
        let tensor = match &format {
            Format::Scaled(format) => {
                let global = matrix.global_scale(format);
                scaled::quantize_under(&shape, format, matrix.values, global, rounding)
            }
            plain => {
                let codes = codec::quantize(*plain, matrix.values);
                Tensor::new(shape.to_vec(), *plain, Bytes::new(codes))
            }
        };
        Quantized::new(matrix, tensor, group.statistics)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, parameters};
    use super::*;

    #[test]
    fn every_number_gets_the_nearest_code() {
        let case = case(24, 64, 5);
        let format = Format::parse("int4-g32-f32").unwrap();
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap();
        let Outcome::Quantized(list) = outcome else { panic!("it rounds") };
        let found = list[0].tensor.to_f32();
        for (block, (values, found)) in case.values.chunks(32).zip(found.chunks(32)).enumerate() {
            // compressed-tensors: the range is 15 / 2 codes to either side.
            let largest = values.iter().fold(0f64, |m, v| m.max(f64::from(v.abs())));
            let step = largest / 7.5;
            for (value, found) in values.iter().zip(found) {
                let code = (f64::from(*value) / step).round_ties_even().clamp(-8.0, 7.0);
                let expected = code * step;
                assert!(
                    (expected - f64::from(*found)).abs() <= 1e-5 * step + 1e-9
                        || (f64::from(*value) / step).fract().abs() - 0.5 < 1e-4,
                    "{block}: {value} {found} {expected}"
                );
            }
        }
    }

    #[test]
    fn a_width_that_does_not_fit_is_named() {
        let case = case(4, 48, 1);
        for (format, block) in [("int4-g32-bf16", "32"), ("q4_k", "256")] {
            let format = Format::parse(format).unwrap();
            let error = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap_err();
            let text = error.to_string();
            assert!(text.contains("layers.0.ffn.gate") && text.contains("48"), "{text}");
            assert!(text.contains(block), "{text}");
        }
    }
}

//! Four over six (arXiv 2512.02010): NVFP4 has a gap between the codes 4 and 6. A block whose
//! largest number is scaled to 4 instead of 6 avoids it. Each block takes the better of the two
//! scales.

use lathe_tensor::{Element, Format, ScaleType};

use super::clip::{Measure, search, under};
use super::{Apply, Stage, Technique};
use crate::error::QuantError;
use crate::matrix::{Group, Outcome, Scales};
use crate::parameters::{Kind, Parameter, Parameters};

const NAME: &str = "four_over_six";
/// The ratios of the scale that maps the largest number to 6, and of the one that maps it to 4.
const RATIOS: [f32; 2] = [1.0, 1.5];

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "scales the largest number of each block of NVFP4 to 6 or to 4, whichever errs less",
    requires: "nvfp4; calibration unless error = weight",
    conflicts: &["rtn", "clip", "gptq", "imatrix"],
    calibrated: false,
    products: false,
    parameters: &[Parameter {
        name: "error",
        kind: Kind::Choice(&["weight", "channel", "output"]),
        meaning: "what is less: errors of weights, weighed by channel, or of the block's output",
    }],
    apply: Apply::Group(apply),
};

fn apply(
    group: &Group<'_>,
    format: Format,
    parameters: &Parameters,
) -> Result<Outcome, QuantError> {
    group.each(|matrix| {
        let scales = Scales::new(NAME, matrix, format)?;
        let scaled = &scales.format;
        if scaled.element != Element::F4E2M1 || scaled.scale != ScaleType::E4M3Global {
            return Err(QuantError::Technique {
                technique: NAME,
                tensor: matrix.name.to_owned(),
                reason: format!("found {format}, expected nvfp4"),
            });
        }
        let error = parameters.choice("error");
        let measure = Measure::of_inputs(NAME, error, group.statistics, matrix, &scales)?;
        let blocks = search(&scales, matrix, &measure, &RATIOS);
        under(&scales, matrix, &blocks, group.statistics)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, error_of, nearest, parameters};
    use super::*;

    /// Every block takes the better of the two roundings, which the test computes in `f64`.
    #[test]
    fn each_block_takes_the_better_scale() {
        let case = case(16, 96, 4);
        let format = Format::parse("nvfp4").unwrap();
        let outcome = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap();
        let Outcome::Quantized(list) = outcome else { panic!("it rounds") };
        let found = list[0].tensor.to_f32();
        let scales = Scales::new(NAME, &case.group().matrices[0], format).unwrap();
        let squares = |values: &[f32], found: &[f32]| -> f64 {
            values.iter().zip(found).map(|(a, b)| f64::from(a - b).powi(2)).sum()
        };
        let mut fours = 0;
        for (values, found) in case.values.chunks(16).zip(found.chunks(16)) {
            let under = |ratio: f32| -> Vec<f32> {
                let block = scales.fit(&values.iter().map(|v| v * ratio).collect::<Vec<_>>());
                values.iter().map(|v| nearest(&scales, *v, block)).collect()
            };
            let (six, four) = (squares(values, &under(1.0)), squares(values, &under(1.5)));
            assert!(squares(values, found) <= six.min(four) * 1.000_001, "{six} {four}");
            fours += usize::from(four < six);
        }
        // Neither scale wins everywhere.
        assert!((10..86).contains(&fours), "{fours} of 96");
    }

    #[test]
    fn errors_are_below_round_to_nearest_and_other_formats_are_refused() {
        let case = case(32, 128, 5);
        let plain = error_of("rtn", &case, "nvfp4", &[]);
        let found = error_of(NAME, &case, "nvfp4", &[]);
        assert!(found < 0.95 * plain, "{found} against {plain}");
        let format = Format::parse("mxfp4").unwrap();
        let error = apply(&case.group(), format, &parameters(&TECHNIQUE, &[])).unwrap_err();
        assert!(error.to_string().contains("expected nvfp4"), "{error}");
    }
}

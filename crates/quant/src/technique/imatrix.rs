//! Importance-weighted GGUF formats: the search for a block's scales weights each column's error by
//! the mean square of its input (llama.cpp's importance matrix).

use lathe_tensor::{Bytes, Format, GgmlType, Tensor, codec};

use super::{Apply, Stage, Technique};
use crate::error::QuantError;
use crate::matrix::{Group, Outcome, Quantized, check_shape};
use crate::parameters::Parameters;

const NAME: &str = "imatrix";

pub(super) static TECHNIQUE: Technique = Technique {
    name: NAME,
    stage: Stage::Round,
    effect: "weighs the error of each column by the mean square of its input (llama.cpp's imatrix)",
    requires: "calibration; a format of GGUF: q4_0, q4_1, q5_0, q5_1, q4_k, q5_k, q6_k, iq4_nl, iq4_xs \
               (q8_0, which narrow rows get in place of q6_k, is rounded to nearest)",
    conflicts: &["rtn", "clip", "gptq"],
    calibrated: true,
    products: false,
    parameters: &[],
    apply: Apply::Group(apply),
};

fn apply(group: &Group<'_>, format: Format, _: &Parameters) -> Result<Outcome, QuantError> {
    group.each(|matrix| {
        let refuse = |reason: String| QuantError::Technique {
            technique: NAME,
            tensor: matrix.name.to_owned(),
            reason,
        };
        let Format::Ggml(kind) = format else {
            return Err(refuse(format!("found {format}, expected a format of GGUF")));
        };
        check_shape(matrix, format)?;
        let statistics = group.statistics.ok_or_else(|| QuantError::Unobserved {
            technique: NAME,
            tensor: matrix.name.to_owned(),
        })?;
        let importance = statistics.squares();
        let codes = codec::quantize_weighted(format, matrix.values, Some(&importance));
        let shape = vec![matrix.rows, matrix.columns];
        let tensor = Tensor::new(shape, format, Bytes::new(codes));
        let mut quantized = Quantized::new(matrix, tensor, Some(statistics))?;
        if kind == GgmlType::Q8_0 {
            let note = format!("{format} takes its block's range and searches nothing: to nearest");
            quantized.report.notes.push(note);
        }
        Ok(quantized)
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{case, error_of};

    #[test]
    fn importance_lowers_the_error_of_the_outputs() {
        let case = case(32, 512, 9);
        for format in ["q4_k", "iq4_xs", "q4_0", "q4_1", "q5_0", "q5_1"] {
            let (with, without) =
                (error_of("imatrix", &case, format, &[]), error_of("rtn", &case, format, &[]));
            assert!(with < 0.95 * without, "{format}: {with} against {without}");
        }
        let [with, without] = ["imatrix", "rtn"].map(|name| error_of(name, &case, "q8_0", &[]));
        assert_eq!(with, without, "nothing is searched");
    }
}

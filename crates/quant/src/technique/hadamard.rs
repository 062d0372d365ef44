//! Rotations of inputs while the model runs. Their inverse is folded into the matrices. Either
//! blocks as long as a format's groups are rotated, so that a rotation stays within a scale
//! (MR-GPTQ, arXiv 2509.23202), or only the whole input of `ffn.down` (QuaRot's R4, arXiv
//! 2404.00456).

use lathe_program::{Op, Program, Weight};

use super::{Apply, Stage, Technique};
use crate::parameters::{Kind, Parameter, Parameters};

pub(super) static TECHNIQUE: Technique = Technique {
    name: "hadamard",
    stage: Stage::Rotate,
    effect: "rotates blocks of inputs while the model runs, and folds the inverse into the matrices",
    requires: "widths that blocks divide, Hadamard matrices of the blocks' size; a folder",
    conflicts: &[],
    calibrated: false,
    products: false,
    parameters: &[
        Parameter {
            name: "block",
            kind: Kind::Whole { default: 32, least: 0, most: 1 << 20 },
            meaning: "elements of an input that are rotated together; 0 for all",
        },
        Parameter {
            name: "inputs",
            kind: Kind::Choice(&["all", "down"]),
            meaning: "of all matrices that are quantized, or of those behind an activation (R4)",
        },
    ],
    apply: Apply::Inputs(block_of),
};

/// The rotated block of the input of `weight`. Op `reader` of a program without transforms reads
/// it.
fn block_of(
    program: &Program,
    weight: Weight,
    reader: usize,
    parameters: &Parameters,
) -> Option<usize> {
    let width = program.weight(weight).shape.last().copied()?;
    let down = match &program.ops[reader] {
        Op::Experts { spec, .. } => spec.down == weight,
        Op::Linear { input, .. } => {
            program.ops.iter().any(|op| matches!(op, Op::Activate { out, .. } if out == input))
        }
        _ => false,
    };
    let block = match parameters.whole("block") {
        0 => width,
        block => block,
    };
    (down || parameters.choice("inputs") == "all").then_some(block)
}

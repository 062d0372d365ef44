//! Rotations (QuaRot, arXiv 2404.00456): orthogonal matrices rotate the stream and the heads'
//! values, so that outliers of a channel spread over all channels. They cancel, and are folded into
//! weights.
//!
//! With blocks as long as a format's groups, a rotation stays within a scale. MR-GPTQ (arXiv
//! 2509.23202) does this for MX formats, for which a rotation of the whole stream is harmful.

use lathe_program::Program;

use super::{Apply, Stage, Technique};
use crate::error::QuantError;
use crate::parameters::{Kind, Parameter, Parameters};
use crate::rotate::orthogonal;
use crate::rotate::turns::{RotationSettings, Turns, turns};

pub(super) static TECHNIQUE: Technique = Technique {
    name: "rotate",
    stage: Stage::Rotate,
    effect: "turns the stream and the heads' values by orthogonal matrices that cancel",
    requires: "RMS norms without a norm after a branch; embedding and head become matrices of their own",
    conflicts: &[],
    calibrated: false,
    products: false,
    parameters: &[
        Parameter {
            name: "kind",
            kind: Kind::Choice(&["random_hadamard", "hadamard", "random"]),
            meaning: "which orthogonal matrices",
        },
        Parameter {
            name: "block",
            kind: Kind::Whole { default: 0, least: 0, most: 1 << 20 },
            meaning: "elements of the stream that are turned together; 0 for all",
        },
        Parameter {
            name: "stream",
            kind: Kind::Flag { default: true },
            meaning: "turn the stream (R1)",
        },
        Parameter {
            name: "values",
            kind: Kind::Flag { default: true },
            meaning: "turn the values of each head (R2), where nothing stands in the way",
        },
        Parameter {
            name: "seed",
            kind: Kind::Whole { default: 1, least: 0, most: u32::MAX as u64 },
            meaning: "of the random kinds",
        },
    ],
    apply: Apply::Program(apply),
};

fn apply(program: &Program, parameters: &Parameters) -> Result<Turns, QuantError> {
    let kind = match parameters.choice("kind") {
        "hadamard" => orthogonal::Kind::Hadamard,
        "random" => orthogonal::Kind::Random,
        _ => orthogonal::Kind::RandomHadamard,
    };
    let choice = RotationSettings {
        kind,
        block: parameters.whole("block"),
        stream: parameters.flag("stream"),
        values: parameters.flag("values"),
        seed: parameters.whole("seed") as u64,
    };
    turns(program, &choice)
}

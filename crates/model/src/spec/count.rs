//! How many parameters a [`DecoderSpec`] has, in all and for one token.

use lathe_program::{Program, WeightRole};
use serde::Serialize;

use super::{DecoderSpec, FfnSpec};

/// Numbers of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct ParameterCount {
    /// All; a head that is the embedding counts once.
    pub total: u64,
    /// Those that one token meets: of the routed experts only its own.
    pub active: u64,
}

impl ParameterCount {
    /// Counts the weights that `program`, lowered from `spec`, declares.
    pub fn of(spec: &DecoderSpec, program: &Program) -> Self {
        let (mut total, mut active) = (0u64, 0u64);
        for decl in &program.weights {
            if decl.role == WeightRole::Head && spec.tied_head {
                continue;
            }
            let count = decl.shape.iter().map(|&n| n as u64).product::<u64>();
            total += count;
            // Stacked experts and their biases have the experts as their first dimension.
            let routed = decl.name.contains(".ffn.experts.");
            active += match decl.layer.map(|layer| &spec.layers[layer as usize].ffn) {
                Some(FfnSpec::Moe(moe)) if routed => {
                    count / moe.router.experts as u64 * moe.router.experts_per_token as u64
                }
                _ => count,
            };
        }
        ParameterCount { total, active }
    }
}

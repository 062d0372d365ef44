//! Mixtures of experts of GGUF files: what the file shows, and what a row says of the router.

use lathe_program::{Activation, GroupLimit, RouterScore};

use super::base::Meta;
use crate::spec::{DecoderSpec, FfnSpec, MoeSpec, RouterSpec, SharedSpec, SpecError};

/// What a row or the file's keys say of a router.
pub(super) struct Routing {
    pub score: RouterScore,
    pub normalise: bool,
    pub scaling: f64,
    pub groups: Option<GroupLimit>,
}

impl Routing {
    /// Softmax over all experts, the chosen scores as they are.
    pub(super) const SOFTMAX: Routing =
        Routing { score: RouterScore::Softmax, normalise: false, scaling: 1.0, groups: None };
}

/// Puts experts on the layers that have a router; other layers stay as they are.
pub(super) fn add(
    m: &Meta,
    spec: &mut DecoderSpec,
    routing: &Routing,
    activation: Activation,
) -> Result<(), SpecError> {
    let experts = m.size("expert_count")?.unwrap_or(0);
    if experts == 0 {
        return Ok(());
    }
    let hidden = match m.size("expert_feed_forward_length")? {
        Some(hidden) => hidden,
        None => m.need("feed_forward_length")?,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if !m.has(index, "ffn_gate_inp.weight") {
            continue;
        }
        let shared = m.shape(Some(index), "ffn_gate_shexp.weight").and_then(|shape| shape.first());
        let gated = m.has(index, "ffn_gate_inp_shexp.weight");
        layer.ffn = FfnSpec::Moe(MoeSpec {
            router: RouterSpec {
                experts,
                experts_per_token: m.need("expert_used_count")?,
                score: routing.score,
                normalise: routing.normalise,
                scaling: routing.scaling as f32,
                groups: routing.groups,
                bias: m.has(index, "ffn_gate_inp.bias"),
                correction: m.has(index, "exp_probs_b.bias"),
            },
            hidden,
            activation,
            bias: m.has(index, "ffn_gate_exps.bias"),
            shared: shared.map(|hidden| SharedSpec { hidden: *hidden, gated }),
        });
    }
    Ok(())
}

//! The rows: one an architecture.

use lathe_program::{Activation, RouterScore};

use super::GgufFamily;
use super::base::{self, Meta};
use crate::names::gguf::{COMMON, PERMUTED};
use crate::spec::{AttentionSpec, DecoderSpec, FfnSpec, MoeSpec, RouterSpec, SpecError};

pub(super) static TABLE: &[GgufFamily] =
    &[GgufFamily { architecture: "llama", spec: llama, rules: &[PERMUTED, COMMON] }];

/// Llama, Mistral and Mixtral.
fn llama(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(m, Activation::SwiGlu)?;
    let window = m.size("attention.sliding_window")?.filter(|window| *window > 0);
    for layer in &mut spec.layers {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            gqa.window = window;
        }
    }
    experts(m, &mut spec, true)?;
    Ok(spec)
}

/// Experts on the layers that have a router; scores are a softmax.
fn experts(m: &Meta, spec: &mut DecoderSpec, normalise: bool) -> Result<(), SpecError> {
    let count = m.size("expert_count")?.unwrap_or(0);
    if count == 0 {
        return Ok(());
    }
    let hidden = match m.size("expert_feed_forward_length")? {
        Some(hidden) => hidden,
        None => m.need("feed_forward_length")?,
    };
    let moe = MoeSpec {
        router: RouterSpec {
            experts: count,
            experts_per_token: m.need("expert_used_count")?,
            score: RouterScore::Softmax,
            normalise,
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: false,
        },
        hidden,
        activation: Activation::SwiGlu,
        bias: false,
        shared: None,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if m.has(index, "ffn_gate_inp.weight") {
            layer.ffn = FfnSpec::Moe(moe);
        }
    }
    Ok(())
}

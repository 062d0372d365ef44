//! ERNIE 4.5: neighbouring elements turn; experts by softmax with a correction for the choice.

use lathe_program::RouterScore;

use super::base::{self, Defaults, LLAMA};
use crate::config::Config;
use crate::spec::{DecoderSpec, FfnSpec, MoeSpec, RouterSpec, SharedSpec, SpecError};

const ERNIE: Defaults = Defaults {
    theta: 500_000.0,
    epsilon: 1e-5,
    tied: true,
    context: 131_072,
    kv_heads: Some(2),
    head_dim: Some(128),
    ..LLAMA
};
const ERNIE_MOE: Defaults = Defaults { kv_heads: Some(4), head_dim: None, ..ERNIE };

fn ernie(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, defaults)?;
    let bias = c.flag("use_bias")?.unwrap_or(false);
    base::each_gqa(&mut spec, |_, gqa| (gqa.qkv_bias, gqa.output_bias) = (bias, bias));
    base::set_mlp_bias(&mut spec, bias);
    base::interleaved(&mut spec);
    Ok(spec)
}

pub(super) fn ernie4_5(c: &Config) -> Result<DecoderSpec, SpecError> {
    ernie(c, &ERNIE)
}

/// A field that newer files name as everybody does.
fn either(c: &Config, own: &str, common: &str) -> Result<Option<usize>, SpecError> {
    Ok(c.size(own)?.or(c.size(common)?))
}

pub(super) fn ernie4_5_moe(c: &Config) -> Result<DecoderSpec, SpecError> {
    // The shared expert would have biases, the routed ones none.
    base::refuse_unless(c, "use_bias", &["false"])?;
    base::refuse_unless(c, "moe_gate", &["topk"])?;
    // Of training: how much an expert takes at most, and how the correction is learnt.
    c.idle(&["moe_capacity", "moe_use_aux_free"]);
    // The chosen scores are divided by their sum, or by this number where the sum is smaller. No
    // sum is as small as the default.
    if let Some(least) = c.number("moe_norm_min")?.filter(|least| *least > 1e-12) {
        return Err(SpecError::feature(format!("moe_norm_min `{least}`")));
    }
    let mut spec = ernie(c, &ERNIE_MOE)?;
    let hidden = c.size("moe_intermediate_size")?.unwrap_or(1536);
    let shared = c.size("moe_num_shared_experts")?.unwrap_or(2);
    let moe = MoeSpec {
        router: RouterSpec {
            experts: either(c, "moe_num_experts", "num_experts")?.unwrap_or(64),
            experts_per_token: either(c, "moe_k", "num_experts_per_tok")?.unwrap_or(6),
            score: RouterScore::Softmax,
            normalise: true,
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: true,
        },
        hidden,
        activation: base::activation(c, &ERNIE_MOE)?,
        bias: false,
        shared: (shared > 0)
            .then_some(SharedSpec { hidden: hidden.saturating_mul(shared), gated: false }),
    };
    let first = c.size("moe_layer_start_index")?.unwrap_or(1);
    // -1 is the last layer.
    let last = match c.number("moe_layer_end_index")? {
        Some(last) if last >= 0.0 => last as usize,
        _ => spec.layers.len(),
    };
    let interval = c.size("moe_layer_interval")?.unwrap_or(1).max(1);
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if (index + 1).is_multiple_of(interval) && index >= first && index <= last {
            layer.ffn = FfnSpec::Moe(moe);
        }
    }
    Ok(spec)
}

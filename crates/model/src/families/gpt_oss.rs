//! gpt-oss: windows on every other layer, sinks, biased experts with a clamped nonlinearity.

use lathe_program::{Activation, RouterScore};

use super::base::{self, Defaults, LLAMA};
use crate::config::Config;
use crate::spec::{
    DecoderSpec, FfnSpec, MoeSpec, RopeScaling, RouterSpec, SpecError, yarn_magnitude,
};

const GPT_OSS: Defaults = Defaults {
    theta: 150_000.0,
    epsilon: 1e-5,
    context: 131_072,
    kv_heads: Some(8),
    head_dim: Some(64),
    ..LLAMA
};

pub(super) fn gpt_oss(c: &Config) -> Result<DecoderSpec, SpecError> {
    // transformers 5.17 fixes both numbers, 5.24 reads them. Other numbers have no agreed meaning.
    base::refuse_unless(c, "swiglu_alpha", &["1.702"])?;
    base::refuse_unless(c, "swiglu_limit", &["7.0", "7"])?;
    base::refuse_unless(c, "hidden_act", &["silu"])?;
    let mut spec = base::decoder(c, &GPT_OSS)?;
    base::attention_bias(c, &mut spec, true)?;
    base::each_gqa(&mut spec, |_, gqa| gqa.sinks = true);
    let sliding = base::sliding_layers(c, spec.layers.len(), |layer| layer.is_multiple_of(2))?;
    let window = base::nullable(c, "sliding_window", Some(128))?;
    base::set_windows(&mut spec, &sliding, window)?;
    if c.get("rope_parameters").or(c.get("rope_scaling")).is_none() {
        let scaling = RopeScaling::Yarn {
            factor: 32.0,
            original: 4096,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: false,
            magnitude: yarn_magnitude(32.0, 1.0),
        };
        base::each_gqa(&mut spec, |_, gqa| {
            gqa.rope.iter_mut().for_each(|rope| rope.scaling = scaling.clone());
        });
    }
    let per_token = c.size("num_experts_per_tok")?.or(c.size("experts_per_token")?);
    let moe = MoeSpec {
        router: RouterSpec {
            experts: c.size("num_local_experts")?.or(c.size("num_experts")?).unwrap_or(128),
            experts_per_token: per_token.unwrap_or(4),
            score: RouterScore::SoftmaxOfChosen,
            normalise: false,
            scaling: 1.0,
            groups: None,
            bias: true,
            correction: false,
        },
        hidden: c.need("intermediate_size")?,
        activation: Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 },
        bias: true,
        shared: None,
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(spec)
}

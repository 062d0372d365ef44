//! Granite: multipliers of embedding, residual, attention and logits; with experts too.

use lathe_program::RouterScore;

use super::base::{self, LLAMA};
use super::llama;
use crate::config::Config;
use crate::spec::{DecoderSpec, FfnSpec, MoeSpec, RouterSpec, SharedSpec, SpecError};

pub(super) fn granite(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = llama::llama(c)?;
    let number = |key: &str| Ok::<_, SpecError>(c.number(key)?.unwrap_or(1.0));
    spec.embedding_multiplier = number("embedding_multiplier")? as f32;
    spec.logits_scale = (1.0 / number("logits_scaling")?) as f32;
    let residual = number("residual_multiplier")? as f32;
    spec.layers.iter_mut().for_each(|layer| layer.residual_multiplier = residual);
    let scale = number("attention_multiplier")? as f32;
    base::each_gqa(&mut spec, |_, gqa| gqa.scale = scale);
    Ok(spec)
}

pub(super) fn granitemoe(c: &Config) -> Result<DecoderSpec, SpecError> {
    mixture(c, 0)
}

/// The same with one expert that every token visits.
pub(super) fn granitemoeshared(c: &Config) -> Result<DecoderSpec, SpecError> {
    mixture(c, c.size("shared_intermediate_size")?.unwrap_or(0))
}

fn mixture(c: &Config, shared: usize) -> Result<DecoderSpec, SpecError> {
    let mut spec = granite(c)?;
    let moe = MoeSpec {
        router: RouterSpec {
            experts: c.size("num_local_experts")?.unwrap_or(8),
            experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(2),
            score: RouterScore::SoftmaxOfChosen,
            normalise: false,
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: false,
        },
        hidden: c.need("intermediate_size")?,
        activation: base::activation(c, &LLAMA)?,
        bias: false,
        shared: (shared > 0).then_some(SharedSpec { hidden: shared, gated: false }),
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(spec)
}

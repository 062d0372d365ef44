//! Command R: layer norms, branches in parallel, neighbouring elements turn.

use lathe_program::NormKind;

use super::base::{self, Defaults, LLAMA};
use crate::config::Config;
use crate::spec::{DecoderSpec, NormSpec, SpecError};

const COHERE: Defaults = Defaults {
    theta: 500_000.0,
    epsilon: 1e-5,
    epsilon_field: "layer_norm_eps",
    tied: true,
    context: 8192,
    ..LLAMA
};
const COHERE2: Defaults = Defaults { theta: 10_000.0, ..COHERE };

fn parallel(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, defaults)?;
    base::attention_bias(c, &mut spec, false)?;
    base::each_norm(&mut spec, |norm| NormSpec { kind: NormKind::Layer, ..norm });
    base::parallel(&mut spec);
    base::interleaved(&mut spec);
    spec.logits_scale = c.number("logit_scale")?.unwrap_or(0.0625) as f32;
    Ok(spec)
}

pub(super) fn cohere(c: &Config) -> Result<DecoderSpec, SpecError> {
    // A layer norm of each head with weights of its own.
    base::refuse_unless(c, "use_qk_norm", &["false"])?;
    parallel(c, &COHERE)
}

/// Windows on three layers of four; the others see everything and know no positions.
pub(super) fn cohere2(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "use_qk_norm", &["false"])?;
    let mut spec = parallel(c, &COHERE2)?;
    let pattern = c.size("sliding_window_pattern")?.unwrap_or(4).max(1);
    let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    base::set_windows(&mut spec, &sliding, window)?;
    base::each_gqa(&mut spec, |layer, gqa| gqa.rope = gqa.rope.take().filter(|_| sliding[layer]));
    Ok(spec)
}

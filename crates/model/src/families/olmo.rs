//! OLMo 1 to 3, and those with experts.

use lathe_program::{NormKind, RouterScore};

use super::base::{self, Defaults, LLAMA};
use super::rope;
use crate::config::Config;
use crate::spec::{
    DecoderSpec, FfnSpec, MoeSpec, NormSpec, QkOrder, QkScope, RouterSpec, SpecError,
};

/// Norms without a weight.
pub(super) fn olmo(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "clip_qkv", &[])?;
    let mut spec = base::decoder(c, &LLAMA)?;
    base::attention_bias(c, &mut spec, false)?;
    let plain = NormSpec { kind: NormKind::Layer, epsilon: 1e-5, weight: false, bias: false };
    base::each_norm(&mut spec, |_| plain);
    Ok(spec)
}

const OLMO2: Defaults = Defaults { epsilon: 1e-5, ..LLAMA };
const OLMO3: Defaults = Defaults { theta: 500_000.0, rope_by_kind: true, ..OLMO2 };
const FLEX_OLMO: Defaults = Defaults { theta: 500_000.0, context: 4096, ..LLAMA };
const OLMOE: Defaults = Defaults { context: 4096, ..OLMO2 };

/// Norms of whole rows of queries and keys.
fn row_norms(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "clip_qkv", &[])?;
    let mut spec = base::decoder(c, defaults)?;
    base::attention_bias(c, &mut spec, false)?;
    base::qk_norms(&mut spec, QkScope::WholeRow, QkOrder::BeforeRope);
    Ok(spec)
}

pub(super) fn olmo2(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = row_norms(c, &OLMO2)?;
    base::norms_after(&mut spec);
    Ok(spec)
}

pub(super) fn olmo3(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = row_norms(c, &OLMO3)?;
    base::norms_after(&mut spec);
    let slides = |layer: usize| !(layer + 1).is_multiple_of(4);
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    base::set_windows(&mut spec, &sliding, window)?;
    // With the older fields the reference gives windows the default base and not the file's.
    base::refuse_unless(c, "rope_theta", &["500000", "500000.0"])?;
    rope::set_local(c, &mut spec, &sliding, ("rope_theta", OLMO3.theta), &OLMO3)?;
    Ok(spec)
}

pub(super) fn olmoe(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = row_norms(c, &OLMOE)?;
    experts(c, &mut spec, (8, 64))?;
    Ok(spec)
}

pub(super) fn flex_olmo(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = row_norms(c, &FLEX_OLMO)?;
    base::norms_after(&mut spec);
    experts(c, &mut spec, (5, 7))?;
    Ok(spec)
}

/// Experts on every layer; defaults are those a token visits, and all.
fn experts(
    c: &Config,
    spec: &mut DecoderSpec,
    (per_token, experts): (usize, usize),
) -> Result<(), SpecError> {
    let found = c.size("num_experts")?.or(c.size("num_local_experts")?);
    let moe = MoeSpec {
        router: RouterSpec {
            experts: found.unwrap_or(experts),
            experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(per_token),
            score: RouterScore::Softmax,
            normalise: c.flag("norm_topk_prob")?.unwrap_or(false),
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: false,
        },
        hidden: c.need("intermediate_size")?,
        activation: base::activation(c, &LLAMA)?,
        bias: false,
        shared: None,
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(())
}

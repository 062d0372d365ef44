//! Qwen 2 and 3, dense and with experts.

use lathe_program::RouterScore;

use super::base::{self, Defaults, LLAMA};
use crate::config::Config;
use crate::spec::{
    DecoderSpec, FfnSpec, MoeSpec, QkOrder, QkScope, RouterSpec, SharedSpec, SpecError,
};

const QWEN2: Defaults = Defaults { context: 32_768, kv_heads: Some(32), ..LLAMA };
const QWEN3: Defaults = Defaults { head_dim: Some(128), ..QWEN2 };
const QWEN2_MOE: Defaults = Defaults { kv_heads: Some(16), ..QWEN2 };
const QWEN3_MOE: Defaults = Defaults { kv_heads: Some(4), ..QWEN2 };

/// The window, if `use_sliding_window` turns it on.
fn window(c: &Config) -> Result<Option<usize>, SpecError> {
    let slides = c.flag("use_sliding_window")?.unwrap_or(false);
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    Ok(window.filter(|_| slides))
}

/// Windows on the layers from `max_window_layers` on.
fn late_windows(c: &Config, spec: &mut DecoderSpec) -> Result<(), SpecError> {
    let window = window(c)?;
    let first = c.size("max_window_layers")?.unwrap_or(28);
    let slides = |layer| window.is_some() && layer >= first;
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    base::set_windows(spec, &sliding, window)
}

const QWEN2_VL: Defaults = Defaults {
    theta: 1e6,
    epsilon: 1e-5,
    context: 32_768,
    kv_heads: Some(8),
    rope_sections: true,
    ..LLAMA
};
const QWEN3_VL: Defaults = Defaults {
    theta: 500_000.0,
    context: 128_000,
    kv_heads: Some(32),
    head_dim: Some(128),
    rope_sections: true,
    ..LLAMA
};
const QWEN3_VL_MOE: Defaults = Defaults { kv_heads: Some(16), head_dim: None, ..QWEN3_VL };

/// The text part of a model that also sees, in an object of its own or, in older files, beside the
/// rest.
fn text_of<'a>(c: &Config<'a>) -> Result<Config<'a>, SpecError> {
    Ok(c.object("text_config")?.unwrap_or(*c))
}

/// Whether the head is tied: the whole model's field counts, or the text's in older files.
fn tie(c: &Config, spec: &mut DecoderSpec) -> Result<(), SpecError> {
    spec.tied_head |= c.flag("tie_word_embeddings")?.unwrap_or(false);
    Ok(())
}

/// The text part of Qwen 2 and 2.5 that see.
pub(super) fn qwen2_vl(c: &Config) -> Result<DecoderSpec, SpecError> {
    let text = text_of(c)?;
    let mut spec = base::decoder(&text, &QWEN2_VL)?;
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = true);
    let window = window(&text)?;
    let first = text.size("max_window_layers")?.unwrap_or(80);
    let slides = |layer| window.is_some() && layer >= first;
    let sliding = base::sliding_layers(&text, spec.layers.len(), slides)?;
    base::set_windows(&mut spec, &sliding, window)?;
    tie(c, &mut spec)?;
    Ok(spec)
}

/// The text part of Qwen 3 that sees.
pub(super) fn qwen3_vl(c: &Config) -> Result<DecoderSpec, SpecError> {
    let text = text_of(c)?;
    let mut spec = base::decoder(&text, &QWEN3_VL)?;
    base::attention_bias(&text, &mut spec, false)?;
    head_norms(&mut spec);
    tie(c, &mut spec)?;
    Ok(spec)
}

/// The text part of Qwen 3 with experts that sees.
pub(super) fn qwen3_vl_moe(c: &Config) -> Result<DecoderSpec, SpecError> {
    let text = text_of(c)?;
    let mut spec = base::decoder(&text, &QWEN3_VL_MOE)?;
    base::attention_bias(&text, &mut spec, false)?;
    head_norms(&mut spec);
    // The class always divides the chosen scores by their sum.
    text.idle(&["norm_topk_prob"]);
    experts(&text, &mut spec, &QWEN3_VL_MOE, None)?;
    for layer in &mut spec.layers {
        if let FfnSpec::Moe(moe) = &mut layer.ffn {
            moe.router.normalise = true;
        }
    }
    tie(c, &mut spec)?;
    Ok(spec)
}

fn head_norms(spec: &mut DecoderSpec) {
    base::qk_norms(spec, QkScope::PerHead, QkOrder::BeforeRope);
}

pub(super) fn qwen2(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &QWEN2)?;
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = true);
    late_windows(c, &mut spec)?;
    Ok(spec)
}

pub(super) fn qwen3(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &QWEN3)?;
    base::attention_bias(c, &mut spec, false)?;
    head_norms(&mut spec);
    late_windows(c, &mut spec)?;
    Ok(spec)
}

pub(super) fn qwen2_moe(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &QWEN2_MOE)?;
    let bias = c.flag("qkv_bias")?.unwrap_or(true);
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = bias);
    let window = window(c)?;
    let first = c.size("max_window_layers")?.unwrap_or(28);
    let slides = |layer: usize| window.is_some() && layer.is_multiple_of(2) && layer < first;
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    base::set_windows(&mut spec, &sliding, window)?;
    let hidden = c.need("shared_expert_intermediate_size")?;
    experts(c, &mut spec, &QWEN2_MOE, Some(SharedSpec { hidden, gated: true }))?;
    Ok(spec)
}

pub(super) fn qwen3_moe(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &QWEN3_MOE)?;
    base::attention_bias(c, &mut spec, false)?;
    head_norms(&mut spec);
    let window = window(c)?;
    base::each_gqa(&mut spec, |_, gqa| gqa.window = window);
    // The class has one window for all layers.
    c.idle(&["max_window_layers"]);
    experts(c, &mut spec, &QWEN3_MOE, None)?;
    Ok(spec)
}

/// Experts on every `decoder_sparse_step`th layer but those in `mlp_only_layers`.
fn experts(
    c: &Config,
    spec: &mut DecoderSpec,
    defaults: &Defaults,
    shared: Option<SharedSpec>,
) -> Result<(), SpecError> {
    let experts = match c.size("num_experts")? {
        Some(experts) => experts,
        None => c.need("num_local_experts")?,
    };
    let step = c.size("decoder_sparse_step")?.unwrap_or(1).max(1);
    let dense = c.sizes("mlp_only_layers")?.unwrap_or_default();
    let moe = MoeSpec {
        router: RouterSpec {
            experts,
            experts_per_token: c.need("num_experts_per_tok")?,
            score: RouterScore::Softmax,
            normalise: c.flag("norm_topk_prob")?.unwrap_or(false),
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: false,
        },
        hidden: c.need("moe_intermediate_size")?,
        activation: base::activation(c, defaults)?,
        bias: false,
        shared,
    };
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if experts > 0 && (index + 1).is_multiple_of(step) && !dense.contains(&index) {
            layer.ffn = FfnSpec::Moe(moe);
        }
    }
    Ok(())
}

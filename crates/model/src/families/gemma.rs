//! Gemma: weights of norms are counted from 1, and embeddings are scaled. Gemma 2 and 3 have norms
//! around each branch.

use lathe_program::{Activation, NormKind};

use super::base::{self, Defaults, LLAMA};
use super::rope;
use crate::config::Config;
use crate::spec::{BranchNorms, DecoderSpec, FfnSpec, NormSpec, QkOrder, QkScope, SpecError};

const GEMMA2: Defaults = Defaults {
    tied: true,
    context: 8192,
    kv_heads: Some(4),
    head_dim: Some(256),
    heads: Some(8),
    vocabulary: Some(256_000),
    activation: ("hidden_activation", "gelu_pytorch_tanh"),
    ..LLAMA
};
const GEMMA3: Defaults = Defaults {
    theta: 1e6,
    context: 131_072,
    vocabulary: Some(262_208),
    rope_by_kind: true,
    ..GEMMA2
};

const GEMMA: Defaults = Defaults {
    tied: true,
    context: 8192,
    kv_heads: Some(16),
    head_dim: Some(256),
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    ..LLAMA
};

/// Gemma 1.
pub(super) fn gemma1(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = counted_from_one(c, &GEMMA)?;
    // The class means the approximation by tanh where a file says `gelu`, and knows no other field.
    c.idle(&["hidden_activation"]);
    if c.text("hidden_act")? == Some("gelu") {
        for layer in &mut spec.layers {
            if let FfnSpec::Dense(dense) = &mut layer.ffn {
                dense.activation = Activation::GeGluTanh;
            }
        }
    }
    Ok(spec)
}

/// What all share.
fn counted_from_one(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    if c.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(SpecError::feature("bidirectional attention"));
    }
    let mut spec = base::decoder(c, defaults)?;
    base::attention_bias(c, &mut spec, false)?;
    spec.embedding_multiplier = (spec.width as f64).sqrt() as f32;
    base::each_norm(&mut spec, |norm| NormSpec { kind: NormKind::Rms { offset: 1.0 }, ..norm });
    Ok(spec)
}

/// What 2 and 3 share.
fn gemma(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    let mut spec = counted_from_one(c, defaults)?;
    // Left over from Gemma 1; the class reads `hidden_activation`.
    c.idle(&["hidden_act"]);
    let norm = Some(spec.final_norm);
    for layer in &mut spec.layers {
        layer.attention_norms = BranchNorms { before: norm, after: norm };
        layer.ffn_norms = layer.attention_norms;
    }
    let scale = c.number("query_pre_attn_scalar")?.unwrap_or(256.0).powf(-0.5) as f32;
    base::each_gqa(&mut spec, |_, gqa| gqa.scale = scale);
    Ok(spec)
}

/// A softcap that null turns off and absence leaves at the class's default.
fn softcap(c: &Config, key: &str, default: Option<f64>) -> Result<Option<f32>, SpecError> {
    let cap = match c.number(key)? {
        None if !c.has(key) => default,
        cap => cap,
    };
    Ok(cap.map(|cap| cap as f32))
}

pub(super) fn gemma2(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = gemma(c, &GEMMA2)?;
    spec.logits_softcap = softcap(c, "final_logit_softcapping", Some(30.0))?;
    let cap = softcap(c, "attn_logit_softcapping", Some(50.0))?;
    base::each_gqa(&mut spec, |_, gqa| gqa.softcap = cap);
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    let sliding = base::sliding_layers(c, spec.layers.len(), |layer| layer.is_multiple_of(2))?;
    base::set_windows(&mut spec, &sliding, window)?;
    Ok(spec)
}

pub(super) fn gemma3(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "attn_logit_softcapping", &[])?;
    let mut spec = gemma(c, &GEMMA3)?;
    spec.logits_softcap = softcap(c, "final_logit_softcapping", None)?;
    let pattern = c.size("sliding_window_pattern")?.unwrap_or(6).max(1);
    let slides = |layer: usize| !(layer + 1).is_multiple_of(pattern);
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    base::set_windows(&mut spec, &sliding, window)?;
    base::qk_norms(&mut spec, QkScope::PerHead, QkOrder::BeforeRope);
    rope::set_local(c, &mut spec, &sliding, ("rope_local_base_freq", 10_000.0), &GEMMA3)?;
    Ok(spec)
}

/// The text part of a model that also sees; its other tensors are left alone.
pub(super) fn gemma3_text_of(c: &Config) -> Result<DecoderSpec, SpecError> {
    let text = c.object("text_config")?;
    let text = text.ok_or_else(|| SpecError::Missing("text_config".to_owned()))?;
    let mut spec = gemma3(&text)?;
    // The class that also sees has a head of its own, which knows no softcap.
    if let Some(cap) = spec.logits_softcap.take() {
        text.note(format!(
            "`final_logit_softcapping: {cap}` is ignored, as this architecture of the reference \
             does"
        ));
    }
    spec.tied_head = c.flag("tie_word_embeddings")?.unwrap_or(spec.tied_head);
    Ok(spec)
}

//! Dense decoders that differ from Llama in a norm, a bias or a nonlinearity.

use lathe_program::NormKind;

use super::base::{self, Defaults, LLAMA};
use super::llama;
use crate::config::Config;
use crate::spec::{BranchNorms, DecoderSpec, NormSpec, QkOrder, QkScope, SpecError};

const SEED_OSS: Defaults =
    Defaults { context: 524_288, kv_heads: Some(8), head_dim: Some(128), ..LLAMA };

pub(super) fn seed_oss(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &SEED_OSS)?;
    let bias = c.flag("attention_bias")?.unwrap_or(true);
    let output_bias = c.flag("attention_out_bias")?.unwrap_or(false);
    base::each_gqa(&mut spec, |_, gqa| (gqa.qkv_bias, gqa.output_bias) = (bias, output_bias));
    base::mlp_bias(c, &mut spec)?;
    Ok(spec)
}

const ARCEE: Defaults = Defaults {
    epsilon: 1e-5,
    context: 4096,
    activation: ("hidden_act", "relu2"),
    gated: false,
    ..LLAMA
};

pub(super) fn arcee(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &ARCEE)?;
    base::attention_bias(c, &mut spec, false)?;
    base::mlp_bias(c, &mut spec)?;
    Ok(spec)
}

const GLM: Defaults = Defaults {
    epsilon: 1.5625e-7,
    context: 131_072,
    kv_heads: Some(2),
    head_dim: Some(128),
    partial: Some(0.5),
    ..LLAMA
};

pub(super) fn glm(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &GLM)?;
    let bias = c.flag("attention_bias")?.unwrap_or(true);
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = bias);
    base::interleaved(&mut spec);
    Ok(spec)
}

/// The same with norms on the branches' outputs too.
pub(super) fn glm4(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = glm(c)?;
    let norm = Some(spec.final_norm);
    for layer in &mut spec.layers {
        layer.attention_norms = BranchNorms { before: norm, after: norm };
        layer.ffn_norms = layer.attention_norms;
    }
    Ok(spec)
}

const EXAONE4: Defaults = Defaults { epsilon: 1e-5, kv_heads: Some(32), ..LLAMA };

/// Norms on outputs and of each head; layers that see everything know no positions where there
/// are windows at all.
pub(super) fn exaone4(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &EXAONE4)?;
    base::qk_norms(&mut spec, QkScope::PerHead, QkOrder::BeforeRope);
    base::norms_after(&mut spec);
    let Some(window) = base::nullable(c, "sliding_window", Some(4096))? else {
        c.idle(&["sliding_window_pattern"]);
        if base::sliding_layers(c, spec.layers.len(), |_| false)?.contains(&true) {
            return Err(SpecError::Missing("sliding_window".to_owned()));
        }
        return Ok(spec);
    };
    let sliding = match c.has("layer_types") {
        true => {
            c.idle(&["sliding_window_pattern"]);
            base::sliding_layers(c, spec.layers.len(), |_| false)?
        }
        false => {
            let pattern = c.size("sliding_window_pattern")?.unwrap_or(4).max(1);
            (1..=spec.layers.len()).map(|layer| !layer.is_multiple_of(pattern)).collect()
        }
    };
    base::set_windows(&mut spec, &sliding, Some(window))?;
    base::each_gqa(&mut spec, |layer, gqa| gqa.rope = gqa.rope.take().filter(|_| sliding[layer]));
    Ok(spec)
}

const HUNYUAN: Defaults = Defaults { epsilon: 1e-5, ntk_alpha: true, ..LLAMA };

pub(super) fn hunyuan(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "use_cla", &["false"])?;
    base::refuse_unless(c, "use_qk_norm", &["true"])?;
    c.idle(&["cla_share_factor", "attention_head_dim"]);
    let mut spec = base::decoder(c, &HUNYUAN)?;
    base::attention_bias(c, &mut spec, false)?;
    base::qk_norms(&mut spec, QkScope::PerHead, QkOrder::AfterRope);
    Ok(spec)
}

const STARCODER2: Defaults = Defaults {
    epsilon: 1e-5,
    epsilon_field: "norm_epsilon",
    tied: true,
    context: 4096,
    kv_heads: Some(2),
    activation: ("hidden_act", "gelu_pytorch_tanh"),
    gated: false,
    ..LLAMA
};

pub(super) fn starcoder2(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "norm_type", &["layer_norm"])?;
    base::refuse_unless(c, "mlp_type", &["default"])?;
    let mut spec = llama::one_window(c, base::decoder(c, &STARCODER2)?, None)?;
    let bias = c.flag("use_bias")?.unwrap_or(true);
    base::each_gqa(&mut spec, |_, gqa| (gqa.qkv_bias, gqa.output_bias) = (bias, bias));
    base::set_mlp_bias(&mut spec, bias);
    base::each_norm(&mut spec, biased);
    Ok(spec)
}

const STABLELM: Defaults = Defaults {
    epsilon: 1e-5,
    epsilon_field: "layer_norm_eps",
    context: 4096,
    kv_heads: Some(32),
    partial: Some(0.25),
    ..LLAMA
};

pub(super) fn stablelm(c: &Config) -> Result<DecoderSpec, SpecError> {
    // A layer norm of each head with weights of its own.
    base::refuse_unless(c, "qk_layernorm", &["false"])?;
    let mut spec = base::decoder(c, &STABLELM)?;
    let bias = c.flag("use_qkv_bias")?.unwrap_or(false);
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = bias);
    base::each_norm(&mut spec, biased);
    if c.flag("use_parallel_residual")?.unwrap_or(false) {
        base::parallel(&mut spec);
    }
    Ok(spec)
}

/// A layer norm with weight and bias.
fn biased(norm: NormSpec) -> NormSpec {
    NormSpec { kind: NormKind::Layer, bias: true, ..norm }
}

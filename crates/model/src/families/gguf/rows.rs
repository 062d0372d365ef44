//! The rows: one an architecture, by its name in llama.cpp.

use lathe_program::{Activation, GroupLimit, GroupScore, RopeStyle, RouterScore};

use super::GgufFamily;
use super::base::{self, Meta};
use super::experts::{self, Routing};
use crate::names::gguf::{COMMON, EARLY_NORMS, FUSED, LATENT, PERMUTED};
use crate::spec::{
    AttentionSpec, DecoderSpec, GqaSpec, MlaSpec, NormSpec, RopeScaling, RopeSpec, SpecError,
};

macro_rules! row {
    ($architecture:literal, $spec:expr, $rules:expr) => {
        GgufFamily { architecture: $architecture, spec: $spec, rules: $rules }
    };
}

pub(super) static TABLE: &[GgufFamily] = &[
    row!("llama", llama, &[PERMUTED, COMMON]),
    row!("granite", granite, &[PERMUTED, COMMON]),
    row!("smollm3", smollm3, &[PERMUTED, COMMON]),
    row!("qwen2", plain, &[COMMON]),
    row!("qwen2moe", |m| with_experts(m, false), &[COMMON]),
    row!("qwen3", plain, &[COMMON]),
    row!("qwen3moe", |m| with_experts(m, true), &[COMMON]),
    row!("olmo2", olmo2, &[COMMON]),
    row!("phi3", phi3, &[FUSED, COMMON]),
    row!("gemma2", gemma2, &[COMMON]),
    row!("gemma3", gemma3, &[COMMON]),
    row!("gpt-oss", gpt_oss, &[EARLY_NORMS, COMMON]),
    row!("deepseek2", deepseek2, &[LATENT, COMMON]),
    row!("minicpm3", minicpm3, &[LATENT, COMMON]),
    row!("glm4moe", glm4moe, &[EARLY_NORMS, COMMON]),
];

/// Changes the heads of every layer.
fn each_gqa(spec: &mut DecoderSpec, mut change: impl FnMut(usize, &mut GqaSpec)) {
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            change(index, gqa);
        }
    }
}

/// The window, if the file has one that is not 0.
fn window(m: &Meta) -> Result<Option<usize>, SpecError> {
    Ok(m.size("attention.sliding_window")?.filter(|window| *window > 0))
}

fn plain(m: &Meta) -> Result<DecoderSpec, SpecError> {
    if window(m)?.is_some() {
        return Err(SpecError::feature("attention.sliding_window of this architecture"));
    }
    base::decoder(m, Activation::SwiGlu)
}

/// Softmax routers; a shared expert with a gate if there is one.
fn with_experts(m: &Meta, normalise: bool) -> Result<DecoderSpec, SpecError> {
    let mut spec = plain(m)?;
    let routing = Routing { normalise, ..Routing::SOFTMAX };
    experts::add(m, &mut spec, &routing, Activation::SwiGlu)?;
    Ok(spec)
}

/// Rows are permuted head by head, so that a part of a head cannot be told from the rest.
fn permuted(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let spec = base::decoder(m, Activation::SwiGlu)?;
    if let AttentionSpec::Gqa(gqa) = &base::first_layer(&spec)?.attention {
        let rotary = gqa.rope.as_ref().map_or(0, |rope| rope.rotary);
        if rotary != gqa.head_dim {
            let expected = format!("{}, the dimension of a head", gqa.head_dim);
            return Err(SpecError::value("rope.dimension_count", rotary, expected));
        }
    }
    Ok(spec)
}

/// Llama, Mistral and Mixtral.
fn llama(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = permuted(m)?;
    let window = window(m)?;
    each_gqa(&mut spec, |_, gqa| gqa.window = window);
    let routing = Routing { normalise: true, ..Routing::SOFTMAX };
    experts::add(m, &mut spec, &routing, Activation::SwiGlu)?;
    Ok(spec)
}

fn granite(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = permuted(m)?;
    let number = |key: &str| Ok::<_, SpecError>(m.number(key)?.filter(|scale| *scale != 0.0));
    spec.embedding_multiplier = number("embedding_scale")?.unwrap_or(1.0) as f32;
    spec.logits_scale = (1.0 / number("logit_scale")?.unwrap_or(1.0)) as f32;
    let residual = number("residual_scale")?.unwrap_or(1.0) as f32;
    spec.layers.iter_mut().for_each(|layer| layer.residual_multiplier = residual);
    if let Some(scale) = number("attention.scale")? {
        each_gqa(&mut spec, |_, gqa| gqa.scale = scale as f32);
    }
    Ok(spec)
}

/// Every fourth layer has no positions; files do not say so.
fn smollm3(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = permuted(m)?;
    each_gqa(&mut spec, |layer, gqa| {
        gqa.rope = gqa.rope.take().filter(|_| (layer + 1) % 4 != 0);
    });
    Ok(spec)
}

fn olmo2(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let spec = plain(m)?;
    let layer = base::first_layer(&spec)?;
    match layer.attention_norms.after.is_some() && layer.ffn_norms.after.is_some() {
        true => Ok(spec),
        false => Err(SpecError::Missing("blk.0.post_attention_norm.weight".to_owned())),
    }
}

fn phi3(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(m, Activation::SwiGlu)?;
    let window = window(m)?;
    each_gqa(&mut spec, |_, gqa| gqa.window = window);
    Ok(spec)
}

/// What Gemma 2 and 3 share; the converter adds 1 to the weights of norms. `large` has another
/// scale of attention, and is known by its number of layers.
fn gemma(m: &Meta, large: usize) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(m, Activation::GeGluTanh)?;
    spec.embedding_multiplier = (spec.width as f64).sqrt() as f32;
    spec.logits_softcap = m.number("final_logit_softcapping")?.map(|cap| cap as f32);
    let cap = m.number("attn_logit_softcapping")?.map(|cap| cap as f32);
    let (width, is_large) = (spec.width, spec.layers.len() == large);
    each_gqa(&mut spec, |_, gqa| {
        gqa.softcap = cap;
        if is_large {
            gqa.scale = (width as f64 / gqa.heads as f64).powf(-0.5) as f32;
        }
    });
    Ok(spec)
}

fn gemma2(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = gemma(m, 46)?;
    let window = window(m)?.or(Some(4096));
    each_gqa(&mut spec, |layer, gqa| gqa.window = window.filter(|_| layer.is_multiple_of(2)));
    Ok(spec)
}

fn gemma3(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = gemma(m, 62)?;
    let window = window(m)?;
    let theta = m.number("rope.freq_base_swa")?.unwrap_or(10_000.0);
    let pattern = m.size("attention.sliding_window_pattern")?.unwrap_or(6).max(1);
    each_gqa(&mut spec, |layer, gqa| {
        if window.is_some() && !(layer + 1).is_multiple_of(pattern) {
            gqa.window = window;
            gqa.rope = gqa.rope.take().map(|rope| RopeSpec::plain(theta, rope.rotary));
        }
    });
    Ok(spec)
}

fn gpt_oss(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(m, Activation::SwiGlu)?;
    base::early_norms(m, &mut spec);
    let window = window(m)?;
    each_gqa(&mut spec, |layer, gqa| {
        gqa.window = window.filter(|_| layer.is_multiple_of(2));
        // The model's own ramp is not rounded; the file has no key for that.
        if let Some(RopeScaling::Yarn { truncate, .. }) =
            gqa.rope.as_mut().map(|rope| &mut rope.scaling)
        {
            *truncate = false;
        }
    });
    let routing = Routing { score: RouterScore::SoftmaxOfChosen, ..Routing::SOFTMAX };
    let activation = Activation::SwiGluClamped { alpha: 1.702, limit: 7.0 };
    experts::add(m, &mut spec, &routing, activation)?;
    Ok(spec)
}

/// Latent attention; files are of two kinds, with the up projection whole or split.
fn mla(m: &Meta, rope: RopeSpec) -> Result<MlaSpec, SpecError> {
    let key = m.size("attention.key_length_mla")?.or(m.size("attention.key_length")?);
    let key = key.ok_or_else(|| SpecError::Missing("attention.key_length_mla".to_owned()))?;
    let heads = m.need("attention.head_count")?;
    let value = m.size("attention.value_length_mla")?.or(m.size("attention.value_length")?);
    let value_dim = match value {
        Some(value_dim) => value_dim,
        None => m.need("embedding_length")?.checked_div(heads).unwrap_or(0),
    };
    let rope_dim = rope.rotary;
    let short = || SpecError::value("attention.key_length_mla", key, "more than the rotary part");
    Ok(MlaSpec {
        heads,
        query_rank: m.size("attention.q_lora_rank")?.filter(|rank| *rank > 0),
        rank: m.need("attention.kv_lora_rank")?,
        rope_dim,
        nope_dim: key.checked_sub(rope_dim).filter(|dim| *dim > 0).ok_or_else(short)?,
        value_dim,
        scale: (key as f64).powf(-0.5) as f32,
        window: None,
        rope,
        latent_norm: NormSpec::rms(1e-6),
        down_bias: false,
        output_bias: false,
    })
}

/// DeepSeek-V2, V3 and Kimi K2.
fn deepseek2(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut rope = super::rope::read(m, m.need("rope.dimension_count")?)?;
    rope.style = RopeStyle::Interleaved;
    let mut stretch = 1.0;
    if let RopeScaling::Yarn { factor, magnitude, .. } = &mut rope.scaling {
        // llama.cpp takes YaRN's own magnitude out again, and scales the scores instead.
        *magnitude = m.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
        let slope = m.number("rope.scaling.yarn_log_multiplier")?.unwrap_or(0.0);
        stretch = 1.0 + slope * factor.max(1.0).ln();
    }
    let mut attention = mla(m, rope)?;
    attention.scale = (f64::from(attention.scale) * stretch * stretch) as f32;
    let hidden = m.size("feed_forward_length")?.unwrap_or(0);
    let mut spec =
        base::with_attention(m, AttentionSpec::Mla(attention), hidden, Activation::SwiGlu)?;
    experts::add(m, &mut spec, &gated_routing(m, RouterScore::Softmax)?, Activation::SwiGlu)?;
    Ok(spec)
}

/// The router that the file's own keys describe.
fn gated_routing(m: &Meta, default: RouterScore) -> Result<Routing, SpecError> {
    let score = match m.size("expert_gating_func")?.unwrap_or(0) {
        0 => default,
        1 => RouterScore::Softmax,
        2 => RouterScore::Sigmoid,
        3 => RouterScore::SoftmaxOfChosen,
        other => return Err(SpecError::feature(format!("expert_gating_func {other}"))),
    };
    let groups = m.size("expert_group_count")?.filter(|groups| *groups > 1);
    let groups = match groups {
        None => None,
        Some(groups) => Some(GroupLimit {
            groups,
            groups_per_token: m.need("expert_group_used_count")?,
            score: match score {
                RouterScore::Sigmoid => GroupScore::TopTwoSum,
                _ => GroupScore::Max,
            },
        }),
    };
    Ok(Routing {
        score,
        normalise: m.flag("expert_weights_norm")?.unwrap_or(false),
        scaling: m.number("expert_weights_scale")?.filter(|s| *s != 0.0).unwrap_or(1.0),
        groups,
    })
}

/// Its scales are those of the published model; files do not have them.
fn minicpm3(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let rope = super::rope::read(m, m.need("rope.dimension_count")?)?;
    let hidden = m.need("feed_forward_length")?;
    let attention = AttentionSpec::Mla(mla(m, rope)?);
    let mut spec = base::with_attention(m, attention, hidden, Activation::SwiGlu)?;
    spec.embedding_multiplier = 12.0;
    spec.logits_scale = (256.0 / spec.width as f64) as f32;
    let depth = (1.4 / (spec.layers.len() as f64).sqrt()) as f32;
    spec.layers.iter_mut().for_each(|layer| layer.residual_multiplier = depth);
    Ok(spec)
}

fn glm4moe(m: &Meta) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(m, Activation::SwiGlu)?;
    base::early_norms(m, &mut spec);
    experts::add(m, &mut spec, &gated_routing(m, RouterScore::Sigmoid)?, Activation::SwiGlu)?;
    Ok(spec)
}

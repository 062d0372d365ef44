//! Latent attention and group-limited routers: DeepSeek-V2 and V3, Kimi K2, and those that took
//! over one of the two (MiniCPM 3 the attention, GLM 4.5 the router).

use lathe_program::{GroupLimit, GroupScore, RopeStyle, RouterScore};

use super::base::{self, Defaults, LLAMA};
use super::rope;
use crate::config::Config;
use crate::spec::{
    AttentionSpec, DecoderSpec, FfnSpec, MlaSpec, MoeSpec, NormSpec, QkNorm, QkOrder, QkScope,
    RouterSpec, SharedSpec, SpecError,
};

/// The classes build the latents' norms without the configured epsilon.
const LATENT_EPSILON: f64 = 1e-6;

const V2: Defaults = LLAMA;
const V3: Defaults = Defaults { context: 4096, ..LLAMA };

/// Latent attention; `query_rank` is the class's default.
fn mla(
    c: &Config,
    defaults: &Defaults,
    query_rank: usize,
    style: RopeStyle,
) -> Result<MlaSpec, SpecError> {
    let heads = c.need("num_attention_heads")?;
    if let Some(kv_heads) = c.size("num_key_value_heads")?.filter(|kv_heads| *kv_heads != heads) {
        let expected = format!("{heads}, as many as num_attention_heads");
        return Err(SpecError::value("num_key_value_heads", kv_heads, expected));
    }
    // The classes set it to `qk_rope_head_dim`.
    c.idle(&["head_dim"]);
    let (nope_dim, rope_dim) = (c.need("qk_nope_head_dim")?, c.need("qk_rope_head_dim")?);
    let bias = c.flag("attention_bias")?.unwrap_or(false);
    let mut rope = rope::read(c, defaults, rope_dim)?;
    rope.style = style;
    let scale = ((nope_dim + rope_dim) as f64).powf(-0.5) * rope::yarn_score_scale(c, defaults)?;
    Ok(MlaSpec {
        heads,
        query_rank: base::nullable(c, "q_lora_rank", Some(query_rank))?,
        rank: c.need("kv_lora_rank")?,
        rope_dim,
        nope_dim,
        value_dim: match c.size("v_head_dim")? {
            Some(value_dim) => value_dim,
            None => c.need("hidden_size")?.checked_div(heads).unwrap_or(0),
        },
        scale: scale as f32,
        window: None,
        rope,
        latent_norm: NormSpec::rms(LATENT_EPSILON),
        down_bias: bias,
        output_bias: bias,
    })
}

/// Experts on all layers from `first_k_dense_replace` on.
fn experts(
    c: &Config,
    spec: &mut DecoderSpec,
    router: RouterSpec,
    (first, shared): (usize, usize),
) -> Result<(), SpecError> {
    base::refuse_unless(c, "moe_layer_freq", &["1"])?;
    let hidden = c.need("moe_intermediate_size")?;
    let shared = c.size("n_shared_experts")?.unwrap_or(shared);
    let shared_hidden = hidden.saturating_mul(shared);
    let moe = MoeSpec {
        router,
        hidden,
        activation: base::activation(c, &LLAMA)?,
        bias: false,
        shared: (shared > 0).then_some(SharedSpec { hidden: shared_hidden, gated: false }),
    };
    let first = c.size("first_k_dense_replace")?.unwrap_or(first);
    spec.layers.iter_mut().skip(first).for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(())
}

/// `n_group` and `topk_group`; one group is no limit.
fn groups(
    c: &Config,
    defaults: (usize, usize),
    score: GroupScore,
) -> Result<Option<GroupLimit>, SpecError> {
    let groups = c.size("n_group")?.unwrap_or(defaults.0);
    let groups_per_token = c.size("topk_group")?.unwrap_or(defaults.1);
    Ok((groups > 1).then_some(GroupLimit { groups, groups_per_token, score }))
}

pub(super) fn deepseek_v2(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "scoring_func", &["softmax"])?;
    base::refuse_unless(c, "topk_method", &["greedy", "group_limited_greedy"])?;
    base::refuse_unless(c, "mlp_bias", &["false"])?;
    // The class ignores it, the original code does not.
    base::refuse_unless(c, "norm_topk_prob", &["false"])?;
    let attention = mla(c, &V2, 1536, RopeStyle::Interleaved)?;
    let mut spec = base::with_attention(c, &V2, AttentionSpec::Mla(attention))?;
    let limited = c.text("topk_method")? == Some("group_limited_greedy");
    if !limited {
        c.idle(&["n_group", "topk_group"]);
    }
    let router = RouterSpec {
        experts: c.size("n_routed_experts")?.unwrap_or(64),
        experts_per_token: c.need("num_experts_per_tok")?,
        score: RouterScore::Softmax,
        normalise: false,
        scaling: c.number("routed_scaling_factor")?.unwrap_or(1.0) as f32,
        groups: if limited { groups(c, (1, 1), GroupScore::Max)? } else { None },
        bias: false,
        correction: false,
    };
    experts(c, &mut spec, router, (0, 2))?;
    Ok(spec)
}

/// DeepSeek-V3's router: sigmoid scores, a correction for the choice.
fn sigmoid_router(
    c: &Config,
    groups: Option<GroupLimit>,
    scaling: f64,
) -> Result<RouterSpec, SpecError> {
    // `noaux_tc` is the name of the whole router, and a published dots.llm1 has it here.
    base::refuse_unless(c, "scoring_func", &["sigmoid", "noaux_tc"])?;
    base::refuse_unless(c, "topk_method", &["noaux_tc"])?;
    Ok(RouterSpec {
        experts: c.need("n_routed_experts")?,
        experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(8),
        score: RouterScore::Sigmoid,
        normalise: c.flag("norm_topk_prob")?.unwrap_or(true),
        scaling: c.number("routed_scaling_factor")?.unwrap_or(scaling) as f32,
        groups,
        bias: false,
        correction: true,
    })
}

pub(super) fn deepseek_v3(c: &Config) -> Result<DecoderSpec, SpecError> {
    let style = match c.flag("rope_interleave")?.unwrap_or(true) {
        true => RopeStyle::Interleaved,
        false => RopeStyle::HalfSplit,
    };
    let attention = mla(c, &V3, 1536, style)?;
    let mut spec = base::with_attention(c, &V3, AttentionSpec::Mla(attention))?;
    let groups = groups(c, (8, 4), GroupScore::TopTwoSum)?;
    experts(c, &mut spec, sigmoid_router(c, groups, 2.5)?, (3, 1))?;
    Ok(spec)
}

const GLM4_MOE: Defaults =
    Defaults { epsilon: 1e-5, context: 131_072, kv_heads: Some(8), partial: Some(0.5), ..LLAMA };

pub(super) fn glm4_moe(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &GLM4_MOE)?;
    let bias = c.flag("attention_bias")?.unwrap_or(false);
    let norm = spec.final_norm;
    let qk_norm = QkNorm { scope: QkScope::PerHead, order: QkOrder::BeforeRope, norm };
    let qk_norm = c.flag("use_qk_norm")?.unwrap_or(false).then_some(qk_norm);
    base::each_gqa(&mut spec, |_, gqa| (gqa.qkv_bias, gqa.qk_norm) = (bias, qk_norm));
    let groups = groups(c, (1, 1), GroupScore::TopTwoSum)?;
    experts(c, &mut spec, sigmoid_router(c, groups, 1.0)?, (1, 1))?;
    Ok(spec)
}

const GLM4_MOE_LITE: Defaults =
    Defaults { epsilon: 1e-5, context: 202_752, partial: Some(1.0), ..LLAMA };

/// The attention of DeepSeek-V3 and the router of GLM 4.5.
pub(super) fn glm4_moe_lite(c: &Config) -> Result<DecoderSpec, SpecError> {
    let style = match c.flag("rope_interleave")?.unwrap_or(true) {
        true => RopeStyle::Interleaved,
        false => RopeStyle::HalfSplit,
    };
    let attention = mla(c, &GLM4_MOE_LITE, 768, style)?;
    let mut spec = base::with_attention(c, &GLM4_MOE_LITE, AttentionSpec::Mla(attention))?;
    let groups = groups(c, (1, 1), GroupScore::TopTwoSum)?;
    let router = RouterSpec {
        experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(4),
        ..sigmoid_router(c, groups, 1.8)?
    };
    let dense = spec.layers.clone();
    experts(c, &mut spec, router, (1, 1))?;
    // The class reads this list and not `first_k_dense_replace`, which then says the same.
    if let Some(kinds) = c.texts("mlp_layer_types")? {
        let layers = dense.len();
        if kinds.len() != layers {
            let (found, expected) = (format!("{} kinds", kinds.len()), format!("{layers} layers"));
            return Err(SpecError::value("mlp_layer_types", found, expected));
        }
        let moe = spec.layers.last().map(|layer| layer.ffn);
        for ((layer, plain), kind) in spec.layers.iter_mut().zip(&dense).zip(kinds) {
            layer.ffn = match (kind, moe) {
                ("dense", _) => plain.ffn,
                ("sparse", Some(moe @ FfnSpec::Moe(_))) => moe,
                (other, _) => {
                    return Err(SpecError::feature(format!("mlp_layer_types `{other}`")));
                }
            };
        }
    }
    Ok(spec)
}

const MINIMAX_M2: Defaults = Defaults {
    theta: 5e6,
    context: 196_608,
    kv_heads: Some(8),
    head_dim: Some(128),
    partial: Some(1.0),
    ..LLAMA
};

/// Norms of whole rows of queries and keys, and V3's router over all experts.
pub(super) fn minimax_m2(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &MINIMAX_M2)?;
    // Published files say how many elements turn instead of which part (transformers 5.24).
    let scaling = c.object("rope_parameters")?.or(c.object("rope_scaling")?);
    let has_part = c.has("partial_rotary_factor")
        || scaling.is_some_and(|scaling| scaling.has("partial_rotary_factor"));
    if let Some(rotary) = c.size("rotary_dim")?.filter(|_| !has_part) {
        base::each_gqa(&mut spec, |_, gqa| {
            gqa.rope.iter_mut().for_each(|rope| rope.rotary = rotary);
        });
    }
    base::qk_norms(&mut spec, QkScope::WholeRow, QkOrder::BeforeRope);
    let moe = MoeSpec {
        router: RouterSpec {
            experts: c.size("num_local_experts")?.or(c.size("num_experts")?).unwrap_or(256),
            experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(8),
            score: RouterScore::Sigmoid,
            normalise: true,
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: true,
        },
        hidden: c.need("intermediate_size")?,
        activation: base::activation(c, &MINIMAX_M2)?,
        bias: false,
        shared: None,
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(spec)
}

const DOTS1: Defaults = Defaults { kv_heads: Some(32), ..LLAMA };

/// The router of V3 after attention with norms of each head and windows on late layers.
pub(super) fn dots1(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &DOTS1)?;
    base::attention_bias(c, &mut spec, false)?;
    base::qk_norms(&mut spec, QkScope::PerHead, QkOrder::BeforeRope);
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    let first = c.size("max_window_layers")?.unwrap_or(62);
    let slides = |layer| window.is_some() && layer >= first;
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    base::set_windows(&mut spec, &sliding, window)?;
    let groups = groups(c, (1, 1), GroupScore::TopTwoSum)?;
    let router = RouterSpec {
        experts_per_token: c.need("num_experts_per_tok")?,
        normalise: c.flag("norm_topk_prob")?.unwrap_or(false),
        ..sigmoid_router(c, groups, 1.0)?
    };
    experts(c, &mut spec, router, (0, 0))?;
    Ok(spec)
}

const MINICPM3: Defaults =
    Defaults { epsilon: 1e-5, tied: true, context: 32_768, vocabulary: Some(73_448), ..LLAMA };

pub(super) fn minicpm3(c: &Config) -> Result<DecoderSpec, SpecError> {
    base::refuse_unless(c, "mlp_bias", &["false"])?;
    let attention = mla(c, &MINICPM3, 768, RopeStyle::HalfSplit)?;
    let mut spec = base::with_attention(c, &MINICPM3, AttentionSpec::Mla(attention))?;
    spec.embedding_multiplier = c.number("scale_emb")?.unwrap_or(12.0) as f32;
    let depth = match c.number("scale_depth")? {
        None if c.has("scale_depth") => 1.0,
        depth => depth.unwrap_or(1.4) / (spec.layers.len() as f64).sqrt(),
    };
    spec.layers.iter_mut().for_each(|layer| layer.residual_multiplier = depth as f32);
    if let Some(base) = base::nullable(c, "dim_model_base", Some(256))? {
        spec.logits_scale = (base as f64 / spec.width as f64) as f32;
    }
    Ok(spec)
}

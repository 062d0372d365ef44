//! The plain decoder that rows start from, and the fields that most configurations share.

use lathe_program::{Activation, RopeStyle};

use super::rope;
use crate::config::Config;
use crate::spec::{
    AttentionSpec, BranchNorms, DecoderSpec, DenseSpec, FfnSpec, GqaSpec, LayerSpec, NormSpec,
    QkNorm, QkOrder, QkScope, Residual, RopeSpec, SpecError,
};

/// What a family assumes where its `config.json` is silent (transformers' class defaults), and
/// which biases it has.
pub(super) struct Defaults {
    pub theta: f64,
    pub epsilon: f64,
    pub tied: bool,
    pub context: usize,
    /// `None`: as many as there are query heads.
    pub kv_heads: Option<usize>,
    /// `None`: the width divided by the number of heads.
    pub head_dim: Option<usize>,
    /// `None`: must be given.
    pub heads: Option<usize>,
    /// `None`: must be given.
    pub vocabulary: Option<usize>,
    /// Whether a part of a head may turn (`partial_rotary_factor`), and the default part; for
    /// other families such a factor is refused, for the reference ignores it.
    pub partial: Option<f64>,
    /// `original_max_position_embeddings` beside the scaling, where a class always has one.
    pub original: Option<usize>,
    /// Names under which older files of the family ask for LongRoPE.
    pub longrope: &'static [&'static str],
    /// The field that names the nonlinearity, and its default.
    pub activation: (&'static str, &'static str),
    /// Whether feed-forward layers have a gate.
    pub gated: bool,
    /// The field that holds the norms' epsilon.
    pub epsilon_field: &'static str,
    /// Whether `alpha` beside the rope type `dynamic` stretches the base once and for all
    /// (Hunyuan).
    pub ntk_alpha: bool,
    /// Whether `rope_parameters` may hold one object for each kind of layer.
    pub rope_by_kind: bool,
    /// Whether positions of pictures have three parts (`mrope_section`). Those of text are equal,
    /// so that text turns as everywhere.
    pub rope_sections: bool,
    /// Whether `rope_parameters` may say that queries grow with their position.
    pub query_scaling: bool,
}

/// transformers' `LlamaConfig`.
pub(super) const LLAMA: Defaults = Defaults {
    theta: 10_000.0,
    epsilon: 1e-6,
    tied: false,
    context: 2048,
    kv_heads: None,
    head_dim: None,
    heads: None,
    vocabulary: None,
    partial: None,
    original: None,
    longrope: &[],
    activation: ("hidden_act", "silu"),
    gated: true,
    epsilon_field: "rms_norm_eps",
    ntk_alpha: false,
    rope_by_kind: false,
    rope_sections: false,
    query_scaling: false,
};

/// A decoder of equal layers: RMS norms before each branch, GQA with full attention over plain
/// positions, a dense gated feed-forward layer, no biases.
pub(super) fn decoder(c: &Config, defaults: &Defaults) -> Result<DecoderSpec, SpecError> {
    with_attention(c, defaults, AttentionSpec::Gqa(gqa(c, defaults)?))
}

/// As [`decoder`], with another attention.
pub(super) fn with_attention(
    c: &Config,
    defaults: &Defaults,
    attention: AttentionSpec,
) -> Result<DecoderSpec, SpecError> {
    let norm = norm(c, defaults)?;
    let positions = context(c, defaults)?;
    let rope = match &attention {
        AttentionSpec::Gqa(gqa) => gqa.rope.as_ref(),
        AttentionSpec::Mla(mla) => Some(&mla.rope),
    };
    let context_limit = rope.and_then(RopeSpec::limit);
    // Where layers turn in different ways, the file's number counts (vLLM's rule for Gemma 3).
    let stretches = rope.filter(|_| !defaults.rope_by_kind);
    let context_max = stretches.map_or(positions, |rope| rope.stretched(positions));
    let layer = LayerSpec {
        attention,
        attention_norms: BranchNorms { before: Some(norm), after: None },
        ffn: FfnSpec::Dense(DenseSpec {
            hidden: c.need("intermediate_size")?,
            activation: activation(c, defaults)?,
            bias: false,
        }),
        ffn_norms: BranchNorms { before: Some(norm), after: None },
        residual: Residual::Sequential,
        residual_multiplier: 1.0,
    };
    Ok(DecoderSpec {
        vocabulary: need(c, "vocab_size", defaults.vocabulary)?,
        width: c.need("hidden_size")?,
        context_max,
        context_limit,
        embedding_multiplier: 1.0,
        layers: vec![layer; layer_count(c)?],
        final_norm: norm,
        logits_scale: 1.0,
        logits_softcap: None,
        tied_head: c.flag("tie_word_embeddings")?.unwrap_or(defaults.tied),
        prediction_layers: c.size("num_nextn_predict_layers")?.unwrap_or(0),
        inputs: Default::default(),
        adapters: Default::default(),
    })
}

/// A size that must be there unless the class has a default.
fn need(c: &Config, key: &str, default: Option<usize>) -> Result<usize, SpecError> {
    match default {
        Some(default) => Ok(c.size(key)?.unwrap_or(default)),
        None => c.need(key),
    }
}

/// The number of layers, small enough to make one spec each.
pub(super) fn layer_count(c: &Config) -> Result<usize, SpecError> {
    let layers = c.need("num_hidden_layers")?;
    if layers > 2048 {
        return Err(SpecError::value("num_hidden_layers", layers, "at most 2048"));
    }
    Ok(layers)
}

pub(super) fn context(c: &Config, defaults: &Defaults) -> Result<usize, SpecError> {
    Ok(c.size("max_position_embeddings")?.unwrap_or(defaults.context))
}

pub(super) fn norm(c: &Config, defaults: &Defaults) -> Result<NormSpec, SpecError> {
    Ok(NormSpec::rms(c.number(defaults.epsilon_field)?.unwrap_or(defaults.epsilon)))
}

fn gqa(c: &Config, defaults: &Defaults) -> Result<GqaSpec, SpecError> {
    let heads = need(c, "num_attention_heads", defaults.heads)?;
    let kv_heads = match c.size("num_key_value_heads")? {
        Some(kv_heads) => kv_heads,
        None if c.has("num_key_value_heads") => heads,
        None => defaults.kv_heads.unwrap_or(heads),
    };
    let head_dim = match c.size("head_dim")?.or(defaults.head_dim) {
        Some(head_dim) => head_dim,
        None => c.need("hidden_size")?.checked_div(heads).unwrap_or(0),
    };
    Ok(GqaSpec {
        heads,
        kv_heads,
        head_dim,
        scale: (head_dim as f64).powf(-0.5) as f32,
        window: None,
        softcap: None,
        sinks: false,
        rope: Some(rope::read(c, defaults, head_dim)?),
        qk_norm: None,
        qkv_bias: false,
        output_bias: false,
        output_gate: None,
    })
}

/// The nonlinearity of a feed-forward layer.
pub(super) fn activation(c: &Config, defaults: &Defaults) -> Result<Activation, SpecError> {
    let (key, default) = defaults.activation;
    let name = c.text(key)?.unwrap_or(default);
    match (defaults.gated, name) {
        (true, name) => gated_activation(key, name),
        (false, "relu2") => Ok(Activation::ReluSquared),
        (false, "gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
        (false, "silu" | "swish") => Ok(Activation::Silu),
        (false, other) => Err(SpecError::feature(format!("{key} `{other}` without a gate"))),
    }
}

/// The gated nonlinearity that transformers calls `name`; `key` is the field that names it.
pub(super) fn gated_activation(key: &str, name: &str) -> Result<Activation, SpecError> {
    match name {
        "silu" | "swish" => Ok(Activation::SwiGlu),
        "gelu_pytorch_tanh" | "gelu_new" => Ok(Activation::GeGluTanh),
        "gelu" => Ok(Activation::GeGluErf),
        other => Err(SpecError::feature(format!("{key} `{other}`"))),
    }
}

/// Changes the heads of every layer.
pub(super) fn each_gqa(spec: &mut DecoderSpec, mut change: impl FnMut(usize, &mut GqaSpec)) {
    for (index, layer) in spec.layers.iter_mut().enumerate() {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            change(index, gqa);
        }
    }
}

/// Turns every norm of the residual stream into another, made from what stands there.
pub(super) fn each_norm(spec: &mut DecoderSpec, change: impl Fn(NormSpec) -> NormSpec) {
    spec.final_norm = change(spec.final_norm);
    for layer in &mut spec.layers {
        for norms in [&mut layer.attention_norms, &mut layer.ffn_norms] {
            norms.before = norms.before.map(&change);
            norms.after = norms.after.map(&change);
        }
    }
}

/// Norms on the branches' outputs and none before them.
pub(super) fn norms_after(spec: &mut DecoderSpec) {
    for layer in &mut spec.layers {
        layer.attention_norms = BranchNorms { before: None, after: Some(spec.final_norm) };
        layer.ffn_norms = layer.attention_norms;
    }
}

/// Both branches read one norm of the stream and are added to it together.
pub(super) fn parallel(spec: &mut DecoderSpec) {
    for layer in &mut spec.layers {
        layer.residual = Residual::Parallel;
        layer.ffn_norms = BranchNorms { before: None, after: None };
    }
}

/// Normalises queries and keys as the residual stream is normalised.
pub(super) fn qk_norms(spec: &mut DecoderSpec, scope: QkScope, order: QkOrder) {
    let qk_norm = QkNorm { scope, order, norm: spec.final_norm };
    each_gqa(spec, |_, gqa| gqa.qk_norm = Some(qk_norm));
}

/// Rotations of neighbouring elements.
pub(super) fn interleaved(spec: &mut DecoderSpec) {
    each_gqa(spec, |_, gqa| {
        gqa.rope.iter_mut().for_each(|rope| rope.style = RopeStyle::Interleaved);
    });
}

/// `key`, one bias for query, key, value and output alike (`attention_bias`).
pub(super) fn attention_bias(
    c: &Config,
    spec: &mut DecoderSpec,
    default: bool,
) -> Result<(), SpecError> {
    let bias = c.flag("attention_bias")?.unwrap_or(default);
    each_gqa(spec, |_, gqa| (gqa.qkv_bias, gqa.output_bias) = (bias, bias));
    Ok(())
}

/// `mlp_bias` of dense feed-forward layers.
pub(super) fn mlp_bias(c: &Config, spec: &mut DecoderSpec) -> Result<(), SpecError> {
    set_mlp_bias(spec, c.flag("mlp_bias")?.unwrap_or(false));
    Ok(())
}

/// Biases of dense feed-forward layers.
pub(super) fn set_mlp_bias(spec: &mut DecoderSpec, has: bool) {
    for layer in &mut spec.layers {
        if let FfnSpec::Dense(dense) = &mut layer.ffn {
            dense.bias = has;
        }
    }
}

/// Refuses `key` unless it is absent, null or `allowed`.
pub(super) fn refuse_unless(c: &Config, key: &str, allowed: &[&str]) -> Result<(), SpecError> {
    match c.get(key) {
        None => Ok(()),
        Some(value) => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if allowed.contains(&text.as_str()) {
                return Ok(());
            }
            Err(SpecError::feature(format!("{key} `{text}`")))
        }
    }
}

/// A size that null turns off and absence leaves at the class's default.
pub(super) fn nullable(
    c: &Config,
    key: &str,
    default: Option<usize>,
) -> Result<Option<usize>, SpecError> {
    match c.size(key)? {
        Some(size) => Ok(Some(size)),
        None if c.has(key) => Ok(None),
        None => Ok(default),
    }
}

/// Which layers see only a window: `layer_types`, or else `default`.
pub(super) fn sliding_layers(
    c: &Config,
    layers: usize,
    default: impl Fn(usize) -> bool,
) -> Result<Vec<bool>, SpecError> {
    let Some(kinds) = c.texts("layer_types")? else {
        return Ok((0..layers).map(default).collect());
    };
    if kinds.len() != layers {
        let expected = format!("one for each of {layers} layers");
        return Err(SpecError::value("layer_types", format!("{} kinds", kinds.len()), expected));
    }
    let slides = |kind: &str| match kind {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(SpecError::feature(format!("layer type `{other}`"))),
    };
    kinds.into_iter().map(slides).collect()
}

/// Gives the sliding layers their window.
pub(super) fn set_windows(
    spec: &mut DecoderSpec,
    sliding: &[bool],
    window: Option<usize>,
) -> Result<(), SpecError> {
    if window.is_none() && sliding.contains(&true) {
        return Err(SpecError::Missing("sliding_window".to_owned()));
    }
    each_gqa(spec, |layer, gqa| gqa.window = window.filter(|_| sliding[layer]));
    Ok(())
}

//! The limits of a [`DecoderSpec`]: checked once, when a file's numbers become a spec.
//!
//! Everything behind this edge may multiply sizes without checks: the limits bound each product.

use lathe_program::{GroupScore, NormKind};

use super::{
    AttentionSpec, DecoderSpec, DenseSpec, FfnSpec, GqaSpec, LayerSpec, MlaSpec, MoeSpec,
    RopeScaling, RopeSpec, RouterSpec, SpecError,
};

const VOCABULARY_MAX: usize = 1 << 22;
const WIDTH_MAX: usize = 1 << 18;
const LAYERS_MAX: usize = 1 << 11;
const HEADS_MAX: usize = 1 << 12;
const HEAD_DIM_MAX: usize = 1 << 13;
const HIDDEN_MAX: usize = 1 << 20;
const EXPERTS_MAX: usize = 1 << 14;
const CONTEXT_MAX: usize = 1 << 27;

impl DecoderSpec {
    /// Whether every size is positive, within sane limits, and divides what it must.
    pub fn validate(&self) -> Result<(), SpecError> {
        size("vocabulary size", self.vocabulary, VOCABULARY_MAX)?;
        size("hidden size", self.width, WIDTH_MAX)?;
        size("number of layers", self.layers.len(), LAYERS_MAX)?;
        size("context length", self.context_max, CONTEXT_MAX)?;
        number("embedding multiplier", self.embedding_multiplier)?;
        number("logits scale", self.logits_scale)?;
        positive("logits softcap", self.logits_softcap.unwrap_or(1.0))?;
        positive("norm epsilon", self.final_norm.epsilon)?;
        let mut last: Option<&LayerSpec> = None;
        for layer in &self.layers {
            if last != Some(layer) {
                validate_layer(layer)?;
            }
            last = Some(layer);
        }
        Ok(())
    }
}

fn validate_layer(layer: &LayerSpec) -> Result<(), SpecError> {
    number("residual multiplier", layer.residual_multiplier)?;
    for norms in [layer.attention_norms, layer.ffn_norms] {
        for norm in [norms.before, norms.after].into_iter().flatten() {
            positive("norm epsilon", norm.epsilon)?;
            if norm.bias && norm.kind != NormKind::Layer {
                return Err(SpecError::feature("a bias on an RMS norm"));
            }
        }
    }
    match &layer.attention {
        AttentionSpec::Gqa(gqa) => validate_gqa(gqa)?,
        AttentionSpec::Mla(mla) => validate_mla(mla)?,
    }
    match &layer.ffn {
        FfnSpec::Dense(DenseSpec { hidden, .. }) => size("feed-forward size", *hidden, HIDDEN_MAX),
        FfnSpec::Moe(moe) => validate_moe(moe),
    }
}

fn validate_gqa(gqa: &GqaSpec) -> Result<(), SpecError> {
    size("number of attention heads", gqa.heads, HEADS_MAX)?;
    size("number of key-value heads", gqa.kv_heads, HEADS_MAX)?;
    size("head dimension", gqa.head_dim, HEAD_DIM_MAX)?;
    if !gqa.heads.is_multiple_of(gqa.kv_heads) {
        return Err(SpecError::value(
            "number of key-value heads",
            gqa.kv_heads,
            format!("a divisor of the {} attention heads", gqa.heads),
        ));
    }
    positive("attention scale", gqa.scale)?;
    positive("attention softcap", gqa.softcap.unwrap_or(1.0))?;
    size("attention window", gqa.window.unwrap_or(1), usize::MAX)?;
    gqa.rope.as_ref().map_or(Ok(()), |rope| validate_rope(rope, gqa.head_dim))
}

fn validate_mla(mla: &MlaSpec) -> Result<(), SpecError> {
    size("number of attention heads", mla.heads, HEADS_MAX)?;
    size("query rank", mla.query_rank.unwrap_or(1), HIDDEN_MAX)?;
    size("key-value rank", mla.rank, HIDDEN_MAX)?;
    size("rotary head dimension", mla.rope_dim, HEAD_DIM_MAX)?;
    size("head dimension without positions", mla.nope_dim, HEAD_DIM_MAX)?;
    size("value head dimension", mla.value_dim, HEAD_DIM_MAX)?;
    positive("attention scale", mla.scale)?;
    size("attention window", mla.window.unwrap_or(1), usize::MAX)?;
    validate_rope(&mla.rope, mla.rope_dim)
}

fn validate_moe(moe: &MoeSpec) -> Result<(), SpecError> {
    size("expert feed-forward size", moe.hidden, HIDDEN_MAX)?;
    if let Some(shared) = moe.shared {
        size("shared expert feed-forward size", shared.hidden, HIDDEN_MAX)?;
    }
    validate_router(&moe.router)
}

fn validate_router(router: &RouterSpec) -> Result<(), SpecError> {
    size("number of experts", router.experts, EXPERTS_MAX)?;
    size("experts per token", router.experts_per_token, router.experts)?;
    number("routed scaling factor", router.scaling)?;
    let Some(groups) = router.groups else { return Ok(()) };
    size("number of expert groups", groups.groups, router.experts)?;
    size("expert groups per token", groups.groups_per_token, groups.groups)?;
    let group = router.experts / groups.groups;
    if !router.experts.is_multiple_of(groups.groups) {
        let expected = format!("a divisor of the {} experts", router.experts);
        return Err(SpecError::value("number of expert groups", groups.groups, expected));
    }
    if groups.score == GroupScore::TopTwoSum && group < 2 {
        let expected = "at most half the number of experts";
        return Err(SpecError::value("number of expert groups", groups.groups, expected));
    }
    if router.experts_per_token > groups.groups_per_token * group {
        let expected = format!("at most {}, the experts of the chosen groups", group);
        return Err(SpecError::value("experts per token", router.experts_per_token, expected));
    }
    Ok(())
}

fn validate_rope(rope: &RopeSpec, head_dim: usize) -> Result<(), SpecError> {
    size("rotary dimension", rope.rotary, head_dim)?;
    if rope.rotary % 2 == 1 {
        return Err(SpecError::value("rotary dimension", rope.rotary, "an even number"));
    }
    if !(rope.theta.is_finite() && rope.theta > 1.0) {
        return Err(SpecError::value("rope theta", rope.theta, "a number above 1"));
    }
    let pairs = rope.rotary / 2;
    let at_least = |field: &str, found: f64, least: f64| {
        if found.is_finite() && found >= least {
            return Ok(());
        }
        Err(SpecError::value(field, found, format!("a number of at least {least}")))
    };
    validate_scaling(rope, pairs, at_least)?;
    // Angles are products of positions and frequencies in f32.
    let longest = rope.switches_at().unwrap_or(1);
    for context in [1, longest.saturating_add(1)] {
        let table = rope.table(context);
        let largest = CONTEXT_MAX as f32;
        let bad = |frequency: &&f32| !(**frequency * largest).is_finite();
        let long = table.frequencies(true).iter();
        if let Some(frequency) = table.inverse_frequencies.iter().chain(long).find(bad) {
            let expected = "a finite number for every position";
            return Err(SpecError::value("rotary frequency", frequency, expected));
        }
    }
    Ok(())
}

fn validate_scaling(
    rope: &RopeSpec,
    pairs: usize,
    at_least: impl Fn(&str, f64, f64) -> Result<(), SpecError>,
) -> Result<(), SpecError> {
    match &rope.scaling {
        RopeScaling::None => Ok(()),
        RopeScaling::Linear { factor } => at_least("rope factor", *factor, f64::MIN_POSITIVE),
        RopeScaling::Dynamic { factor, original } => {
            size("original context length", *original, CONTEXT_MAX)?;
            at_least("rotary dimension of dynamic scaling", rope.rotary as f64, 4.0)?;
            at_least("rope factor", *factor, 1.0)
        }
        RopeScaling::Yarn { factor, original, beta_fast, beta_slow, magnitude, .. } => {
            size("original context length", *original, CONTEXT_MAX)?;
            at_least("rope beta_fast", *beta_fast, f64::MIN_POSITIVE)?;
            at_least("rope beta_slow", *beta_slow, f64::MIN_POSITIVE)?;
            at_least("rope attention factor", *magnitude, f64::MIN_POSITIVE)?;
            at_least("rope factor", *factor, f64::MIN_POSITIVE)
        }
        RopeScaling::Llama3 { factor, original, low_factor, high_factor } => {
            size("original context length", *original, CONTEXT_MAX)?;
            at_least("rope low_freq_factor", *low_factor, f64::MIN_POSITIVE)?;
            at_least(
                "rope high_freq_factor minus low_freq_factor",
                high_factor - low_factor,
                1e-9,
            )?;
            at_least("rope factor", *factor, f64::MIN_POSITIVE)
        }
        RopeScaling::LongRope { short, long, original, magnitude } => {
            size("original context length", *original, CONTEXT_MAX)?;
            at_least("rope attention factor", *magnitude, f64::MIN_POSITIVE)?;
            divisors("rope short_factor", short, pairs)?;
            divisors("rope long_factor", long, pairs)
        }
        RopeScaling::Divisors { divisors: list } => {
            divisors("rope frequency divisors", list, pairs)
        }
    }
}

fn divisors(field: &str, list: &[f32], pairs: usize) -> Result<(), SpecError> {
    if list.len() != pairs {
        let expected = format!("{pairs} numbers, one a pair");
        return Err(SpecError::value(field, format!("{} numbers", list.len()), expected));
    }
    match list.iter().find(|d| !(d.is_finite() && **d > 0.0)) {
        Some(bad) => Err(SpecError::value(field, bad, "positive numbers")),
        None => Ok(()),
    }
}

fn size(field: &str, found: usize, limit: usize) -> Result<(), SpecError> {
    if (1..=limit).contains(&found) {
        return Ok(());
    }
    let expected = match limit {
        usize::MAX => "at least 1".to_owned(),
        limit => format!("1 to {limit}"),
    };
    Err(SpecError::value(field, found, expected))
}

fn number(field: &str, found: f32) -> Result<(), SpecError> {
    if found.is_finite() {
        return Ok(());
    }
    Err(SpecError::value(field, found, "a finite number"))
}

fn positive(field: &str, found: f32) -> Result<(), SpecError> {
    if found.is_finite() && found > 0.0 {
        return Ok(());
    }
    Err(SpecError::value(field, found, "a positive number"))
}

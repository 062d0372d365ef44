//! Llama and those that differ from it in a window, a router or layers without positions.

use lathe_program::RouterScore;

use super::base::{self, Defaults, LLAMA};
use super::rope;
use crate::config::Config;
use crate::spec::{DecoderSpec, FfnSpec, MoeSpec, RouterSpec, SpecError};

pub(super) fn llama(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &LLAMA)?;
    base::attention_bias(c, &mut spec, false)?;
    base::mlp_bias(c, &mut spec)?;
    Ok(spec)
}

pub(super) const MISTRAL: Defaults = Defaults { context: 131_072, kv_heads: Some(8), ..LLAMA };

/// One window for all layers.
pub(super) fn one_window(
    c: &Config,
    mut spec: DecoderSpec,
    default: Option<usize>,
) -> Result<DecoderSpec, SpecError> {
    let window = base::nullable(c, "sliding_window", default)?;
    if c.texts("layer_types")?.is_some_and(|kinds| kinds.iter().any(|kind| *kind != kinds[0])) {
        return Err(SpecError::feature("layer_types of several kinds in this architecture"));
    }
    base::each_gqa(&mut spec, |_, gqa| gqa.window = window);
    Ok(spec)
}

/// Windows on the layers that `layer_types` names, by default all.
pub(super) fn ministral(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &MISTRAL)?;
    let window = base::nullable(c, "sliding_window", Some(4096))?;
    let sliding = base::sliding_layers(c, spec.layers.len(), |_| window.is_some())?;
    base::set_windows(&mut spec, &sliding, window)?;
    Ok(spec)
}

const MINISTRAL3: Defaults = Defaults {
    theta: 1e6,
    epsilon: 1e-5,
    context: 262_144,
    kv_heads: Some(8),
    head_dim: Some(128),
    query_scaling: true,
    ..LLAMA
};

/// Queries grow with their position from the original context on; up to there this is a Mistral.
pub(super) fn ministral3(c: &Config) -> Result<DecoderSpec, SpecError> {
    // The class has a scaling by default; published files have theirs.
    if c.get("rope_parameters").or(c.get("rope_scaling")).is_none() {
        return Err(SpecError::Missing("rope_parameters".to_owned()));
    }
    let mut spec = one_window(c, base::decoder(c, &MINISTRAL3)?, None)?;
    if let Some(original) = rope::query_scaling_starts(c, &MINISTRAL3)? {
        spec.context_limit = Some(original);
        if spec.context_max > original {
            let whole = std::mem::replace(&mut spec.context_max, original);
            c.note(format!(
                "a context of {original} of {whole}: llama_4_scaling_beta is not supported beyond"
            ));
        }
    }
    Ok(spec)
}

/// The text part of a Mistral that also sees; its other tensors are left alone.
pub(super) fn mistral3_text_of(c: &Config) -> Result<DecoderSpec, SpecError> {
    let text = c.object("text_config")?;
    let text = text.ok_or_else(|| SpecError::Missing("text_config".to_owned()))?;
    let mut spec = match text.text("model_type")?.unwrap_or("mistral") {
        "mistral" => mistral(&text)?,
        "ministral3" => ministral3(&text)?,
        other => return Err(SpecError::Architecture(other.to_owned())),
    };
    // The class ties by default, whatever its text part says.
    spec.tied_head = c.flag("tie_word_embeddings")?.unwrap_or(true);
    Ok(spec)
}

const HELIUM: Defaults = Defaults {
    theta: 100_000.0,
    epsilon: 1e-8,
    context: 4096,
    kv_heads: Some(20),
    head_dim: Some(128),
    ..LLAMA
};

/// Neighbouring elements turn; the output matrix has no bias.
pub(super) fn helium(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &HELIUM)?;
    let bias = c.flag("attention_bias")?.unwrap_or(false);
    base::each_gqa(&mut spec, |_, gqa| gqa.qkv_bias = bias);
    base::mlp_bias(c, &mut spec)?;
    base::interleaved(&mut spec);
    Ok(spec)
}

const CWM: Defaults = Defaults {
    theta: 1e6,
    epsilon: 1e-5,
    context: 131_072,
    kv_heads: Some(8),
    head_dim: Some(128),
    ..LLAMA
};

pub(super) fn cwm(c: &Config) -> Result<DecoderSpec, SpecError> {
    // The class has a scaling by default; published files have theirs.
    if c.get("rope_parameters").or(c.get("rope_scaling")).is_none() {
        return Err(SpecError::Missing("rope_parameters".to_owned()));
    }
    let mut spec = base::decoder(c, &CWM)?;
    base::mlp_bias(c, &mut spec)?;
    let window = base::nullable(c, "sliding_window", Some(8192))?.filter(|window| *window > 0);
    let slides = |layer: usize| !layer.is_multiple_of(4);
    let sliding = base::sliding_layers(c, spec.layers.len(), slides)?;
    base::set_windows(&mut spec, &sliding, window)?;
    Ok(spec)
}

pub(super) fn mistral(c: &Config) -> Result<DecoderSpec, SpecError> {
    one_window(c, base::decoder(c, &MISTRAL)?, Some(4096))
}

const MIXTRAL: Defaults = Defaults { theta: 1e6, epsilon: 1e-5, ..MISTRAL };

pub(super) fn mixtral(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = one_window(c, base::decoder(c, &MIXTRAL)?, None)?;
    let experts = c.size("num_local_experts")?.or(c.size("num_experts")?).unwrap_or(8);
    let moe = MoeSpec {
        router: RouterSpec {
            experts,
            experts_per_token: c.size("num_experts_per_tok")?.unwrap_or(2),
            score: RouterScore::Softmax,
            normalise: true,
            scaling: 1.0,
            groups: None,
            bias: false,
            correction: false,
        },
        hidden: c.need("intermediate_size")?,
        activation: base::activation(c, &MIXTRAL)?,
        bias: false,
        shared: None,
    };
    spec.layers.iter_mut().for_each(|layer| layer.ffn = FfnSpec::Moe(moe));
    Ok(spec)
}

const SMOLLM3: Defaults =
    Defaults { theta: 2e6, tied: true, context: 32_768, kv_heads: Some(4), ..LLAMA };

pub(super) fn smollm3(c: &Config) -> Result<DecoderSpec, SpecError> {
    let mut spec = base::decoder(c, &SMOLLM3)?;
    base::attention_bias(c, &mut spec, false)?;
    base::mlp_bias(c, &mut spec)?;
    let layers = spec.layers.len();
    let turns = match c.sizes("no_rope_layers")? {
        Some(turns) if turns.len() < layers => {
            let expected = format!("one for each of {layers} layers");
            let found = format!("{} numbers", turns.len());
            return Err(SpecError::value("no_rope_layers", found, expected));
        }
        Some(turns) => {
            c.idle(&["no_rope_layer_interval"]);
            turns.into_iter().map(|turns| turns != 0).collect()
        }
        None => {
            let interval = c.size("no_rope_layer_interval")?.unwrap_or(4).max(1);
            (1..=layers).map(|layer| layer % interval != 0).collect::<Vec<_>>()
        }
    };
    let window = c.size("sliding_window")?;
    let slides = c.flag("use_sliding_window")?.unwrap_or(false) && window.is_some();
    let sliding = base::sliding_layers(c, layers, |layer| slides && !turns[layer])?;
    base::set_windows(&mut spec, &sliding, window)?;
    base::each_gqa(&mut spec, |layer, gqa| gqa.rope = gqa.rope.take().filter(|_| turns[layer]));
    Ok(spec)
}

const PHI3: Defaults = Defaults {
    epsilon: 1e-5,
    context: 4096,
    partial: Some(1.0),
    original: Some(4096),
    longrope: &["su", "yarn"],
    ..LLAMA
};

pub(super) fn phi3(c: &Config) -> Result<DecoderSpec, SpecError> {
    one_window(c, base::decoder(c, &PHI3)?, None)
}

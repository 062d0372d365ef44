//! What a drafter's `config.json` says, in both layouts.

use serde_json::Value;

use super::{EagleError, EagleSpec, FeatureNorm, Fusion};
use crate::checkpoint::Checkpoint;
use crate::config::Config;
use crate::families::Family;
use crate::spec::SpecError;

/// The class whose layers drafters have.
const LLAMA: &str = "LlamaForCausalLM";
/// The classes of EAGLE-3 and EAGLE-1 drafters in the layout of SGLang.
const CLASSES: [(&str, bool); 4] = [
    ("LlamaForCausalLMEagle3", true),
    ("Eagle3LlamaForCausalLM", true),
    ("LlamaForCausalLMEagle", false),
    ("EagleLlamaForCausalLM", false),
];
/// The field that names the layers in both layouts.
const LAYER_IDS: &str = "eagle_aux_hidden_state_layer_ids";

/// What a file says.
pub(super) struct Described {
    pub spec: EagleSpec,
    pub taps: Taps,
    /// Tokens of the model that it is made for.
    pub vocabulary: usize,
}

/// The layers that features come from.
pub(super) enum Taps {
    /// vLLM's rule where a file names none: 2, half of the layers, and all but 3.
    Usual,
    /// By the number of layers before the tap.
    Given { field: &'static str, layers: Vec<i64> },
}

impl Taps {
    /// How many features there are.
    fn count(&self) -> usize {
        match self {
            Taps::Usual => 3,
            Taps::Given { layers, .. } => layers.len(),
        }
    }

    /// Layers before each tap, of a model of `layers`.
    pub(super) fn layers(&self, layers: usize) -> Result<Vec<usize>, EagleError> {
        let count = layers as i64;
        let (field, taps) = match self {
            Taps::Usual => ("layers by default: 2, half, all but 3", vec![2, count / 2, count - 3]),
            Taps::Given { field, layers } => (*field, layers.clone()),
        };
        let tap = |found: i64| match usize::try_from(found) {
            Ok(tap) if tap <= layers => Ok(tap),
            _ => Err(EagleError::Tap { field, found, layers }),
        };
        taps.into_iter().map(tap).collect()
    }
}

/// Whether a configuration says that it is a drafter's.
pub(super) fn names_eagle(config: &Value) -> bool {
    let speculator = config["speculators_model_type"].as_str();
    let class = config["architectures"][0].as_str();
    speculator.is_some_and(|kind| kind.starts_with("eagle"))
        || class.is_some_and(|class| CLASSES.iter().any(|(known, _)| class == *known))
        || (class == Some(LLAMA) && config["draft_vocab_size"].is_u64())
}

/// Reads a configuration; `checkpoint` says whether biases exist.
pub(super) fn read(
    config: &Value,
    checkpoint: &Checkpoint,
    target_width: usize,
) -> Result<Described, SpecError> {
    let c = Config::new(config, "")?;
    match c.text("speculators_model_type")? {
        Some("eagle3") => speculators(config, &c, target_width),
        Some(kind) => Err(SpecError::feature(format!("speculators_model_type `{kind}`"))),
        None => plain(config, &c, checkpoint, target_width),
    }
}

/// vLLM's speculators: the layer's configuration is an object of its own.
fn speculators(value: &Value, c: &Config, target_width: usize) -> Result<Described, SpecError> {
    let layer = value.get("transformer_layer_config");
    let layer = layer.ok_or_else(|| SpecError::Missing("transformer_layer_config".to_owned()))?;
    let mut spec = decoder(layer, "transformer_layer_config.model_type")?;
    let vocabulary = spec.vocabulary;
    spec.vocabulary = c.need("draft_vocab_size")?;
    let ids = c.sizes(LAYER_IDS)?;
    let taps = ids.map_or(Taps::Usual, |ids| Taps::Given {
        field: LAYER_IDS,
        layers: ids.into_iter().map(|id| id as i64).collect(),
    });
    let flag = |key: &str, default: bool| Ok::<_, SpecError>(c.flag(key)?.unwrap_or(default));
    let fusion = Fusion::Features {
        taps: taps.count(),
        feature_norm: feature_norm(flag("norm_before_fc", false)?, flag("fc_norm", false)?)?,
        norm_before_residual: flag("norm_before_residual", true)?,
    };
    let (norm_output, feature_width) =
        (flag("norm_output", false)?, c.size("target_hidden_size")?.unwrap_or(target_width));
    let spec = EagleSpec { decoder: spec, fusion, feature_width, final_norm: true, norm_output };
    Ok(Described { spec, taps, vocabulary })
}

/// SafeAILab, SGLang and SpecForge: a Llama's configuration with more fields.
fn plain(
    value: &Value,
    c: &Config,
    checkpoint: &Checkpoint,
    target_width: usize,
) -> Result<Described, SpecError> {
    let classes = c.texts("architectures")?.unwrap_or_default();
    let class = classes.first().copied().unwrap_or(LLAMA);
    let draft = c.size("draft_vocab_size")?;
    let third = match CLASSES.iter().find(|(known, _)| *known == class) {
        Some((_, third)) => *third,
        None if class == LLAMA => draft.is_some(),
        None => return Err(SpecError::Architecture(class.to_owned())),
    };
    let mut spec = decoder(value, "model_type")?;
    let vocabulary = spec.vocabulary;
    if !third {
        // Its first layer reads what is fused as it is, and so does the head.
        spec.layers[0].attention_norms.before = None;
        let fusion = Fusion::Hidden { bias: checkpoint.contains("fc.bias") };
        let (feature_width, final_norm) = (spec.width, false);
        let norm_output = false;
        let spec = EagleSpec { decoder: spec, fusion, feature_width, final_norm, norm_output };
        return Ok(Described { spec, taps: Taps::Usual, vocabulary });
    }
    spec.vocabulary = draft.unwrap_or(vocabulary);
    let nested = c.object("eagle_config")?;
    if nested.map_or(Ok(None), |it| it.flag("use_aux_hidden_state"))? == Some(false) {
        return Err(SpecError::feature("use_aux_hidden_state `false`"));
    }
    // SGLang counts the layer whose output is the feature, vLLM the one whose input is.
    let after = nested.map_or(Ok(None), |it| it.sizes(LAYER_IDS))?;
    let taps = match (after, c.sizes(LAYER_IDS)?) {
        (Some(ids), _) => Taps::Given {
            field: "eagle_config.eagle_aux_hidden_state_layer_ids",
            layers: ids.into_iter().map(|id| (id as i64).saturating_add(1)).collect(),
        },
        (None, Some(ids)) => {
            Taps::Given { field: LAYER_IDS, layers: ids.into_iter().map(|id| id as i64).collect() }
        }
        (None, None) => Taps::Usual,
    };
    let flag = |key: &str| {
        let own = nested.map_or(Ok(None), |it| it.flag(key))?;
        Ok::<_, SpecError>(own.or(c.flag(key)?).unwrap_or(false))
    };
    let fusion = Fusion::Features {
        taps: taps.count(),
        feature_norm: feature_norm(flag("norm_before_fc")?, flag("fc_norm")?)?,
        norm_before_residual: flag("norm_before_residual")?,
    };
    let norm_output = flag("norm_output")?;
    let feature_width = c.size("target_hidden_size")?.unwrap_or(target_width);
    let spec = EagleSpec { decoder: spec, fusion, feature_width, final_norm: true, norm_output };
    Ok(Described { spec, taps, vocabulary })
}

fn feature_norm(whole: bool, each: bool) -> Result<FeatureNorm, SpecError> {
    match (whole, each) {
        (false, false) => Ok(FeatureNorm::None),
        (true, false) => Ok(FeatureNorm::Whole),
        (false, true) => Ok(FeatureNorm::Each),
        (true, true) => Err(SpecError::feature("`norm_before_fc` together with `fc_norm`")),
    }
}

/// The layers that a configuration describes, which are a Llama's; `kind_field` names its family.
fn decoder(config: &Value, kind_field: &str) -> Result<crate::DecoderSpec, SpecError> {
    let kind = config["model_type"].as_str().unwrap_or("llama");
    if kind != "llama" {
        return Err(SpecError::value(kind_field, kind, "llama"));
    }
    let mut config = config.clone();
    config["model_type"] = kind.into();
    config["architectures"] = [LLAMA].into_iter().collect();
    let mut spec = Family::of_config(&config)?.spec(&config)?;
    if spec.layers.is_empty() {
        return Err(SpecError::value("num_hidden_layers", 0, "at least 1"));
    }
    spec.tied_head = false;
    Ok(spec)
}

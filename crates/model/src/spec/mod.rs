//! `DecoderSpec`: what a decoder is, as data, one [`LayerSpec`] a layer.
//!
//! A spec holds no tensor and no name of a file or family; it says what is computed. Alternating
//! windows, leading dense layers or layers without positions are differences between layers, not
//! flags. [`DecoderSpec::validate`] is the edge where sizes of a file become sizes to rely on.

mod count;
mod eagle;
pub(crate) mod low_rank;
mod rope;
mod validate;

use std::collections::BTreeMap;

use lathe_program::{Activation, GroupLimit, InputTransform, NormKind, RouterScore};
use serde::Serialize;
use serde::ser::{SerializeStruct, Serializer};

pub use count::ParameterCount;
pub use eagle::{EagleSpec, FeatureNorm, Fusion};
pub use low_rank::LowRank;
pub use rope::{RopeScaling, RopeSpec, yarn_magnitude};

/// Why a description of a model could not become a [`DecoderSpec`].
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum SpecError {
    /// The family is not in the table.
    #[error("architecture {0} is not supported")]
    Architecture(String),
    /// A feature that would change the computation, and that is not implemented.
    #[error("{0} is not supported")]
    Feature(String),
    /// A field that the family needs is absent.
    #[error("the model's configuration lacks `{0}`")]
    Missing(String),
    /// A field has a value of the wrong type or out of range.
    #[error("`{field}` is {found}, expected {expected}")]
    Value {
        /// The field's name in the file.
        field: String,
        /// What stands there.
        found: String,
        /// What may stand there.
        expected: String,
    },
}

impl SpecError {
    /// A feature, named for a person: `rope type \`foo\``.
    pub fn feature(name: impl Into<String>) -> Self {
        SpecError::Feature(name.into())
    }

    /// A value that may not stand where it stands.
    pub fn value(
        field: impl Into<String>,
        found: impl ToString,
        expected: impl Into<String>,
    ) -> Self {
        SpecError::Value {
            field: field.into(),
            found: found.to_string(),
            expected: expected.into(),
        }
    }
}

/// A normalisation of rows.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct NormSpec {
    /// Which.
    pub kind: NormKind,
    /// Added under the root.
    pub epsilon: f32,
    /// Whether it has a weight at all (OLMo 1's has none).
    pub weight: bool,
    /// Whether it has a bias; [`NormKind::Layer`] only.
    pub bias: bool,
}

impl NormSpec {
    /// Root mean square with a plain weight (Zhang and Sennrich 2019).
    pub fn rms(epsilon: f64) -> Self {
        NormSpec {
            kind: NormKind::Rms { offset: 0.0 },
            epsilon: epsilon as f32,
            weight: true,
            bias: false,
        }
    }
}

/// Which elements a normalisation of queries and keys takes together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QkScope {
    /// Each head by itself, one weight `[head_dim]` for all heads (Qwen 3, Gemma 3).
    PerHead,
    /// All heads of a row together, weight `[heads * head_dim]` (OLMo 2).
    WholeRow,
}

/// Whether queries and keys are normalised before or after they turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum QkOrder {
    /// First the norm, then the rotation.
    BeforeRope,
    /// First the rotation, then the norm.
    AfterRope,
}

/// Normalisation of queries and keys.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct QkNorm {
    /// Of what.
    pub scope: QkScope,
    /// When.
    pub order: QkOrder,
    /// Which.
    pub norm: NormSpec,
}

/// A gate on the attention's output, before the output matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputGate {
    /// `sigmoid` of one number a head.
    SigmoidPerHead,
    /// `sigmoid` of one number an element.
    SigmoidPerElement,
}

/// Attention with keys and values of `kv_heads` heads: MHA, GQA and MQA.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct GqaSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a query, key and value head.
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// A query at position `p` sees keys at positions `> p - window`; `None` sees all.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)` after the scale.
    pub softcap: Option<f32>,
    /// One learnt logit a head that joins the softmax's denominator.
    pub sinks: bool,
    /// Positions; `None` for a layer without (NoPE).
    pub rope: Option<RopeSpec>,
    /// Normalisation of queries and keys.
    pub qk_norm: Option<QkNorm>,
    /// Biases of query, key and value.
    pub qkv_bias: bool,
    /// Bias of the output matrix.
    pub output_bias: bool,
    /// A gate on the output.
    pub output_gate: Option<OutputGate>,
}

/// Multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct MlaSpec {
    /// Query heads.
    pub heads: usize,
    /// Rank of the query's own down projection; `None` projects in one step.
    pub query_rank: Option<usize>,
    /// Elements of the cached latent.
    pub rank: usize,
    /// Elements of a query head, and of the shared key, that turn with the position.
    pub rope_dim: usize,
    /// Elements of a query and key head that do not.
    pub nope_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Multiplies the scores; YaRN's `mscale_all_dim` is folded in.
    pub scale: f32,
    /// As in [`GqaSpec::window`].
    pub window: Option<usize>,
    /// Positions.
    pub rope: RopeSpec,
    /// Norm of the latents.
    pub latent_norm: NormSpec,
    /// Biases of the two down projections (and of the rotary key).
    pub down_bias: bool,
    /// Bias of the output matrix.
    pub output_bias: bool,
}

/// A layer's attention.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AttentionSpec {
    /// Heads of keys and values.
    Gqa(GqaSpec),
    /// One latent for all heads.
    Mla(MlaSpec),
}

/// A feed-forward layer that every token takes.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct DenseSpec {
    /// Width inside.
    pub hidden: usize,
    /// The nonlinearity; it says whether there is a gate.
    pub activation: Activation,
    /// Biases of all its matrices.
    pub bias: bool,
}

/// How experts are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RouterSpec {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts that a token visits.
    pub experts_per_token: usize,
    /// How logits become scores.
    pub score: RouterScore,
    /// Whether the chosen scores are divided by their sum.
    pub normalise: bool,
    /// Multiplies the chosen scores at the end.
    pub scaling: f32,
    /// Group-limited choice.
    pub groups: Option<GroupLimit>,
    /// Whether logits have a bias.
    pub bias: bool,
    /// Whether a correction is added to the scores for the choice alone.
    pub correction: bool,
}

/// A dense feed-forward layer beside the routed experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SharedSpec {
    /// Width inside, of all shared experts together.
    pub hidden: usize,
    /// Whether a sigmoid gate of one number a token multiplies its output.
    pub gated: bool,
}

/// A mixture of experts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct MoeSpec {
    /// Who goes where.
    pub router: RouterSpec,
    /// Width inside an expert.
    pub hidden: usize,
    /// The nonlinearity of experts, routed and shared.
    pub activation: Activation,
    /// Biases of the experts' matrices.
    pub bias: bool,
    /// Experts that every token visits.
    pub shared: Option<SharedSpec>,
}

/// A layer's feed-forward part.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FfnSpec {
    /// One for all tokens.
    Dense(DenseSpec),
    /// A few of many, by token.
    Moe(MoeSpec),
}

/// The norms around one branch (attention or feed-forward) of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct BranchNorms {
    /// Before the branch (Llama, Gemma).
    pub before: Option<NormSpec>,
    /// On the branch's output, before it joins the residual (Gemma, OLMo 2).
    pub after: Option<NormSpec>,
}

/// How the two branches of a layer join the residual stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// `y = x + attention(x)`, then `y + ffn(y)`.
    Sequential,
    /// `x + attention(x) + ffn(x)`; without a norm of its own the feed-forward part shares the
    /// attention's.
    Parallel,
}

/// One layer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LayerSpec {
    /// Its attention.
    pub attention: AttentionSpec,
    /// Norms around the attention.
    pub attention_norms: BranchNorms,
    /// Its feed-forward part.
    pub ffn: FfnSpec,
    /// Norms around the feed-forward part.
    pub ffn_norms: BranchNorms,
    /// How both join the residual stream.
    pub residual: Residual,
    /// Multiplies a branch as it joins (Granite); 1 otherwise.
    pub residual_multiplier: f32,
}

/// A decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct DecoderSpec {
    /// Tokens.
    pub vocabulary: usize,
    /// Elements of the residual stream.
    pub width: usize,
    /// Positions that the model was made for.
    pub context_max: usize,
    /// Positions beyond which attention would have to change in a way that is not implemented, if
    /// there are some; at least `context_max`.
    pub context_limit: Option<usize>,
    /// Multiplies the embedding (Gemma, Granite); 1 otherwise.
    pub embedding_multiplier: f32,
    /// The layers, in order.
    pub layers: Vec<LayerSpec>,
    /// The norm before the head.
    pub final_norm: NormSpec,
    /// Multiplies the logits (Granite); 1 otherwise.
    pub logits_scale: f32,
    /// `softcap * tanh(logit / softcap)` (Gemma 2).
    pub logits_softcap: Option<f32>,
    /// Whether the head is the embedding.
    pub tied_head: bool,
    /// Layers that a file may hold after the last one, to predict further tokens. Nothing runs
    /// them.
    pub prediction_layers: usize,
    /// What is done to the inputs of matrices, by the matrix's canonical name; nothing to those
    /// that are not named.
    pub inputs: BTreeMap<String, InputTransform>,
    /// What low-rank adapters add to the products of matrices, by the matrix's canonical name.
    pub adapters: BTreeMap<String, LowRank>,
}

impl DecoderSpec {
    /// The different layers, in order of their first use, and for each layer which it is.
    pub fn layer_kinds(&self) -> (Vec<&LayerSpec>, Vec<usize>) {
        let mut kinds: Vec<&LayerSpec> = Vec::new();
        let mut which = Vec::with_capacity(self.layers.len());
        for layer in &self.layers {
            let at = kinds.iter().position(|kind| *kind == layer).unwrap_or_else(|| {
                kinds.push(layer);
                kinds.len() - 1
            });
            which.push(at);
        }
        (kinds, which)
    }
}

impl DecoderSpec {
    /// Changes the number of positions; what a user should be told, if it is another number than
    /// the files say.
    ///
    /// # Errors
    /// If a rotary embedding has no meaning so far out, or the number is out of range.
    pub fn set_context(&mut self, context: usize) -> Result<Option<String>, SpecError> {
        if let Some(limit) = self.context_limit.filter(|limit| context > *limit) {
            let expected = format!("at most {limit}, where rotation or attention would change");
            return Err(SpecError::value("context", context, expected));
        }
        let before = std::mem::replace(&mut self.context_max, context);
        self.validate()?;
        let note = || format!("a context of {context}, where the model's own is {before}");
        Ok((before != context).then(note))
    }
}

impl Serialize for DecoderSpec {
    /// Layers that are alike are written once: `layer_kinds` lists them, `layers` says which
    /// kind each layer is. Of what is done to inputs, and of adapters by rank, the number of
    /// matrices is written.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let (kinds, which) = self.layer_kinds();
        let mut out = serializer.serialize_struct("DecoderSpec", 12)?;
        out.serialize_field("vocabulary", &self.vocabulary)?;
        out.serialize_field("width", &self.width)?;
        out.serialize_field("context_max", &self.context_max)?;
        out.serialize_field("embedding_multiplier", &self.embedding_multiplier)?;
        out.serialize_field("layer_kinds", &kinds)?;
        out.serialize_field("layers", &which)?;
        out.serialize_field("final_norm", &self.final_norm)?;
        out.serialize_field("logits_scale", &self.logits_scale)?;
        out.serialize_field("logits_softcap", &self.logits_softcap)?;
        out.serialize_field("tied_head", &self.tied_head)?;
        if !self.inputs.is_empty() {
            let mut matrices: BTreeMap<String, usize> = BTreeMap::new();
            for transform in self.inputs.values() {
                *matrices.entry(transform.to_string()).or_default() += 1;
            }
            out.serialize_field("inputs", &matrices)?;
        }
        if !self.adapters.is_empty() {
            let mut matrices: BTreeMap<usize, usize> = BTreeMap::new();
            for low_rank in self.adapters.values() {
                *matrices.entry(low_rank.rank).or_default() += 1;
            }
            out.serialize_field("adapters", &matrices)?;
        }
        out.end()
    }
}

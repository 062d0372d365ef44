//! `Op`: what one step of a decoder computes, as data.
//!
//! Programs are in single-assignment form: every op names its inputs and makes new values, so
//! that an interpreter may alias buffers by liveness, fuse neighbours, count, observe or
//! differentiate. All activations are `[rows, width]`, logically `f32`; a row is a token.

use crate::transform::InputTransform;

/// An activation `[rows, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Value(pub u32);

/// A weight of the program, an index into [`crate::Program::weights`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Weight(pub u32);

/// A rotary table, an index into [`crate::Program::ropes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Rope(pub u32);

/// A layer of the KV cache, an index into [`crate::KvLayout::layers`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KvLayer(pub u32);

/// The outcome of a [`Op::Route`]: for each row, `experts_per_token` pairs of expert and weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Routing(pub u32);

/// What a weight is for: decides splits across ranks, and what quantizers may touch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum WeightRole {
    /// Token embedding `[vocabulary, width]`.
    Embedding,
    /// The matrix that makes logits `[vocabulary, width]`; may be the embedding itself.
    Head,
    /// A linear layer `[out, in]`.
    Linear,
    /// Stacked expert matrices `[experts, out, in]`.
    Experts,
    /// A router's matrix `[experts, in]`.
    Router,
    /// A vector: norm weight, bias, sink, router correction.
    Vector,
}

/// A declared weight: its name, shape and role. The bytes come from a [`crate::WeightSource`].
#[derive(Debug, Clone, PartialEq)]
pub struct WeightDecl {
    /// Canonical name, the same for every file layout: `layers.3.attention.query`.
    pub name: String,
    /// Dimensions, outermost first.
    pub shape: Vec<usize>,
    /// What it is for.
    pub role: WeightRole,
    /// The layer that it belongs to, if any.
    pub layer: Option<u32>,
}

/// A declared value: its name (for observers and errors) and width.
#[derive(Debug, Clone, PartialEq)]
pub struct ValueDecl {
    /// `layers.3.attention.query`, `layers.3.ffn.gated`, ...
    pub name: String,
    /// Elements in a row.
    pub width: usize,
}

/// How a row is normalised.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// `x / sqrt(mean(x^2) + eps) * (offset + weight)`; `offset` is 0 for Llama and 1 for Gemma.
    Rms {
        /// Added to the weight.
        offset: f32,
    },
    /// `(x - mean) / sqrt(var + eps) * weight + bias`.
    Layer,
}

/// The nonlinearity of a feed-forward layer; `gate` and `up` are its inputs.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `silu(gate) * up`.
    SwiGlu,
    /// `gelu_tanh(gate) * up`.
    GeGluTanh,
    /// `gelu_erf(gate) * up`.
    GeGluErf,
    /// gpt-oss: `(min(gate, limit) * sigmoid(alpha * gate)) * (clamp(up, -limit, limit) + 1)`.
    SwiGluClamped {
        /// 1.702.
        alpha: f32,
        /// 7.
        limit: f32,
    },
    /// `silu(gate)`, no `up`.
    Silu,
    /// `gelu_tanh(gate)`, no `up`.
    GeluTanh,
    /// `relu(gate)^2`, no `up`.
    ReluSquared,
}

/// Which pairs of elements a rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RopeStyle {
    /// Element `i` with element `i + rotary/2` (Llama in Hugging Face layout, NeoX).
    HalfSplit,
    /// Element `2i` with element `2i + 1` (GPT-J, DeepSeek, GGUF Llama).
    Interleaved,
}

/// A rotary table: angle of pair `i` at position `p` is `p * inverse_frequencies[i]`.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeTable {
    /// One per pair, radians a position, all scaling kinds already folded in.
    pub inverse_frequencies: Vec<f32>,
    /// Multiplies cosine and sine (YaRN's and longrope's attention factor).
    pub magnitude: f32,
    /// Which elements pair up.
    pub style: RopeStyle,
}

/// The numbers of an attention over keys and values with heads of their own (MHA, GQA, MQA).
#[derive(Debug, Clone, PartialEq)]
pub struct AttendSpec {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Elements of a query or key head.
    pub head_dim: usize,
    /// Elements of a value head.
    pub value_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// A query at position `p` sees keys at positions `> p - window`.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)` after the scale.
    pub softcap: Option<f32>,
    /// One logit a head that joins the softmax's denominator and nothing else `[heads]`.
    pub sinks: Option<Weight>,
}

/// The numbers of a multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Query heads.
    pub heads: usize,
    /// Elements of the cached latent (`kv_lora_rank`).
    pub rank: usize,
    /// Elements of the shared rotary key.
    pub rope_dim: usize,
    /// Elements of a head's key (and query) that carry no position.
    pub nope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// As in [`AttendSpec::window`].
    pub window: Option<usize>,
    /// As in [`AttendSpec::softcap`].
    pub softcap: Option<f32>,
    /// `[heads * nope_dim, rank]`: a latent's keys.
    pub key_up: Weight,
    /// `[heads * value_dim, rank]`: a latent's values.
    pub value_up: Weight,
}

/// Blocks of expanded rows are multiples of this: of a tile of positions, and of KV blocks.
const EXPANDED_ROWS_UNIT: usize = 64;

impl LatentSpec {
    /// Rows from which on the expanded form (keys and values made from the latents, once for all
    /// rows) costs no more than the absorbed one, however many positions they see; `None` if it
    /// never pays. FLOPs of a head for `r` rows that see `v` positions each:
    ///
    /// ```text
    /// absorbed   2 r v (2 rank + rope)           + 2 r rank (nope + value)
    /// expanded   2 r v (nope + rope + value)     + 2 v rank (nope + value)
    /// ```
    ///
    /// For `v = r` the last terms are equal; for large `v` the forms meet where
    /// `r (2 rank - nope - value) = rank (nope + value)`. Both read the same bytes of cache and
    /// matrices. The number depends on the model alone: see [`crate::Program::expanded_until`].
    pub fn expanded_rows(&self) -> Option<usize> {
        let made = self.nope_dim + self.value_dim;
        let saved = (2 * self.rank).checked_sub(made).filter(|saved| *saved > 0)?;
        Some((self.rank * made).div_ceil(saved).next_multiple_of(EXPANDED_ROWS_UNIT))
    }
}

/// How logits of experts become scores.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum RouterScore {
    /// Softmax over all experts, then choose.
    Softmax,
    /// Choose by logit, then softmax over the chosen.
    SoftmaxOfChosen,
    /// Sigmoid of each logit.
    Sigmoid,
}

/// How the score of a group of experts is made (group-limited routing).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The best expert's score (DeepSeek-V2).
    Max,
    /// The sum of the two best (DeepSeek-V3).
    TopTwoSum,
}

/// Only experts of the best `groups_per_token` of `groups` groups may be chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct GroupLimit {
    /// Equal groups that the experts are divided into, in order.
    pub groups: usize,
    /// Groups that stay.
    pub groups_per_token: usize,
    /// How a group is scored.
    pub score: GroupScore,
}

/// A router as data.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// Experts to choose from.
    pub experts: usize,
    /// Experts that a token visits.
    pub experts_per_token: usize,
    /// How logits become scores.
    pub score: RouterScore,
    /// Whether the chosen scores are divided by their sum (plus `1e-20`).
    pub normalise: bool,
    /// Multiplies the chosen scores at the end.
    pub scaling: f32,
    /// Group-limited choice.
    pub groups: Option<GroupLimit>,
    /// `[experts, in]`.
    pub weight: Weight,
    /// Added to the logits `[experts]`.
    pub bias: Option<Weight>,
    /// Added to the scores for the choice only, not for the weights `[experts]` (DeepSeek-V3).
    pub correction: Option<Weight>,
}

/// Expert matrices as data: each expert is a gated feed-forward layer of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Experts that the matrices hold.
    pub experts: usize,
    /// The router's number of the first of them; 0 unless experts are split across ranks. A
    /// choice outside `first_expert .. first_expert + experts` adds nothing.
    pub first_expert: usize,
    /// Width inside an expert.
    pub hidden: usize,
    /// The nonlinearity.
    pub activation: Activation,
    /// `[experts, hidden, in]`.
    pub gate: Weight,
    /// `[experts, hidden, in]`.
    pub up: Weight,
    /// `[experts, out, hidden]`.
    pub down: Weight,
    /// `[experts, hidden]`.
    pub gate_bias: Option<Weight>,
    /// `[experts, hidden]`.
    pub up_bias: Option<Weight>,
    /// `[experts, out]`.
    pub down_bias: Option<Weight>,
    /// Whether a row is multiplied by its routing weight before the expert (Llama 4) and not after.
    pub weigh_input: bool,
    /// What is done to the hidden row that `down` reads; what `gate` and `up` read is the op's
    /// input, which an [`Op::Transform`] before it makes.
    pub hidden_transform: InputTransform,
}

/// One matrix of a linear group.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearPart {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Weight>,
    /// `[rows, out]`.
    pub out: Value,
}

/// How a gate multiplies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// `input * sigmoid(gate)`; `gate` is as wide as `input`, or its width divides `input`'s and
    /// each element gates a run of neighbours (a head, or with width 1 the whole row).
    Sigmoid,
}

/// One operation on all rows of a step.
#[derive(Debug, Clone, PartialEq)]
pub enum Op {
    /// `out = table[token - first_token] * multiplier`; zero for a token outside the table.
    Embed {
        /// `[vocabulary, width]`, or a rank's part of it.
        table: Weight,
        /// The token of the table's first row; 0 unless the vocabulary is split across ranks.
        first_token: u32,
        /// Gemma's `sqrt(width)`, Granite's embedding multiplier; 1 otherwise.
        multiplier: f32,
        /// `[rows, width]`.
        out: Value,
    },
    /// Normalises each of `groups` equal parts of a row by itself.
    Norm {
        /// `[rows, groups * n]`.
        input: Value,
        /// `[n]`, or `[groups * n]` with one weight an element; absent means ones.
        weight: Option<Weight>,
        /// Same shape as `weight`; `NormKind::Layer` only.
        bias: Option<Weight>,
        /// Which norm.
        kind: NormKind,
        /// Added under the root.
        epsilon: f32,
        /// 1 for a whole row, the number of heads for QK-norm.
        groups: usize,
        /// As `input`.
        out: Value,
    },
    /// Matrices that share an input (query, key and value; gate and up).
    Linear {
        /// `[rows, in]`.
        input: Value,
        /// One output each.
        parts: Vec<LinearPart>,
    },
    /// Rotates and rounds each row, as the matrices that read it expect.
    Transform {
        /// `[rows, n]`.
        input: Value,
        /// How.
        transform: InputTransform,
        /// `[rows, n]`.
        out: Value,
    },
    /// Turns the rotary part of each head by its row's position.
    Rope {
        /// `[rows, heads * head_dim]`.
        input: Value,
        /// Heads in a row.
        heads: usize,
        /// First rotated element of a head; `2 * inverse_frequencies.len()` elements turn.
        offset: usize,
        /// The table.
        rope: Rope,
        /// As `input`.
        out: Value,
    },
    /// Stores keys and values of all rows at their positions.
    WriteKv {
        /// `[rows, kv_heads * head_dim]`.
        key: Value,
        /// `[rows, kv_heads * value_dim]`.
        value: Value,
        /// Where.
        layer: KvLayer,
    },
    /// Attention of each row over its sequence's cache, this step's rows included.
    Attend {
        /// `[rows, heads * head_dim]`.
        query: Value,
        /// The cache to read.
        layer: KvLayer,
        /// The numbers.
        spec: AttendSpec,
        /// `[rows, heads * value_dim]`.
        out: Value,
    },
    /// Stores latents and rotary keys of all rows at their positions.
    WriteLatent {
        /// `[rows, rank]`, already normalised.
        latent: Value,
        /// `[rows, rope_dim]`, already turned.
        rope_key: Value,
        /// Where.
        layer: KvLayer,
    },
    /// Multi-head latent attention; the backend chooses the absorbed or the expanded form.
    AttendLatent {
        /// `[rows, heads * (nope_dim + rope_dim)]`, each head its nope part first.
        query: Value,
        /// The cache to read.
        layer: KvLayer,
        /// The numbers.
        spec: LatentSpec,
        /// `[rows, heads * value_dim]`.
        out: Value,
    },
    /// The nonlinearity of a feed-forward layer.
    Activate {
        /// `[rows, hidden]`.
        gate: Value,
        /// `[rows, hidden]`; present for the gated kinds.
        up: Option<Value>,
        /// Which.
        kind: Activation,
        /// `[rows, hidden]`.
        out: Value,
    },
    /// Chooses experts for each row.
    Route {
        /// `[rows, in]`.
        input: Value,
        /// The router.
        spec: RouterSpec,
        /// The choice.
        out: Routing,
    },
    /// Runs each row through its experts and sums their outputs by routing weight.
    Experts {
        /// `[rows, in]`.
        input: Value,
        /// The choice.
        routing: Routing,
        /// The matrices.
        spec: ExpertsSpec,
        /// `[rows, out]`.
        out: Value,
    },
    /// `out = left + right * scale`.
    Add {
        /// `[rows, n]`.
        left: Value,
        /// `[rows, n]`.
        right: Value,
        /// Granite's residual multiplier; 1 otherwise.
        scale: f32,
        /// `[rows, n]`.
        out: Value,
    },
    /// Multiplies by a gate.
    Gate {
        /// `[rows, n]`.
        input: Value,
        /// `[rows, m]`, `m` divides `n`.
        gate: Value,
        /// How.
        kind: GateKind,
        /// `[rows, n]`.
        out: Value,
    },
    /// Adds the values of all ranks (tensor parallelism); the identity with one rank.
    AllReduce {
        /// `[rows, n]`.
        input: Value,
        /// `[rows, n]`.
        out: Value,
    },
    /// Puts the values of all ranks side by side, rank 0 first; the identity with one rank.
    AllGather {
        /// `[rows, n]`, as wide on every rank.
        input: Value,
        /// `[rows, n * ranks]`.
        out: Value,
    },
    /// Some columns of a value.
    Slice {
        /// `[rows, n]`.
        input: Value,
        /// First column.
        start: usize,
        /// `[rows, m]`: columns `start .. start + m`.
        out: Value,
    },
    /// Logits of the rows that the step asks for: `softcap(head x input) * scale`.
    Logits {
        /// `[rows, width]`, already normalised.
        input: Value,
        /// `[vocabulary, width]`, or a rank's part of it if `gather`.
        head: Weight,
        /// Whether the head holds this rank's rows only: the ranks' logits are then put side by
        /// side, rank 0 first.
        gather: bool,
        /// Multiplies the product (Granite divides by `logits_scaling`).
        scale: f32,
        /// `softcap * tanh(x / softcap)` after the scale (Gemma 2).
        softcap: Option<f32>,
    },
    /// Hands a value out of the program (drafters' features, distillation).
    Capture {
        /// `[rows, n]`.
        input: Value,
        /// Which tap, from 0 on.
        tap: u32,
    },
}

impl Op {
    /// The op's kind in snake case: `linear`, `attend_latent`.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Norm { .. } => "norm",
            Op::Linear { .. } => "linear",
            Op::Transform { .. } => "transform",
            Op::Rope { .. } => "rope",
            Op::WriteKv { .. } => "write_kv",
            Op::Attend { .. } => "attend",
            Op::WriteLatent { .. } => "write_latent",
            Op::AttendLatent { .. } => "attend_latent",
            Op::Activate { .. } => "activate",
            Op::Route { .. } => "route",
            Op::Experts { .. } => "experts",
            Op::Add { .. } => "add",
            Op::Gate { .. } => "gate",
            Op::AllReduce { .. } => "all_reduce",
            Op::AllGather { .. } => "all_gather",
            Op::Slice { .. } => "slice",
            Op::Logits { .. } => "logits",
            Op::Capture { .. } => "capture",
        }
    }

    /// The values that the op reads, in the order of its fields.
    pub fn inputs(&self) -> impl Iterator<Item = Value> + use<> {
        let pair = match *self {
            Op::Embed { .. } => [None, None],
            Op::Norm { input, .. }
            | Op::Linear { input, .. }
            | Op::Transform { input, .. }
            | Op::Rope { input, .. }
            | Op::Route { input, .. }
            | Op::Experts { input, .. }
            | Op::AllReduce { input, .. }
            | Op::AllGather { input, .. }
            | Op::Slice { input, .. }
            | Op::Logits { input, .. }
            | Op::Capture { input, .. } => [Some(input), None],
            Op::WriteKv { key, value, .. } => [Some(key), Some(value)],
            Op::WriteLatent { latent, rope_key, .. } => [Some(latent), Some(rope_key)],
            Op::Attend { query, .. } | Op::AttendLatent { query, .. } => [Some(query), None],
            Op::Activate { gate, up, .. } => [Some(gate), up],
            Op::Add { left, right, .. } => [Some(left), Some(right)],
            Op::Gate { input, gate, .. } => [Some(input), Some(gate)],
        };
        pair.into_iter().flatten()
    }

    /// The values that the op makes.
    pub fn outputs(&self) -> impl Iterator<Item = Value> + '_ {
        let (one, parts): (Option<Value>, &[LinearPart]) = match self {
            Op::Linear { parts, .. } => (None, parts),
            Op::Embed { out, .. }
            | Op::Norm { out, .. }
            | Op::Transform { out, .. }
            | Op::Rope { out, .. }
            | Op::Attend { out, .. }
            | Op::AttendLatent { out, .. }
            | Op::Activate { out, .. }
            | Op::Experts { out, .. }
            | Op::Add { out, .. }
            | Op::Gate { out, .. }
            | Op::AllReduce { out, .. }
            | Op::AllGather { out, .. }
            | Op::Slice { out, .. } => (Some(*out), &[]),
            Op::WriteKv { .. }
            | Op::WriteLatent { .. }
            | Op::Route { .. }
            | Op::Logits { .. }
            | Op::Capture { .. } => (None, &[]),
        };
        one.into_iter().chain(parts.iter().map(|part| part.out))
    }

    /// The weights that the op reads, matrices before their biases.
    pub fn weights(&self) -> Vec<Weight> {
        match self {
            Op::Embed { table, .. } => vec![*table],
            Op::Norm { weight, bias, .. } => weight.iter().chain(bias).copied().collect(),
            Op::Linear { parts, .. } => {
                parts.iter().flat_map(|p| [Some(p.weight), p.bias]).flatten().collect()
            }
            Op::Attend { spec, .. } => spec.sinks.into_iter().collect(),
            Op::AttendLatent { spec, .. } => vec![spec.key_up, spec.value_up],
            Op::Route { spec, .. } => {
                [Some(spec.weight), spec.bias, spec.correction].into_iter().flatten().collect()
            }
            Op::Experts { spec, .. } => {
                let biases = [spec.gate_bias, spec.up_bias, spec.down_bias];
                let matrices = [Some(spec.gate), Some(spec.up), Some(spec.down)];
                matrices.into_iter().chain(biases).flatten().collect()
            }
            Op::Logits { head, .. } => vec![*head],
            Op::Transform { .. }
            | Op::Rope { .. }
            | Op::WriteKv { .. }
            | Op::WriteLatent { .. }
            | Op::Activate { .. }
            | Op::Add { .. }
            | Op::Gate { .. }
            | Op::AllReduce { .. }
            | Op::AllGather { .. }
            | Op::Slice { .. }
            | Op::Capture { .. } => Vec::new(),
        }
    }

    /// The layer of the KV cache that the op writes or reads.
    pub fn kv_layer(&self) -> Option<KvLayer> {
        match self {
            Op::WriteKv { layer, .. }
            | Op::Attend { layer, .. }
            | Op::WriteLatent { layer, .. }
            | Op::AttendLatent { layer, .. } => Some(*layer),
            _ => None,
        }
    }

    /// The inputs whose buffer the op's output may take over when they die here: each element of
    /// the output depends on no other row, and on no element of that input's row which the op
    /// would already have overwritten (a norm reads its whole group before it writes).
    pub fn in_place_inputs(&self) -> impl Iterator<Item = Value> + use<> {
        let pair = match *self {
            Op::Norm { input, .. }
            | Op::Transform { input, .. }
            | Op::Rope { input, .. }
            | Op::Gate { input, .. }
            | Op::AllReduce { input, .. } => [Some(input), None],
            Op::Activate { gate, up, .. } => [Some(gate), up],
            Op::Add { left, right, .. } => [Some(left), Some(right)],
            _ => [None, None],
        };
        pair.into_iter().flatten()
    }
}

impl Activation {
    /// Whether it takes an `up` beside its `gate`.
    pub fn is_gated(&self) -> bool {
        match self {
            Activation::SwiGlu
            | Activation::GeGluTanh
            | Activation::GeGluErf
            | Activation::SwiGluClamped { .. } => true,
            Activation::Silu | Activation::GeluTanh | Activation::ReluSquared => false,
        }
    }
}

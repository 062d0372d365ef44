//! `Op`: the computation of one step of a decoder, as data.
//!
//! Programs are in single-assignment form: every op names its inputs and makes new values. So an
//! interpreter may alias buffers by liveness, fuse neighbours, count, observe or differentiate. All
//! activations are `[rows, width]`, logically `f32`. A row is a token.

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

/// The result of an [`Op::Route`]: for each row, `experts_per_token` pairs of expert and weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Routing(pub u32);

/// The role of a weight. It decides how ranks split the weight, and what quantizers may change.
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
    /// Its role.
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

/// The kind of normalisation.
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

/// The pairs of elements that a rotation combines.
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
    /// One for each pair, in radians per position. All kinds of scaling are already included.
    pub inverse_frequencies: Vec<f32>,
    /// Other frequencies for texts that are longer than the pretrained context, if there are any.
    pub long: Option<LongRope>,
    /// Multiplies cosine and sine (YaRN's and longrope's attention factor).
    pub magnitude: f32,
    /// Which elements pair up.
    pub style: RopeStyle,
}

impl RopeTable {
    /// The frequencies of a text, chosen by [`crate::StepSequence::long_rope`].
    pub fn frequencies(&self, long_rope: bool) -> &[f32] {
        match &self.long {
            Some(long) if long_rope => &long.inverse_frequencies,
            _ => &self.inverse_frequencies,
        }
    }
}

/// The frequencies of a rotary table for long texts (LongRoPE, arXiv 2402.13753). All positions of
/// a text use the same frequencies.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Texts of more tokens than this are long.
    pub original: usize,
    /// As many as [`RopeTable::inverse_frequencies`].
    pub inverse_frequencies: Vec<f32>,
}

/// The parameters of an attention with separate keys and values (MHA, GQA, MQA).
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
    /// One logit for each head that is added to the softmax's denominator only `[heads]`.
    pub sinks: Option<Weight>,
}

/// The parameters of a multi-head latent attention (DeepSeek-V2, section 2.1).
#[derive(Debug, Clone, PartialEq)]
pub struct LatentSpec {
    /// Query heads.
    pub heads: usize,
    /// Elements of the cached latent (`kv_lora_rank`).
    pub rank: usize,
    /// Elements of the shared rotary key.
    pub rope_dim: usize,
    /// Elements of a head's key (and query) without a position.
    pub nope_dim: usize,
    /// Elements of a head's value.
    pub value_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    /// As in [`AttendSpec::window`].
    pub window: Option<usize>,
    /// As in [`AttendSpec::softcap`].
    pub softcap: Option<f32>,
    /// `[heads * nope_dim, rank]`: makes keys from latents.
    pub key_up: Weight,
    /// `[heads * value_dim, rank]`: makes values from latents.
    pub value_up: Weight,
}

/// Blocks of expanded rows are multiples of this. It is a multiple of a tile of positions and of KV
/// blocks.
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

/// How a router's logits become scores.
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

/// The score of a group of experts (group-limited routing).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GroupScore {
    /// The best expert's score (DeepSeek-V2).
    Max,
    /// The sum of the two best (DeepSeek-V3).
    TopTwoSum,
}

/// Group-limited routing: only experts of the best `groups_per_token` of `groups` groups may be
/// chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct GroupLimit {
    /// Equal groups of experts, in order.
    pub groups: usize,
    /// Groups that remain for a token.
    pub groups_per_token: usize,
    /// The score of a group.
    pub score: GroupScore,
}

/// The parameters of a router.
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

/// The parameters of experts. Each expert is a gated feed-forward layer of its own.
#[derive(Debug, Clone, PartialEq)]
pub struct ExpertsSpec {
    /// Experts that the matrices hold.
    pub experts: usize,
    /// The router's number of the first expert; 0 unless experts are split across ranks. A choice
    /// outside `first_expert .. first_expert + experts` adds nothing.
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
    /// Whether a row is multiplied by its routing weight before the expert (Llama 4). Otherwise it
    /// is multiplied after.
    pub weigh_input: bool,
    /// The transform of the hidden row that `down` reads. The input of `gate` and `up` is the op's
    /// input, which an [`Op::Transform`] before it may make.
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

/// The kind of a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// `input * sigmoid(gate)`. If `gate` is narrower than `input`, its width divides `input`'s,
    /// and each of its elements gates a run of neighbours (a head, or with width 1 the whole row).
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
    /// A value from outside the program: [`crate::Step::inputs`].
    Input {
        /// The number of the step's input, from 0.
        input: u32,
        /// `[rows, width]`.
        out: Value,
    },
    /// Normalises each of `groups` equal parts of a row separately.
    Norm {
        /// `[rows, groups * n]`.
        input: Value,
        /// `[n]`, or `[groups * n]` with one weight for each element. Without it, all weights are
        /// one.
        weight: Option<Weight>,
        /// As wide as `weight`; `NormKind::Layer` only.
        bias: Option<Weight>,
        /// The kind of norm.
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
        /// The matrices, with one output each.
        parts: Vec<LinearPart>,
    },
    /// Rotates and rounds each row for the matrices that read it.
    Transform {
        /// `[rows, n]`.
        input: Value,
        /// The transform.
        transform: InputTransform,
        /// `[rows, n]`.
        out: Value,
    },
    /// Rotates the rotary part of each head by its row's position.
    Rope {
        /// `[rows, heads * head_dim]`.
        input: Value,
        /// Heads in a row.
        heads: usize,
        /// The first rotated element of a head; `2 * inverse_frequencies.len()` elements are
        /// rotated.
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
        /// The layer of the cache.
        layer: KvLayer,
    },
    /// Attention of each row over its sequence's cache, which includes this step's rows.
    Attend {
        /// `[rows, heads * head_dim]`.
        query: Value,
        /// The cache to read.
        layer: KvLayer,
        /// The parameters.
        spec: AttendSpec,
        /// `[rows, heads * value_dim]`.
        out: Value,
    },
    /// Stores latents and rotary keys of all rows at their positions.
    WriteLatent {
        /// `[rows, rank]`, already normalised.
        latent: Value,
        /// `[rows, rope_dim]`, already rotated.
        rope_key: Value,
        /// The layer of the cache.
        layer: KvLayer,
    },
    /// Multi-head latent attention; the backend chooses the absorbed or the expanded form.
    AttendLatent {
        /// `[rows, heads * (nope_dim + rope_dim)]`; each head begins with its nope part.
        query: Value,
        /// The cache to read.
        layer: KvLayer,
        /// The parameters.
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
        /// The kind.
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
        /// The chosen experts.
        out: Routing,
    },
    /// Runs each row through its experts and sums their outputs by routing weight.
    Experts {
        /// `[rows, in]`.
        input: Value,
        /// The chosen experts.
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
        /// The kind of gate.
        kind: GateKind,
        /// `[rows, n]`.
        out: Value,
    },
    /// Sums the values of all ranks (tensor parallelism). With one rank it does nothing.
    AllReduce {
        /// `[rows, n]`.
        input: Value,
        /// `[rows, n]`.
        out: Value,
    },
    /// Puts the values of all ranks side by side, rank 0 first. With one rank it does nothing.
    AllGather {
        /// `[rows, n]`, equally wide on every rank.
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
        /// Whether the head holds only this rank's rows. The ranks' logits are then put side by
        /// side, rank 0 first.
        gather: bool,
        /// Multiplies the product (Granite divides by `logits_scaling`).
        scale: f32,
        /// `softcap * tanh(x / softcap)` after the scale (Gemma 2).
        softcap: Option<f32>,
    },
    /// Hands a value out of the program (features for drafters, distillation).
    Capture {
        /// `[rows, n]`.
        input: Value,
        /// The number of the tap, from 0.
        tap: u32,
    },
}

/// A value, weight or other object that an op names.
#[derive(Debug)]
pub enum Operand<'a> {
    /// A value that it reads. An op reads at most two.
    Input(&'a Value),
    /// A value that it makes.
    Output(&'a Value),
    /// A weight that it reads.
    Weight(&'a Weight),
    /// The layer of the KV cache that it writes or reads.
    Layer(&'a KvLayer),
    /// A routing that it makes or reads.
    Routing(&'a Routing),
    /// A rotary table that it reads.
    Rope(&'a Rope),
}

/// A mutable [`Operand`].
#[derive(Debug)]
pub enum OperandMut<'a> {
    /// As [`Operand::Input`].
    Input(&'a mut Value),
    /// As [`Operand::Output`].
    Output(&'a mut Value),
    /// As [`Operand::Weight`].
    Weight(&'a mut Weight),
    /// As [`Operand::Layer`].
    Layer(&'a mut KvLayer),
    /// As [`Operand::Routing`].
    Routing(&'a mut Routing),
    /// As [`Operand::Rope`].
    Rope(&'a mut Rope),
}

/// Lists the operands of each op, in this one place. The match works for `&Op` and `&mut Op`.
macro_rules! walk {
    ($op:expr, $visit:ident, $Operand:ident, $($reference:tt)+) => {
        match $op {
            Op::Embed { table, out, .. } => {
                $visit($Operand::Weight(table));
                $visit($Operand::Output(out));
            }
            Op::Input { out, .. } => $visit($Operand::Output(out)),
            Op::Norm { input, weight, bias, out, .. } => {
                $visit($Operand::Input(input));
                if let Some(weight) = weight {
                    $visit($Operand::Weight(weight));
                }
                if let Some(bias) = bias {
                    $visit($Operand::Weight(bias));
                }
                $visit($Operand::Output(out));
            }
            Op::Linear { input, parts } => {
                $visit($Operand::Input(input));
                for LinearPart { weight, bias, out } in parts {
                    $visit($Operand::Weight(weight));
                    if let Some(bias) = bias {
                        $visit($Operand::Weight(bias));
                    }
                    $visit($Operand::Output(out));
                }
            }
            Op::Rope { input, rope, out, .. } => {
                $visit($Operand::Input(input));
                $visit($Operand::Rope(rope));
                $visit($Operand::Output(out));
            }
            Op::Transform { input, out, .. }
            | Op::AllReduce { input, out }
            | Op::AllGather { input, out }
            | Op::Slice { input, out, .. } => {
                $visit($Operand::Input(input));
                $visit($Operand::Output(out));
            }
            Op::WriteKv { key: first, value: second, layer }
            | Op::WriteLatent { latent: first, rope_key: second, layer } => {
                $visit($Operand::Input(first));
                $visit($Operand::Input(second));
                $visit($Operand::Layer(layer));
            }
            Op::Attend { query, layer, spec, out } => {
                $visit($Operand::Input(query));
                $visit($Operand::Layer(layer));
                if let Some(sinks) = $($reference)+ spec.sinks {
                    $visit($Operand::Weight(sinks));
                }
                $visit($Operand::Output(out));
            }
            Op::AttendLatent { query, layer, spec, out } => {
                $visit($Operand::Input(query));
                $visit($Operand::Layer(layer));
                $visit($Operand::Weight($($reference)+ spec.key_up));
                $visit($Operand::Weight($($reference)+ spec.value_up));
                $visit($Operand::Output(out));
            }
            Op::Activate { gate, up, out, .. } => {
                $visit($Operand::Input(gate));
                if let Some(up) = up {
                    $visit($Operand::Input(up));
                }
                $visit($Operand::Output(out));
            }
            Op::Route { input, spec, out } => {
                $visit($Operand::Input(input));
                $visit($Operand::Weight($($reference)+ spec.weight));
                if let Some(bias) = $($reference)+ spec.bias {
                    $visit($Operand::Weight(bias));
                }
                if let Some(correction) = $($reference)+ spec.correction {
                    $visit($Operand::Weight(correction));
                }
                $visit($Operand::Routing(out));
            }
            Op::Experts { input, routing, spec, out } => {
                $visit($Operand::Input(input));
                $visit($Operand::Routing(routing));
                $visit($Operand::Weight($($reference)+ spec.gate));
                $visit($Operand::Weight($($reference)+ spec.up));
                $visit($Operand::Weight($($reference)+ spec.down));
                if let Some(bias) = $($reference)+ spec.gate_bias {
                    $visit($Operand::Weight(bias));
                }
                if let Some(bias) = $($reference)+ spec.up_bias {
                    $visit($Operand::Weight(bias));
                }
                if let Some(bias) = $($reference)+ spec.down_bias {
                    $visit($Operand::Weight(bias));
                }
                $visit($Operand::Output(out));
            }
            Op::Add { left, right, out, .. } => {
                $visit($Operand::Input(left));
                $visit($Operand::Input(right));
                $visit($Operand::Output(out));
            }
            Op::Gate { input, gate, out, .. } => {
                $visit($Operand::Input(input));
                $visit($Operand::Input(gate));
                $visit($Operand::Output(out));
            }
            Op::Logits { input, head, .. } => {
                $visit($Operand::Input(input));
                $visit($Operand::Weight(head));
            }
            Op::Capture { input, .. } => $visit($Operand::Input(input)),
        }
    };
}

impl Op {
    /// The op's kind in snake case: `linear`, `attend_latent`.
    pub fn kind(&self) -> &'static str {
        match self {
            Op::Embed { .. } => "embed",
            Op::Input { .. } => "input",
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

    /// Calls `visit` with every operand, in the order of the op's fields. The matrix of a linear
    /// part comes before its bias.
    pub fn visit(&self, visit: &mut dyn FnMut(Operand<'_>)) {
        walk!(self, visit, Operand, &);
    }

    /// As [`Op::visit`], to change the operands.
    pub fn visit_mut(&mut self, visit: &mut dyn FnMut(OperandMut<'_>)) {
        walk!(self, visit, OperandMut, &mut);
    }

    /// The values that the op reads, in the order of its fields.
    pub fn inputs(&self) -> impl Iterator<Item = Value> + use<> {
        let mut pair = [None, None];
        let mut next = 0;
        self.visit(&mut |operand| {
            if let Operand::Input(value) = operand {
                pair[next] = Some(*value);
                next += 1;
            }
        });
        pair.into_iter().flatten()
    }

    /// The values that the op makes.
    pub fn outputs(&self) -> impl Iterator<Item = Value> + use<> {
        let mut outputs = Vec::new();
        self.visit(&mut |operand| {
            if let Operand::Output(value) = operand {
                outputs.push(*value);
            }
        });
        outputs.into_iter()
    }

    /// The weights that the op reads, matrices before their biases.
    pub fn weights(&self) -> Vec<Weight> {
        let mut weights = Vec::new();
        self.visit(&mut |operand| {
            if let Operand::Weight(weight) = operand {
                weights.push(*weight);
            }
        });
        weights
    }

    /// The layer of the KV cache that the op writes or reads.
    pub fn kv_layer(&self) -> Option<KvLayer> {
        let mut found = None;
        self.visit(&mut |operand| {
            if let Operand::Layer(layer) = operand {
                found = Some(*layer);
            }
        });
        found
    }

    /// The inputs whose buffer the op's output may reuse, if they are not read later. Each element
    /// of the output then depends on no other row, and on no element of that input's row which the
    /// op has already overwritten (a norm reads its whole group before it writes).
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
    /// Whether the activation takes `up` beside `gate`.
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

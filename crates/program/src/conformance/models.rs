//! Small whole decoders, one for each kind of attention and of feed-forward layer.

use crate::builder::{LinearSpec, ProgramBuilder};
use crate::kv::KvLayerShape;
use crate::op::*;
use crate::program::Program;
use crate::transform::InputTransform;

/// The sizes of a small decoder.
#[derive(Debug, Clone, PartialEq)]
pub struct SmallDecoder {
    /// Layers. Odd ones have a window of `window`.
    pub layers: u32,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
    /// Width of the residual stream.
    pub width: usize,
    /// The kind of attention.
    pub attention: SmallAttention,
    /// Width of the feed-forward layers, or of one expert.
    pub hidden: usize,
    /// Experts, and experts for each token. `None` is a dense feed-forward layer.
    pub experts: Option<(usize, usize)>,
    /// Window of odd layers.
    pub window: Option<usize>,
    /// Positions in a block.
    pub block_tokens: usize,
    /// [`Program::long_rope_after`].
    pub long_rope_after: Option<usize>,
}

/// The attention of a [`SmallDecoder`].
#[derive(Debug, Clone, PartialEq)]
pub enum SmallAttention {
    /// Grouped queries with biases. Layers with a window also have sinks.
    Grouped {
        /// The additional parts.
        style: GroupedStyle,
        /// Query heads.
        heads: usize,
        /// Key and value heads.
        kv_heads: usize,
        /// Elements of a head.
        head_dim: usize,
    },
    /// Multi-head latent attention with a latent query.
    Latent {
        /// Query heads.
        heads: usize,
        /// Elements of the latents.
        rank: usize,
        /// Elements of the rotary key.
        rope_dim: usize,
        /// Elements of a head without position.
        nope_dim: usize,
        /// Elements of a head's value.
        value_dim: usize,
    },
}

/// The parts of a grouped attention besides its matrices.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupedStyle {
    /// A norm of each head of queries and keys.
    HeadNorms,
    /// Norms over all heads of a row (one for queries and one for keys), and a gate for each head's
    /// output.
    RowNormsAndGates,
}

impl SmallDecoder {
    /// A Llama of two layers with grouped queries.
    pub fn grouped() -> Self {
        Self {
            layers: 2,
            vocabulary: 96,
            width: 64,
            attention: SmallAttention::Grouped {
                style: GroupedStyle::HeadNorms,
                heads: 8,
                kv_heads: 4,
                head_dim: 32,
            },
            hidden: 128,
            experts: None,
            window: Some(6),
            block_tokens: 4,
            long_rope_after: None,
        }
    }

    /// The same with norms over whole rows of heads, and gates.
    pub fn gated() -> Self {
        let attention = SmallAttention::Grouped {
            style: GroupedStyle::RowNormsAndGates,
            heads: 8,
            kv_heads: 4,
            head_dim: 32,
        };
        Self { attention, ..Self::grouped() }
    }

    /// Latent attention over a dense feed-forward layer.
    pub fn latent() -> Self {
        let attention = SmallAttention::Latent {
            heads: 4,
            rank: 64,
            rope_dim: 32,
            nope_dim: 32,
            value_dim: 32,
        };
        Self { attention, window: None, ..Self::grouped() }
    }

    /// Grouped queries with a mixture of eight experts, two for each token, and a shared expert.
    pub fn mixture() -> Self {
        Self { hidden: 64, experts: Some((8, 2)), ..Self::grouped() }
    }

    /// The same with different rotary tables for texts of more than `original` tokens.
    pub fn long_rope_after(self, original: usize) -> Self {
        Self { long_rope_after: Some(original), ..self }
    }

    /// The same with widths rounded up to multiples of `block`, for matrices in blocks.
    pub fn fitting(self, block: usize) -> Self {
        let up = |n: usize| n.next_multiple_of(block);
        let attention = match self.attention {
            SmallAttention::Grouped { style, heads, kv_heads, head_dim } => {
                let head_dim = up(heads * head_dim) / heads;
                SmallAttention::Grouped { style, heads, kv_heads, head_dim }
            }
            SmallAttention::Latent { heads, rank, rope_dim, nope_dim, value_dim } => {
                let value_dim = up(heads * value_dim) / heads;
                SmallAttention::Latent { heads, rank: up(rank), rope_dim, nope_dim, value_dim }
            }
        };
        Self { width: up(self.width), hidden: up(self.hidden), attention, ..self }
    }

    /// Its program.
    pub fn program(&self) -> Program {
        let mut builder = ProgramBuilder::new(self.vocabulary, 4096, self.block_tokens);
        let shape = [self.vocabulary, self.width];
        let table = builder.weight("embedding", &shape, WeightRole::Embedding, None);
        let mut stream = builder.embed(table, 1.0, "embedding");
        for layer in 0..self.layers {
            let mut block = Layer { decoder: self, builder: &mut builder, layer };
            stream = match self.attention {
                SmallAttention::Grouped { style, heads, kv_heads, head_dim } => {
                    block.grouped(stream, style, [heads, kv_heads, head_dim])
                }
                SmallAttention::Latent { heads, rank, rope_dim, nope_dim, value_dim } => {
                    block.latent(stream, [heads, rank, rope_dim, nope_dim, value_dim])
                }
            };
            stream = match self.experts {
                None => block.dense(stream),
                Some((experts, per_token)) => block.mixture(stream, experts, per_token),
            };
        }
        let norm = builder.weight("final_norm", &[self.width], WeightRole::Vector, None);
        let last = builder.rms_norm(stream, norm, 1e-5, "final_norm");
        let head = builder.weight("head", &shape, WeightRole::Head, None);
        builder.logits(last, head, 1.0, None);
        builder.finish()
    }
}

/// The state while one layer is written.
struct Layer<'a> {
    decoder: &'a SmallDecoder,
    builder: &'a mut ProgramBuilder,
    layer: u32,
}

impl Layer<'_> {
    fn name(&self, name: &str) -> String {
        format!("layers.{}.{name}", self.layer)
    }

    fn weight(&mut self, name: &str, shape: &[usize], role: WeightRole) -> Weight {
        let name = self.name(name);
        self.builder.weight(name, shape, role, Some(self.layer))
    }

    fn norm(&mut self, input: Value, name: &str, groups: usize) -> Value {
        let n = self.builder.width(input) / groups;
        let weight = self.weight(name, &[n], WeightRole::Vector);
        let kind = NormKind::Rms { offset: 0.0 };
        let name = self.name(name);
        self.builder.norm(input, Some(weight), None, kind, 1e-5, groups, name)
    }

    fn part(&mut self, name: &str, input: usize, out: usize, bias: bool) -> LinearSpec {
        let weight = self.weight(name, &[out, input], WeightRole::Linear);
        let bias = bias.then(|| self.weight(&format!("{name}_bias"), &[out], WeightRole::Vector));
        LinearSpec::new(weight, self.name(name)).bias(bias)
    }

    fn one(&mut self, input: Value, name: &str, out: usize, bias: bool) -> Value {
        let part = self.part(name, self.builder.width(input), out, bias);
        self.builder.linear_one(input, part)
    }

    fn rope(&mut self, input: Value, heads: usize, offset: usize, dim: usize, name: &str) -> Value {
        let pairs = dim / 2;
        let frequencies = |base: f32| {
            (0..pairs).map(move |i| base.powf(-(i as f32) / pairs as f32)).collect::<Vec<_>>()
        };
        let long = self
            .decoder
            .long_rope_after
            .map(|original| LongRope { original, inverse_frequencies: frequencies(100000.0) });
        let rope = self.builder.rope_table(RopeTable {
            inverse_frequencies: frequencies(10000.0),
            long,
            magnitude: 1.0,
            style: RopeStyle::HalfSplit,
        });
        let name = self.name(name);
        self.builder.rope(input, heads, offset, rope, name)
    }

    fn residual(&mut self, stream: Value, branch: Value, name: &str) -> Value {
        let name = self.name(name);
        self.builder.add(stream, branch, 1.0, name)
    }

    fn grouped(&mut self, stream: Value, style: GroupedStyle, dims: [usize; 3]) -> Value {
        let [heads, kv_heads, head_dim] = dims;
        let width = self.decoder.width;
        let window = self.decoder.window.filter(|_| self.layer % 2 == 1);
        let normed = self.norm(stream, "attention_norm", 1);
        let parts = vec![
            self.part("attention.query", width, heads * head_dim, true),
            self.part("attention.key", width, kv_heads * head_dim, true),
            self.part("attention.value", width, kv_heads * head_dim, true),
        ];
        let projected = self.builder.linear(normed, parts);
        let (query_groups, key_groups) = match style {
            GroupedStyle::HeadNorms => (heads, kv_heads),
            GroupedStyle::RowNormsAndGates => (1, 1),
        };
        let query = self.norm(projected[0], "attention.query_norm", query_groups);
        let key = self.norm(projected[1], "attention.key_norm", key_groups);
        let query = self.rope(query, heads, 0, head_dim, "attention.query_turned");
        let key = self.rope(key, kv_heads, 0, head_dim, "attention.key_turned");
        let shape = KvLayerShape::Heads { kv_heads, key_dim: head_dim, value_dim: head_dim };
        let cache = self.builder.kv_layer(shape, window);
        self.builder.write_kv(key, projected[2], cache);
        let sinks = window.map(|_| self.weight("attention.sinks", &[heads], WeightRole::Vector));
        let spec = AttendSpec {
            heads,
            kv_heads,
            head_dim,
            value_dim: head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            window,
            softcap: None,
            sinks,
        };
        let name = self.name("attention.attended");
        let mut attended = self.builder.attend(query, cache, spec, name);
        if style == GroupedStyle::RowNormsAndGates {
            let gate = self.one(normed, "attention.gate", heads, false);
            let name = self.name("attention.gated");
            attended = self.builder.gate(attended, gate, GateKind::Sigmoid, name);
        }
        let out = self.one(attended, "attention.output", width, true);
        self.residual(stream, out, "attention.residual")
    }

    fn latent(&mut self, stream: Value, dims: [usize; 5]) -> Value {
        let [heads, rank, rope_dim, nope_dim, value_dim] = dims;
        let width = self.decoder.width;
        let normed = self.norm(stream, "attention_norm", 1);
        let parts = vec![
            self.part("attention.query_down", width, rank, false),
            self.part("attention.kv_down", width, rank, false),
            self.part("attention.rope_key", width, rope_dim, false),
        ];
        let projected = self.builder.linear(normed, parts);
        let query = self.norm(projected[0], "attention.query_down_norm", 1);
        let query = self.one(query, "attention.query_up", heads * (nope_dim + rope_dim), false);
        let query = self.rope(query, heads, nope_dim, rope_dim, "attention.query_turned");
        let latent = self.norm(projected[1], "attention.kv_norm", 1);
        let rope_key = self.rope(projected[2], 1, 0, rope_dim, "attention.rope_key_turned");
        let cache = self.builder.kv_layer(KvLayerShape::Latent { rank, rope_dim }, None);
        self.builder.write_latent(latent, rope_key, cache);
        let spec = LatentSpec {
            heads,
            rank,
            rope_dim,
            nope_dim,
            value_dim,
            scale: 1.0 / ((nope_dim + rope_dim) as f32).sqrt(),
            window: None,
            softcap: None,
            key_up: self.weight("attention.key_up", &[heads * nope_dim, rank], WeightRole::Linear),
            value_up: self.weight(
                "attention.value_up",
                &[heads * value_dim, rank],
                WeightRole::Linear,
            ),
        };
        let name = self.name("attention.attended");
        let attended = self.builder.attend_latent(query, cache, spec, name);
        let out = self.one(attended, "attention.output", width, false);
        self.residual(stream, out, "attention.residual")
    }

    fn dense(&mut self, stream: Value) -> Value {
        let normed = self.norm(stream, "ffn_norm", 1);
        let out = self.feed_forward(normed, "ffn");
        self.residual(stream, out, "ffn.residual")
    }

    fn feed_forward(&mut self, input: Value, prefix: &str) -> Value {
        let (width, hidden) = (self.decoder.width, self.decoder.hidden);
        let parts = vec![
            self.part(&format!("{prefix}.gate"), width, hidden, false),
            self.part(&format!("{prefix}.up"), width, hidden, false),
        ];
        let projected = self.builder.linear(input, parts);
        let name = self.name(&format!("{prefix}.gated"));
        let gated =
            self.builder.activate(projected[0], Some(projected[1]), Activation::SwiGlu, name);
        self.one(gated, &format!("{prefix}.down"), width, false)
    }

    fn mixture(&mut self, stream: Value, experts: usize, experts_per_token: usize) -> Value {
        let (width, hidden) = (self.decoder.width, self.decoder.hidden);
        let normed = self.norm(stream, "ffn_norm", 1);
        let router = RouterSpec {
            experts,
            experts_per_token,
            score: RouterScore::Sigmoid,
            normalise: true,
            scaling: 1.5,
            groups: None,
            weight: self.weight("ffn.router", &[experts, width], WeightRole::Router),
            bias: None,
            correction: Some(self.weight("ffn.router_correction", &[experts], WeightRole::Vector)),
        };
        let routing = self.builder.route(normed, router);
        let (wide, narrow) = ([experts, hidden, width], [experts, width, hidden]);
        let spec = ExpertsSpec {
            experts,
            first_expert: 0,
            hidden,
            activation: Activation::SwiGlu,
            gate: self.weight("ffn.experts.gate", &wide, WeightRole::Experts),
            up: self.weight("ffn.experts.up", &wide, WeightRole::Experts),
            down: self.weight("ffn.experts.down", &narrow, WeightRole::Experts),
            gate_bias: None,
            up_bias: None,
            down_bias: Some(self.weight(
                "ffn.experts.down_bias",
                &[experts, width],
                WeightRole::Vector,
            )),
            weigh_input: false,
            hidden_transform: InputTransform::default(),
        };
        let name = self.name("ffn.experts");
        let routed = self.builder.experts(normed, routing, spec, name);
        let shared = self.feed_forward(normed, "ffn.shared");
        let gate = self.one(normed, "ffn.shared.router", 1, false);
        let name = self.name("ffn.shared.gated_output");
        let shared = self.builder.gate(shared, gate, GateKind::Sigmoid, name);
        let name = self.name("ffn.sum");
        let sum = self.builder.add(routed, shared, 1.0, name);
        self.residual(stream, sum, "ffn.residual")
    }
}

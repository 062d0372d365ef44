//! One small program for each op kind and seed. Inputs are embeddings, so that the values of a row
//! depend on its token. A tap captures the output of the op.

use lathe_tensor::ActivationFormat;

use super::random::Random;
use crate::builder::{LinearSpec, ProgramBuilder};
use crate::kv::KvLayerShape;
use crate::op::*;
use crate::program::Program;
use crate::transform::{InputTransform, StaticScale};

/// A program that exercises one op.
#[derive(Debug, Clone)]
pub struct Case {
    /// `attend/3`: the op's kind and the seed.
    pub name: String,
    /// Taps capture the op's output. There may be logits.
    pub program: Program,
    /// Whether rows depend on the cache. Chunks and trees then matter.
    pub attends: bool,
}

type Make = fn(&mut Maker);

/// Each kind of case.
const KINDS: [(&str, Make); 15] = [
    ("embed", Maker::embed),
    ("input", Maker::fed),
    ("norm", Maker::norm),
    ("linear", Maker::linear),
    ("transform", Maker::transform),
    ("rope", Maker::rope),
    ("attend", Maker::attend),
    ("attend_latent", Maker::attend_latent),
    ("activate", Maker::activate),
    ("experts", Maker::experts),
    ("add", Maker::add),
    ("gate", Maker::gate),
    ("slice", Maker::slice),
    ("collective", Maker::collective),
    ("logits", Maker::logits),
];

/// `seeds` cases of every kind. The inputs of matrices in a block format have widths that are
/// multiples of `block`.
pub fn cases(seeds: u64, block: usize) -> Vec<Case> {
    let kinds = KINDS.iter().flat_map(|kind| (0..seeds).map(move |seed| (kind, seed)));
    kinds.map(|((kind, make), seed)| case(kind, *make, seed, block)).collect()
}

fn case(kind: &str, make: Make, seed: u64, block: usize) -> Case {
    let name = format!("{kind}/{seed}");
    let mut random = Random::named(seed, kind);
    let block_tokens = random.pick(&[1, 3, 4, 16]);
    let builder = ProgramBuilder::new(41 + random.below(9), 512, block_tokens);
    let mut maker = Maker { random, builder, block, taps: 0, weights: 0 };
    make(&mut maker);
    Case { name, program: maker.builder.finish(), attends: kind.starts_with("attend") }
}

struct Maker {
    random: Random,
    builder: ProgramBuilder,
    block: usize,
    taps: u32,
    weights: u32,
}

impl Maker {
    /// A width that suits matrices in the format of the case.
    fn columns(&mut self) -> usize {
        if self.block > 1 { self.block * self.random.between(1, 3) } else { self.width() }
    }

    /// Any width.
    fn width(&mut self) -> usize {
        self.random.between(1, 150)
    }

    fn weight(&mut self, kind: &str, shape: &[usize], role: WeightRole) -> Weight {
        self.weights += 1;
        self.builder.weight(format!("w{}.{kind}", self.weights), shape, role, None)
    }

    fn vector(&mut self, n: usize) -> Weight {
        self.weight("vector", &[n], WeightRole::Vector)
    }

    fn matrix(&mut self, out: usize, input: usize) -> Weight {
        self.weight("matrix", &[out, input], WeightRole::Linear)
    }

    fn maybe<T>(&mut self, make: impl FnOnce(&mut Self) -> T) -> Option<T> {
        self.random.coin().then(|| make(self))
    }

    /// An input `[rows, width]`. Its table is as wide as the format's blocks require, and is cut to
    /// `width`.
    fn input(&mut self, width: usize) -> Value {
        let vocabulary = self.builder.vocabulary();
        let wide = width.next_multiple_of(self.block);
        let table = self.weight("table", &[vocabulary, wide], WeightRole::Embedding);
        let input = self.builder.embed(table, 1.0, "input");
        if wide == width { input } else { self.builder.slice(input, 0, width, "cut") }
    }

    fn capture(&mut self, value: Value) {
        self.builder.capture(value, self.taps);
        self.taps += 1;
    }

    fn embed(&mut self) {
        let (vocabulary, width) = (self.builder.vocabulary(), self.columns());
        let table = self.weight("table", &[vocabulary, width], WeightRole::Embedding);
        let multiplier = self.random.pick(&[1.0, 7.5]);
        let out = self.builder.embed(table, multiplier, "out");
        self.capture(out);
        let part = self.weight("part", &[vocabulary - 20, width], WeightRole::Embedding);
        let out = self.builder.value("part", width);
        self.builder.push(Op::Embed { table: part, first_token: 10, multiplier, out });
        self.capture(out);
    }

    fn fed(&mut self) {
        for _ in 0..self.random.between(1, 3) {
            let width = self.width();
            let input = self.builder.input(width, "fed");
            let sum = self.builder.add(input, input, 0.5, "sum");
            self.capture(sum);
            self.capture(input);
        }
    }

    fn norm(&mut self) {
        let groups = self.random.pick(&[1, 1, 3, 8]);
        let n = self.width();
        let input = self.input(groups * n);
        let kind = self.random.pick(&[
            NormKind::Rms { offset: 0.0 },
            NormKind::Rms { offset: 1.0 },
            NormKind::Layer,
        ]);
        let width = if self.random.coin() { n } else { groups * n };
        let weight = self.maybe(|maker| maker.vector(width));
        let bias = match kind {
            NormKind::Layer => self.maybe(|maker| maker.vector(width)),
            NormKind::Rms { .. } => None,
        };
        let out = self.builder.norm(input, weight, bias, kind, 1e-3, groups, "out");
        self.capture(out);
        self.capture(input);
    }

    fn linear(&mut self) {
        let columns = self.columns();
        let input = self.input(columns);
        let parts = (0..self.random.between(1, 3))
            .map(|i| {
                let rows = self.width();
                let weight = self.matrix(rows, columns);
                let bias = self.maybe(|maker| maker.vector(rows));
                LinearSpec::new(weight, format!("out{i}")).bias(bias)
            })
            .collect();
        for out in self.builder.linear(input, parts) {
            self.capture(out);
        }
    }

    /// The inputs are embeddings, so that both sides round the same numbers. If sums differed in
    /// their last bit, a code could fall on the other side of a tie.
    fn transform(&mut self) {
        let own = ActivationFormat::ALL.into_iter().map(|format| (Some(format), None));
        let stored = ActivationFormat::ALL.into_iter().filter(|format| format.takes_scale());
        let stored = stored.map(|format| (Some(format), StaticScale::new(0.043)));
        for (format, scale) in own.chain([(None, None)]).chain(stored) {
            let hadamard = self.random.pick(&[None, Some(8), Some(32), Some(12), Some(40)]);
            let unit = format.map_or(1, ActivationFormat::width_unit) * hadamard.unwrap_or(1);
            let width = unit * self.random.between(1, 5);
            let input = self.input(width);
            let transform = InputTransform { hadamard, format, scale };
            let out = self.builder.transform(input, transform, format!("{transform}"));
            self.capture(out);
            // Without a second reader, the op may run in place.
            if self.random.coin() {
                self.capture(input);
            }
        }
    }

    fn rope(&mut self) {
        let (heads, pairs) = (self.random.between(1, 5), self.random.between(1, 20));
        let (offset, rest) = (self.random.pick(&[0, 0, 6]), self.random.pick(&[0, 0, 5]));
        let input = self.input(heads * (offset + 2 * pairs + rest));
        let table = RopeTable {
            inverse_frequencies: (0..pairs).map(|i| 0.9f32.powi(i as i32)).collect(),
            long: self.maybe(|maker| LongRope {
                original: maker.random.between(1, 120),
                inverse_frequencies: (0..pairs).map(|i| 0.7f32.powi(i as i32)).collect(),
            }),
            magnitude: self.random.pick(&[1.0, 1.2]),
            style: self.random.pick(&[RopeStyle::HalfSplit, RopeStyle::Interleaved]),
        };
        let rope = self.builder.rope_table(table);
        let out = self.builder.rope(input, heads, offset, rope, "out");
        self.capture(out);
    }

    /// Rotated queries or keys, so that rows of the same token differ by position.
    fn turned(&mut self, heads: usize, [offset, dim]: [usize; 2]) -> Value {
        let input = self.input(heads * (offset + dim));
        let pairs = dim / 2;
        let table = RopeTable {
            inverse_frequencies: (0..pairs).map(|i| 0.8f32.powi(i as i32)).collect(),
            long: None,
            magnitude: 1.0,
            style: RopeStyle::HalfSplit,
        };
        let rope = self.builder.rope_table(table);
        self.builder.rope(input, heads, offset, rope, "turned")
    }

    fn attend(&mut self) {
        let (kv_heads, ratio) = (self.random.between(1, 3), self.random.pick(&[1, 2, 3, 7]));
        let heads = kv_heads * ratio;
        let head_dim = self.random.pick(&[2, 10, 16, 32, 64, 72]);
        let value_dim = if self.random.coin() { head_dim } else { self.random.between(1, 70) };
        let window = self.maybe(|maker| maker.random.between(1, 40));
        let shape = KvLayerShape::Heads { kv_heads, key_dim: head_dim, value_dim };
        let layer = self.builder.kv_layer(shape, window);
        let query = self.turned(heads, [0, head_dim]);
        let key = self.turned(kv_heads, [0, head_dim]);
        let value = self.input(kv_heads * value_dim);
        self.builder.write_kv(key, value, layer);
        let spec = AttendSpec {
            heads,
            kv_heads,
            head_dim,
            value_dim,
            scale: self.random.pick(&[1.0, 2.0]) / (head_dim as f32).sqrt(),
            window,
            softcap: self.maybe(|maker| maker.random.pick(&[2.0, 30.0])),
            sinks: self.maybe(|maker| maker.vector(heads)),
        };
        let out = self.builder.attend(query, layer, spec, "out");
        self.capture(out);
    }

    fn attend_latent(&mut self) {
        let (heads, rank) = (self.random.between(1, 5), self.columns());
        let (rope_dim, nope_dim) = (self.random.pick(&[2, 16, 32]), self.random.between(1, 40));
        let value_dim = self.random.between(1, 40);
        let window = self.random.pick(&[None, None, Some(9)]);
        let layer = self.builder.kv_layer(KvLayerShape::Latent { rank, rope_dim }, window);
        let query = self.turned(heads, [nope_dim, rope_dim]);
        let latent = self.input(rank);
        let rope_key = self.turned(1, [0, rope_dim]);
        self.builder.write_latent(latent, rope_key, layer);
        let spec = LatentSpec {
            heads,
            rank,
            rope_dim,
            nope_dim,
            value_dim,
            scale: 1.0 / ((nope_dim + rope_dim) as f32).sqrt(),
            window,
            softcap: self.random.pick(&[None, None, Some(20.0)]),
            key_up: self.matrix(heads * nope_dim, rank),
            value_up: self.matrix(heads * value_dim, rank),
        };
        let out = self.builder.attend_latent(query, layer, spec, "out");
        self.capture(out);
    }

    fn activate(&mut self) {
        let width = self.width();
        let (gate, up) = (self.input(width), self.input(width));
        for kind in [
            Activation::SwiGlu,
            Activation::GeGluTanh,
            Activation::GeGluErf,
            Activation::SwiGluClamped { alpha: 1.702, limit: 1.5 },
            Activation::Silu,
            Activation::GeluTanh,
            Activation::ReluSquared,
        ] {
            let out = self.builder.activate(gate, kind.is_gated().then_some(up), kind, "out");
            self.capture(out);
        }
    }

    fn router(&mut self, width: usize) -> RouterSpec {
        let groups = self.random.pick(&[None, None, Some(4)]);
        let experts = groups.map_or_else(|| self.random.between(2, 20), |groups| groups * 4);
        let groups = groups.map(|groups| GroupLimit {
            groups,
            groups_per_token: 2,
            score: self.random.pick(&[GroupScore::Max, GroupScore::TopTwoSum]),
        });
        let scores = [RouterScore::Softmax, RouterScore::SoftmaxOfChosen, RouterScore::Sigmoid];
        RouterSpec {
            experts,
            experts_per_token: self.random.between(1, experts.min(6)),
            score: self.random.pick(&scores),
            normalise: self.random.coin(),
            scaling: self.random.pick(&[1.0, 2.5]),
            groups,
            weight: self.weight("router", &[experts, width], WeightRole::Router),
            bias: self.maybe(|maker| maker.vector(experts)),
            correction: self.maybe(|maker| maker.vector(experts)),
        }
    }

    fn experts(&mut self) {
        let (width, hidden, out) = (self.columns(), self.columns(), self.width());
        let input = self.input(width);
        let router = self.router(width);
        let routed = router.experts;
        let routing = self.builder.route(input, router);
        let first_expert = if self.random.below(4) == 0 { 1 } else { 0 };
        let experts = routed - first_expert;
        let activation = self.random.pick(&[
            Activation::SwiGlu,
            Activation::GeGluTanh,
            Activation::SwiGluClamped { alpha: 1.702, limit: 2.0 },
        ]);
        let role = WeightRole::Experts;
        let biases = self.random.coin();
        let bias = |maker: &mut Self, n| {
            biases.then(|| maker.weight("bias", &[experts, n], WeightRole::Vector))
        };
        let spec = ExpertsSpec {
            experts,
            first_expert,
            hidden,
            activation,
            gate_bias: bias(self, hidden),
            up_bias: bias(self, hidden),
            down_bias: bias(self, out),
            gate: self.weight("gate", &[experts, hidden, width], role),
            up: self.weight("up", &[experts, hidden, width], role),
            down: self.weight("down", &[experts, out, hidden], role),
            weigh_input: self.random.below(4) == 0,
            hidden_transform: InputTransform {
                hadamard: self.random.pick(&[None, Some(1), Some(2)]).filter(|n| hidden % n == 0),
                ..InputTransform::default()
            },
        };
        let out = self.builder.experts(input, routing, spec, "out");
        self.capture(out);
    }

    fn add(&mut self) {
        let width = self.width();
        let (left, right) = (self.input(width), self.input(width));
        let sum = self.builder.add(left, right, 1.0, "sum");
        let scaled = self.builder.add(sum, right, 0.22, "scaled");
        let twice = self.builder.add(scaled, scaled, 1.0, "twice");
        self.capture(twice);
    }

    fn gate(&mut self) {
        let (parts, n) = (self.random.between(1, 6), self.width());
        let input = self.input(parts * n);
        for width in [1, parts, parts * n] {
            let gate = self.input(width);
            let out = self.builder.gate(input, gate, GateKind::Sigmoid, "out");
            self.capture(out);
        }
    }

    fn slice(&mut self) {
        let width = self.width();
        let input = self.input(width);
        let start = self.random.below(width);
        let count = self.random.between(1, width - start);
        let out = self.builder.slice(input, start, count, "out");
        self.capture(out);
        self.capture(input);
    }

    /// With one rank these ops do nothing.
    fn collective(&mut self) {
        let width = self.width();
        let input = self.input(width);
        let sum = self.builder.all_reduce(input, "sum");
        let out = self.builder.value("gathered", width);
        self.builder.push(Op::AllGather { input: sum, out });
        self.capture(out);
    }

    fn logits(&mut self) {
        let columns = self.columns();
        let input = self.input(columns);
        let vocabulary = self.builder.vocabulary();
        let head = self.weight("head", &[vocabulary, columns], WeightRole::Head);
        let scale = self.random.pick(&[1.0, 0.25]);
        let softcap = self.maybe(|maker| maker.random.pick(&[1.0, 30.0]));
        self.builder.logits(input, head, scale, softcap);
    }
}

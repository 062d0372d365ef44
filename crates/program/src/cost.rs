//! The cost counter: the operations and bytes of a step, computed from the program alone.
//!
//! Conventions:
//! - A multiplication and an addition are two FLOPs. `exp`, `tanh`, a division or a root is one.
//! - A weight is read once in a step, however many rows use it. Of an embedding only the rows of
//!   the step's tokens are read, and of the experts only those that some row visits.
//! - A cached position is read once for each step and sequence, however many rows and heads see it.
//! - Activations are `f32`. Each op reads its inputs and writes its outputs once. With caches they
//!   do not reach main memory, so [`roofline`] leaves them out.

pub mod parallel;

use crate::kv::KvFormat;
use crate::op::*;
use crate::program::Program;
use crate::transform::InputTransform;

/// The cost of an op or a step.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes of weights read.
    pub weight_bytes: u64,
    /// Bytes of the cache read.
    pub kv_read_bytes: u64,
    /// Bytes of the cache written.
    pub kv_write_bytes: u64,
    /// Bytes of activations read and written.
    pub activation_bytes: u64,
    /// Bytes that a rank sends to others, with ring algorithms: `2 (n - 1) / n` of the value for an
    /// all-reduce, and `(n - 1) / n` of the whole for a gather.
    pub communication_bytes: u64,
}

impl Cost {
    /// Bytes that move to and from memory: weights and cache.
    pub fn memory_bytes(&self) -> u64 {
        self.weight_bytes + self.kv_read_bytes + self.kv_write_bytes
    }
}

impl std::ops::AddAssign for Cost {
    fn add_assign(&mut self, other: Cost) {
        self.flops += other.flops;
        self.weight_bytes += other.weight_bytes;
        self.kv_read_bytes += other.kv_read_bytes;
        self.kv_write_bytes += other.kv_write_bytes;
        self.activation_bytes += other.activation_bytes;
        self.communication_bytes += other.communication_bytes;
    }
}

/// FLOPs of an element. A rotation takes the additions of the butterflies and of the dense factor,
/// and a division. Rounding takes a division, a rounding and a multiplication.
fn transform_flops(transform: &InputTransform) -> u64 {
    let rotation = transform.hadamard.map_or(0, |block| {
        let (butterflies, odd) = (block.trailing_zeros(), block >> block.trailing_zeros());
        u64::from(butterflies) + 1 + if odd > 1 { odd as u64 } else { 0 }
    });
    rotation + if transform.format.is_some() { 3 } else { 0 }
}

/// One sequence of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceShape {
    /// Tokens in the cache before the step.
    pub cached: usize,
    /// New rows.
    pub rows: usize,
}

/// Which experts the rows of a step visit.
#[derive(Debug, Clone, Default, PartialEq)]
pub enum RoutingLoad {
    /// Every expert is equally likely, independently for each row. With `E` experts and `k` for
    /// each row, `n` rows visit `E (1 - (1 - k / E)^n)` distinct experts on average.
    #[default]
    Even,
    /// For each [`Routing`], the share of rows that visits each expert, independently for each row.
    /// `n` rows visit the sum of `1 - (1 - share)^n` distinct experts. Trained routers are uneven.
    Shares(Vec<Vec<f64>>),
    /// For each [`Routing`], the rows of each expert.
    Counted(Vec<Vec<u32>>),
}

/// The shape of a step. Its cost depends on nothing else.
#[derive(Debug, Clone, PartialEq)]
pub struct StepShape {
    /// The sequences.
    pub sequences: Vec<SequenceShape>,
    /// Rows with logits.
    pub logits_rows: usize,
    /// The experts of the rows.
    pub routing: RoutingLoad,
    /// The number of ranks that run programs like this one.
    pub ranks: usize,
}

impl StepShape {
    /// One sequence of `tokens` new tokens after `cached`, with the logits of the last.
    pub fn prefill(cached: usize, tokens: usize) -> Self {
        let sequences = vec![SequenceShape { cached, rows: tokens }];
        Self { sequences, logits_rows: 1, routing: RoutingLoad::Even, ranks: 1 }
    }

    /// One new token for each of `batch` sequences with `cached` tokens.
    pub fn decode(batch: usize, cached: usize) -> Self {
        let sequences = vec![SequenceShape { cached, rows: 1 }; batch];
        Self { sequences, logits_rows: batch, routing: RoutingLoad::Even, ranks: 1 }
    }

    /// Rows of all sequences.
    pub fn rows(&self) -> usize {
        self.sequences.iter().map(|sequence| sequence.rows).sum()
    }
}

/// The cost of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StepCost {
    /// The cost of each op, in the program's order.
    pub ops: Vec<Cost>,
    /// Their sum.
    pub total: Cost,
}

/// Counts the cost of `shape`. `weight_bytes` gives the stored bytes of a weight.
pub fn count(
    program: &Program,
    shape: &StepShape,
    weight_bytes: &dyn Fn(Weight) -> u64,
    kv_format: KvFormat,
) -> StepCost {
    let counter = Counter { program, shape, weight_bytes, kv_format };
    let ops: Vec<Cost> = program.ops.iter().map(|op| counter.op(op)).collect();
    let mut total = Cost::default();
    ops.iter().for_each(|cost| total += *cost);
    StepCost { ops, total }
}

/// The limit of a step's speed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Arithmetic.
    Compute,
    /// Memory traffic.
    Memory,
}

/// A step against a machine's two limits (Williams, Waterman, Patterson, 2009).
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize)]
pub struct Roofline {
    /// FLOPs per byte of weights and cache.
    pub intensity: f64,
    /// The limit that is reached first.
    pub bound: Bound,
    /// The least time of the step, in milliseconds.
    pub floor_ms: f64,
}

/// Compares `cost` with `bytes_per_s` of memory and `flops_per_s` of arithmetic.
pub fn roofline(cost: &Cost, bytes_per_s: f64, flops_per_s: f64) -> Roofline {
    let (flops, bytes) = (cost.flops as f64, cost.memory_bytes() as f64);
    let (compute, memory) = (flops / flops_per_s, bytes / bytes_per_s);
    Roofline {
        intensity: flops / bytes.max(1.0),
        bound: if compute > memory { Bound::Compute } else { Bound::Memory },
        floor_ms: compute.max(memory) * 1e3,
    }
}

/// Operations for a score after its dot product: scale, subtract, `exp`, sum, divide.
const SOFTMAX_FLOPS: u64 = 5;
/// Operations for an element of a norm: square, sum, scale, weight.
const NORM_FLOPS: u64 = 4;
/// Operations for an element of an activation: negate, `exp`, add, divide, multiply.
const ACTIVATE_FLOPS: u64 = 5;
/// Bytes of an activation's element.
const ACTIVATION_BYTES: u64 = 4;

struct Counter<'a> {
    program: &'a Program,
    shape: &'a StepShape,
    weight_bytes: &'a dyn Fn(Weight) -> u64,
    kv_format: KvFormat,
}

impl Counter<'_> {
    fn op(&self, op: &Op) -> Cost {
        let mut cost = Cost {
            activation_bytes: self.activation_bytes(op),
            communication_bytes: self.communication_bytes(op),
            ..Cost::default()
        };
        match op {
            Op::Embed { table, multiplier, out, .. } => {
                let rows = self.program.weight(*table).shape[0] as u64;
                cost.flops = if *multiplier == 1.0 { 0 } else { self.elements(*out) };
                cost.weight_bytes =
                    (self.weight_bytes)(*table) * (self.rows().min(rows)) / rows.max(1);
            }
            Op::Norm { input, .. } => {
                cost.flops = NORM_FLOPS * self.elements(*input);
                cost.weight_bytes = self.all_weights(op);
            }
            Op::Linear { input, parts } => {
                for part in parts {
                    let per_output = 2 * self.width(*input) + u64::from(part.bias.is_some());
                    cost.flops += per_output * self.elements(part.out);
                }
                cost.weight_bytes = self.all_weights(op);
            }
            Op::Transform { transform, out, .. } => cost.flops = self.transform(transform, *out),
            Op::Rope { heads, rope, .. } => {
                let pairs = self.program.ropes[rope.0 as usize].inverse_frequencies.len();
                cost.flops = self.rows() * (*heads * pairs * 6) as u64;
            }
            Op::WriteKv { layer, .. } | Op::WriteLatent { layer, .. } => {
                cost.kv_write_bytes = self.rows() * self.token_bytes(*layer);
            }
            Op::Attend { layer, spec, .. } => {
                let per_pair = (2 * (spec.head_dim + spec.value_dim)) as u64 + SOFTMAX_FLOPS;
                cost.flops = self.pairs(spec.window) * spec.heads as u64 * per_pair;
                cost.kv_read_bytes = self.positions(spec.window) * self.token_bytes(*layer);
                cost.weight_bytes = self.all_weights(op);
            }
            Op::AttendLatent { layer, spec, .. } => {
                cost.flops = self.latent_flops(spec);
                cost.kv_read_bytes = self.positions(spec.window) * self.token_bytes(*layer);
                cost.weight_bytes = self.all_weights(op);
            }
            Op::Activate { out, .. } => cost.flops = ACTIVATE_FLOPS * self.elements(*out),
            Op::Gate { out, .. } => cost.flops = ACTIVATE_FLOPS * self.elements(*out),
            Op::Add { scale, out, .. } => {
                cost.flops = (1 + u64::from(*scale != 1.0)) * self.elements(*out);
            }
            Op::Route { input, spec, .. } => {
                let logits = self.rows() * spec.experts as u64;
                cost.flops = logits * (2 * self.width(*input) + SOFTMAX_FLOPS);
                cost.weight_bytes = self.all_weights(op);
            }
            Op::Experts { input, routing, spec, out } => {
                self.experts(&mut cost, op, *routing, spec, [*input, *out]);
            }
            Op::Logits { input, head, .. } => {
                let logits_rows = self.shape.logits_rows as u64;
                let logits = logits_rows * self.program.weight(*head).shape[0] as u64;
                cost.flops = logits * 2 * self.width(*input);
                cost.weight_bytes = if logits_rows > 0 { self.all_weights(op) } else { 0 };
            }
            Op::AllReduce { input, .. } => {
                cost.flops = self.elements(*input) * self.others() / self.ranks();
            }
            Op::Input { .. } | Op::AllGather { .. } | Op::Slice { .. } | Op::Capture { .. } => {}
        }
        cost
    }

    fn transform(&self, transform: &InputTransform, out: Value) -> u64 {
        transform_flops(transform) * self.elements(out)
    }

    fn rows(&self) -> u64 {
        self.shape.rows() as u64
    }

    fn ranks(&self) -> u64 {
        self.shape.ranks.max(1) as u64
    }

    fn others(&self) -> u64 {
        self.ranks() - 1
    }

    fn width(&self, value: Value) -> u64 {
        self.program.value_width(value) as u64
    }

    fn elements(&self, value: Value) -> u64 {
        self.rows() * self.width(value)
    }

    fn all_weights(&self, op: &Op) -> u64 {
        op.weights().into_iter().map(|weight| (self.weight_bytes)(weight)).sum()
    }

    fn token_bytes(&self, layer: KvLayer) -> u64 {
        self.program.kv.layer(layer).shape.bytes_per_token(self.kv_format) as u64
    }

    fn activation_bytes(&self, op: &Op) -> u64 {
        let elements: u64 = match op {
            Op::Logits { input, head, .. } => {
                let vocabulary = self.program.weight(*head).shape[0] as u64;
                self.shape.logits_rows as u64 * (self.width(*input) + vocabulary)
            }
            _ => op.inputs().chain(op.outputs()).map(|value| self.elements(value)).sum(),
        };
        ACTIVATION_BYTES * elements
    }

    fn communication_bytes(&self, op: &Op) -> u64 {
        let elements = match op {
            Op::AllReduce { input, .. } => 2 * self.elements(*input),
            Op::AllGather { out, .. } => self.elements(*out),
            Op::Logits { gather: true, .. } => {
                self.shape.logits_rows as u64 * self.program.vocabulary as u64
            }
            _ => 0,
        };
        ACTIVATION_BYTES * elements * self.others() / self.ranks()
    }

    /// Pairs of a row and a position that it sees.
    fn pairs(&self, window: Option<usize>) -> u64 {
        self.shape.sequences.iter().map(|sequence| pairs(sequence, window)).sum()
    }

    /// Positions that some row sees.
    fn positions(&self, window: Option<usize>) -> u64 {
        self.shape.sequences.iter().map(|sequence| positions(sequence, window)).sum()
    }

    /// For each sequence the cheaper of two forms (DeepSeek-V2, section 2.1.2). The expanded form
    /// makes keys and values of every visible position from the latents. The absorbed form does
    /// not.
    fn latent_flops(&self, spec: &LatentSpec) -> u64 {
        let [rank, rope, nope, value] =
            [spec.rank, spec.rope_dim, spec.nope_dim, spec.value_dim].map(|n| n as u64);
        let of = |sequence: &SequenceShape| {
            let pairs = pairs(sequence, spec.window);
            let expanded = positions(sequence, spec.window) * 2 * rank * (nope + value)
                + pairs * (2 * (nope + rope + value) + SOFTMAX_FLOPS);
            let absorbed = sequence.rows as u64 * 2 * rank * (nope + value)
                + pairs * (2 * (rank + rope + rank) + SOFTMAX_FLOPS);
            spec.heads as u64 * expanded.min(absorbed)
        };
        self.shape.sequences.iter().map(of).sum()
    }

    fn experts(
        &self,
        cost: &mut Cost,
        op: &Op,
        routing: Routing,
        spec: &ExpertsSpec,
        [input, out]: [Value; 2],
    ) {
        let (visits, distinct) = self.visits(routing, spec);
        let (hidden, input, out) = (spec.hidden as u64, self.width(input), self.width(out));
        let per_hidden = ACTIVATE_FLOPS + transform_flops(&spec.hidden_transform);
        let per_visit = 4 * hidden * input + per_hidden * hidden + 2 * hidden * out + 2 * out;
        cost.flops = (visits * per_visit as f64).round() as u64;
        let share = distinct / spec.experts as f64;
        cost.weight_bytes = (self.all_weights(op) as f64 * share).round() as u64;
    }

    /// The visits to experts of `spec`, and the number of distinct experts.
    fn visits(&self, routing: Routing, spec: &ExpertsSpec) -> (f64, f64) {
        let local = spec.first_expert..spec.first_expert + spec.experts;
        if let RoutingLoad::Counted(counts) = &self.shape.routing
            && let Some(counts) = counts.get(routing.0 as usize)
        {
            let counts = counts.get(local).unwrap_or(&[]);
            let visits: u64 = counts.iter().map(|count| u64::from(*count)).sum();
            let distinct = counts.iter().filter(|count| **count > 0).count();
            return (visits as f64, distinct as f64);
        }
        if let RoutingLoad::Shares(shares) = &self.shape.routing
            && let Some(shares) = shares.get(routing.0 as usize).filter(|all| !all.is_empty())
        {
            let (shares, rows) = (shares.get(local).unwrap_or(&[]), self.rows() as f64);
            let distinct = shares.iter().map(|share| 1.0 - (1.0 - share).powf(rows)).sum();
            return (rows * shares.iter().sum::<f64>(), distinct);
        }
        let is_router = |op: &Op| match op {
            Op::Route { spec, out, .. } if *out == routing => {
                Some((spec.experts as f64, spec.experts_per_token as f64))
            }
            _ => None,
        };
        let router = self.program.ops.iter().find_map(is_router);
        let (experts, per_token) = router.unwrap_or((spec.experts as f64, 1.0));
        let (rows, local) = (self.rows() as f64, spec.experts as f64);
        let distinct = local * (1.0 - (1.0 - per_token / experts).powf(rows));
        (rows * per_token * local / experts, distinct)
    }
}

/// Row `i` sees `cached + i + 1` positions, or the window if that is less.
fn pairs(sequence: &SequenceShape, window: Option<usize>) -> u64 {
    let (cached, rows) = (sequence.cached as u64, sequence.rows as u64);
    let window = window.map_or(u64::MAX, |window| window as u64);
    // The first rows see less than a whole window.
    let growing = window.saturating_sub(cached).min(rows);
    growing * cached + growing * (growing + 1) / 2 + (rows - growing) * window.min(cached + rows)
}

fn positions(sequence: &SequenceShape, window: Option<usize>) -> u64 {
    if sequence.rows == 0 {
        return 0;
    }
    let first = window.map_or(0, |window| (sequence.cached + 1).saturating_sub(window));
    (sequence.cached + sequence.rows - first) as u64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::models::{GroupedStyle, SmallAttention, SmallDecoder};

    /// The sizes of Llama 3.1 8B (with this model's extra norms and biases).
    fn llama_8b() -> Program {
        SmallDecoder {
            layers: 32,
            vocabulary: 128_256,
            width: 4096,
            attention: SmallAttention::Grouped {
                style: GroupedStyle::HeadNorms,
                heads: 32,
                kv_heads: 8,
                head_dim: 128,
            },
            hidden: 14_336,
            experts: None,
            window: None,
            block_tokens: 16,
            long_rope_after: None,
        }
        .program()
    }

    fn bf16(program: &Program) -> impl Fn(Weight) -> u64 + '_ {
        |weight| 2 * program.weight(weight).shape.iter().product::<usize>() as u64
    }

    fn of_kind(program: &Program, cost: &StepCost, kind: &str) -> Cost {
        let mut sum = Cost::default();
        for (op, cost) in program.ops.iter().zip(&cost.ops) {
            if op.kind() == kind {
                sum += *cost;
            }
        }
        sum
    }

    #[test]
    fn llama_8b_by_hand() {
        let program = llama_8b();
        let bytes = bf16(&program);
        let decode = count(&program, &StepShape::decode(4, 1000), &bytes, KvFormat::BF16);
        // A layer: query and output 4096^2, key and value 4096 x 1024, three of 4096 x 14336:
        // 218,103,808 weights, 32 layers 6,979,321,856. Biases: 4096 + 2 x 1024 + 4096.
        let (matrices, biases) = (6_979_321_856, 32 * (4096 + 2048 + 4096));
        let linear = of_kind(&program, &decode, "linear");
        assert_eq!(linear.weight_bytes, 2 * (matrices + biases));
        assert_eq!(linear.flops, 4 * (2 * matrices + biases));
        // Keys and values: 32 layers x 8 heads x 2 x 128 x 2 bytes = 128 KiB a token.
        let attend = of_kind(&program, &decode, "attend");
        assert_eq!(attend.kv_read_bytes, 4 * 1001 * 131_072);
        assert_eq!(attend.flops, 4 * 32 * 32 * 1001 * (2 * 256 + 5));
        assert_eq!(decode.total.kv_write_bytes, 4 * 131_072);
        let logits = of_kind(&program, &decode, "logits");
        assert_eq!(logits.flops, 4 * 2 * 128_256 * 4096);
        assert_eq!(logits.weight_bytes, 2 * 128_256 * 4096);
        assert_eq!(of_kind(&program, &decode, "embed").weight_bytes, 4 * 2 * 4096);

        let prefill = count(&program, &StepShape::prefill(0, 512), &bytes, KvFormat::BF16);
        let attend = of_kind(&program, &prefill, "attend");
        assert_eq!(attend.flops, 32 * 32 * (512 * 513 / 2) * (2 * 256 + 5));
        assert_eq!(attend.kv_read_bytes, 512 * 131_072);
        assert_eq!(of_kind(&program, &prefill, "logits").flops, 2 * 128_256 * 4096);
    }

    #[test]
    fn a_step_is_bound_by_memory_or_by_arithmetic() {
        let program = llama_8b();
        let bytes = bf16(&program);
        let at = |shape: StepShape| {
            let cost = count(&program, &shape, &bytes, KvFormat::BF16);
            // An H100's 3.35 TB/s and 989 TFLOP/s.
            roofline(&cost.total, 3.35e12, 989e12)
        };
        let decode = at(StepShape::decode(1, 128));
        assert_eq!(decode.bound, Bound::Memory);
        // 15.0 GB of weights at 3.35 TB/s.
        assert!((decode.floor_ms - 4.49).abs() < 0.02, "{decode:?}");
        assert!((decode.intensity - 1.0).abs() < 0.02, "{decode:?}");
        let prefill = at(StepShape::prefill(0, 4096));
        assert_eq!(prefill.bound, Bound::Compute);
    }

    #[test]
    fn windows_bound_pairs_and_positions() {
        let naive = |cached: usize, rows: usize, window: usize| -> (u64, u64) {
            let first = |i: usize| (cached + i + 1).saturating_sub(window);
            let pairs = (0..rows).map(|i| (cached + i + 1 - first(i)) as u64).sum();
            (pairs, (cached + rows - first(0)) as u64)
        };
        for (cached, rows, window) in
            [(0, 1, 1), (0, 10, 4), (3, 10, 4), (9, 5, 4), (0, 3, 50), (7, 60, 50), (49, 1, 50)]
        {
            let shape = SequenceShape { cached, rows };
            let found = (pairs(&shape, Some(window)), positions(&shape, Some(window)));
            assert_eq!(found, naive(cached, rows, window), "{cached} {rows} {window}");
        }
        assert_eq!(pairs(&SequenceShape { cached: 5, rows: 2 }, None), 6 + 7);
    }

    #[test]
    fn experts_cost_what_is_visited() {
        let program = SmallDecoder::mixture().program();
        let bytes = bf16(&program);
        let run = |shape: &StepShape| {
            of_kind(&program, &count(&program, shape, &bytes, KvFormat::F32), "experts")
        };
        let per_expert = 2 * (3 * 64 * 64 + 64);
        // Two of eight: one row visits two, sixteen rows 8 (1 - 0.75^16) = 7.92 on average.
        let one = run(&StepShape::decode(1, 0));
        assert_eq!(one.weight_bytes, 2 * 2 * per_expert);
        assert_eq!(one.flops, 2 * 2 * (6 * 64 * 64 + 5 * 64 + 2 * 64));
        let expected = 2.0 * 8.0 * (1.0 - 0.75f64.powi(16)) * per_expert as f64;
        let many = run(&StepShape::decode(16, 0)).weight_bytes as f64;
        assert!((many - expected).abs() < 2.0);
        // All rows visit the first two experts, or half of them visit others.
        let mut uneven = StepShape::decode(3, 0);
        let of = |shares: [f64; 8]| RoutingLoad::Shares(vec![shares.to_vec(); 2]);
        uneven.routing = of([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]);
        assert_eq!(run(&uneven).weight_bytes, 2 * 2 * per_expert);
        assert_eq!(run(&uneven).flops, 3 * one.flops);
        uneven.routing = of([1.0, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0]);
        let expected = 2.0 * (1.0 + 2.0 * (1.0 - 0.125)) * per_expert as f64;
        assert!((run(&uneven).weight_bytes as f64 - expected).abs() < 2.0);
        let mut counted = StepShape::decode(3, 0);
        let counts = vec![3, 0, 0, 0, 0, 2, 1, 0];
        counted.routing = RoutingLoad::Counted(vec![counts.clone(), counts]);
        assert_eq!(run(&counted).weight_bytes, 2 * 3 * per_expert);
        assert_eq!(run(&counted).flops, 3 * one.flops);
    }

    #[test]
    fn latent_attention_takes_the_cheaper_form() {
        let program = SmallDecoder::latent().program();
        let bytes = bf16(&program);
        let flops = |shape: &StepShape| {
            of_kind(&program, &count(&program, shape, &bytes, KvFormat::F32), "attend_latent").flops
        };
        // Four heads, rank 64, rope, nope and value 32, two layers. Decoding absorbs.
        let absorbed = 2 * 64 * 64 + 101 * (2 * (64 + 32 + 64) + 5);
        assert_eq!(flops(&StepShape::decode(1, 100)), 2 * 4 * absorbed);
        let expanded = 200 * 2 * 64 * 64 + 200 * 201 / 2 * (2 * 96 + 5);
        assert_eq!(flops(&StepShape::prefill(0, 200)), 2 * 4 * expanded);
        let cost = count(&program, &StepShape::decode(1, 100), &bytes, KvFormat::BF16).total;
        assert_eq!(cost.kv_read_bytes, 2 * 101 * 96 * 2);
    }
}

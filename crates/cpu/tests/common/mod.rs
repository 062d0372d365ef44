//! A small decoder with random weights, and steps for it.
#![allow(dead_code)] // not every test uses everything

use std::sync::Arc;

use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_program::{
    Activation, AttendSpec, Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions,
    KvFormat, KvLayerShape, LinearSpec, Program, ProgramBuilder, RopeStyle, RopeTable, SequenceId,
    Step, StepSequence, TokenSource, Value, Weight, WeightRole, WeightSource, replace_tables,
};
use lathe_tensor::{Bytes, Format, GgmlType, Tensor, codec};

pub(crate) const VOCABULARY: usize = 97;
pub(crate) const BLOCK_TOKENS: usize = 16;
const WIDTH: usize = 64;

/// Numbers from a seed, in `-1 .. 1`.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        self.0 >> 33
    }
    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }
    fn number(&mut self) -> f32 {
        self.next() as f32 / (1u64 << 30) as f32 - 1.0
    }
}

/// Random weights: matrices in Q8_0 blocks, the rest in f32.
pub(crate) struct RandomWeights(pub Arc<Program>);

impl WeightSource for RandomWeights {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let decl = self.0.weight(weight);
        let mut random = Random(u64::from(weight.0) * 77 + 5);
        let n = decl.shape.iter().product();
        let scale =
            if decl.role == WeightRole::Vector { 1.0 } else { 2.0 / (decl.shape[1] as f32).sqrt() };
        let values: Vec<f32> = (0..n).map(|_| random.number() * scale).collect();
        if decl.role != WeightRole::Linear {
            return Ok(Tensor::from_f32(&decl.shape, &values));
        }
        let format = Format::Ggml(GgmlType::Q8_0);
        let codes = codec::quantize(format, &values);
        Ok(Tensor::new(decl.shape.clone(), format, Bytes::new(codes)).expect("a whole tensor"))
    }
}

/// Layers with 6 query and 2 key heads of 32, the second with a window of 20 and sinks.
pub(crate) fn program(layers: u32) -> Arc<Program> {
    let mut b = ProgramBuilder::new(VOCABULARY, 2048, BLOCK_TOKENS);
    let table = b.weight("embedding", &[VOCABULARY, WIDTH], WeightRole::Embedding, None);
    let rope = b.rope_table(RopeTable {
        long: None,
        inverse_frequencies: (0..16).map(|i| 10000f32.powf(-f32::from(i as u8) / 16.0)).collect(),
        magnitude: 1.0,
        style: RopeStyle::HalfSplit,
    });
    let mut x = b.embed(table, 1.0, "x");
    for layer in 0..layers {
        x = attention(&mut b, x, layer, rope);
        x = feed_forward(&mut b, x, layer);
    }
    let norm = b.weight("final_norm", &[WIDTH], WeightRole::Vector, None);
    let head = b.weight("head", &[VOCABULARY, WIDTH], WeightRole::Head, None);
    let x = b.rms_norm(x, norm, 1e-5, "final");
    b.logits(x, head, 1.0, None);
    Arc::new(b.finish())
}

fn linear(b: &mut ProgramBuilder, name: &str, layer: u32, shape: [usize; 2]) -> LinearSpec {
    LinearSpec::new(
        b.weight(format!("layers.{layer}.{name}"), &shape, WeightRole::Linear, Some(layer)),
        name,
    )
}

fn attention(b: &mut ProgramBuilder, x: Value, layer: u32, rope: lathe_program::Rope) -> Value {
    let vector = |b: &mut ProgramBuilder, name: &str, n: usize| {
        b.weight(format!("layers.{layer}.{name}"), &[n], WeightRole::Vector, Some(layer))
    };
    let norm = vector(b, "attention_norm", WIDTH);
    let normed = b.rms_norm(x, norm, 1e-5, "normed");
    let parts = vec![
        linear(b, "query", layer, [192, WIDTH]),
        linear(b, "key", layer, [64, WIDTH]),
        linear(b, "value", layer, [64, WIDTH]),
    ];
    let qkv = b.linear(normed, parts);
    let query = b.rope(qkv[0], 6, 0, rope, "query_turned");
    let key = b.rope(qkv[1], 2, 0, rope, "key_turned");
    let windowed = layer % 2 == 1;
    let window = windowed.then_some(20);
    let shape = KvLayerShape::Heads { kv_heads: 2, key_dim: 32, value_dim: 32 };
    let kv = b.kv_layer(shape, window);
    b.write_kv(key, qkv[2], kv);
    let sinks = windowed.then(|| vector(b, "sinks", 6));
    let spec = AttendSpec {
        heads: 6,
        kv_heads: 2,
        head_dim: 32,
        value_dim: 32,
        scale: 32f32.powf(-0.5),
        window,
        softcap: windowed.then_some(30.0),
        sinks,
    };
    let mixed = b.attend(query, kv, spec, "mixed");
    let output = linear(b, "output", layer, [WIDTH, 192]);
    let out = b.linear_one(mixed, output);
    b.add(x, out, 1.0, "x")
}

fn feed_forward(b: &mut ProgramBuilder, x: Value, layer: u32) -> Value {
    let norm =
        b.weight(format!("layers.{layer}.ffn_norm"), &[WIDTH], WeightRole::Vector, Some(layer));
    let normed = b.rms_norm(x, norm, 1e-5, "normed");
    let parts = vec![linear(b, "gate", layer, [96, WIDTH]), linear(b, "up", layer, [96, WIDTH])];
    let both = b.linear(normed, parts);
    let hidden = b.activate(both[0], Some(both[1]), Activation::SwiGlu, "hidden");
    let down = linear(b, "down", layer, [WIDTH, 96]);
    let out = b.linear_one(hidden, down);
    b.add(x, out, 1.0, "x")
}

/// A prepared executor of `program`.
pub(crate) fn executor(
    program: &Arc<Program>,
    threads: usize,
    exact: bool,
    kv: Option<KvFormat>,
) -> Box<dyn Executor> {
    let options = ExecutorOptions {
        kv_blocks: 512,
        kv_format: kv,
        rows_max: 128,
        threads: Some(threads),
        exact,
    };
    let backend = CpuBackend::new(CpuOptions::default());
    backend
        .prepare(Arc::clone(program), &RandomWeights(Arc::clone(program)), &options)
        .expect("it prepares")
}

/// A sequence with its own pages, and how far it was run.
pub(crate) struct Sequence {
    pub tokens: Vec<u32>,
    pub cached: usize,
    pub tables: Vec<BlockTable>,
}

impl Sequence {
    /// `length` random tokens, and pages `first_page ..` for them in a random order.
    pub(crate) fn new(
        program: &Program,
        length: usize,
        first_page: u32,
        random: &mut Random,
    ) -> Self {
        let tokens = (0..length).map(|_| random.below(VOCABULARY) as u32).collect();
        let blocks = length.div_ceil(BLOCK_TOKENS) as u32;
        let tables = (0..program.kv.groups.len() as u32).map(|group| {
            let start = first_page + group * blocks;
            let mut blocks: Vec<u32> = (start..start + blocks).collect();
            for i in (1..blocks.len()).rev() {
                blocks.swap(i, random.below(i + 1));
            }
            BlockTable { first: 0, blocks }
        });
        Self { tokens, cached: 0, tables: tables.collect() }
    }
}

/// A step of the next `rows` tokens of each sequence. All logits are asked for.
pub(crate) fn step(parts: &mut [(&mut Sequence, usize)]) -> Step {
    let mut step = Step::default();
    for (sequence, rows) in parts.iter_mut() {
        let (cached, first_row) = (sequence.cached, step.tokens.len() as u32);
        let next = cached..cached + *rows;
        let tokens = sequence.tokens[next.clone()].iter();
        step.tokens.extend(tokens.map(|token| TokenSource::Given(*token)));
        step.positions.extend(next.map(|p| p as u32));
        let id = SequenceId(step.sequences.len() as u32);
        step.tables.extend(replace_tables(id, &sequence.tables));
        step.sequences.push(StepSequence {
            id,
            first_row,
            rows: *rows as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        });
        sequence.cached += *rows;
    }
    step.choices = (0..step.tokens.len() as u32).map(Choice::logits_of).collect();
    step
}

//! Times prefill and decoding of Llama-shaped programs with made-up weights, without a model file.
//!
//! `cargo run --release -p lathe-cpu --example decode_bench -- [smollm2|1b|8b] [format] [threads]
//! [prompt] [generate]` `LATHE_PROFILE=1` adds the time by kind of stage.

use std::sync::Arc;
use std::time::Instant;

use lathe_cpu::machine::measure_bandwidth;
use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_program::{
    Activation, AttendSpec, Backend, BackendError, BlockTable, Choice, Executor, ExecutorOptions,
    KvLayerShape, LinearSpec, Program, ProgramBuilder, Rope, RopeStyle, RopeTable, SequenceId,
    Step, StepSequence, TokenSource, Value, Weight, WeightRole, WeightSource, replace_tables,
};
use lathe_tensor::{Bytes, Format, Tensor, codec};

const BLOCK_TOKENS: usize = 32;

struct Shape {
    layers: u32,
    width: usize,
    hidden: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    vocabulary: usize,
    tied: bool,
}

const SHAPES: [(&str, Shape); 3] = [
    (
        "smollm2",
        Shape {
            layers: 30,
            width: 576,
            hidden: 1536,
            heads: 9,
            kv_heads: 3,
            head_dim: 64,
            vocabulary: 49152,
            tied: true,
        },
    ),
    (
        "1b",
        Shape {
            layers: 16,
            width: 2048,
            hidden: 8192,
            heads: 32,
            kv_heads: 8,
            head_dim: 64,
            vocabulary: 128256,
            tied: true,
        },
    ),
    (
        "8b",
        Shape {
            layers: 32,
            width: 4096,
            hidden: 14336,
            heads: 32,
            kv_heads: 8,
            head_dim: 128,
            vocabulary: 128256,
            tied: false,
        },
    ),
];

/// Weights that repeat a few numbers, because speed does not depend on them.
struct MadeUp {
    program: Arc<Program>,
    format: Format,
}

impl WeightSource for MadeUp {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let decl = self.program.weight(weight);
        let columns = *decl.shape.last().unwrap_or(&1);
        let row: Vec<f32> = (0..columns).map(|i| ((i * 37 % 101) as f32 - 50.0) / 1500.0).collect();
        if decl.role == WeightRole::Vector {
            return Ok(Tensor::from_f32(&decl.shape, &vec![1.0; columns]));
        }
        let big = matches!(decl.role, WeightRole::Embedding | WeightRole::Head);
        let q8 = Format::Ggml(lathe_tensor::GgmlType::Q8_0);
        let format = if big && !matches!(self.format, Format::Float(_)) { q8 } else { self.format };
        let codes = codec::quantize(format, &row);
        let rows: usize = decl.shape[..decl.shape.len() - 1].iter().product();
        Ok(Tensor::new(decl.shape.clone(), format, Bytes::new(codes.repeat(rows)))
            .expect("whole rows"))
    }
}

fn program(shape: &Shape) -> Program {
    let mut b = ProgramBuilder::new(shape.vocabulary, 8192, BLOCK_TOKENS);
    let table =
        b.weight("embedding", &[shape.vocabulary, shape.width], WeightRole::Embedding, None);
    let pairs = shape.head_dim / 2;
    let rope = b.rope_table(RopeTable {
        long: None,
        inverse_frequencies: (0..pairs)
            .map(|i| 10000f32.powf(-(i as f32) / pairs as f32))
            .collect(),
        magnitude: 1.0,
        style: RopeStyle::HalfSplit,
    });
    let mut x = b.embed(table, 1.0, "x");
    for layer in 0..shape.layers {
        x = block(&mut b, shape, x, layer, rope);
    }
    let norm = b.weight("final_norm", &[shape.width], WeightRole::Vector, None);
    let head = b.weight("head", &[shape.vocabulary, shape.width], WeightRole::Head, None);
    let x = b.rms_norm(x, norm, 1e-5, "final");
    b.logits(x, head, 1.0, None);
    b.finish()
}

fn block(b: &mut ProgramBuilder, shape: &Shape, x: Value, layer: u32, rope: Rope) -> Value {
    let (width, dim) = (shape.width, shape.head_dim);
    let linear = |b: &mut ProgramBuilder, name: &str, out: usize, columns: usize| {
        let name = format!("layers.{layer}.{name}");
        LinearSpec::new(
            b.weight(name.clone(), &[out, columns], WeightRole::Linear, Some(layer)),
            name,
        )
    };
    let norm = |b: &mut ProgramBuilder, x: Value, name: &str| {
        let weight =
            b.weight(format!("layers.{layer}.{name}"), &[width], WeightRole::Vector, Some(layer));
        b.rms_norm(x, weight, 1e-5, name)
    };
    let normed = norm(b, x, "attention_norm");
    let parts = vec![
        linear(b, "query", shape.heads * dim, width),
        linear(b, "key", shape.kv_heads * dim, width),
        linear(b, "value", shape.kv_heads * dim, width),
    ];
    let qkv = b.linear(normed, parts);
    let query = b.rope(qkv[0], shape.heads, 0, rope, "query");
    let key = b.rope(qkv[1], shape.kv_heads, 0, rope, "key");
    let cache = KvLayerShape::Heads { kv_heads: shape.kv_heads, key_dim: dim, value_dim: dim };
    let kv = b.kv_layer(cache, None);
    b.write_kv(key, qkv[2], kv);
    let spec = AttendSpec {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: dim,
        value_dim: dim,
        scale: (dim as f32).powf(-0.5),
        window: None,
        softcap: None,
        sinks: None,
    };
    let mixed = b.attend(query, kv, spec, "mixed");
    let output = linear(b, "output", width, shape.heads * dim);
    let out = b.linear_one(mixed, output);
    let x = b.add(x, out, 1.0, "x");
    let normed = norm(b, x, "ffn_norm");
    let parts = vec![linear(b, "gate", shape.hidden, width), linear(b, "up", shape.hidden, width)];
    let both = b.linear(normed, parts);
    let hidden = b.activate(both[0], Some(both[1]), Activation::SwiGlu, "hidden");
    let down = linear(b, "down", width, shape.hidden);
    let out = b.linear_one(hidden, down);
    b.add(x, out, 1.0, "x")
}

fn step(cached: usize, rows: usize) -> Step {
    let blocks = (cached + rows).div_ceil(BLOCK_TOKENS) as u32;
    let table = BlockTable { first: 0, blocks: (0..blocks).collect() };
    Step {
        tokens: (0..rows as u32)
            .map(|i| TokenSource::Given((cached as u32 + i) * 7 % 1000))
            .collect(),
        positions: (cached as u32..(cached + rows) as u32).collect(),
        sequences: vec![StepSequence {
            id: SequenceId(0),
            first_row: 0,
            rows: rows as u32,
            cached: cached as u32,
            expanded: 0,
            long_rope: false,
            ancestors: None,
        }],
        tables: replace_tables(SequenceId(0), &[table]),
        choices: vec![Choice::logits_of(rows as u32 - 1)],
        inputs: Vec::new(),
    }
}

fn run(executor: &mut dyn Executor, cached: usize, rows: usize) -> f64 {
    let step = step(cached, rows);
    let start = Instant::now();
    executor.run(&step).expect("it runs");
    start.elapsed().as_secs_f64()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let argument =
        |i: usize, default: &str| arguments.get(i).cloned().unwrap_or_else(|| default.to_owned());
    let number = |i: usize, default: &str| argument(i, default).parse::<usize>().expect("a number");
    let name = argument(0, "smollm2");
    let (_, shape) = SHAPES.iter().find(|(n, _)| *n == name).expect("smollm2, 1b or 8b");
    let format = Format::parse(&argument(1, "q4_1")).expect("a format");
    let (threads, prompt, generate) = (number(2, "2"), number(3, "512"), number(4, "100"));
    let program = Arc::new(program(shape));
    let source = MadeUp { program: Arc::clone(&program), format };
    let options = ExecutorOptions {
        kv_blocks: (prompt + generate).div_ceil(BLOCK_TOKENS) + 1,
        kv_format: None,
        rows_max: 512,
        threads: Some(threads),
        exact: false,
    };
    let start = Instant::now();
    let backend = CpuBackend::new(CpuOptions::default());
    let mut executor =
        backend.prepare(Arc::clone(&program), &source, &options).expect("it prepares");
    println!(
        "prepared in {:.2} s, {:.1} MB of weights",
        start.elapsed().as_secs_f64(),
        executor.weight_bytes() as f64 / 1e6
    );
    let table = &program.weights[0].shape;
    let table_bytes = if shape.tied { 0 } else { table.iter().product::<usize>() };
    let read = measure_bandwidth(threads).expect("memory to read").read_gb_s;
    let mut prefill = f64::MAX;
    for _ in 0..3 {
        let chunks = (0..prompt).step_by(options.rows_max);
        let time =
            chunks.map(|at| run(&mut *executor, at, options.rows_max.min(prompt - at))).sum();
        prefill = prefill.min(time);
    }
    println!(
        "prefill of {prompt}: {:.1} ms, {:.0} tokens/s",
        prefill * 1e3,
        prompt as f64 / prefill
    );
    let mut times: Vec<f64> = (0..generate).map(|i| run(&mut *executor, prompt + i, 1)).collect();
    times.sort_by(f64::total_cmp);
    // Every weight is read once a step except the embedding's table. A tied head counts.
    let big = 34.0 / 32.0 * table.iter().product::<usize>() as f64;
    let bytes = executor.weight_bytes() as f64 - big.max(table_bytes as f64);
    for (what, time) in [("median", times[generate / 2]), ("best", times[0])] {
        let gb_s = bytes / time / 1e9;
        println!(
            "decode {what}: {:.3} ms, {:.1} tokens/s, {gb_s:.1} of {read:.1} GB/s ({:.0} %)",
            time * 1e3,
            1.0 / time,
            100.0 * gb_s / read
        );
    }
    for rows in [2, 4, 8, 16] {
        let time = (0..10).map(|_| run(&mut *executor, prompt, rows)).fold(f64::MAX, f64::min);
        println!("step of {rows:2}: {:.3} ms, {:.2}x one", time * 1e3, time / times[0]);
    }
}

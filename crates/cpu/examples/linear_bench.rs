//! Compares the speed of the linear kernels with the limits of the machine, measured in one run.
//!
//! `cargo run --release -p lathe-cpu --example linear_bench -- [--isa NAME] [--threads N]
//! [--formats q4_0,bf16] [--rows 1,2,4] [--out N] [--columns N] [--exact] [--prefill]`
//!
//! For each format and number of rows it prints the time of one product, the bytes of weights (as
//! in the file) over that time relative to the measured read bandwidth, and the operations over
//! that time relative to the measured rate in registers. The matrices that take turns are too many
//! for a cache.

use std::time::Instant;

use lathe_cpu::gang::{Gang, available_cores};
use lathe_cpu::linear::{Activations, Operands, Part, matmul};
use lathe_cpu::machine::{last_level_cache_bytes, measure_bandwidth, measure_matmul};
use lathe_cpu::{Isa, linear::Matrix};
use lathe_tensor::{Bytes, Format, Tensor};

struct Options {
    isa: Isa,
    threads: usize,
    formats: Vec<String>,
    rows: Vec<usize>,
    out: usize,
    columns: usize,
    exact: bool,
    prefill: bool,
}

fn options() -> Options {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let value = |name: &str| {
        let at = args.iter().position(|a| a == name)?;
        args.get(at + 1).map(String::as_str)
    };
    let number =
        |name: &str, default: usize| value(name).map_or(default, |v| v.parse().expect("a number"));
    let formats = "q4_0,q4_1,q5_0,q5_1,q8_0,q4_k,q5_k,q6_k,bf16,f16,f32";
    let list = |text: &str| text.split(',').map(str::to_owned).collect::<Vec<_>>();
    Options {
        isa: Isa::select(value("--isa").map(|v| Isa::parse(v).expect("an ISA")))
            .expect("an ISA of this machine"),
        threads: number("--threads", available_cores().count),
        formats: list(value("--formats").unwrap_or(formats)),
        rows: list(value("--rows").unwrap_or("1,2,4,8,16,64,512"))
            .iter()
            .map(|v| v.parse().expect("a number"))
            .collect(),
        out: number("--out", 8192),
        columns: number("--columns", 2048),
        exact: args.iter().any(|a| a == "--exact"),
        prefill: args.iter().any(|a| a == "--prefill"),
    }
}

/// A weight of pseudo-random bytes whose scales are small finite numbers.
fn weight(format: Format, rows: usize, columns: usize) -> Tensor {
    let values: Vec<f32> = (0..16 * columns)
        .map(|i| ((i as u32).wrapping_mul(2654435761) >> 8) as f32 / (1 << 24) as f32 - 0.5)
        .collect();
    let codes = lathe_tensor::codec::quantize(format, &values).repeat(rows / 16);
    Tensor::new(vec![rows, columns], format, Bytes::new(codes)).expect("whole blocks")
}

/// The least of many times of one product, in seconds. Other work on the machine only adds to a
/// time.
fn seconds(gang: &Gang, matrices: &[Matrix], rows: usize, prefill: bool) -> f64 {
    let (out_width, columns) = (matrices[0].rows(), matrices[0].columns());
    let x: Vec<f32> = (0..rows * columns).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect();
    let mut out = vec![0f32; rows * out_width];
    let operands = Operands::of(matrices);
    let mut activations = Activations::new();
    activations.set_forms((0..rows).map(|_| prefill));
    let mut least = f64::INFINITY;
    let begin = Instant::now();
    let mut products = 0;
    while products < 2 * matrices.len() || (begin.elapsed().as_secs_f64() < 0.5 && products < 2000)
    {
        let start = Instant::now();
        activations.prepare(gang, operands, &x, columns);
        let matrix = &matrices[products % matrices.len()];
        matmul(gang, &mut [Part::new(matrix, &mut out)], &activations);
        least = least.min(start.elapsed().as_secs_f64());
        products += 1;
    }
    least
}

fn main() {
    let options = options();
    let gang = Gang::new(options.threads);
    let bandwidth = measure_bandwidth(options.threads).expect("memory");
    let peak = measure_matmul(options.threads, options.isa);
    println!(
        "isa {}, {} threads; read {:.1} GB/s, copy {:.1} GB/s; int8 {:.0}, bf16 {:.0}, f32 {:.0} GOP/s",
        options.isa,
        options.threads,
        bandwidth.read_gb_s,
        bandwidth.copy_gb_s,
        peak.int8_gop_s,
        peak.bf16_gop_s,
        peak.f32_gop_s
    );
    println!("matrix {} x {}", options.out, options.columns);
    println!("format  rows       us    GB/s  of read   GOP/s  of peak  x one row");
    let cache = last_level_cache_bytes().unwrap_or(32 << 20);
    for name in &options.formats {
        let format = Format::parse(name).expect("a format");
        let tensor = weight(format, options.out, options.columns);
        let copies = (3 * cache / tensor.codes.len()).clamp(1, 400) + 1;
        let pack = || Matrix::pack(&tensor, options.isa, options.exact).expect("packs");
        let start = Instant::now();
        let matrices: Vec<Matrix> = (0..copies).map(|_| pack()).collect();
        let packing = copies as f64 * tensor.codes.len() as f64 / start.elapsed().as_secs_f64();
        let peak_rate = match format {
            Format::Float(_) if name == "bf16" && !options.exact => peak.bf16_gop_s,
            Format::Float(_) => peak.f32_gop_s,
            _ if options.exact => peak.f32_gop_s,
            _ => peak.int8_gop_s,
        };
        let mut one = None;
        for &rows in &options.rows {
            let time = seconds(&gang, &matrices, rows, options.prefill);
            let one = *one.get_or_insert(time);
            let rate = tensor.codes.len() as f64 / time / 1e9;
            let operations = 2.0 * (options.out * options.columns * rows) as f64 / time / 1e9;
            println!(
                "{name:6} {rows:5} {:8.0} {rate:7.2} {:7.1}% {operations:7.0} {:7.1}% {:9.2}",
                time * 1e6,
                100.0 * rate / bandwidth.read_gb_s,
                100.0 * operations / peak_rate,
                time / one
            );
        }
        println!("{name:6} packed at {:.2} GB/s", packing / 1e9);
    }
}

//! The conformance suite of `lathe-program` on the GPU. Where there is none, each test says by
//! name that it is skipped; `LATHE_REQUIRE_CUDA=1` makes that a failure.
#![cfg(feature = "device")]

use lathe_cuda::CudaBackend;
use lathe_program::conformance::models::{GroupedStyle, SmallAttention, SmallDecoder};
use lathe_program::conformance::{
    Case, Settings, Size, Summary, Tolerance, batch_invariance, check, check_case, check_case_of,
    choices, trees,
};
use lathe_program::{KvFormat, Program};
use lathe_tensor::Format;

fn backend(test: &str) -> Option<CudaBackend> {
    match CudaBackend::open(0) {
        Ok(backend) => Some(backend),
        Err(error) => {
            assert!(std::env::var_os("LATHE_REQUIRE_CUDA").is_none(), "{test}: {error}");
            println!("{test}: skipped, {error}");
            None
        }
    }
}

/// Rounded inputs are the only feature that the cases use and the kernels lack.
fn run(backend: &CudaBackend, settings: &Settings) {
    let report =
        check(backend, settings).unwrap_or_else(|failure| panic!("{settings:?}: {failure}"));
    println!("{settings:?}: {} cases, worst {}", report.cases, report.worst);
    let lacks = |it: &String| it.contains("activations rounded to");
    assert!(report.unsupported.iter().all(lacks), "{:?}", report.unsupported);
    assert!(report.cases > 10 * settings.seeds as usize, "{} cases", report.cases);
}

#[test]
fn f32_agrees_with_the_reference() {
    let Some(backend) = backend("f32_agrees_with_the_reference") else { return };
    run(&backend, &Settings::default());
}

#[test]
fn bf16_weights_agree_with_the_reference() {
    let Some(backend) = backend("bf16_weights_agree_with_the_reference") else { return };
    let format = Format::parse("bf16").expect("a format");
    run(&backend, &Settings { format, seeds: 4, ..Settings::default() });
}

/// A sum that differs in its last bit can move a stored code by one step.
#[test]
fn cache_formats_agree_with_the_reference() {
    let Some(backend) = backend("cache_formats_agree_with_the_reference") else { return };
    for kv_format in [
        KvFormat::F32,
        KvFormat::F16,
        KvFormat::BF16,
        KvFormat::Int16,
        KvFormat::F8E4M3,
        KvFormat::Int8,
    ] {
        run(&backend, &Settings { kv_format, seeds: 4, ..Settings::default() });
    }
}

#[test]
fn steps_do_not_change_results() {
    let Some(backend) = backend("steps_do_not_change_results") else { return };
    for kv_format in [KvFormat::F32, KvFormat::BF16] {
        let settings = Settings { kv_format, ..Settings::default() };
        batch_invariance(&backend, &settings).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

#[test]
fn choices_are_those_of_the_sampler() {
    let Some(backend) = backend("choices_are_those_of_the_sampler") else { return };
    let settings = Settings { seeds: 4, ..Settings::default() };
    choices(&backend, &settings).unwrap_or_else(|failure| panic!("{failure}"));
}

/// The bounds are those of the CPU backend's test: an accepted branch's rows saw their ancestors
/// in other slots, which is another order of a sum.
#[test]
fn trees_are_plain_decoding() {
    let Some(backend) = backend("trees_are_plain_decoding") else { return };
    for (kv_format, coarse) in [
        (KvFormat::F32, 2e-5),
        (KvFormat::Int16, 1e-3),
        (KvFormat::BF16, 2e-2),
        (KvFormat::F8E4M3, 0.2),
    ] {
        let tolerance = Tolerance { absolute: coarse, relative: coarse };
        let settings = Settings { kv_format, tolerance, seeds: 2, ..Settings::default() };
        trees(&backend, &settings).unwrap_or_else(|failure| panic!("{kv_format:?}: {failure}"));
    }
}

/// What runs where the executor need not be exact: products on tensor cores, attention in shares,
/// ops that run together. Only a cache of f32 shows how good their sums are.
fn fast(kv_format: KvFormat, coarse: f32) -> Settings {
    let format = Format::parse("bf16").expect("a format");
    let tolerance = Tolerance { absolute: coarse, relative: coarse };
    Settings { format, kv_format, exact: false, tolerance, seeds: 6, threads: None }
}

#[test]
fn fast_kernels_agree_with_the_reference() {
    let Some(backend) = backend("fast_kernels_agree_with_the_reference") else { return };
    run(&backend, &fast(KvFormat::F32, 1e-4));
    run(&backend, &fast(KvFormat::BF16, 2e-2));
}

#[test]
fn fast_kernels_choose() {
    let Some(backend) = backend("fast_kernels_choose") else { return };
    let settings = fast(KvFormat::BF16, 2e-2);
    choices(&backend, &settings).unwrap_or_else(|failure| panic!("{failure}"));
}

/// A decoder whose products have rows of several chunks of weights, and tiles that are not full.
fn wide(heads: usize, kv_heads: usize, head_dim: usize) -> Program {
    wide_of(heads, kv_heads, head_dim, [1056, 2080])
}

fn wide_of(heads: usize, kv_heads: usize, head_dim: usize, [width, hidden]: [usize; 2]) -> Program {
    let style = GroupedStyle::HeadNorms;
    let attention = SmallAttention::Grouped { style, heads, kv_heads, head_dim };
    let decoder = SmallDecoder {
        vocabulary: 1031,
        width,
        hidden,
        window: Some(40),
        block_tokens: 16,
        attention,
        ..SmallDecoder::grouped()
    };
    decoder.program()
}

/// Heads of both sizes.
#[test]
fn fast_kernels_agree_on_wide_decoders() {
    let Some(backend) = backend("fast_kernels_agree_on_wide_decoders") else { return };
    for (heads, kv_heads, head_dim) in [(8, 2, 64), (6, 2, 64), (8, 1, 128), (2, 2, 128)] {
        let program = wide(heads, kv_heads, head_dim);
        let case = Case { name: format!("{heads} heads of {head_dim}"), program, attends: true };
        for (kv_format, coarse) in [(KvFormat::F32, 1e-3), (KvFormat::BF16, 4e-2)] {
            let mut report = Summary::default();
            check_case(&backend, &fast(kv_format, coarse), &case, &mut report)
                .unwrap_or_else(|failure| panic!("{kv_format:?}: {failure}"));
            println!("{}, {kv_format:?}: worst {}", case.name, report.worst);
            assert!(report.numbers > 0 && report.unsupported.is_empty(), "{report:?}");
        }
    }
}

/// Up to 64 rows keep nearly all bits of the activations. More round them to `bf16`: 2^-9 of each,
/// and the bound is for the largest of some 400,000 sums of such numbers.
#[test]
fn large_steps_agree_on_wide_decoders() {
    let Some(backend) = backend("large_steps_agree_on_wide_decoders") else { return };
    for (rows_max, kv_format, coarse) in [
        (33, KvFormat::F32, 1e-3),
        (64, KvFormat::F32, 1e-3),
        (64, KvFormat::BF16, 4e-2),
        (120, KvFormat::F32, 8e-2),
        (400, KvFormat::BF16, 8e-2),
    ] {
        let mut report = Summary::default();
        for (heads, kv_heads, head_dim) in [(6, 2, 64), (8, 2, 128)] {
            let program = wide(heads, kv_heads, head_dim);
            let name = format!("{heads} heads of {head_dim}");
            let case = Case { name, program, attends: true };
            let size = Size { rows_max, tokens: 3 * rows_max };
            check_case_of(&backend, &fast(kv_format, coarse), &case, size, &mut report)
                .unwrap_or_else(|failure| panic!("{rows_max} rows, {kv_format:?}: {failure}"));
        }
        println!("{rows_max} rows, {kv_format:?}: worst {} of {}", report.worst, report.numbers);
        assert!(report.numbers > rows_max * 1031 && report.unsupported.is_empty(), "{report:?}");
    }
}

/// Codes with scales. Up to four rows, and e4m3 with any number, multiply the codes and then the
/// sums; more rows multiply four-bit codes by their group's scale first, which rounds the scale and
/// the weight to `bf16`: as much as rounding activations.
#[test]
fn codes_with_scales_agree_on_wide_decoders() {
    let Some(backend) = backend("codes_with_scales_agree_on_wide_decoders") else { return };
    for name in [
        "f8e4m3-channel-f32",
        "f8e4m3-tensor-bf16",
        "int4-channel-f32",
        "int4-g64-f16",
        "int4-g128-bf16",
    ] {
        let format = Format::parse(name).expect("a format");
        let grouped = format.block_len() > 1;
        for (rows_max, tokens, coarse) in [
            (3, 20, 1e-3),
            (4, 30, 1e-3),
            (17, 60, if grouped { 8e-2 } else { 1e-3 }),
            (64, 150, if grouped { 8e-2 } else { 1e-3 }),
            (300, 600, 8e-2),
        ] {
            let mut report = Summary::default();
            let program = wide_of(6, 2, 64, [1152, 2176]);
            let case = Case { name: name.to_owned(), program, attends: true };
            let settings = Settings { format, ..fast(KvFormat::F32, coarse) };
            let size = Size { rows_max, tokens };
            check_case_of(&backend, &settings, &case, size, &mut report)
                .unwrap_or_else(|failure| panic!("{rows_max} rows: {failure}"));
            println!("{name}, {rows_max} rows: worst {} of {}", report.worst, report.numbers);
            assert!(report.numbers > 1031 && report.unsupported.is_empty(), "{report:?}");
        }
    }
}

#[test]
fn exact_executors_hold_any_format_as_f32() {
    let Some(backend) = backend("exact_executors_hold_any_format_as_f32") else { return };
    for name in ["f8e4m3-channel-f32", "int4-g32-f16-asym", "q4_k", "mxfp4"] {
        let format = Format::parse(name).expect("a format");
        run(&backend, &Settings { format, seeds: 2, ..Settings::default() });
    }
}

/// The tolerance is used: a bound of nothing fails.
#[test]
fn no_tolerance_is_not_met() {
    let Some(backend) = backend("no_tolerance_is_not_met") else { return };
    let tolerance = Tolerance { absolute: 1e-30, relative: 0.0 };
    assert!(check(&backend, &Settings { tolerance, seeds: 2, ..Settings::default() }).is_err());
}

//! The conformance suite of `lathe-program`, on the strongest instruction set of this machine.

use lathe_cpu::{CpuBackend, CpuOptions, Isa};
use lathe_program::KvFormat;
use lathe_program::conformance::{
    Settings, Summary, Tolerance, batch_invariance, check, choices, trees,
};
use lathe_tensor::{Format, GgmlType};

fn run(settings: &Settings) -> Summary {
    run_with(None, settings)
}

fn run_with(isa: Option<Isa>, settings: &Settings) -> Summary {
    let backend = CpuBackend::new(CpuOptions { isa });
    let report =
        check(&backend, settings).unwrap_or_else(|failure| panic!("{settings:?}: {failure}"));
    println!("{settings:?}: {report:?}");
    assert!(report.unsupported.is_empty(), "{settings:?}: {:?}", report.unsupported);
    report
}

#[test]
fn exact_agrees_with_the_reference() {
    run(&Settings { threads: Some(2), ..Settings::default() });
}

#[test]
fn every_cache_format_agrees_with_the_reference() {
    for kv_format in KvFormat::ALL {
        let settings = Settings { kv_format, threads: Some(2), seeds: 4, ..Settings::default() };
        run(&settings);
    }
}

/// Exact products of quantized weights are as good as those of floats. The default path rounds the
/// input of a product to two bytes, which errs by at most 1/32512 of the largest of 32 elements.
/// The experts of the cases multiply two such products of some tens and sum several: the largest
/// error seen is 4e-3. Weights of four bits have steps eight times as large: the largest error seen
/// is 1.5e-2. With one byte the same cases would differ by half a unit, and with another expert by
/// some units.
#[test]
fn quantized_weights_agree_with_the_reference() {
    for kind in [GgmlType::Q8_0, GgmlType::Q4_0, GgmlType::Q4_1] {
        let exact = Settings {
            format: Format::Ggml(kind),
            threads: Some(2),
            seeds: 4,
            ..Settings::default()
        };
        run(&exact);
        let coarser = if kind == GgmlType::Q8_0 { 1.0 } else { 8.0 };
        let tolerance = Tolerance { absolute: coarser * 8e-3, relative: coarser * 1e-3 };
        let tight = Settings { exact: false, tolerance, ..exact };
        if Isa::detect() != Isa::Amx {
            run(&tight);
            continue;
        }
        run_with(Some(Isa::Avx512), &tight);
        // Rows in the prefill form multiply weights that are rounded to bf16, which errs by at most
        // 1/512 of each. That is 32 times the error of two bytes in the same cases.
        let tolerance = Tolerance { absolute: 0.25, relative: 1e-2 };
        run(&Settings { tolerance, ..tight });
    }
}

#[test]
fn choices_are_those_of_the_sampler() {
    let backend = CpuBackend::new(CpuOptions::default());
    let settings = Settings { seeds: 4, threads: Some(2), ..Settings::default() };
    choices(&backend, &settings).unwrap_or_else(|failure| panic!("{failure}"));
}

/// A chain has the bits of plain decoding. The rows of an accepted branch saw their ancestors in
/// other slots: the same terms in other lanes of a sum. So what follows differs by the rounding of
/// `f32`, and by a code of the cache where that rounding moves one.
#[test]
fn trees_are_plain_decoding() {
    let backend = CpuBackend::new(CpuOptions::default());
    for kv_format in KvFormat::ALL {
        let coarse = match kv_format {
            KvFormat::F32 => 2e-5,
            KvFormat::Int16 => 1e-3,
            KvFormat::F16 | KvFormat::BF16 => 2e-2,
            KvFormat::F8E4M3 | KvFormat::Int8 | KvFormat::Int4 => 0.2,
        };
        let tolerance = Tolerance { absolute: coarse, relative: coarse };
        let settings =
            Settings { kv_format, tolerance, seeds: 2, threads: Some(2), ..Settings::default() };
        trees(&backend, &settings).unwrap_or_else(|failure| panic!("{kv_format:?}: {failure}"));
    }
}

#[test]
fn steps_do_not_change_results() {
    let backend = CpuBackend::new(CpuOptions::default());
    let (floats, blocks) = (Format::F32, Format::Ggml(GgmlType::Q8_0));
    for (format, kv_format, exact) in [
        (floats, KvFormat::F32, true),
        (floats, KvFormat::F32, false),
        (blocks, KvFormat::F32, true),
        (blocks, KvFormat::F32, false),
        (blocks, KvFormat::Int4, false),
    ] {
        let settings =
            Settings { format, kv_format, exact, threads: Some(2), ..Settings::default() };
        batch_invariance(&backend, &settings).unwrap_or_else(|failure| panic!("{failure}"));
    }
}

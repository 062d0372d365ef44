//! Tests on tensors that are made so that each source of error is known.

use lathe_tensor::codec::scaled::{BlockScale, quantize, quantize_with};
use lathe_tensor::{GgmlType, GlobalScale};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::*;
use crate::technique::tests::normal;

const FP4: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

fn format(name: &str) -> Format {
    Format::parse(name).unwrap()
}

fn rounded(name: &str, shape: &[usize], values: &[f32]) -> Tensor {
    match format(name) {
        Format::Scaled(scaled) => quantize(shape, &scaled, values, E8m0Rounding::Even).unwrap(),
        other => {
            let codes = Bytes::new(codec_of(other, values));
            Tensor::new(shape.to_vec(), other, codes).unwrap()
        }
    }
}

fn codec_of(format: Format, values: &[f32]) -> Vec<u8> {
    lathe_tensor::codec::quantize(format, values)
}

fn gaussian(count: usize, seed: u64) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| normal(&mut random)).collect()
}

fn inputs(columns: usize, size: impl Fn(usize) -> f32) -> Statistics {
    let mut statistics = Statistics::new(columns);
    let mut rows = gaussian(200 * columns, 9);
    rows.iter_mut().enumerate().for_each(|(at, x)| *x *= size(at % columns));
    statistics.add(&rows);
    statistics
}

fn sums(sources: &Sources) -> f64 {
    sources.parts().iter().map(|(_, part)| part).sum()
}

#[test]
fn the_parts_are_the_whole_in_every_format() {
    let values = gaussian(8 * 256, 1);
    let statistics = inputs(256, |_| 1.0);
    let mut names: Vec<String> =
        GgmlType::ALL.iter().map(|kind| Format::Ggml(*kind).to_string()).collect();
    let scaled = "int4-g32-bf16 int4-channel-f16 int3-tensor-f32 int8-tile4x64-f32 int2-g16-f32-asym \
                  f8e4m3-channel-f32 f8e5m2-tensor-f32 mxfp8 mxfp6 mxfp6_e3m2 mxfp4 nvfp4 bf16";
    names.extend(scaled.split_whitespace().map(str::to_owned));
    for name in names {
        let tensor = rounded(&name, &[8, 256], &values);
        let found = explain_tensor(&values, &tensor, Some(&statistics));
        let squares = |list: &[f32]| list.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
        let difference: Vec<f32> =
            tensor.to_f32().iter().zip(&values).map(|(a, b)| a - b).collect();
        let error = squares(&difference) / squares(&values);
        for measured in [found.weights, found.outputs.unwrap()] {
            let sources = measured.sources;
            assert!((sums(&sources) - sources.total).abs() < 1e-12, "{name}: {sources:?}");
            assert!(sources.rounding > 0.0 && sources.rounding < 3.0 * sources.total, "{name}");
            // For nearest codes, the tensor's error equals the last round but one, to the bit.
            let nearest = matches!(tensor.format, Format::Scaled(_));
            assert!(!nearest || sources.codes == 0.0, "{name}: {sources:?}");
        }
        // Outputs sum errors of several weights, so a larger weight error may make them better.
        let clipping = found.weights.sources.clipping;
        assert!(clipping.is_none_or(|it| it >= 0.0), "{name}: {clipping:?}");
        assert!((found.weights.sources.total / error - 1.0).abs() < 1e-9, "{name}");
        assert!((found.weights.sqnr_db + 10.0 * error.log10()).abs() < 1e-9, "{name}");
    }
}

/// Each row contains the largest code, so that the range gives the scales of the data.
fn on_fp4_grid(scale: f32) -> Vec<f32> {
    (0..4 * 64)
        .map(|i| FP4[(i * 7 + i / 32) % 8].max(if i % 32 == 0 { 6.0 } else { 0.0 }))
        .enumerate()
        .map(|(i, v)| if i % 3 == 1 { -v * scale } else { v * scale })
        .collect()
}

#[test]
fn data_on_the_grid_has_no_error() {
    let values = on_fp4_grid(0.25);
    for name in ["f4e2m1-g32-f32", "mxfp4"] {
        let found = explain_tensor(&values, &rounded(name, &[4, 64], &values), None);
        assert_eq!(found.weights.sqnr_db, NO_NOISE_DB);
        assert!(found.weights.sources.parts().iter().all(|(_, part)| *part == 0.0), "{found:?}");
        assert!(found.outputs.is_none());
    }
}

#[test]
fn powers_of_two_are_the_scale_formats_error() {
    // 6 * 1.4 = 8.4 gets the scale 2. The expectation uses a list of fp4's numbers.
    let values = on_fp4_grid(1.4);
    let tensor = rounded("mxfp4", &[4, 64], &values);
    let (mut error, mut signal) = (0.0, 0.0);
    for value in &values {
        let nearest = FP4.iter().map(|code| (2.0 * code - value.abs()).abs());
        error += f64::from(nearest.fold(f32::INFINITY, f32::min)).powi(2);
        signal += f64::from(*value).powi(2);
    }
    let sources = explain_tensor(&values, &tensor, None).weights.sources;
    assert!((sources.scale_format.unwrap() - error / signal).abs() < 1e-6, "{sources:?}");
    assert!((sources.total - error / signal).abs() < 1e-6, "{sources:?}");
    assert!(sources.rounding < 1e-12 && sources.clipping == Some(0.0), "{sources:?}");
}

#[test]
fn an_outlier_channel_is_found_in_weights_and_in_inputs() {
    let mut values = gaussian(32 * 128, 3);
    values.iter_mut().skip(5).step_by(128).for_each(|value| *value *= 60.0);
    let tensor = rounded("int4-channel-f32", &[32, 128], &values);
    let found = explain_tensor(&values, &tensor, None);
    assert_eq!(found.outlier_channels, 1);
    let sources = found.weights.sources;
    assert!(sources.outliers > 0.8 * sources.total, "{sources:?}");
    // Without the outlier, the error would be that of the others with their own range.
    let rest: Vec<f32> =
        values.iter().enumerate().filter(|(i, _)| i % 128 != 5).map(|it| *it.1).collect();
    let alone = explain_tensor(&rest, &rounded("int4-channel-f32", &[32, 127], &rest), None);
    let square = |all: &[f32]| all.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
    let expected = alone.weights.sources.total * square(&rest) / square(&values);
    assert!((sources.rounding / expected - 1.0).abs() < 1e-6, "{sources:?} {expected}");

    let values = gaussian(32 * 128, 4);
    let tensor = rounded("int4-channel-f32", &[32, 128], &values);
    let statistics = inputs(128, |column| if column == 40 { 100.0 } else { 1.0 });
    let found = explain_tensor(&values, &tensor, Some(&statistics));
    let sources = found.outputs.unwrap().sources;
    assert_eq!(found.outlier_channels, 1);
    assert!(sources.outliers > 0.9 * sources.total, "{sources:?}");
    assert!(found.weights.sources.outliers < 0.02 * found.weights.sources.total);
}

#[test]
fn clipping_scales_and_codes_are_told_apart() {
    let values = gaussian(16 * 64, 5);
    let Format::Scaled(scaled) = format("int4-channel-f32") else { panic!("codes and scales") };
    let scales = |ratio: f32| -> Vec<BlockScale> {
        let largest = |row: &[f32]| row.iter().fold(0f32, |m, v| m.max(v.abs()));
        let one = |row: &[f32]| BlockScale { scale: ratio * largest(row) / 7.5, zero: 0 };
        values.chunks(64).map(one).collect()
    };
    let under = |ratio: f32| {
        quantize_with(&[16, 64], &scaled, &values, &scales(ratio), GlobalScale::One).unwrap()
    };
    let half = explain_tensor(&values, &under(0.3), None).weights.sources;
    assert!(half.clipping.unwrap() > 0.8 * half.total && half.scale_choice < 0.0, "{half:?}");
    let wide = explain_tensor(&values, &under(3.0), None).weights.sources;
    assert!(wide.scale_choice > 0.8 * wide.total && wide.clipping == Some(0.0), "{wide:?}");
    // One code of each eight is moved by one, so the codes alone cause the error.
    let mut tensor = under(1.0);
    let moved: Vec<u8> = tensor
        .codes
        .iter()
        .enumerate()
        .map(|(at, byte)| if at % 4 == 0 { byte & 0xf0 | byte.wrapping_add(1) & 15 } else { *byte })
        .collect();
    tensor.codes = Bytes::new(moved);
    let codes = explain_tensor(&values, &tensor, None).weights.sources;
    assert!(codes.codes > 0.5 * codes.total && codes.rounding > 0.0, "{codes:?}");
    assert!((sums(&codes) - codes.total).abs() < 1e-12);
}

#[test]
fn theory_is_the_books_formula_for_one_scale() {
    let values = gaussian(64 * 512, 6);
    for bits in [4, 6, 8] {
        let name = format!("int{bits}-tensor-f32");
        let found = explain_tensor(&values, &rounded(&name, &[64, 512], &values), None);
        let levels = f64::from((1u32 << bits) - 1);
        let formula = 20.0 * levels.log10() + 10.0 * 3f64.log10() - found.peak_db;
        let theory = found.weights.theory_sqnr_db;
        assert!((theory - formula).abs() < 1e-3, "{bits}: {theory} {formula}");
        assert!((found.weights.sqnr_db - theory).abs() < 0.1, "{bits}: {found:?}");
    }
    // Floats have steps of all sizes. The noise is their mixture.
    let tensor = rounded("f8e4m3-channel-f32", &[64, 512], &values);
    let found = explain_tensor(&values, &tensor, None).weights;
    assert!((found.sqnr_db - found.theory_sqnr_db).abs() < 0.1, "{found:?}");
}

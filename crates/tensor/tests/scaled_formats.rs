//! Formats with scales of their own, against results that `tests/peers/scaled_formats.py`
//! computed without this crate.

use std::path::{Path, PathBuf};

use lathe_tensor::codec::scaled::{self, BlockScale, E8m0Rounding};
use lathe_tensor::codec::{self, element};
use lathe_tensor::safetensors::SafetensorsFile;
use lathe_tensor::{
    Block, Bytes, Element, Format, GgmlType, GlobalScale, ScaleType, ScaledFormat, Tensor,
    TensorError, ZeroPoint,
};
use serde_json::Value;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tensor").join(name)
}

fn format(name: &str) -> ScaledFormat {
    match Format::parse(name) {
        Ok(Format::Scaled(format)) => format,
        other => panic!("{name}: {other:?}"),
    }
}

#[test]
fn casts_agree_with_ml_dtypes() {
    let file = SafetensorsFile::open(&fixture("casts.safetensors")).unwrap();
    for (name, element) in [
        ("f8e4m3", Element::F8E4M3),
        ("f8e5m2", Element::F8E5M2),
        ("f6e2m3", Element::F6E2M3),
        ("f6e3m2", Element::F6E3M2),
        ("f4e2m1", Element::F4E2M1),
    ] {
        let numbers = file.tensor(&format!("{name}.numbers")).unwrap().to_f32();
        let codes = &file.raw(&format!("{name}.codes")).unwrap().bytes;
        assert_eq!(numbers.len(), codes.len());
        for (number, code) in numbers.iter().zip(codes.iter()) {
            assert_eq!(element::from_f32(element, *number), *code, "{name} of {number:e}");
        }
    }
}

/// SplitMix64, in (0, 1).
fn uniform(seed: u64, count: u64) -> impl Iterator<Item = f64> {
    (1..=count).map(move |i| {
        let mut z = (i + (seed << 32)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^= z >> 31;
        ((z >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    })
}

const SHAPE: [usize; 2] = [512, 1024];

fn samples(source: &str) -> Vec<f32> {
    let count = 1 << 19;
    if source == "gaussian" {
        let angles = uniform(2, count).map(|u| (std::f64::consts::TAU * u).cos());
        let radii = uniform(1, count).map(|u| (-2.0 * u.ln()).sqrt());
        radii.zip(angles).map(|(r, c)| (r * c) as f32).collect()
    } else {
        let centred = uniform(3, count).map(|u| u - 0.5);
        centred.map(|u| (-u.signum() * (1.0 - 2.0 * u.abs()).ln()) as f32).collect()
    }
}

fn decibels(values: &[f32], found: &[f32]) -> f64 {
    let signal: f64 = values.iter().map(|&v| f64::from(v).powi(2)).sum();
    let pairs = values.iter().zip(found);
    let noise: f64 = pairs.map(|(&v, &f)| (f64::from(v) - f64::from(f)).powi(2)).sum();
    10.0 * (signal / noise).log10()
}

#[test]
fn noise_agrees_with_the_table_in_double_precision() {
    let table = std::fs::read_to_string(fixture("sqnr.json")).unwrap();
    let table: Value = serde_json::from_str(&table).unwrap();
    for (source, rows) in table.as_object().unwrap() {
        let values = samples(source);
        for (key, expected) in rows.as_object().unwrap() {
            let (name, rounding) = key.split_once('/').unwrap_or((key, "floor"));
            let rounding = match rounding {
                "floor" => E8m0Rounding::Floor,
                "ceil" => E8m0Rounding::Ceil,
                "even" => E8m0Rounding::Even,
                _ => E8m0Rounding::Mse,
            };
            let tensor = scaled::quantize(&SHAPE, &format(name), &values, rounding).unwrap();
            let found = decibels(&values, &tensor.to_f32());
            let expected = expected.as_f64().unwrap();
            assert!((found - expected).abs() < 0.02, "{source} {key}: {found} for {expected} dB");
        }
    }
}

/// GGUF's types on the first rows, searches included: both searches end near the least error.
#[test]
fn noise_of_ggufs_types_agrees_with_the_table() {
    let table = std::fs::read_to_string(fixture("sqnr_ggml.json")).unwrap();
    let table: Value = serde_json::from_str(&table).unwrap();
    for (source, rows) in table.as_object().unwrap() {
        let values = &samples(source)[..128 * SHAPE[1]];
        for kind in GgmlType::ALL {
            let format = Format::Ggml(kind);
            let mut found = vec![0.0; values.len()];
            codec::dequantize(format, &codec::quantize(format, values), &mut found);
            let found = decibels(values, &found);
            let expected = rows[&format.to_string()].as_f64().unwrap();
            assert!((found - expected).abs() < 0.1, "{source} {format}: {found} for {expected} dB");
        }
    }
}

#[test]
fn blocks_cut_off_at_the_edges() {
    // Rows and columns that are no multiple of anything, in a stack of matrices.
    let shape = [2, 5, 7];
    let values: Vec<f32> = (0..70).map(|i| (i as f32 * 0.7).sin() * (i + 1) as f32).collect();
    for (block, scales) in [
        (Block::Tensor, 2),
        (Block::Channel, 10),
        (Block::Tile(2, 3), 2 * 3 * 3),
        (Block::Tile(128, 128), 2),
        (Block::Group(7), 10),
    ] {
        for bits in 2..=8 {
            for zero in [ZeroPoint::None, ZeroPoint::Int] {
                let element = Element::Int(bits);
                let format = ScaledFormat { element, block, scale: ScaleType::F32, zero };
                let tensor = scaled::quantize(&shape, &format, &values, E8m0Rounding::Floor);
                let tensor = tensor.unwrap();
                assert_eq!(tensor.scales.len(), 4 * scales);
                assert_eq!(tensor.codes.len(), 10 * (7 * usize::from(bits)).div_ceil(8));
                let found = tensor.to_f32();
                let range = ((1 << bits) - 1) as f32 / 2.0;
                let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let worst = values.iter().zip(&found).map(|(v, f)| (v - f).abs());
                let worst = worst.fold(0.0, f32::max);
                assert!(worst <= largest / range * 1.001, "{format}: {worst}");
            }
        }
    }
}

#[test]
fn rows_keep_their_scales() {
    let shape = [2, 4, 32];
    let values: Vec<f32> = (0..256).map(|i| (i as f32).sin() * (1 + i / 32) as f32).collect();
    for name in
        ["mxfp4", "nvfp4", "int4-channel-f32-asym", "f8e4m3-tile2x16-f32", "int8-tensor-f32"]
    {
        let tensor = scaled::quantize(&shape, &format(name), &values, E8m0Rounding::Floor).unwrap();
        let all = tensor.to_f32();
        assert_eq!(tensor.slice_rows(4..8).unwrap().to_f32(), all[128..], "{name}");
        assert_eq!(tensor.slice_rows(2..4).unwrap().to_f32(), all[64..128], "{name}");
        assert_eq!(tensor.slice_rows(0..0).unwrap().rows(), 0);
        let across = tensor.slice_rows(3..5);
        if matches!(name, "mxfp4" | "int4-channel-f32-asym") {
            assert_eq!(across.unwrap().to_f32(), all[96..160], "{name}");
            let gathered = tensor.gather_rows(&[7, 0]).unwrap().to_f32();
            assert_eq!((&gathered[..32], &gathered[32..]), (&all[224..], &all[..32]), "{name}");
        } else {
            assert!(matches!(across, Err(TensorError::Rows { .. })), "{name}");
        }
    }
}

#[test]
fn global_scales_multiply_or_divide() {
    let blocks = [BlockScale { scale: 2.0, zero: 0 }; 2];
    let codes = [7u8; 32];
    let format = ScaledFormat::NVFP4;
    let read = |global| {
        scaled::assemble(&[2, 1, 16], &format, &codes, &blocks, global).map(|t| t.to_f32())
    };
    let multiplied = read(GlobalScale::Multiply(vec![0.1, 3.0])).unwrap();
    assert_eq!((multiplied[0], multiplied[16]), (6.0 * (2.0 * 0.1), 36.0));
    let divided = read(GlobalScale::Divide(vec![3.0, 0.5])).unwrap();
    assert_eq!((divided[0], divided[16]), (6.0 * (2.0 / 3.0), 24.0));
    assert!(matches!(read(GlobalScale::One), Err(TensorError::Side { .. })));
    assert!(matches!(read(GlobalScale::Multiply(vec![1.0])), Err(TensorError::Side { .. })));
}

#[test]
fn odd_blocks_keep_their_meaning() {
    let mx = |values: [f32; 32], rounding| {
        scaled::quantize(&[32], &ScaledFormat::MXFP4, &values, rounding).unwrap().to_f32()
    };
    for rounding in [E8m0Rounding::Floor, E8m0Rounding::Ceil, E8m0Rounding::Even, E8m0Rounding::Mse]
    {
        assert_eq!(mx([0.0; 32], rounding), [0.0; 32]);
        // The largest number is exactly representable in all of them.
        assert_eq!(mx([-6.0; 32], rounding), [-6.0; 32], "{rounding:?}");
        let large = mx([1e38; 32], rounding)[0];
        assert!((large - 1e38).abs() < 0.25e38, "{rounding:?}: {large}");
        assert_eq!(mx([1e-45; 32], rounding)[0], 0.0, "{rounding:?}");
        assert!(mx([f32::NAN; 32], rounding)[31].is_nan(), "{rounding:?}");
        assert!(mx([f32::INFINITY; 32], rounding)[0].is_nan(), "{rounding:?}");
    }
    // 7 saturates with floor, and does not with the others.
    let sevens = |rounding| mx([7.0; 32], rounding)[0];
    assert_eq!(sevens(E8m0Rounding::Floor), 6.0);
    assert_eq!(sevens(E8m0Rounding::Ceil), 8.0);
    assert_eq!(sevens(E8m0Rounding::Even), 8.0);
    let zeros = scaled::quantize(&[2, 16], &ScaledFormat::NVFP4, &[0.0; 32], E8m0Rounding::Floor);
    assert_eq!(zeros.unwrap().to_f32(), [0.0; 32]);
    let zeros =
        scaled::quantize(&[4], &format("int4-channel-f16-asym"), &[0.0; 4], E8m0Rounding::Floor);
    assert_eq!(zeros.unwrap().to_f32(), [0.0; 4]);
}

#[test]
fn planes_of_the_wrong_size_are_refused() {
    let empty = || Bytes::new(Vec::new());
    let format = Format::Scaled(format("int4-g32-f16-asym"));
    let make = |codes: usize, scales: usize, zeros: usize| {
        let bytes = |n: usize| Bytes::new(vec![0u8; n]);
        let planes = (bytes(codes), bytes(scales), bytes(zeros));
        Tensor::new_scaled(vec![2, 64], format, planes.0, planes.1, planes.2, GlobalScale::One)
    };
    assert!(make(64, 8, 4).is_ok());
    assert!(matches!(make(63, 8, 4), Err(TensorError::Size { expected: 64, .. })));
    assert!(matches!(make(64, 4, 4), Err(TensorError::Side { expected: 8, .. })));
    assert!(matches!(make(64, 8, 8), Err(TensorError::Side { expected: 4, .. })));
    let mx = Format::Scaled(ScaledFormat::MXFP4);
    assert!(matches!(Tensor::new(vec![2, 33], mx, empty()), Err(TensorError::Block { .. })));
}

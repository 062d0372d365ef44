//! Compares formats of activations, and powers of two of MX blocks, with what compressed-tensors
//! and torchao made of the same rows (`tests/peers/activation_formats.py`).

use std::path::Path;

use lathe_tensor::codec::scaled::{self, E8m0Rounding};
use lathe_tensor::safetensors::SafetensorsFile;
use lathe_tensor::{ActivationFormat, ScaledFormat};

const WIDTH: usize = 64;

fn fixture() -> SafetensorsFile {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tensor");
    SafetensorsFile::open(&folder.join("activations.safetensors")).unwrap()
}

/// Blocks of 32 in which some number differs by more than a part in a million.
fn differing<'a>(
    rows: &'a [f32],
    found: &'a [f32],
    expected: &'a [f32],
) -> Vec<(&'a [f32], &'a [f32], &'a [f32])> {
    assert!(!rows.is_empty() && rows.len() == found.len() && rows.len() == expected.len());
    let close = |(a, b): (&f32, &f32)| {
        (a.is_nan() && b.is_nan()) || (a - b).abs() <= 1e-6 * b.abs() || a == b
    };
    let all = rows.chunks(32).zip(found.chunks(32)).zip(expected.chunks(32));
    all.map(|((row, found), expected)| (row, found, expected))
        .filter(|(_, found, expected)| !found.iter().zip(*expected).all(close))
        .collect()
}

#[test]
fn rows_are_rounded_as_compressed_tensors_does() {
    let file = fixture();
    let rows = file.tensor("rows").unwrap().to_f32();
    for format in ActivationFormat::ALL {
        // compressed-tensors 0.20 rounds the largest number of MXFP8 to the one bit of MXFP4's
        // mantissa, not to MXFP8's three as torchao does, and as is done here.
        let name = match format {
            ActivationFormat::Mxfp8 => "mxfp8.even",
            other => other.name(),
        };
        let expected = file.tensor(name).unwrap().to_f32();
        // These rows have ties on purpose. A product with a second scale and a division by it may
        // round them differently. So NVFP4 is compared on the random rows, which come first.
        let rows = match format {
            ActivationFormat::Nvfp4 => &rows[..16 * WIDTH],
            _ => &rows[..],
        };
        let expected = &expected[..rows.len()];
        let found = format.round(rows, WIDTH).unwrap();
        for (row, found, expected) in differing(rows, &found, expected) {
            // There scales below 2^-126 are zero, and numbers that `f32` cannot hold are NaN.
            let largest = row.iter().fold(0f32, |most, x| most.max(x.abs()));
            if !(1e-36..1e38).contains(&largest) {
                continue;
            }
            panic!("{format} of {row:?}:\n{found:?}\n{expected:?}");
        }
    }
}

#[test]
fn powers_of_two_are_torchaos() {
    let file = fixture();
    let rows = file.tensor("rows").unwrap().to_f32();
    let shape = [rows.len() / WIDTH, WIDTH];
    for (name, format) in [("mxfp4", ScaledFormat::MXFP4), ("mxfp8", ScaledFormat::MXFP8_E4M3)] {
        for (mode, rounding) in [
            ("floor", E8m0Rounding::Floor),
            ("ceil", E8m0Rounding::Ceil),
            ("even", E8m0Rounding::Even),
        ] {
            let expected = file.tensor(&format!("{name}.{mode}")).unwrap().to_f32();
            let found = scaled::quantize(&shape, &format, &rows, rounding).unwrap().to_f32();
            for (row, found, expected) in differing(&rows, &found, &expected) {
                // torchao does not use scales below 2^-126.
                if row.iter().all(|x| x.abs() < 1e-36) {
                    continue;
                }
                panic!("{name} {mode} of {row:?}:\n{found:?}\n{expected:?}");
            }
        }
    }
}

/// `Mse` finds the best power of two, which this test finds by trying all of them in `f64`.
#[test]
fn the_least_error_is_the_least() {
    let rows = fixture().tensor("rows").unwrap().to_f32();
    let magnitudes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let error = |block: &[f32], exponent: i32| -> f64 {
        let scale = 2f64.powi(exponent);
        let of = |x: &f32| {
            let ratio = f64::from(x.abs()) / scale;
            let nearest = magnitudes.iter().map(|m| (m - ratio).abs()).fold(f64::MAX, f64::min);
            (nearest * scale).powi(2)
        };
        block.iter().map(of).sum()
    };
    let finite = rows.chunks(32).filter(|block| {
        let largest = block.iter().fold(0f32, |most, x| most.max(x.abs()));
        block.iter().all(|x| x.is_finite()) && (1e-30..1e30).contains(&largest)
    });
    let mut checked = 0;
    for block in finite {
        let format = ScaledFormat::MXFP4;
        let found = scaled::quantize(&[32], &format, block, E8m0Rounding::Mse).unwrap().to_f32();
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        let found: f64 = found.iter().zip(block).map(square).sum();
        let best = (-110..110).map(|exponent| error(block, exponent)).fold(f64::MAX, f64::min);
        assert!(found <= best * 1.000_001, "{found} {best} of {block:?}");
        checked += 1;
    }
    assert!(checked > 30, "{checked}");
}

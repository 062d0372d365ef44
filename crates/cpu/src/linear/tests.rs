//! Compares every kernel, instruction set of this machine, format and odd shape with a scalar
//! oracle. Also checks that the bits of a row's product do not depend on the rows beside it.

mod formats;

use lathe_tensor::{
    Block, Bytes, Element, Format, GgmlType, GlobalScale, ScaleType, ScaledFormat, Tensor,
    ZeroPoint, codec,
};

use super::activations::quantize_segment;
use super::dispatch::with_dots;
use super::table::Tiles;
use super::{Activations, Matrix, Operands, Part, matmul};
use crate::gang::Gang;
use crate::isa::{Isa, SEGMENT};
use crate::pack::layout::Operand;

/// A small generator of random numbers. Tests need variety, not quality.
struct Random(u64);

impl Random {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32 / (1 << 24) as f32 - 0.5) * 2.0
    }

    fn values(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next() * (1.0 + 3.0 * self.next().abs())).collect()
    }
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.is_available())
}

/// `weight`, packed for each instruction set of this machine, and once more for AVX-512's `bf16`
/// dots if the machine has them but prefers other kernels.
fn packed_by_all(weight: &Tensor) -> Vec<(String, Matrix)> {
    let pack = |isa| Matrix::pack(weight, isa, false).expect("packs");
    let all = isas().map(|isa| (isa.to_string(), pack(isa)));
    #[cfg(target_arch = "x86_64")]
    let all = all.chain((Isa::Avx512.is_available() && Isa::Avx512.has_bf16_dot()).then(|| {
        let mut packed = pack(Isa::Avx512);
        packed.kernels = with_dots(packed.kernels, packed.packed.layout);
        ("dots".to_owned(), packed)
    }));
    all.collect()
}

fn tensor(format: Format, rows: usize, columns: usize, random: &mut Random) -> Tensor {
    let values = random.values(rows * columns);
    if let Format::Scaled(scaled) = format {
        let shape = [rows, columns];
        return codec::scaled::quantize(&shape, &scaled, &values, Default::default())
            .expect("a format that fits");
    }
    let codes = Bytes::new(codec::quantize(format, &values));
    Tensor::new(vec![rows, columns], format, codes).expect("a tensor of whole blocks")
}

fn column_counts(format: Format) -> Vec<usize> {
    match (format, format.block_len()) {
        (Format::Float(_), _) => vec![1, 7, 16, 33, 100, 300],
        (_, 1) => vec![5, 32, 300],
        (_, block) => vec![block, 3 * block, 288_usize.next_multiple_of(block)],
    }
}

/// The product `[rows, out]`, computed by `threads` threads.
fn product(packed: &Matrix, x: &[f32], threads: usize) -> Vec<f32> {
    let gang = Gang::new(threads);
    let mut activations = Activations::new();
    activations.prepare(&gang, Operands::of([packed]), x, packed.columns());
    let mut out = vec![f32::NAN; x.len() / packed.columns() * packed.rows()];
    matmul(&gang, &mut [Part::new(packed, &mut out)], &activations);
    out
}

/// What the kernel's operand rounds `x` to.
fn rounded(operand: Operand, x: &[f32], columns: usize) -> Vec<f32> {
    match operand {
        Operand::F32 => x.to_vec(),
        Operand::Int8(offset) => {
            let segments = x.chunks(columns).flat_map(|row| row.chunks(SEGMENT));
            segments
                .flat_map(|part| {
                    let mut values = [0f32; SEGMENT];
                    values[..part.len()].copy_from_slice(part);
                    let (codes, scale) = quantize_segment(&values, offset.fineness);
                    codes.into_iter().take(part.len()).map(move |c| c as f32 * scale)
                })
                .collect()
        }
    }
}

/// Sums in `f64` and sums of magnitudes, for each row of `x` and each output.
fn oracle(weights: &[f32], x: &[f32], columns: usize) -> Vec<(f64, f64)> {
    let dot = |w: &[f32], x: &[f32]| {
        let terms = || w.iter().zip(x).map(|(&w, &x)| f64::from(w) * f64::from(x));
        (terms().sum::<f64>(), terms().map(f64::abs).sum::<f64>())
    };
    let rows = x.chunks(columns);
    rows.flat_map(|x| weights.chunks(columns).map(move |w| dot(w, x))).collect()
}

/// Checks `got`, whole rows, against the first of the oracle's, within `1e-5` of the sum of
/// magnitudes.
fn check(name: &str, got: &[f32], expected: &[(f64, f64)], out: usize) {
    for (index, (&found, &(sum, size))) in got.iter().zip(expected).enumerate() {
        let close = (f64::from(found) - sum).abs() <= 1e-5 * size + 1e-30;
        let (row, output) = (index / out, index % out);
        assert!(close, "{name}: row {row} output {output}: expected {sum}, found {found}");
    }
}

/// Every number of rows up to one more than a block holds, and some larger ones.
const ROWS: [usize; 19] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 33, 65];

#[test]
fn kernels_agree_with_the_oracle() {
    let mut random = Random(1);
    for format in formats::layouts() {
        for columns in column_counts(format) {
            // One panel, less than one, and more than the kernels of several panels multiply at
            // once.
            for out in [1, 16, 83] {
                let weight = tensor(format, out, columns, &mut random);
                let dequantized = weight.to_f32();
                let x = random.values(65 * columns);
                let exact_sums = oracle(&dequantized, &x, columns);
                let mut rounded_sums = None;
                for isa in isas() {
                    for exact in [false, true] {
                        let packed = Matrix::pack(&weight, isa, exact).expect("packs");
                        let expected = match packed.operand {
                            Operand::F32 => &exact_sums,
                            operand => rounded_sums.get_or_insert_with(|| {
                                oracle(&dequantized, &rounded(operand, &x, columns), columns)
                            }),
                        };
                        for rows in ROWS.into_iter().filter(|&rows| out == 83 || rows <= 17) {
                            let name =
                                format!("{format} {isa} exact={exact} {rows}x{columns}->{out}");
                            let got = product(&packed, &x[..rows * columns], 1);
                            check(&name, &got, expected, out);
                        }
                    }
                }
            }
        }
    }
}

/// Formats that share a layout differ in where their scales are stored.
#[test]
fn every_format_is_laid_out_as_it_reads() {
    let mut random = Random(8);
    for format in formats::promised() {
        for columns in column_counts(format) {
            let out = 37;
            let weight = tensor(format, out, columns, &mut random);
            let x = random.values(3 * columns);
            let packed = Matrix::pack(&weight, Isa::detect(), true).expect("packs");
            let expected = oracle(&weight.to_f32(), &x, columns);
            let name = format!("{format} 3x{columns}->{out}");
            check(&name, &product(&packed, &x, 1), &expected, out);
        }
    }
}

#[test]
fn formats_without_kernels_are_refused_by_name() {
    for format in formats::all() {
        let packed = Matrix::pack(&tensor(format, 1, 256, &mut Random(9)), Isa::Portable, false);
        match packed {
            Ok(_) => assert!(formats::is_promised(format), "{format} has kernels"),
            Err(error) => {
                assert!(!formats::is_promised(format), "{format}: {error}");
                assert!(error.to_string().contains(&format.to_string()), "{format}: {error}");
            }
        }
    }
}

/// A packed matrix has the bytes of its file. The exceptions are scales that are repeated every 256
/// positions, fp6 (which becomes fp8), and the gaps between panels.
#[test]
fn weights_stay_as_small_as_they_are() {
    let (rows, columns) = (64, 2048);
    for format in formats::promised() {
        let weight = tensor(format, rows, columns, &mut Random(10));
        let packed = Matrix::pack(&weight, Isa::detect(), false).expect("packs");
        let codes = match format {
            Format::Scaled(scaled) if scaled.element.bits() == 6 => rows * columns,
            _ => weight.codes.len(),
        };
        let scale_bytes = match format {
            Format::Scaled(scaled) => {
                let zero = usize::from(scaled.zero == ZeroPoint::Int);
                let length = match scaled.block {
                    Block::Group(n) | Block::Tile(_, n) => 256.min(n as usize),
                    Block::Tensor | Block::Channel => 256,
                };
                rows * columns / length * (scaled.scale.bytes() + zero)
            }
            _ => 0,
        };
        let gaps = packed.panels() * 192;
        let (bytes, most) = (packed.bytes(), codes + scale_bytes + gaps);
        assert!(bytes <= most, "{format}: {bytes} bytes, {most} at most");
    }
}

/// Kernels read a NaN's code as 480, so packing must not let it through.
#[test]
fn a_nan_among_fp8_codes_is_not_hidden() {
    for (block, scale) in [
        (Block::Channel, ScaleType::F32),
        (Block::Channel, ScaleType::BF16),
        (Block::Group(64), ScaleType::F16),
        (Block::Group(32), ScaleType::E8M0),
    ] {
        let zero = ZeroPoint::None;
        for (element, codes) in [(Element::F8E4M3, [0x7f, 0xff]), (Element::F8E5M2, [0x7d, 0xfc])] {
            let format = Format::Scaled(ScaledFormat { element, block, scale, zero });
            for code in codes {
                let good = tensor(format, 20, 96 * 4, &mut Random(11));
                let mut bytes = good.codes.to_vec();
                bytes[17 * 384 + 300] = code;
                let (scales, zeros) = (good.scales.clone(), good.zeros.clone());
                let codes = Bytes::new(bytes);
                let shape = good.shape.clone();
                let bad = Tensor::new_scaled(shape, format, codes, scales, zeros, GlobalScale::One)
                    .expect("a tensor");
                let x = Random(12).values(3 * 384);
                for isa in isas() {
                    let product_of = |weight: &Tensor| {
                        let packed = Matrix::pack(weight, isa, false).expect("packs");
                        product(&packed, &x, 1)
                    };
                    for (index, (got, want)) in
                        product_of(&bad).into_iter().zip(product_of(&good)).enumerate()
                    {
                        let as_before = got.to_bits() == want.to_bits();
                        let hit = index % 20 == 17;
                        assert!(
                            if hit { !got.is_finite() } else { as_before },
                            "{format} {isa}: {got} for {want}"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_neighbours() {
    let mut random = Random(2);
    for format in formats::kernels() {
        let (out, columns) = (83, 512);
        let weight = tensor(format, out, columns, &mut random);
        let x = random.values(40 * columns);
        for isa in isas() {
            for exact in [false, true] {
                let packed = Matrix::pack(&weight, isa, exact).expect("packs");
                let alone: Vec<f32> =
                    x.chunks(columns).flat_map(|row| product(&packed, row, 1)).collect();
                for rows in [2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 15, 16, 17, 24, 33, 40] {
                    for threads in [1, 3] {
                        let got = product(&packed, &x[..rows * columns], threads);
                        let same = got.iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(
                            same,
                            "{format} {isa} exact={exact}: {rows} rows, {threads} threads"
                        );
                    }
                }
            }
        }
    }
}

#[test]
fn kernels_agree_to_the_bit_across_isas() {
    let mut random = Random(3);
    // Kernels of floats agree too, because each output is one chain of fused products on every
    // instruction set. Tiles of `bf16` are the exception.
    for format in formats::layouts() {
        let (out, columns) = (50, 1024);
        let weight = tensor(format, out, columns, &mut random);
        let x = random.values(9 * columns);
        let pack = |isa| Matrix::pack(&weight, isa, false).expect("packs");
        let bits_of = |packed: &Matrix| -> Vec<u32> {
            product(packed, &x, 1).iter().map(|v| v.to_bits()).collect()
        };
        let expected = bits_of(&pack(Isa::Portable));
        for isa in isas() {
            let packed = pack(isa);
            if !matches!(packed.kernels.tiles, Tiles::Split) {
                assert_eq!(bits_of(&packed), expected, "{format} on {isa}");
            }
        }
    }
}

#[test]
fn extreme_codes_and_activations_are_exact() {
    for kind in [GgmlType::Q8_0, GgmlType::Q4_0] {
        let format = Format::Ggml(kind);
        let one = half::f16::from_f32(1.0).to_bits().to_le_bytes();
        let fill = |byte: u8, len: usize| -> Vec<u8> {
            let block: Vec<u8> = one.into_iter().chain(std::iter::repeat_n(byte, len)).collect();
            block.repeat(16)
        };
        for byte in [0x80, 0x7f, 0x00, 0xff] {
            let codes = fill(byte, if kind == GgmlType::Q8_0 { 32 } else { 16 });
            let weight = Tensor::new(vec![16, 32], format, Bytes::new(codes)).expect("a tensor");
            for sign in [1.0, -1.0] {
                let x = vec![127.0 * sign; 32];
                for isa in isas() {
                    let packed = Matrix::pack(&weight, isa, false).expect("packs");
                    let got = product(&packed, &x, 1);
                    let expected = oracle(&weight.to_f32(), &x, 32);
                    check(&format!("{format} {isa}"), &got, &expected, 16);
                }
            }
        }
    }
}

#[test]
fn bias_residual_and_groups_of_parts() {
    let mut random = Random(4);
    let columns = 256;
    let formats = [Format::Ggml(GgmlType::Q4_K), Format::Ggml(GgmlType::Q6_K), Format::F32];
    let weights = formats.map(|format| tensor(format, 70, columns, &mut random));
    let x = random.values(3 * columns);
    for isa in isas() {
        let packed = weights.each_ref().map(|w| Matrix::pack(w, isa, false).expect("packs"));
        let gang = Gang::new(4);
        let mut activations = Activations::new();
        let fill =
            |row: usize, out: &mut [f32]| out.copy_from_slice(&x[row * columns..][..columns]);
        activations.prepare_with(&gang, Operands::of(&packed), (3, columns), fill);
        let bias = random.values(70);
        let before = random.values(3 * 70);
        let mut outs = [before.clone(), vec![0.0; 3 * 70], vec![0.0; 3 * 70]];
        let mut parts: Vec<Part> =
            packed.iter().zip(&mut outs).map(|(m, out)| Part::new(m, out)).collect();
        parts[0].bias = Some(&bias);
        parts[0].accumulate = Some(0.75);
        matmul(&gang, &mut parts, &activations);
        for (i, out) in outs.iter().enumerate() {
            let mut expected = product(&packed[i], &x, 1);
            if i == 0 {
                for (j, value) in expected.iter_mut().enumerate() {
                    *value = before[j] + (*value + bias[j % 70]) * 0.75;
                }
            }
            assert_eq!(*out, expected, "part {i} on {isa}");
        }
    }
}

/// Where AMX or AVX-512 multiply pairs of `bf16`, rows in the prefill form have `bf16` weights and
/// activations. Elsewhere the form changes nothing. Rows in the decoding form are computed as if
/// they were alone.
#[test]
fn rows_of_both_forms_lie_beside_each_other() {
    let mut random = Random(7);
    for format in formats::kernels() {
        // Some formats have more positions along k than tiles multiply at once.
        let long = matches!(format, Format::Ggml(GgmlType::Q4_K) | Format::BF16);
        let columns = if long { 2304 } else { 288_usize.next_multiple_of(format.block_len()) };
        let weight = tensor(format, 70, columns, &mut random);
        let rounded_weight: Vec<f32> =
            weight.to_f32().iter().map(|&w| half::bf16::from_f32(w).to_f32()).collect();
        // These rows are several pairs of blocks of tiles.
        let rows = 89;
        let x = random.values(rows * columns);
        let before = random.values(rows * 70);
        let bias = random.values(70);
        let forms: Vec<bool> = (0..rows).map(|_| random.next() > -0.4).collect();
        for (isa, packed) in packed_by_all(&weight) {
            let parts = 1 + usize::from(random.next() > 0.0);
            let run = |x: &[f32], forms: &[bool], before: &[f32], threads| {
                let gang = Gang::new(threads);
                let mut activations = Activations::new();
                activations.set_tile_parts(parts);
                activations.set_forms(forms.iter().copied());
                activations.prepare(&gang, Operands::of([&packed]), x, columns);
                let mut out = before.to_vec();
                let mut part = Part::new(&packed, &mut out);
                (part.bias, part.accumulate) = (Some(bias.as_slice()), Some(1.0));
                matmul(&gang, &mut [part], &activations);
                out
            };
            let all = run(&x, &forms, &before, 3);
            for row in 0..rows {
                let (x, before) = (&x[row * columns..][..columns], &before[row * 70..][..70]);
                let alone = run(x, &forms[row..=row], before, 1);
                assert_eq!(alone, all[row * 70..][..70], "{format} {isa}: row {row} alone");
                let tiled = forms[row] && packed.kernels.has_prompt();
                if tiled {
                    let got: Vec<f32> = alone
                        .iter()
                        .zip(before)
                        .zip(&bias)
                        .map(|((sum, before), bias)| sum - before - bias)
                        .collect();
                    // Two parts err less than `check` allows.
                    let round = |&x: &f32| half::bf16::from_f32(x).to_f32();
                    let x = if parts == 1 { x.iter().map(round).collect() } else { x.to_vec() };
                    let name = format!("{format} {isa} in {parts} parts");
                    check(&name, &got, &oracle(&rounded_weight, &x, columns), 70);
                } else {
                    assert_eq!(alone, run(x, &[false], before, 1), "{format} {isa}: row {row}");
                }
            }
        }
    }
}

#[test]
fn slices_of_rows_are_matrices() {
    let mut random = Random(5);
    let weight = tensor(Format::Ggml(GgmlType::Q5_0), 96, 64, &mut random);
    let x = random.values(64);
    let packed = Matrix::pack(&weight, Isa::detect(), false).expect("packs");
    let all = product(&packed, &x, 1);
    assert_eq!(product(&packed.slice_rows(32..64), &x, 1), all[32..64]);
}

#[test]
fn a_nan_is_not_hidden() {
    let mut random = Random(6);
    for format in formats::kernels() {
        let weight = tensor(format, 16, 256, &mut random);
        for isa in isas() {
            let packed = Matrix::pack(&weight, isa, false).expect("packs");
            for bad in [f32::NAN, f32::INFINITY] {
                let mut x = random.values(256);
                x[77] = bad;
                assert!(product(&packed, &x, 1).iter().all(|v| !v.is_finite()), "{format} {isa}");
            }
        }
    }
}

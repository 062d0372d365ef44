//! Scalar codecs: every format to `f32` and back, each in one plain way. Faster kernels are checked
//! against them, so they favour the definition over speed.
//!
//! Dequantizing agrees bit for bit with the Python package `gguf` in `f32`. Quantizing does too,
//! for the types that the package can write. The search of the K-quants is this crate's own
//! ([`search`]).

mod block;
pub mod element;
mod iq4;
mod kquant;
mod nearest;
mod scale;
pub mod scaled;
pub mod search;

use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::format::{FloatType, Format, GgmlType};

/// Elements that one thread quantizes at a time. It is a multiple of every block length.
const CHUNK_ELEMENTS: usize = 1 << 12;

/// Turns whole blocks into numbers.
///
/// # Panics
/// If `codes` and `out` are not the same whole number of blocks, or if the format keeps its
/// scales in a plane of their own (`Tensor::to_f32` reads those).
pub fn dequantize(format: Format, codes: &[u8], out: &mut [f32]) {
    assert_eq!(Ok(codes.len()), format.row_bytes(out.len()), "whole blocks of {format}");
    match format {
        Format::Float(FloatType::F32) => each(codes, out, f32::from_le_bytes),
        Format::Float(FloatType::F16) => halves(codes, out),
        // A bf16 is the upper half of an `f32`, for every kind of NaN too.
        Format::Float(FloatType::BF16) => {
            each(codes, out, |b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16));
        }
        Format::Ggml(t) => {
            let decode = decoder(t);
            let blocks = codes.chunks_exact(t.block_bytes());
            blocks.zip(out.chunks_exact_mut(t.block_len())).for_each(|(b, out)| decode(b, out));
        }
        Format::Scaled(_) => panic!("{format} keeps its scales apart"),
    }
}

/// Turns numbers into whole blocks. Each type rounds to nearest by its own rule.
///
/// # Panics
/// If `values` is no whole number of blocks, or if the format keeps its scales in a plane of
/// their own ([`scaled`] makes those).
pub fn quantize(format: Format, values: &[f32]) -> Vec<u8> {
    quantize_weighted(format, values, None)
}

/// As [`quantize`], but `importance` (one non-negative number a column, from an importance matrix)
/// is the weight of squared errors in the encoder's search for scales. q8_0 and floats do not
/// search and ignore it. q4_0, q4_1, q5_0 and q5_1 search only with an importance.
///
/// # Panics
/// As [`quantize`]. Also if `values` is no whole number of rows of `importance.len()`, or a row is
/// no whole number of blocks.
pub fn quantize_weighted(format: Format, values: &[f32], importance: Option<&[f32]>) -> Vec<u8> {
    let bytes = format.row_bytes(values.len()).expect("whole blocks");
    let columns = importance.map_or(values.len(), <[f32]>::len);
    assert!(values.is_empty() || values.len().is_multiple_of(columns), "whole rows");
    assert!(format.row_bytes(columns).is_ok(), "rows of whole blocks");
    let mut out = vec![0; bytes];
    let chunk_bytes = format.row_bytes(CHUNK_ELEMENTS).expect("a multiple of every block");
    out.par_chunks_mut(chunk_bytes).zip(values.par_chunks(CHUNK_ELEMENTS)).enumerate().for_each(
        |(chunk, (out, values))| {
            let weights = importance.map(|w| (w, chunk * CHUNK_ELEMENTS));
            quantize_chunk(format, values, weights, out);
        },
    );
    out
}

/// Quantizes one chunk. `importance` comes with the chunk's offset in the tensor.
fn quantize_chunk(
    format: Format,
    values: &[f32],
    importance: Option<(&[f32], usize)>,
    out: &mut [u8],
) {
    match format {
        Format::Float(FloatType::F32) => each_back(values, out, f32::to_le_bytes),
        Format::Float(FloatType::F16) => halves_back(values, out),
        Format::Float(FloatType::BF16) => {
            each_back(values, out, |v| bf16::from_f32(v).to_le_bytes());
        }
        Format::Ggml(t) => {
            let blocks = values.chunks_exact(t.block_len()).zip(out.chunks_mut(t.block_bytes()));
            for (i, (values, out)) in blocks.enumerate() {
                let importance = importance.map(|(weights, offset)| {
                    &weights[(offset + i * t.block_len()) % weights.len()..][..t.block_len()]
                });
                encode(t, values, importance, out);
            }
        }
        Format::Scaled(_) => panic!("{format} keeps its scales apart"),
    }
}

fn decoder(t: GgmlType) -> fn(&[u8], &mut [f32]) {
    match t {
        GgmlType::Q4_0 => block::decode_q4_0,
        GgmlType::Q4_1 => block::decode_q4_1,
        GgmlType::Q5_0 => block::decode_q5_0,
        GgmlType::Q5_1 => block::decode_q5_1,
        GgmlType::Q8_0 => block::decode_q8_0,
        GgmlType::Q4_K => kquant::decode_q4_k,
        GgmlType::Q5_K => kquant::decode_q5_k,
        GgmlType::Q6_K => kquant::decode_q6_k,
        GgmlType::IQ4_NL => iq4::decode_iq4_nl,
        GgmlType::IQ4_XS => iq4::decode_iq4_xs,
    }
}

fn encode(t: GgmlType, values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    match t {
        GgmlType::Q4_0 => block::encode_q4_0(values, importance, out),
        GgmlType::Q4_1 => block::encode_q4_1(values, importance, out),
        GgmlType::Q5_0 => block::encode_q5_0(values, importance, out),
        GgmlType::Q5_1 => block::encode_q5_1(values, importance, out),
        GgmlType::Q8_0 => block::encode_q8_0(values, out),
        GgmlType::Q4_K => kquant::encode_q4_k(values, importance, out),
        GgmlType::Q5_K => kquant::encode_q5_k(values, importance, out),
        GgmlType::Q6_K => kquant::encode_q6_k(values, importance, out),
        GgmlType::IQ4_NL => iq4::encode_iq4_nl(values, importance, out),
        GgmlType::IQ4_XS => iq4::encode_iq4_xs(values, importance, out),
    }
}

fn each<const N: usize>(codes: &[u8], out: &mut [f32], decode: impl Fn([u8; N]) -> f32) {
    for (bytes, out) in codes.as_chunks::<N>().0.iter().zip(out) {
        *out = decode(*bytes);
    }
}

fn each_back<const N: usize>(values: &[f32], out: &mut [u8], encode: impl Fn(f32) -> [u8; N]) {
    for (value, out) in values.iter().zip(out.as_chunks_mut::<N>().0) {
        *out = encode(*value);
    }
}

/// Halves that are converted at once. The machine's conversion instruction is detected once for all
/// of them.
const HALVES: usize = 256;

fn halves(codes: &[u8], out: &mut [f32]) {
    for (codes, out) in codes.chunks(2 * HALVES).zip(out.chunks_mut(HALVES)) {
        let mut buffer = [f16::ZERO; HALVES];
        for (half, bytes) in buffer.iter_mut().zip(codes.as_chunks::<2>().0) {
            *half = f16::from_le_bytes(*bytes);
        }
        buffer[..out.len()].convert_to_f32_slice(out);
    }
}

fn halves_back(values: &[f32], out: &mut [u8]) {
    for (values, out) in values.chunks(HALVES).zip(out.chunks_mut(2 * HALVES)) {
        let mut buffer = [f16::ZERO; HALVES];
        buffer[..values.len()].convert_from_f32_slice(values);
        for (half, bytes) in buffer.iter().zip(out.as_chunks_mut::<2>().0) {
            *bytes = half.to_le_bytes();
        }
    }
}

/// The half at byte `at` of a block, as `f32`.
fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

fn put_half(block: &mut [u8], at: usize, value: f32) {
    block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
}

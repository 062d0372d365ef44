//! GGUF types that no kernel reads: their tensors are unpacked when they are read, to a format that
//! has kernels and holds the same numbers bit for bit. That takes more memory than the file does.
//!
//! Most are codes of a few bits that stand for integers under one scale a group. Where groups have
//! 32 numbers or more they become integers with scales in a plane of their own, else `f32`.

mod grids;
mod ternary;

use rayon::prelude::*;

use super::GgufType;
use crate::bytes::Bytes;
use crate::error::TensorError;
use crate::format::{Block, Element, Format, GgmlType, ScaleType, ScaledFormat, ZeroPoint};
use crate::tensor::{GlobalScale, Tensor};

/// The first `f16` at byte `at`, as `f32`.
fn half_at(block: &[u8], at: usize) -> f32 {
    half::f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}

/// Integers and the scale of each group of a block.
type Decode = fn(block: &[u8], codes: &mut [i8], scales: &mut [f32]);

/// How a type is unpacked.
#[derive(Clone, Copy)]
enum Unpack {
    /// Integers under one scale for each `group` of a block.
    Coded { bits: u8, group: usize, decode: Decode },
    /// Sixteen scales and minima.
    Q2K,
    /// Becomes Q6_K, which has the same scales and more bits.
    Q3K,
    /// Codes and scales that only lie in another order.
    Mxfp4,
    /// The same.
    Nvfp4,
}

impl Unpack {
    fn of(kind: GgufType) -> Option<Unpack> {
        let coded = |bits, group, decode: Decode| Unpack::Coded { bits, group, decode };
        Some(match kind.0 {
            10 => Unpack::Q2K,
            11 => Unpack::Q3K,
            16 => coded(8, 32, grids::iq2_xxs),
            17 => coded(8, 16, grids::iq2_xs),
            18 => coded(8, 32, grids::iq3_xxs),
            19 => coded(8, 32, grids::iq1_s),
            21 => coded(8, 32, grids::iq3_s),
            22 => coded(8, 16, grids::iq2_s),
            29 => coded(8, 16, grids::iq1_m),
            34 => coded(4, 256, ternary::tq1_0),
            35 => coded(4, 256, ternary::tq2_0),
            39 => Unpack::Mxfp4,
            40 => Unpack::Nvfp4,
            _ => return None,
        })
    }

    fn format(self) -> Format {
        match self {
            Unpack::Coded { group: 16, .. } | Unpack::Q2K => Format::F32,
            Unpack::Coded { bits, group, .. } => Format::Scaled(ScaledFormat {
                element: Element::Int(bits),
                block: Block::Group(group as u32),
                scale: ScaleType::F32,
                zero: ZeroPoint::None,
            }),
            Unpack::Q3K => Format::Ggml(GgmlType::Q6_K),
            Unpack::Mxfp4 => Format::Scaled(ScaledFormat::MXFP4),
            Unpack::Nvfp4 => Format::Scaled(ScaledFormat::NVFP4),
        }
    }
}

/// The format in which tensors of `kind` are given, if they are unpacked.
pub(super) fn format(kind: GgufType) -> Option<Format> {
    Unpack::of(kind).map(Unpack::format)
}

/// The numbers of a tensor of `kind`, in [`format()`]. `shape` and `bytes` agree: the header was
/// checked. NVFP4 is multiplied by `global`, one number a matrix.
pub(super) fn unpack(
    kind: GgufType,
    shape: &[usize],
    bytes: &[u8],
    global: Vec<f32>,
) -> Option<Result<Tensor, TensorError>> {
    let unpack = Unpack::of(kind)?;
    let (length, size) = kind.block()?;
    let blocks = Blocks { bytes, length: length as usize, size: size as usize };
    let elements: usize = shape.iter().product();
    Some(match unpack {
        Unpack::Coded { group: 16, decode, .. } => {
            let values = blocks.map(elements, 1, |block, values: &mut [f32]| {
                let (mut codes, mut scales) = ([0i8; 256], [0f32; 16]);
                decode(block, &mut codes, &mut scales);
                let groups = values.chunks_exact_mut(16).zip(codes.chunks_exact(16)).zip(scales);
                for ((values, codes), scale) in groups {
                    let pairs = values.iter_mut().zip(codes);
                    pairs.for_each(|(value, code)| *value = scale * f32::from(*code));
                }
            });
            Ok(Tensor::from_f32_vec(shape.to_vec(), values))
        }
        Unpack::Q2K => Ok(Tensor::from_f32_vec(shape.to_vec(), blocks.map(elements, 1, q2_k))),
        Unpack::Q3K => {
            let mut codes = vec![0; bytes.len() / blocks.size * 210];
            codes.par_chunks_mut(210).zip(blocks.all()).for_each(|(out, block)| q3_k(block, out));
            Tensor::new(shape.to_vec(), unpack.format(), Bytes::new(codes))
        }
        Unpack::Coded { bits, group, decode } => coded(shape, &blocks, (bits, group, decode)),
        Unpack::Mxfp4 => planes(shape, &blocks, unpack.format(), 1, GlobalScale::One),
        Unpack::Nvfp4 => planes(shape, &blocks, unpack.format(), 4, GlobalScale::Multiply(global)),
    })
}

/// The blocks of a tensor.
struct Blocks<'a> {
    bytes: &'a [u8],
    /// Numbers in a block.
    length: usize,
    /// Bytes of a block.
    size: usize,
}

impl Blocks<'_> {
    fn all(&self) -> rayon::slice::ChunksExact<'_, u8> {
        self.bytes.par_chunks_exact(self.size)
    }

    /// What `each` makes of every block: a number for each `per` of the tensor's `elements`.
    fn map<T: Copy + Default + Send + Sync>(
        &self,
        elements: usize,
        per: usize,
        each: impl Fn(&[u8], &mut [T]) + Sync,
    ) -> Vec<T> {
        let mut out = vec![T::default(); elements / per];
        let parts = out.par_chunks_mut(self.length / per).zip(self.all());
        parts.for_each(|(out, block)| each(block, out));
        out
    }
}

fn coded(
    shape: &[usize],
    blocks: &Blocks<'_>,
    (bits, group, decode): (u8, usize, Decode),
) -> Result<Tensor, TensorError> {
    let elements: usize = shape.iter().product();
    let whole = |block: &[u8]| {
        let (mut codes, mut scales) = ([0i8; 256], [0f32; 8]);
        decode(block, &mut codes, &mut scales);
        (codes, scales)
    };
    let per = if bits == 4 { 2 } else { 1 };
    let codes = blocks.map(elements, per, |block, out: &mut [u8]| {
        let (codes, _) = whole(block);
        for (byte, codes) in out.iter_mut().zip(codes.chunks_exact(per)) {
            *byte = match codes {
                [low, high] => *low as u8 & 15 | (*high as u8) << 4,
                codes => codes[0] as u8,
            };
        }
    });
    let scales = blocks.map(elements, group, |block, out: &mut [f32]| {
        out.copy_from_slice(&whole(block).1[..out.len()]);
    });
    let scales = scales.iter().flat_map(|scale| scale.to_le_bytes()).collect::<Vec<u8>>();
    let unpack = Unpack::Coded { bits, group, decode };
    Tensor::new_scaled(
        shape.to_vec(),
        unpack.format(),
        Bytes::new(codes),
        Bytes::new(scales),
        Bytes::new(Vec::new()),
        GlobalScale::One,
    )
}

/// Blocks of fp4 codes: `scales` bytes of scales, then the codes of each group. A byte holds one of
/// a group's first half and, in its high nibble, one of its second half; a plane has neighbours.
fn planes(
    shape: &[usize],
    blocks: &Blocks<'_>,
    format: Format,
    scales: usize,
    global: GlobalScale,
) -> Result<Tensor, TensorError> {
    let elements: usize = shape.iter().product();
    let group = blocks.length / scales;
    // Minus zero is zero to ggml.
    let code = |nibble: u8| if nibble == 8 { 0 } else { nibble };
    let codes = blocks.map(elements, 2, |block, out: &mut [u8]| {
        let groups = out.chunks_exact_mut(group / 2).zip(block[scales..].chunks_exact(group / 2));
        for (out, packed) in groups {
            let nibble = |i: usize| code(packed[i % (group / 2)] >> (4 * (2 * i / group)) & 15);
            for (i, byte) in out.iter_mut().enumerate() {
                *byte = nibble(2 * i) | nibble(2 * i + 1) << 4;
            }
        }
    });
    let is_e4m3 = scales > 1;
    let scales = blocks.map(elements, group, |block, out: &mut [u8]| {
        out.copy_from_slice(&block[..out.len()]);
        // ggml's unsigned e4m3 has no NaN: that code is zero.
        let nan = out.iter_mut().filter(|code| is_e4m3 && **code & 0x7f == 0x7f);
        nan.for_each(|code| *code = 0);
    });
    let none = Bytes::new(Vec::new());
    Tensor::new_scaled(shape.to_vec(), format, Bytes::new(codes), Bytes::new(scales), none, global)
}

/// 16 groups of 16: two bits a code, four bits a scale and a minimum, both under a half.
fn q2_k(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 80), half_at(block, 82));
    for (group, out) in out.chunks_exact_mut(16).enumerate() {
        let packed = block[group];
        let (scale, min) = (d * f32::from(packed & 15), min * f32::from(packed >> 4));
        let codes = &block[16 + group / 8 * 32 + group % 2 * 16..][..16];
        for (out, byte) in out.iter_mut().zip(codes) {
            *out = scale * f32::from(byte >> (2 * (group / 2 % 4)) & 3) - min;
        }
    }
}

/// 16 groups of 16: three bits a code in two planes, six bits a scale. `out` is a block of Q6_K,
/// whose scales have eight bits and whose codes are shifted by 32.
fn q3_k(block: &[u8], out: &mut [u8]) {
    let (high, low, scales) = (&block[..32], &block[32..96], &block[96..108]);
    out[208..210].copy_from_slice(&block[108..110]);
    for group in 0..16 {
        let four = scales[group % 8] >> (4 * (group / 8)) & 15;
        let two = scales[8 + group % 4] >> (2 * (group / 4)) & 3;
        out[192 + group] = (four | two << 4).wrapping_sub(32);
        for lane in 0..16 {
            let byte = group % 2 * 16 + lane;
            let two = low[group / 8 * 32 + byte] >> (2 * (group / 2 % 4)) & 3;
            // The offset of 4 counts where the bit is not set.
            let code = (two | (high[byte] >> (group / 2) & 1) << 2) + 28;
            let i = group * 16 + lane;
            let (half, quarter) = (i / 128, i % 128 / 32);
            out[half * 64 + i % 64] |= (code & 15) << (4 * (quarter / 2));
            out[128 + half * 32 + i % 32] |= (code >> 4) << (2 * quarter);
        }
    }
}

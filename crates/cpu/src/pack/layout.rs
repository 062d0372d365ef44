//! The layout of a panel, which packing writes and kernels read.
//!
//! A panel is a run of chunks along k. A chunk has the codes of its segments of 32 positions. In
//! coded layouts its scales follow:
//! ```text
//! f32, f16 : 32 x 16 lanes
//! bf16     : 16 pairs (k, k+1) x 16 lanes: the operand of a bf16 dot or of an AMX tile
//! codes    : c[j] is the word of the four codes of positions 4j..4j+4, j in 0..8
//!   nibbles: 4 vectors; vector s, lane word = low4(c[2s]) | low4(c[2s+1]) << 4
//!   bit 4  : 1 vector;  lane word = OR over j of bit4(c[j]) << j                  (5-bit codes)
//!   bits 45: 2 vectors; vector h, lane word = OR over i of bits45(c[4h+i]) << 2i   (6-bit codes)
//!   bytes  : 8 vectors; vector j, lane word = c[j]                                (8-bit codes)
//! fp8      : 32 x 16 lanes, codes of floats, each converted to f32 by itself
//! ```
//! A vector has 64 bytes, 16 lanes x 4 neighbours along k. It is the operand of an int8 dot or
//! tile. Codes are unsigned, or indexes of a table of 16. The integer dot subtracts the zero point.
//! A chunk has exactly the bytes of its blocks in the file, so decoding reads as many bytes as the
//! file has.

use crate::isa::SEGMENT;
use lathe_tensor::{FloatType, GgmlType, ScaleType};

use super::PANEL;

/// How the codes of a segment are stored and what a code means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Codes {
    /// Four bits minus 8.
    Signed4,
    /// Four bits.
    Unsigned4,
    /// Five bits minus 16.
    Signed5,
    /// Five bits.
    Unsigned5,
    /// Six bits minus 32.
    Signed6,
    /// Eight bits minus 128.
    Signed8,
    /// Four bits that pick one of GGUF's IQ4 values.
    Iq4,
    /// Four bits that pick an fp4 e2m1 value, doubled so that it is an integer.
    E2m1,
    /// fp8 e4m3, none a NaN. Narrower floats are written as the e4m3 of the same number.
    F8E4m3,
    /// fp8 e5m2.
    F8E5m2,
}

impl Codes {
    /// Bits that a code takes.
    pub(crate) fn bits(self) -> usize {
        match self {
            Codes::Signed4 | Codes::Unsigned4 | Codes::Iq4 | Codes::E2m1 => 4,
            Codes::Signed5 | Codes::Unsigned5 => 5,
            Codes::Signed6 => 6,
            Codes::Signed8 | Codes::F8E4m3 | Codes::F8E5m2 => 8,
        }
    }

    /// Whether codes are floats. Only floats can multiply them.
    pub(crate) fn is_float(self) -> bool {
        matches!(self, Codes::F8E4m3 | Codes::F8E5m2)
    }

    /// How finely activations are rounded before these codes multiply them.
    pub(crate) fn fineness(self) -> Fineness {
        match self {
            Codes::Signed4 | Codes::Unsigned4 => Fineness::Coarse,
            // Codes that index a table become the number there, which has more than four bits.
            _ => Fineness::Fine,
        }
    }

    /// The unsigned code that stands for zero when kernels multiply.
    pub(crate) fn zero(self) -> i32 {
        match self {
            Codes::Unsigned4 | Codes::Unsigned5 | Codes::F8E4m3 | Codes::F8E5m2 => 0,
            Codes::Signed4 => 8,
            Codes::E2m1 => 12,
            Codes::Signed5 => 16,
            Codes::Signed6 => 32,
            Codes::Signed8 | Codes::Iq4 => 128,
        }
    }
}

/// The scales at the end of a chunk, lane by lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scales {
    /// `f16` scale of one segment (Q4_0, Q5_0, Q8_0, IQ4_NL).
    Half,
    /// `f16` scale, `f16` min of one segment (Q4_1, Q5_1).
    HalfMin,
    /// Eight segments: three words of six-bit sub-scales and mins, `f16` d, `f16` dmin (Q4_K,
    /// Q5_K). Word 0 has scales 0..4, word 1 scales 4..8, word 2 mins 0..4, six bits each from
    /// bit 0; mins 4..8 (24 bits) fill the top bytes of words 0, 1, 2 in order.
    SuperMin,
    /// Eight segments: sixteen vectors of `i8` sub-scales, one per 16 positions, `f16` d (Q6_K).
    SuperSigned,
    /// Eight segments: two bytes of high bits, four bytes of low nibbles, `f16` d: sub-scale `i`
    /// is `low4(i) | high2(i) << 4`, minus 32 (IQ4_XS).
    SuperSix,
    /// One byte a segment, `2^(byte - 127)` (MX).
    E8m0,
    /// Two bytes a segment, fp8 e4m3, one per 16 positions, times the matrix's multiplier (NVFP4).
    E4m3,
    /// One scale (and min) for a run of segments, in the checkpoint's own type.
    Group {
        /// Segments that share a scale.
        segments: usize,
        /// F32, F16 or BF16; under fp8 codes also E8M0.
        kind: ScaleType,
        /// Whether an `i8` zero point follows each scale.
        zeros: bool,
    },
}

impl Scales {
    /// Segments in a chunk.
    pub(crate) fn segments(self) -> usize {
        match self {
            Scales::Half | Scales::HalfMin | Scales::E8m0 | Scales::E4m3 => 1,
            Scales::SuperMin | Scales::SuperSigned | Scales::SuperSix => 8,
            Scales::Group { segments, .. } => segments,
        }
    }

    /// Scales of a segment.
    pub(crate) fn parts(self) -> usize {
        match self {
            Scales::SuperSigned | Scales::E4m3 => 2,
            _ => 1,
        }
    }

    /// Bytes of a lane's scales in a chunk.
    pub(crate) fn lane_bytes(self) -> usize {
        match self {
            Scales::Half | Scales::E4m3 => 2,
            Scales::HalfMin => 4,
            Scales::SuperMin => 16,
            Scales::SuperSigned => 18,
            Scales::SuperSix => 8,
            Scales::E8m0 => 1,
            Scales::Group { kind, zeros, .. } => kind.bytes() + usize::from(zeros),
        }
    }
}

/// How the numbers of a panel are stored. It chooses the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PanelLayout {
    /// Plain floats.
    Float(FloatType),
    /// Codes and scales.
    Coded(Codes, Scales),
}

impl PanelLayout {
    /// The layout of a GGUF type.
    pub(crate) fn of_ggml(kind: GgmlType) -> PanelLayout {
        let (codes, scales) = match kind {
            GgmlType::Q4_0 => (Codes::Signed4, Scales::Half),
            GgmlType::Q4_1 => (Codes::Unsigned4, Scales::HalfMin),
            GgmlType::Q5_0 => (Codes::Signed5, Scales::Half),
            GgmlType::Q5_1 => (Codes::Unsigned5, Scales::HalfMin),
            GgmlType::Q8_0 => (Codes::Signed8, Scales::Half),
            GgmlType::Q4_K => (Codes::Unsigned4, Scales::SuperMin),
            GgmlType::Q5_K => (Codes::Unsigned5, Scales::SuperMin),
            GgmlType::Q6_K => (Codes::Signed6, Scales::SuperSigned),
            GgmlType::IQ4_NL => (Codes::Iq4, Scales::Half),
            GgmlType::IQ4_XS => (Codes::Iq4, Scales::SuperSix),
        };
        PanelLayout::Coded(codes, scales)
    }

    /// Segments in a chunk. Rows are padded with zero weights to whole chunks.
    pub(crate) fn chunk_segments(self) -> usize {
        match self {
            PanelLayout::Float(_) => 1,
            PanelLayout::Coded(_, scales) => scales.segments(),
        }
    }

    /// Bytes of a segment's codes, sixteen rows.
    pub(crate) fn segment_bytes(self) -> usize {
        SEGMENT
            * PANEL
            * match self {
                PanelLayout::Float(kind) => kind.bytes() * 8,
                PanelLayout::Coded(codes, _) => codes.bits(),
            }
            / 8
    }

    /// Bytes of a chunk of sixteen rows.
    pub(crate) fn chunk_bytes(self) -> usize {
        let scales = match self {
            PanelLayout::Float(_) => 0,
            PanelLayout::Coded(_, scales) => scales.lane_bytes() * PANEL,
        };
        self.chunk_segments() * self.segment_bytes() + scales
    }
}

/// How finely activations are rounded to codes of two bytes, `2^low_bits * high + low`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fineness {
    /// Codes from -16256 to 16256.
    Fine,
    /// Codes from -2032 to 2032, for weights of four bits.
    Coarse,
}

impl Fineness {
    pub(crate) const COUNT: usize = 2;

    /// The fineness for weights whose unsigned codes have `bits`.
    pub(crate) const fn of_bits(bits: u32) -> Fineness {
        if bits == 4 { Fineness::Coarse } else { Fineness::Fine }
    }

    /// The number of bits of the low byte.
    pub(crate) const fn low_bits(self) -> u32 {
        match self {
            Fineness::Fine => 7,
            Fineness::Coarse => 4,
        }
    }
}

/// How the zero point of unsigned codes is subtracted. The integer dot starts at `-zero * sum(x)`
/// over the positions that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Offset {
    /// The code that stands for zero.
    pub(crate) zero: i32,
    /// Scales of a segment: 1 or 2.
    pub(crate) parts: usize,
    /// How finely activations are rounded.
    pub(crate) fineness: Fineness,
}

/// How the activations of a matrix must be prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operand {
    /// `f32`, not rounded.
    F32,
    /// Codes of two `int8`, with a scale a segment.
    Int8(Offset),
}

/// Constants that decoding needs beside the bytes of a panel.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Constants {
    /// Segments in a chunk of [`Scales::Group`].
    pub(crate) group_segments: usize,
    /// Type of the scales of [`Scales::Group`].
    pub(crate) scale: ScaleType,
    /// Bytes of a packed segment with its part of the scales, rounded up.
    pub(crate) segment_bytes: usize,
    /// A factor of every scale.
    pub(crate) multiplier: f32,
}

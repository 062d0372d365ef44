//! `Format`: how the numbers of a tensor are stored, as a value.
//!
//! A format is an element type, a block that shares a scale, and the scale's own type. Three
//! families cover what checkpoints hold: plain floats, GGUF's interleaved block structs, and
//! codes with scales in planes of their own (compressed-tensors, MX, NVFP4, fp8, GPTQ, AWQ).

use std::fmt;

/// A plain floating-point type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum FloatType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
}

/// A GGUF block type (`ggml_type`). Names are the file format's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(non_camel_case_types, missing_docs)]
pub enum GgmlType {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q4_K,
    Q5_K,
    Q6_K,
}

/// The number that one code stands for, before its scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Element {
    /// Two's complement integer of 2 to 8 bits.
    Int(u8),
    /// OCP fp8, 4 exponent bits, 3 mantissa bits, no infinities, largest 448.
    F8E4M3,
    /// OCP fp8, 5 exponent bits, 2 mantissa bits.
    F8E5M2,
    /// OCP MX fp6, 2 exponent bits.
    F6E2M3,
    /// OCP MX fp6, 3 exponent bits.
    F6E3M2,
    /// OCP MX fp4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives.
    F4E2M1,
}

/// Which elements of a `[rows, columns]` weight share one scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Block {
    /// The whole tensor.
    Tensor,
    /// One row (an output channel).
    Channel,
    /// This many neighbours along a row.
    Group(u32),
    /// A rectangle of rows x columns.
    Tile(u32, u32),
}

/// The type in which a scale is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ScaleType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// bfloat16.
    BF16,
    /// A power of two, `2^(code - 127)` (OCP MX).
    E8M0,
    /// fp8 e4m3, multiplied by one `f32` of the whole tensor (NVFP4).
    E4M3Global,
}

/// How a code is shifted before it is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ZeroPoint {
    /// Symmetric: `value = code * scale`.
    None,
    /// Asymmetric: `value = (code - zero) * scale`, one integer zero per block.
    Int,
}

/// Codes and scales in planes of their own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ScaledFormat {
    /// What a code means.
    pub element: Element,
    /// What shares a scale.
    pub block: Block,
    /// How a scale is stored.
    pub scale: ScaleType,
    /// Whether codes are shifted.
    pub zero: ZeroPoint,
}

/// How the numbers of a tensor are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Format {
    /// Plain floats, row-major.
    Float(FloatType),
    /// GGUF blocks along each row, scale and codes interleaved.
    Ggml(GgmlType),
    /// Codes, scales and zero points in separate planes.
    Scaled(ScaledFormat),
}

impl Format {
    /// `f32`, the format of the reference.
    pub const F32: Format = Format::Float(FloatType::F32);
    /// IEEE half.
    pub const F16: Format = Format::Float(FloatType::F16);
    /// bfloat16.
    pub const BF16: Format = Format::Float(FloatType::BF16);
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Float(t) => write!(f, "{}", format!("{t:?}").to_lowercase()),
            Format::Ggml(t) => write!(f, "{}", format!("{t:?}").to_lowercase()),
            Format::Scaled(s) => {
                let element = match s.element {
                    Element::Int(bits) => format!("int{bits}"),
                    other => format!("{other:?}").to_lowercase(),
                };
                let block = match s.block {
                    Block::Tensor => "tensor".to_owned(),
                    Block::Channel => "channel".to_owned(),
                    Block::Group(n) => format!("g{n}"),
                    Block::Tile(r, c) => format!("tile{r}x{c}"),
                };
                let zero = if s.zero == ZeroPoint::Int { "-asym" } else { "" };
                write!(f, "{element}-{block}-{}{zero}", format!("{:?}", s.scale).to_lowercase())
            }
        }
    }
}

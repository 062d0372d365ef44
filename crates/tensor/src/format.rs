//! `Format`: how the numbers of a tensor are stored, as a value.
//!
//! A format is an element type, a block that shares a scale, and the type of the scale. Three
//! families cover the contents of checkpoints: plain floats, GGUF's interleaved blocks, and codes
//! with scales in planes of their own (compressed-tensors, MX, NVFP4, fp8, GPTQ, AWQ).

use std::fmt;

use crate::error::TensorError;

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

impl FloatType {
    /// Bytes of one number.
    pub const fn bytes(self) -> usize {
        match self {
            FloatType::F32 => 4,
            FloatType::F16 | FloatType::BF16 => 2,
        }
    }
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
    IQ4_NL,
    IQ4_XS,
}

impl GgmlType {
    /// Every type, in the order of its id.
    pub const ALL: [GgmlType; 10] = [
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::Q8_0,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_NL,
        GgmlType::IQ4_XS,
    ];

    /// Elements in a block.
    pub const fn block_len(self) -> usize {
        match self {
            GgmlType::Q4_0 | GgmlType::Q4_1 | GgmlType::Q5_0 | GgmlType::Q5_1 => 32,
            GgmlType::Q8_0 | GgmlType::IQ4_NL => 32,
            GgmlType::Q4_K | GgmlType::Q5_K | GgmlType::Q6_K | GgmlType::IQ4_XS => 256,
        }
    }

    /// Bytes in a block.
    pub const fn block_bytes(self) -> usize {
        match self {
            GgmlType::Q4_0 => 18,
            GgmlType::Q4_1 => 20,
            GgmlType::Q5_0 => 22,
            GgmlType::Q5_1 => 24,
            GgmlType::Q8_0 => 34,
            GgmlType::Q4_K => 144,
            GgmlType::Q5_K => 176,
            GgmlType::Q6_K => 210,
            GgmlType::IQ4_NL => 18,
            GgmlType::IQ4_XS => 136,
        }
    }

    /// The number by which GGUF files name the type.
    pub const fn id(self) -> u32 {
        match self {
            GgmlType::Q4_0 => 2,
            GgmlType::Q4_1 => 3,
            GgmlType::Q5_0 => 6,
            GgmlType::Q5_1 => 7,
            GgmlType::Q8_0 => 8,
            GgmlType::Q4_K => 12,
            GgmlType::Q5_K => 13,
            GgmlType::Q6_K => 14,
            GgmlType::IQ4_NL => 20,
            GgmlType::IQ4_XS => 23,
        }
    }

    /// The type with this id. `None` if it cannot be read.
    pub fn from_id(id: u32) -> Option<GgmlType> {
        Self::ALL.into_iter().find(|t| t.id() == id)
    }
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

impl Element {
    /// Bits of one code.
    pub const fn bits(self) -> usize {
        match self {
            Element::Int(bits) => bits as usize,
            Element::F8E4M3 | Element::F8E5M2 => 8,
            Element::F6E2M3 | Element::F6E3M2 => 6,
            Element::F4E2M1 => 4,
        }
    }
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

impl ScaleType {
    /// Bytes of one scale.
    pub const fn bytes(self) -> usize {
        match self {
            ScaleType::F32 => 4,
            ScaleType::F16 | ScaleType::BF16 => 2,
            ScaleType::E8M0 | ScaleType::E4M3Global => 1,
        }
    }
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

/// The shape of the grid of scales of one `Format::Scaled` tensor.
///
/// A tensor of more than two dimensions is a stack of `[rows, columns]` matrices (one for each
/// expert). Blocks never reach across matrices, so `Block::Tensor` has one scale a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ScaleGrid {
    /// Matrices in the stack.
    pub matrices: usize,
    /// Blocks down one matrix.
    pub rows: usize,
    /// Blocks along a row.
    pub columns: usize,
    /// Rows of the matrix that one block covers.
    pub block_rows: usize,
    /// Columns that one block covers.
    pub block_columns: usize,
    /// Rows of one matrix, at least 1.
    pub matrix_rows: usize,
}

impl ScaleGrid {
    /// The number of scales. The product fits, because each factor divides or equals a checked
    /// dimension.
    pub fn len(&self) -> usize {
        self.matrices * self.rows * self.columns
    }

    /// Whether there is no scale at all (a tensor without elements).
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The index of the first scale of row `row` in the flattened `[matrices * rows, columns]`
    /// view.
    pub fn row_start(&self, row: usize) -> usize {
        let (matrix, row) = (row / self.matrix_rows, row % self.matrix_rows);
        (matrix * self.rows + row / self.block_rows) * self.columns
    }
}

impl ScaledFormat {
    /// OCP MXFP4: fp4 in groups of 32 with power-of-two scales.
    pub const MXFP4: ScaledFormat = Self::mx(Element::F4E2M1);
    /// OCP MXFP6 with 2 exponent bits.
    pub const MXFP6_E2M3: ScaledFormat = Self::mx(Element::F6E2M3);
    /// OCP MXFP6 with 3 exponent bits.
    pub const MXFP6_E3M2: ScaledFormat = Self::mx(Element::F6E3M2);
    /// OCP MXFP8 with 4 exponent bits.
    pub const MXFP8_E4M3: ScaledFormat = Self::mx(Element::F8E4M3);
    /// OCP MXFP8 with 5 exponent bits.
    pub const MXFP8_E5M2: ScaledFormat = Self::mx(Element::F8E5M2);
    /// NVFP4: fp4 in groups of 16, e4m3 scales, one `f32` a tensor.
    pub const NVFP4: ScaledFormat = ScaledFormat {
        element: Element::F4E2M1,
        block: Block::Group(16),
        scale: ScaleType::E4M3Global,
        zero: ZeroPoint::None,
    };

    const fn mx(element: Element) -> ScaledFormat {
        let (block, scale, zero) = (Block::Group(32), ScaleType::E8M0, ZeroPoint::None);
        ScaledFormat { element, block, scale, zero }
    }

    /// The grid of scales for `shape`. `None` if a block has no rows or columns.
    pub fn grid(&self, shape: &[usize]) -> Option<ScaleGrid> {
        let columns = shape.last().copied().unwrap_or(1);
        let matrix_rows = if shape.len() < 2 { 1 } else { shape[shape.len() - 2] };
        let stacked = &shape[..shape.len().saturating_sub(2)];
        let matrices = stacked.iter().try_fold(1usize, |n, &d| n.checked_mul(d))?;
        let (block_rows, block_columns) = match self.block {
            Block::Tensor => (matrix_rows.max(1), columns.max(1)),
            Block::Channel => (1, columns.max(1)),
            Block::Group(n) => (1, n as usize),
            Block::Tile(r, c) => (r as usize, c as usize),
        };
        if block_rows == 0 || block_columns == 0 {
            return None;
        }
        let rows = matrix_rows.div_ceil(block_rows);
        let matrix_rows = matrix_rows.max(1);
        let columns = columns.div_ceil(block_columns);
        Some(ScaleGrid { matrices, rows, columns, block_rows, block_columns, matrix_rows })
    }
}

impl Format {
    /// `f32`, the format of the reference.
    pub const F32: Format = Format::Float(FloatType::F32);
    /// IEEE half.
    pub const F16: Format = Format::Float(FloatType::F16);
    /// bfloat16.
    pub const BF16: Format = Format::Float(FloatType::BF16);

    /// The number of elements that a row must be a multiple of. It is 1 for floats, and for scaled
    /// formats whose blocks may be cut off at the end of a row (channel, tensor, tiles).
    pub fn block_len(&self) -> usize {
        match self {
            Format::Float(_) => 1,
            Format::Ggml(t) => t.block_len(),
            Format::Scaled(ScaledFormat { block: Block::Group(n), .. }) => *n as usize,
            Format::Scaled(_) => 1,
        }
    }

    /// Bytes of `Tensor::codes` for one row of `columns` elements.
    ///
    /// # Errors
    /// If a row is no whole number of blocks, or the size overflows.
    pub fn row_bytes(&self, columns: usize) -> Result<usize, TensorError> {
        let block = self.block_len();
        if block == 0 || !columns.is_multiple_of(block) {
            return Err(TensorError::Block { format: *self, block, columns });
        }
        let bytes = match self {
            Format::Float(t) => columns.checked_mul(t.bytes()),
            Format::Ggml(t) => (columns / block).checked_mul(t.block_bytes()),
            Format::Scaled(s) => columns.checked_mul(s.element.bits()).map(|bits| bits.div_ceil(8)),
        };
        bytes.ok_or_else(|| TensorError::Overflow { shape: vec![columns] })
    }

    /// Bytes of `Tensor::codes` for a tensor of this shape (scales and zeros not counted).
    ///
    /// # Errors
    /// If a row is no whole number of blocks, or the size overflows.
    pub fn bytes_for(&self, shape: &[usize]) -> Result<usize, TensorError> {
        let overflow = || TensorError::Overflow { shape: shape.to_vec() };
        let columns = shape.last().copied().unwrap_or(1);
        let leading = &shape[..shape.len().saturating_sub(1)];
        let rows =
            leading.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
        // The number of elements is checked too, because dequantizing computes it.
        rows.checked_mul(columns).and_then(|n| n.checked_mul(8)).ok_or_else(overflow)?;
        self.row_bytes(columns)?.checked_mul(rows).ok_or_else(overflow)
    }

    /// Bits that one element takes in a large tensor: its code and its share of a group's scale.
    /// Scales of channels, tiles and tensors are not counted, because many elements share them.
    pub fn bits_per_weight(&self) -> f64 {
        match self {
            Format::Float(t) => (t.bytes() * 8) as f64,
            Format::Ggml(t) => (t.block_bytes() * 8) as f64 / t.block_len() as f64,
            Format::Scaled(s) => {
                let side = s.scale.bytes() * 8 + if s.zero == ZeroPoint::Int { 8 } else { 0 };
                let shared = match s.block {
                    Block::Group(n) => side as f64 / f64::from(n.max(1)),
                    Block::Tile(r, c) => side as f64 / (f64::from(r.max(1)) * f64::from(c.max(1))),
                    Block::Tensor | Block::Channel => 0.0,
                };
                s.element.bits() as f64 + shared
            }
        }
    }

    /// Reads what `Display` writes, in either case, and the short names `mxfp4`, `mxfp6`
    /// (`mxfp6_e2m3`, `mxfp6_e3m2`), `mxfp8` (`mxfp8_e4m3`, `mxfp8_e5m2`) and `nvfp4`.
    ///
    /// # Errors
    /// If no format has this name.
    pub fn parse(name: &str) -> Result<Format, TensorError> {
        let lower = name.to_lowercase();
        let short = match lower.as_str() {
            "f32" => Some(Format::F32),
            "f16" => Some(Format::F16),
            "bf16" => Some(Format::BF16),
            "mxfp4" => Some(Format::Scaled(ScaledFormat::MXFP4)),
            "mxfp6" | "mxfp6_e2m3" => Some(Format::Scaled(ScaledFormat::MXFP6_E2M3)),
            "mxfp6_e3m2" => Some(Format::Scaled(ScaledFormat::MXFP6_E3M2)),
            "mxfp8" | "mxfp8_e4m3" => Some(Format::Scaled(ScaledFormat::MXFP8_E4M3)),
            "mxfp8_e5m2" => Some(Format::Scaled(ScaledFormat::MXFP8_E5M2)),
            "nvfp4" => Some(Format::Scaled(ScaledFormat::NVFP4)),
            _ => GgmlType::ALL.into_iter().map(Format::Ggml).find(|f| f.to_string() == lower),
        };
        short
            .or_else(|| parse_scaled(&lower).map(Format::Scaled))
            .ok_or_else(|| TensorError::UnknownFormat { name: name.to_owned() })
    }
}

fn parse_scaled(name: &str) -> Option<ScaledFormat> {
    let (name, zero) = match name.strip_suffix("-asym") {
        Some(rest) => (rest, ZeroPoint::Int),
        None => (name, ZeroPoint::None),
    };
    let mut parts = name.split('-');
    let (element, block, scale) = (parts.next()?, parts.next()?, parts.next()?);
    if parts.next().is_some() {
        return None;
    }
    let element = match element {
        "f8e4m3" => Element::F8E4M3,
        "f8e5m2" => Element::F8E5M2,
        "f6e2m3" => Element::F6E2M3,
        "f6e3m2" => Element::F6E3M2,
        "f4e2m1" => Element::F4E2M1,
        other => match other.strip_prefix("int")?.parse().ok()? {
            bits @ 2..=8 => Element::Int(bits),
            _ => return None,
        },
    };
    let scale = match scale {
        "f32" => ScaleType::F32,
        "f16" => ScaleType::F16,
        "bf16" => ScaleType::BF16,
        "e8m0" => ScaleType::E8M0,
        "e4m3global" => ScaleType::E4M3Global,
        _ => return None,
    };
    Some(ScaledFormat { element, block: parse_block(block)?, scale, zero })
}

fn parse_block(name: &str) -> Option<Block> {
    let positive = |n: &str| n.parse::<u32>().ok().filter(|&n| n > 0);
    if let Some(tile) = name.strip_prefix("tile") {
        let (rows, columns) = tile.split_once('x')?;
        return Some(Block::Tile(positive(rows)?, positive(columns)?));
    }
    match name {
        "tensor" => Some(Block::Tensor),
        "channel" => Some(Block::Channel),
        group => Some(Block::Group(positive(group.strip_prefix('g')?)?)),
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Format::Float(t) => write!(f, "{}", format!("{t:?}").to_lowercase()),
            Format::Ggml(t) => write!(f, "{}", format!("{t:?}").to_lowercase()),
            Format::Scaled(s) => write!(f, "{s}"),
        }
    }
}

impl fmt::Display for ScaledFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let element = match self.element {
            Element::Int(bits) => format!("int{bits}"),
            other => format!("{other:?}").to_lowercase(),
        };
        let block = match self.block {
            Block::Tensor => "tensor".to_owned(),
            Block::Channel => "channel".to_owned(),
            Block::Group(n) => format!("g{n}"),
            Block::Tile(r, c) => format!("tile{r}x{c}"),
        };
        let zero = if self.zero == ZeroPoint::Int { "-asym" } else { "" };
        write!(f, "{element}-{block}-{}{zero}", format!("{:?}", self.scale).to_lowercase())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        let mut formats = vec![Format::F32, Format::F16, Format::BF16];
        formats.extend(GgmlType::ALL.map(Format::Ggml));
        formats.extend([ScaledFormat::NVFP4, ScaledFormat::MXFP6_E3M2].map(Format::Scaled));
        formats.push(Format::Scaled(ScaledFormat {
            element: Element::Int(3),
            block: Block::Tile(128, 64),
            scale: ScaleType::BF16,
            zero: ZeroPoint::Int,
        }));
        for format in formats {
            assert_eq!(Format::parse(&format.to_string()), Ok(format));
        }
        for wrong in ["", "q9_9", "int9-g32-f16", "int4-g0-f16", "int4-g32", "int4-tile1-f32"] {
            assert!(Format::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(Format::Ggml(GgmlType::Q4_K).bytes_for(&[3, 512]), Ok(3 * 288));
        assert_eq!(Format::Ggml(GgmlType::Q4_0).bits_per_weight(), 4.5);
        assert_eq!(Format::Scaled(ScaledFormat::NVFP4).bits_per_weight(), 4.5);
        assert_eq!(Format::Scaled(ScaledFormat::MXFP6_E2M3).bytes_for(&[2, 32]), Ok(48));
        assert!(matches!(
            Format::Ggml(GgmlType::Q4_K).bytes_for(&[576]),
            Err(TensorError::Block { block: 256, columns: 576, .. })
        ));
        assert!(matches!(
            Format::F32.bytes_for(&[usize::MAX, 2]),
            Err(TensorError::Overflow { .. })
        ));
    }
}

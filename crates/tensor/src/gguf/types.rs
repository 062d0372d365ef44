//! The tensor types that GGUF files name, readable or not.

use std::fmt;

use super::compact;
use crate::format::{Format, GgmlType};

/// A tensor type by its number in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GgufType(pub u32);

/// Number, name, elements in a block, bytes in a block (ggml's table; gaps are retired types).
const TYPES: [(u32, &str, u64, u64); 34] = [
    (0, "F32", 1, 4),
    (1, "F16", 1, 2),
    (2, "Q4_0", 32, 18),
    (3, "Q4_1", 32, 20),
    (6, "Q5_0", 32, 22),
    (7, "Q5_1", 32, 24),
    (8, "Q8_0", 32, 34),
    (9, "Q8_1", 32, 36),
    (10, "Q2_K", 256, 84),
    (11, "Q3_K", 256, 110),
    (12, "Q4_K", 256, 144),
    (13, "Q5_K", 256, 176),
    (14, "Q6_K", 256, 210),
    (15, "Q8_K", 256, 292),
    (16, "IQ2_XXS", 256, 66),
    (17, "IQ2_XS", 256, 74),
    (18, "IQ3_XXS", 256, 98),
    (19, "IQ1_S", 256, 50),
    (20, "IQ4_NL", 32, 18),
    (21, "IQ3_S", 256, 110),
    (22, "IQ2_S", 256, 82),
    (23, "IQ4_XS", 256, 136),
    (24, "I8", 1, 1),
    (25, "I16", 1, 2),
    (26, "I32", 1, 4),
    (27, "I64", 1, 8),
    (28, "F64", 1, 8),
    (29, "IQ1_M", 256, 56),
    (30, "BF16", 1, 2),
    (34, "TQ1_0", 256, 54),
    (35, "TQ2_0", 256, 66),
    (39, "MXFP4", 32, 17),
    (40, "NVFP4", 64, 36),
    (41, "Q1_0", 128, 18),
];

impl GgufType {
    /// `f64`, which is rounded to `f32` when it is read.
    pub const F64: GgufType = GgufType(28);
    /// fp4 in groups of 16, with a second scale in a tensor of its own.
    pub const NVFP4: GgufType = GgufType(40);

    fn row(self) -> Option<&'static (u32, &'static str, u64, u64)> {
        TYPES.iter().find(|row| row.0 == self.0)
    }

    /// Elements and bytes of a block, if the type is known.
    pub fn block(self) -> Option<(u64, u64)> {
        self.row().map(|row| (row.2, row.3))
    }

    /// The format that tensors of this type are read as. `None` if they cannot be read.
    pub fn format(self) -> Option<Format> {
        match self.0 {
            0 => Some(Format::F32),
            1 => Some(Format::F16),
            30 => Some(Format::BF16),
            id => GgmlType::from_id(id).map(Format::Ggml).or_else(|| compact::format(self)),
        }
    }

    /// Whether tensors of this type are unpacked when they are read, because no kernel reads them.
    pub fn is_unpacked(self) -> bool {
        compact::format(self).is_some()
    }

    /// The type that a format is written as. `None` for formats that GGUF does not have.
    pub fn of(format: Format) -> Option<GgufType> {
        match format {
            Format::Ggml(t) => Some(GgufType(t.id())),
            Format::F32 => Some(GgufType(0)),
            Format::F16 => Some(GgufType(1)),
            Format::BF16 => Some(GgufType(30)),
            Format::Scaled(_) => None,
        }
    }
}

impl fmt::Display for GgufType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.row() {
            Some(row) => f.write_str(row.1),
            None => write!(f, "unknown type {}", self.0),
        }
    }
}

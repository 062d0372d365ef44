//! Formats that inputs of linear layers are rounded to while a model runs. A rounded row depends on
//! that row alone, so no other row of a step changes it.

use std::fmt;

use crate::codec::scaled::{self, E8m0Rounding};
use crate::error::TensorError;
use crate::format::{Block, Element, ScaleType, ScaledFormat, ZeroPoint};
use crate::tensor::GlobalScale;

/// How a row of activations is rounded. All formats are symmetric, and their scales are computed
/// from the row ("dynamic"). Integers follow compressed-tensors: `largest / ((2^bits - 1) / 2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ActivationFormat {
    /// 4-bit integers, one `f32` scale a row.
    Int4Token,
    /// 8-bit integers, one `f32` scale a row.
    Int8Token,
    /// fp8 e4m3, one `f32` scale a row.
    Fp8Token,
    /// OCP MXFP8 (e4m3): a power of two for each 32 elements.
    Mxfp8,
    /// OCP MXFP4: a power of two for each 32 elements.
    Mxfp4,
    /// NVFP4: an e4m3 scale for each 16 elements under one `f32` a row, `largest / (448 * 6)`.
    Nvfp4,
}

impl ActivationFormat {
    /// Every format.
    pub const ALL: [ActivationFormat; 6] = [
        ActivationFormat::Int4Token,
        ActivationFormat::Int8Token,
        ActivationFormat::Fp8Token,
        ActivationFormat::Mxfp8,
        ActivationFormat::Mxfp4,
        ActivationFormat::Nvfp4,
    ];

    /// How the power of two of an MX block is chosen. The largest number is rounded to the
    /// element's mantissa first, as compressed-tensors does for activations.
    pub const POWER_OF_TWO: E8m0Rounding = E8m0Rounding::Even;

    /// The name in recipes, such as `int8-token` or `mxfp4`.
    pub const fn name(self) -> &'static str {
        match self {
            ActivationFormat::Int4Token => "int4-token",
            ActivationFormat::Int8Token => "int8-token",
            ActivationFormat::Fp8Token => "fp8-token",
            ActivationFormat::Mxfp8 => "mxfp8",
            ActivationFormat::Mxfp4 => "mxfp4",
            ActivationFormat::Nvfp4 => "nvfp4",
        }
    }

    /// The format called `name`.
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.name() == name)
    }

    /// The format of one row, which counts as a matrix.
    pub const fn scaled(self) -> ScaledFormat {
        match self {
            ActivationFormat::Int4Token => Self::token(Element::Int(4)),
            ActivationFormat::Int8Token => Self::token(Element::Int(8)),
            ActivationFormat::Fp8Token => Self::token(Element::F8E4M3),
            ActivationFormat::Mxfp8 => ScaledFormat::MXFP8_E4M3,
            ActivationFormat::Mxfp4 => ScaledFormat::MXFP4,
            ActivationFormat::Nvfp4 => ScaledFormat::NVFP4,
        }
    }

    const fn token(element: Element) -> ScaledFormat {
        let (scale, zero) = (ScaleType::F32, ZeroPoint::None);
        ScaledFormat { element, block: Block::Channel, scale, zero }
    }

    /// Elements that share a scale and depend on no others. `None` if that is the whole row.
    pub const fn group(self) -> Option<usize> {
        match self {
            ActivationFormat::Mxfp8 | ActivationFormat::Mxfp4 => Some(32),
            _ => None,
        }
    }

    /// A row's width is a multiple of this.
    pub const fn width_unit(self) -> usize {
        match self {
            ActivationFormat::Mxfp8 | ActivationFormat::Mxfp4 => 32,
            ActivationFormat::Nvfp4 => 16,
            _ => 1,
        }
    }

    /// Whether a scale can be found beforehand in place of the row's own: the step of a code for
    /// integers and fp8, and what scales of blocks are divided by for NVFP4.
    pub const fn takes_scale(self) -> bool {
        !matches!(self, ActivationFormat::Mxfp8 | ActivationFormat::Mxfp4)
    }

    /// As [`Self::round`], under a scale that was found beforehand ([`Self::takes_scale`]).
    /// Numbers beyond its range saturate.
    ///
    /// # Errors
    /// As [`Self::round`].
    ///
    /// # Panics
    /// If the format takes no scale, or `values` is no whole number of rows.
    pub fn round_under(
        self,
        values: &[f32],
        width: usize,
        scale: f32,
    ) -> Result<Vec<f32>, TensorError> {
        assert!(self.takes_scale(), "{self} takes no scale");
        assert!(values.len().is_multiple_of(width.max(1)), "whole rows");
        if self != ActivationFormat::Nvfp4 {
            let mut rounded = vec![0.0; values.len()];
            scaled::round_block(self.scaled().element, values, scale, 0, &mut rounded);
            return Ok(rounded);
        }
        let shape = [values.len() / width.max(1), width];
        let global = GlobalScale::Divide(vec![scale]);
        let rounding = Self::POWER_OF_TWO;
        Ok(scaled::quantize_under(&shape, &self.scaled(), values, global, rounding)?.to_f32())
    }

    /// Rounds `values`, `[rows, width]`, by the scalar codec: quantizes and dequantizes them.
    ///
    /// # Errors
    /// If `width` is no multiple of [`Self::width_unit`].
    ///
    /// # Panics
    /// If `values` is no whole number of rows.
    pub fn round(self, values: &[f32], width: usize) -> Result<Vec<f32>, TensorError> {
        assert!(values.len().is_multiple_of(width.max(1)), "whole rows");
        // Each row counts as a matrix, so that it has its own second scale in NVFP4.
        let shape = [values.len() / width.max(1), 1, width];
        Ok(scaled::quantize(&shape, &self.scaled(), values, Self::POWER_OF_TWO)?.to_f32())
    }
}

impl fmt::Display for ActivationFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

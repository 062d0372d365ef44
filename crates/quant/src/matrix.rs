//! The input and output types of techniques.

use std::collections::BTreeMap;

use lathe_tensor::codec::scaled::{self, BlockScale, E8m0Rounding, Span};
use lathe_tensor::{Block, Format, GlobalScale, ScaledFormat, Tensor, TensorError};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::QuantError;
use crate::statistics::{Asymmetry, Statistics};

/// One `[rows, columns]` weight.
#[derive(Debug, Clone, Copy)]
pub struct Matrix<'a> {
    /// Canonical name.
    pub name: &'a str,
    /// Output channels.
    pub rows: usize,
    /// Input channels.
    pub columns: usize,
    /// Row-major.
    pub values: &'a [f32],
    /// The largest magnitude over all matrices that engines run as one (query, key and value; gate
    /// and up). These share NVFP4's global scale. `None` if this matrix stands alone.
    pub fused_largest: Option<f32>,
}

impl Matrix<'_> {
    /// The global scale of `format` for this matrix.
    pub fn global_scale(&self, format: &ScaledFormat) -> GlobalScale {
        let own = || self.values.iter().fold(0f32, |most, v| most.max(v.abs()));
        scaled::global_scale(format, std::iter::once(self.fused_largest.unwrap_or_else(own)))
    }
}

/// Matrices that read the same input.
#[derive(Debug, Clone)]
pub struct Group<'a> {
    /// The matrices.
    pub matrices: Vec<Matrix<'a>>,
    /// Statistics of the input, if calibration ran.
    pub statistics: Option<&'a Statistics>,
    /// How the input differs from the float model's, if calibration ran through both.
    pub asymmetry: Option<&'a Asymmetry>,
    /// A number for each input channel. Channels with the same number must have the same scale.
    /// `None` if all are free.
    pub tied: Option<&'a [usize]>,
}

impl<'a> Group<'a> {
    /// The statistics of the input, for a `technique` that needs them.
    ///
    /// # Errors
    /// [`QuantError::Unobserved`] with the name `tensor`, if there are none.
    pub fn observed(
        &self,
        technique: &'static str,
        tensor: &str,
    ) -> Result<&'a Statistics, QuantError> {
        let seen = self.statistics.filter(|it| it.rows() > 0);
        seen.ok_or_else(|| QuantError::Unobserved { technique, tensor: tensor.to_owned() })
    }

    /// Replaces the values of tied channels by one common value, which `join` computes from them.
    /// `values` has one number for each channel.
    pub fn join_tied(&self, values: &mut [f64], join: impl Fn(&[f64]) -> f64) {
        let Some(tied) = self.tied else { return };
        let mut together: BTreeMap<usize, Vec<f64>> = BTreeMap::new();
        for (number, value) in tied.iter().zip(values.iter()) {
            together.entry(*number).or_default().push(*value);
        }
        let joined: BTreeMap<usize, f64> =
            together.into_iter().map(|(number, all)| (number, join(&all))).collect();
        values.iter_mut().zip(tied).for_each(|(value, number)| *value = joined[number]);
    }

    /// Quantizes each matrix by itself.
    ///
    /// # Errors
    /// What `one` fails with.
    pub fn each(
        &self,
        one: impl Fn(&Matrix<'_>) -> Result<Quantized, QuantError>,
    ) -> Result<Outcome, QuantError> {
        let list = self.matrices.iter().map(one).collect::<Result<_, _>>()?;
        Ok(Outcome::Quantized(list))
    }
}

/// A quantized matrix and what it cost.
#[derive(Debug, Clone)]
pub struct Quantized {
    /// `[rows, columns]` in the format of the recipe.
    pub tensor: Tensor,
    /// Its error.
    pub report: MatrixReport,
}

impl Quantized {
    /// `tensor`, which was made from `matrix`, with its error.
    ///
    /// # Errors
    /// [`QuantError::Format`] with the tensor's name, if `tensor` is an error.
    pub fn new(
        matrix: &Matrix<'_>,
        tensor: Result<Tensor, TensorError>,
        statistics: Option<&Statistics>,
    ) -> Result<Self, QuantError> {
        let at = |source| QuantError::Format { tensor: matrix.name.to_owned(), source };
        let tensor = tensor.map_err(at)?;
        let report = MatrixReport::new(matrix, &tensor, statistics);
        Ok(Quantized { tensor, report })
    }
}

/// The error of a quantized matrix.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct MatrixReport {
    /// Signal over quantization noise of the weights, in decibels; 200 if there is no noise.
    pub sqnr_db: f64,
    /// Mean squared error of the outputs over their mean square, on the calibration inputs. `None`
    /// if products of channels were not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output_error: Option<f64>,
    /// Remarks of the technique.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

/// The result of a technique for a group.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// The matrices, in the group's order.
    Quantized(Vec<Quantized>),
    /// One positive number for each input channel. The columns are multiplied by it and the input
    /// is divided by it, before anything is rounded.
    Scaled(Vec<f32>),
}

/// The ratio in decibels that is reported if there is no noise.
const NO_NOISE_DB: f64 = 200.0;
/// Numbers whose squares one thread sums. It is fixed, so that the sum does not depend on threads.
const SUMMED_TOGETHER: usize = 1 << 14;

impl MatrixReport {
    /// Compares `tensor` with the matrix that it was made from.
    pub fn new(matrix: &Matrix<'_>, tensor: &Tensor, statistics: Option<&Statistics>) -> Self {
        MatrixReport::of(matrix, tensor.to_f32(), statistics)
    }

    /// Compares `found`, which replaces `matrix`, with it.
    pub fn of(matrix: &Matrix<'_>, found: Vec<f32>, statistics: Option<&Statistics>) -> Self {
        let mut difference = found;
        difference.par_iter_mut().zip(matrix.values).for_each(|(a, b)| *a -= b);
        let (signal, noise) = (squared_sum(matrix.values), squared_sum(&difference));
        let sqnr_db = match noise > 0.0 {
            true => (10.0 * (signal / noise).log10()).min(NO_NOISE_DB),
            false => NO_NOISE_DB,
        };
        let statistics = statistics.filter(|it| it.has_products());
        let output_error = statistics.map(|statistics| {
            let form = statistics.quadratic();
            let (error, whole) = (form.sum(&difference), form.sum(matrix.values));
            if whole > 0.0 { error / whole } else { 0.0 }
        });
        MatrixReport { sqnr_db, output_error, notes: Vec::new() }
    }
}

/// The sum of squares. It is the same for any number of threads.
fn squared_sum(values: &[f32]) -> f64 {
    let part = |values: &[f32]| values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>();
    let parts: Vec<f64> = values.par_chunks(SUMMED_TOGETHER).map(part).collect();
    parts.iter().sum()
}

/// The block scales of one matrix while a technique chooses codes. For formats of integers and
/// small floats, with one scale for each run of neighbours in a row.
#[derive(Debug, Clone)]
pub struct Scales {
    /// The format.
    pub format: ScaledFormat,
    /// The format's global scale.
    pub global: GlobalScale,
    /// Columns of a block.
    pub block_columns: usize,
    /// Blocks of a row.
    pub blocks: usize,
    /// How a power-of-two scale is rounded, for formats that have such scales.
    pub rounding: E8m0Rounding,
}

impl Scales {
    /// For `matrix` in `format`.
    ///
    /// # Errors
    /// If a row is not a whole number of groups, or if `technique` cannot choose codes of the
    /// format: GGUF blocks, plain floats, and scales that several rows share.
    pub fn new(
        technique: &'static str,
        matrix: &Matrix<'_>,
        format: Format,
    ) -> Result<Self, QuantError> {
        check_shape(matrix, format)?;
        let refuse = |reason: String| QuantError::Technique {
            technique,
            tensor: matrix.name.to_owned(),
            reason,
        };
        let expected = "expected integers or small floats with a scale a group or a row";
        let Format::Scaled(scaled) = format else {
            return Err(refuse(format!("found {format}, {expected}")));
        };
        let block_columns = match scaled.block {
            Block::Group(size) => size as usize,
            Block::Channel => matrix.columns.max(1),
            Block::Tensor | Block::Tile(..) => {
                return Err(refuse(format!("found {format}, {expected}")));
            }
        };
        let blocks = matrix.columns.div_ceil(block_columns);
        Ok(Scales {
            format: scaled,
            global: matrix.global_scale(&scaled),
            block_columns,
            blocks,
            rounding: E8m0Rounding::Even,
        })
    }

    /// The same, with power-of-two scales rounded by `rounding`.
    pub fn rounding(self, rounding: E8m0Rounding) -> Self {
        Scales { rounding, ..self }
    }

    /// The factor of all stored scales.
    pub fn unit(&self) -> f32 {
        self.global.apply(0, 1.0)
    }

    /// The scale that maps the block's largest number to the end of the codes' range.
    pub fn fit(&self, values: &[f32]) -> BlockScale {
        self.fit_shrunken(values, Span::of(values), 1.0)
    }

    /// As [`Self::fit`] of `values` times `ratio`. `span` is the span of the unscaled values.
    pub fn fit_shrunken(&self, values: &[f32], span: Span, ratio: f32) -> BlockScale {
        scaled::fit_shrunken(&self.format, values, span, ratio, self.unit(), self.rounding)
    }

    /// The factor of a block's codes: its stored scale times the global scale.
    pub fn step(&self, block: BlockScale) -> f32 {
        self.global.apply(0, scaled::round(self.format.scale, block.scale))
    }

    /// Rounds `values` of one block to their nearest codes and writes the decoded numbers.
    ///
    /// # Panics
    /// If `rounded` and `values` differ in length.
    pub fn round(&self, values: &[f32], block: BlockScale, rounded: &mut [f32]) {
        let (element, step) = (self.format.element, self.step(block));
        scaled::round_block(element, values, step, block.zero, rounded);
    }

    /// The nearest codes of `values` of one block.
    ///
    /// # Panics
    /// If `codes` and `values` differ in length.
    pub fn encode(&self, values: &[f32], block: BlockScale, codes: &mut [u8]) {
        let (element, step) = (self.format.element, self.step(block));
        scaled::encode_block(element, values, step, block.zero, codes);
    }
}

/// Checks that the rows of a matrix are whole numbers of the format's blocks.
///
/// # Errors
/// [`QuantError::Format`] with the tensor's name, its width and the block.
pub(crate) fn check_shape(matrix: &Matrix<'_>, format: Format) -> Result<(), QuantError> {
    let shape = [matrix.rows, matrix.columns];
    format
        .bytes_for(&shape)
        .map(drop)
        .map_err(|source| QuantError::Format { tensor: matrix.name.to_owned(), source })
}

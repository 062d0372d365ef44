//! The ledger of a job: what weights have become so far. It only grows, and it is what a resumable
//! job writes after each layer.

use std::collections::BTreeMap;

use lathe_program::{StaticScale, Weight};
use lathe_tensor::Tensor;

use super::reports::Reports;
use crate::correction::Correction;

/// What weights have become so far.
#[derive(Default)]
pub(super) struct Ledger {
    /// Quantized matrices.
    pub finished: BTreeMap<Weight, Tensor>,
    /// What runs beside quantized matrices.
    pub corrections: BTreeMap<Weight, Correction>,
    /// Factors of the input channels of an op's matrices, by op.
    pub columns: BTreeMap<usize, Vec<f32>>,
    /// Divisors of the rows of a matrix, or of the elements of a vector.
    pub rows: BTreeMap<Weight, Vec<f32>>,
    /// Norms that took scales.
    pub norms: BTreeMap<Weight, Tensor>,
    /// Scales of inputs that calibration found, by the matrix that reads them.
    pub input_scales: BTreeMap<Weight, StaticScale>,
    /// A cache: largest magnitudes of matrices that engines run as one, by the first of them.
    pub fused_largest: BTreeMap<Weight, Vec<f32>>,
    /// Elements of matrices that are done.
    pub done: usize,
    pub reports: Reports,
}

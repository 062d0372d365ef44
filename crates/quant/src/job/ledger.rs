//! The ledger of a job: the results so far. It only grows. A resumable job writes it after each
//! layer.

use std::collections::BTreeMap;

use lathe_program::{StaticScale, Weight};
use lathe_tensor::Tensor;

use super::reports::Reports;
use crate::correction::Correction;

/// The results so far.
#[derive(Default)]
pub(super) struct Ledger {
    /// Quantized matrices.
    pub finished: BTreeMap<Weight, Tensor>,
    /// The corrections of quantized matrices.
    pub corrections: BTreeMap<Weight, Correction>,
    /// Factors of the input channels of an op's matrices, by op.
    pub columns: BTreeMap<usize, Vec<f32>>,
    /// Divisors of the rows of a matrix, or of the elements of a vector.
    pub rows: BTreeMap<Weight, Vec<f32>>,
    /// Norms with scales folded in.
    pub norms: BTreeMap<Weight, Tensor>,
    /// Scales of inputs that calibration found, by the matrix that reads them.
    pub input_scales: BTreeMap<Weight, StaticScale>,
    /// A cache of the largest magnitudes of matrices that engines run as one, by the first of them.
    pub fused_largest: BTreeMap<Weight, Vec<f32>>,
    /// Elements of matrices that are done.
    pub done: usize,
    pub reports: Reports,
}

//! The part of a recipe that limits the bits of a model.

use lathe_tensor::Format;
use serde::{Deserialize, Serialize};

/// How the loss of a layer is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sensitivity {
    /// KL divergence from the base, in nats a token, with this layer alone rounded.
    #[default]
    Kl,
    /// The sum over the layer's matrices of `tr(D H D^T) / tr(W H W^T)`. `W` is the matrix, `D` its
    /// error, and `H = E[x x^T]` for its inputs `x`.
    Hessian,
}

/// The limit of the bits of a model, and the formats to choose from.
#[derive(Debug, Clone, PartialEq)]
pub struct Budget {
    /// Mean bits of a quantized weight. Scales and low-rank corrections count.
    pub bits: f64,
    /// The formats that a layer may have.
    pub formats: Vec<Format>,
    /// The loss to minimise.
    pub sensitivity: Sensitivity,
}

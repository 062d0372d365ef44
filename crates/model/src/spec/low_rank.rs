//! A low-rank term beside a matrix.

use serde::Serialize;

/// `scale * B (A x)`, added to a matrix's product `W x` (LoRA, Hu et al. 2021, section 4.1). `x` is
/// what the layer reads, before anything is done to it for the matrix's own format.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct LowRank {
    /// Rows of `A` `[rank, in]` and columns of `B` `[out, rank]`.
    pub rank: usize,
    /// Multiplies the product: `alpha / rank`, or `alpha / sqrt(rank)`.
    pub scale: f32,
    /// Canonical name of `A`: [`LowRank::down_of`] the first of the matrices that share it.
    pub down: String,
}

/// After a matrix's name in that of its `A`.
pub(crate) const DOWN: &str = ".lora_a";

impl LowRank {
    /// Canonical name of the `A` that is made for `matrix`.
    pub fn down_of(matrix: &str) -> String {
        format!("{matrix}{DOWN}")
    }

    /// Canonical name of the `B` of `matrix`.
    pub fn up_of(matrix: &str) -> String {
        format!("{matrix}.lora_b")
    }
}

//! `EagleSpec`: what a drafter is that reads features of the model that it drafts for.

use super::DecoderSpec;

/// How features are normalised before they are fused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureNorm {
    /// Not at all.
    None,
    /// All side by side (`norm_before_fc`).
    Whole,
    /// Each layer's by itself (`fc_norm`, EAGLE-3.1).
    Each,
}

/// What is fused into the stream that the first layer reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fusion {
    /// EAGLE-1 and EAGLE-2: the embedding and the row that the model's head reads.
    Hidden {
        /// Whether the fusion has a bias.
        bias: bool,
    },
    /// EAGLE-3: the stream of the model at several layers. The first layer reads the embedding
    /// beside it.
    Features {
        /// Layers that features come from.
        taps: usize,
        /// Norm of the features.
        feature_norm: FeatureNorm,
        /// Whether the first layer's residual is the normalised hidden row.
        norm_before_residual: bool,
    },
}

/// What a drafter is.
#[derive(Debug, Clone, PartialEq)]
pub struct EagleSpec {
    /// Its layers, widths and norms. The vocabulary is the drafter's own.
    pub decoder: DecoderSpec,
    /// What it drafts from.
    pub fusion: Fusion,
    /// Elements of one layer's feature.
    pub feature_width: usize,
    /// Whether the stream is normalised before the head.
    pub final_norm: bool,
    /// Whether the next drafted row reads the normalised stream (EAGLE-3.1).
    pub norm_output: bool,
}

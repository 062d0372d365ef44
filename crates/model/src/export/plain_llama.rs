//! What both targets can say: a decoder of equal Llama layers.

use lathe_program::Activation;

use super::ExportError;
use crate::spec::{
    AttentionSpec, BranchNorms, DecoderSpec, DenseSpec, FfnSpec, GqaSpec, NormSpec, Residual,
    RopeSpec,
};

/// A decoder of equal layers with RMS norms before each branch, GQA and SwiGLU.
pub(super) struct PlainLlama<'a> {
    pub spec: &'a DecoderSpec,
    pub attention: &'a GqaSpec,
    pub ffn: &'a DenseSpec,
    pub rope: &'a RopeSpec,
    pub epsilon: f32,
}

impl<'a> PlainLlama<'a> {
    /// The parts of `spec`, or what it has beyond them.
    pub(super) fn of(spec: &'a DecoderSpec, target: &'static str) -> Result<Self, ExportError> {
        let refuse = |feature: &str| ExportError::Feature { feature: feature.to_owned(), target };
        let layer = spec.layers.first().ok_or_else(|| refuse("a model without layers"))?;
        let epsilon = spec.final_norm.epsilon;
        let norm = NormSpec::rms(f64::from(epsilon));
        let before = BranchNorms { before: Some(norm), after: None };
        let AttentionSpec::Gqa(attention) = &layer.attention else {
            return Err(refuse("latent attention"));
        };
        let FfnSpec::Dense(ffn) = &layer.ffn else { return Err(refuse("a mixture of experts")) };
        let rope = attention.rope.as_ref().ok_or_else(|| refuse("attention without positions"))?;
        let scale = (attention.head_dim as f64).powf(-0.5) as f32;
        let beyond = [
            (spec.layers.iter().any(|other| other != layer), "layers of several kinds"),
            (layer.attention_norms != before || layer.ffn_norms != before, "norms of this kind"),
            (spec.final_norm != norm, "a final norm of this kind"),
            (layer.residual != Residual::Sequential, "a parallel residual"),
            (layer.residual_multiplier != 1.0, "a residual multiplier"),
            (spec.embedding_multiplier != 1.0, "an embedding multiplier"),
            (spec.logits_scale != 1.0 || spec.logits_softcap.is_some(), "a scale of the logits"),
            (attention.scale != scale, "an attention scale of its own"),
            (attention.window.is_some(), "windowed attention"),
            (attention.softcap.is_some(), "an attention softcap"),
            (attention.sinks, "attention sinks"),
            (attention.qk_norm.is_some(), "normalised queries and keys"),
            (attention.output_gate.is_some(), "gated attention"),
            (attention.qkv_bias != attention.output_bias, "biases of some attention matrices"),
            (ffn.activation != Activation::SwiGlu, "an activation other than SwiGLU"),
            (rope.rotary != attention.head_dim, "partial rotary embeddings"),
            // The matrices are rotated with them.
            (
                spec.inputs.values().any(|input| input.hadamard.is_some()),
                "inputs that are rotated while the model runs",
            ),
        ];
        match beyond.iter().find(|(has, _)| *has) {
            Some((_, feature)) => Err(refuse(feature)),
            None => Ok(PlainLlama { spec, attention, ffn, rope, epsilon }),
        }
    }
}

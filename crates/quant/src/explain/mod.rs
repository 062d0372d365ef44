//! Error analysis: the error of a quantized model, its sources and its cost, and which technique to
//! try next.
//!
//! [`crate::job::Job::explain`] fills an [`Explanation`] with numbers that are measured on text
//! which calibration did not see. `sources` splits an error into parts, and `advice` draws
//! conclusions. Nothing here knows how a report looks.

mod advice;
mod divergence;
mod grid;
mod histogram;
mod sources;

use serde::{Deserialize, Serialize};

pub use advice::{Advice, advise};
pub use divergence::Divergence;
pub(crate) use divergence::{DivergenceSum, kl_divergence, log_softmax};
pub use histogram::Histogram;
pub use sources::{Measured, OUTLIER_FACTOR, Sources, TensorError, explain_tensor};

/// The error of one tensor.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TensorExplanation {
    /// Canonical name.
    pub tensor: String,
    /// The name of its format.
    pub format: String,
    /// Numbers in it.
    pub elements: usize,
    /// The error of the codes, without a correction.
    #[serde(flatten)]
    pub error: TensorError,
    /// The remaining error with a correction, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrected: Option<Corrected>,
    /// The squared output error if only the inputs were rounded, to int8 with a scale for each
    /// token, over the squared output. An estimate, whatever the recipe does.
    pub activation_int8: Option<f64>,
    /// The mean squared length of the outputs.
    pub output_energy: Option<f64>,
}

/// The error that remains with a correction: squared error over squared signal.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Corrected {
    /// The correction's rank.
    pub rank: usize,
    /// Its bits for each weight.
    pub bits: f64,
    /// The error of the weights.
    pub weights: f64,
    /// The error of the outputs, if inputs were observed.
    pub outputs: Option<f64>,
}

/// The error of one layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LayerExplanation {
    /// The layer's index, from 0.
    pub layer: usize,
    /// Its quantized tensors.
    pub tensors: Vec<TensorExplanation>,
    /// Numbers in those tensors.
    pub elements: usize,
    /// Mean bits of those numbers, with scales and corrections.
    pub bits: f64,
    /// The error of the stream after this layer, with all layers up to this one quantized: the root
    /// of the mean over tokens of `|error|^2 / |stream|^2`.
    pub stream_error: f64,
    /// The same with this layer alone quantized.
    pub alone_error: f64,
    /// KL to the base with this layer alone quantized.
    pub kl: Divergence,
}

/// The KL that a mean number of bits would cost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Budget {
    /// Layers that stay in the file's float format. They are the layers with the most KL for the
    /// bits that this takes.
    pub kept_layers: usize,
    /// Mean bits of all numbers of [`LayerExplanation::elements`].
    pub bits: f64,
    /// The sum of the other layers' KL.
    pub kl: f64,
}

/// The distribution of weights or activations, in the file and after rotations and scales.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Distribution {
    /// As in the file.
    pub before: Histogram,
    /// Before rounding, after rotations and scales. `None` if none changed them.
    pub after: Option<Histogram>,
}

/// The error analysis of a quantized model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// The format of the recipe.
    pub format: String,
    /// Names of its techniques.
    pub techniques: Vec<String>,
    /// Whether calibration ran through quantized layers.
    pub quantized_prefix: bool,
    /// Tokens of the measured text.
    pub tokens: usize,
    /// Tokens of a window. Tokens of different windows do not attend to each other.
    pub window: usize,
    /// KL to the base of the whole quantized model.
    pub kl: Divergence,
    /// By layer.
    pub layers: Vec<LayerExplanation>,
    /// Bits against KL.
    pub budgets: Vec<Budget>,
    /// The distribution of the quantized tensors' weights.
    pub weights: Distribution,
    /// The distribution of their inputs.
    pub activations: Distribution,
    /// The advice.
    pub advice: Vec<Advice>,
}

impl Explanation {
    /// The mean of each part over all tensors, each relative to its own signal. Takes output
    /// errors, or weight errors if no input was observed.
    pub fn sources(&self) -> Sources {
        let all: Vec<Sources> = self
            .layers
            .iter()
            .flat_map(|layer| &layer.tensors)
            .map(|it| it.error.outputs.unwrap_or(it.error.weights).sources)
            .collect();
        let share = 1.0 / all.len().max(1) as f64;
        all.iter().fold(Sources::default(), |sum, it| sum.plus(it, share))
    }
}

/// For each `k`, the cost of keeping the `k` most sensitive layers in floats of `float_bits`.
pub(crate) fn budgets(layers: &[LayerExplanation], float_bits: f64) -> Vec<Budget> {
    let spared = |it: &LayerExplanation| it.kl.mean / (it.elements as f64 * (float_bits - it.bits));
    let mut order: Vec<&LayerExplanation> = layers.iter().filter(|it| it.elements > 0).collect();
    order.sort_by(|a, b| spared(b).total_cmp(&spared(a)));
    let elements: f64 = order.iter().map(|it| it.elements as f64).sum();
    let at = |kept: usize| {
        let bits = |(index, it): (usize, &&LayerExplanation)| {
            it.elements as f64 * if index < kept { float_bits } else { it.bits }
        };
        Budget {
            kept_layers: kept,
            bits: order.iter().enumerate().map(bits).sum::<f64>() / elements.max(1.0),
            kl: order[kept..].iter().map(|it| it.kl.mean).sum(),
        }
    };
    (0..=order.len()).map(at).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A model with layers of these KLs. Each has one tensor whose error has these parts.
    pub(crate) fn explanation(kls: &[f64], sources: Sources) -> Explanation {
        let measured = Measured { sqnr_db: 20.0, theory_sqnr_db: 20.0, sources };
        let error = TensorError {
            weights: measured,
            outputs: Some(measured),
            outlier_channels: 0,
            peak_db: 12.0,
        };
        let tensor = |layer: usize| TensorExplanation {
            tensor: format!("layers.{layer}.ffn.down"),
            format: "int4-g64-bf16".to_owned(),
            elements: 1000,
            error,
            corrected: None,
            activation_int8: None,
            output_energy: None,
        };
        let layer = |(layer, kl): (usize, &f64)| LayerExplanation {
            layer,
            tensors: vec![tensor(layer)],
            elements: 1000,
            bits: 4.0,
            stream_error: 0.1,
            alone_error: 0.1,
            kl: Divergence { mean: *kl, standard_error: 0.0 },
        };
        Explanation {
            format: "int4-g64-bf16".to_owned(),
            techniques: vec!["gptq".to_owned()],
            quantized_prefix: true,
            tokens: 512,
            window: 512,
            kl: Divergence { mean: kls.iter().sum(), standard_error: 0.0 },
            layers: kls.iter().enumerate().map(layer).collect(),
            budgets: Vec::new(),
            weights: Distribution::default(),
            activations: Distribution::default(),
            advice: Vec::new(),
        }
    }

    #[test]
    fn budgets_keep_the_most_sensitive_layers_first() {
        let explanation = explanation(&[0.1, 0.4, 0.2], Sources::default());
        let found = budgets(&explanation.layers, 16.0);
        let pairs: Vec<(f64, f64)> =
            found.iter().map(|it| (it.bits, (it.kl * 10.0).round() / 10.0)).collect();
        assert_eq!(pairs, [(4.0, 0.7), (8.0, 0.3), (12.0, 0.1), (16.0, 0.0)]);
    }
}

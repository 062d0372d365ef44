//! Random weights for any program, in any format.

use lathe_tensor::{Format, Tensor, codec};

use super::random::Random;
use crate::backend::{BackendError, WeightSource};
use crate::op::{Weight, WeightRole};
use crate::program::Program;

/// Weights that are drawn from a seed and each weight's name. Linear layers, experts, embedding and
/// head have the given format; routers and vectors are `f32`. Activations stay near 1.
#[derive(Debug, Clone)]
pub struct SeededWeights<'a> {
    /// The program of these weights.
    pub program: &'a Program,
    /// Format of the matrices.
    pub format: Format,
    /// The seed.
    pub seed: u64,
}

impl WeightSource for SeededWeights<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        let decl = self.program.weight(weight);
        let mut random = Random::named(self.seed, &decl.name);
        let columns = *decl.shape.last().unwrap_or(&1);
        let spread = match decl.role {
            WeightRole::Embedding => 1.0,
            WeightRole::Vector => 0.3,
            _ => 1.5 / (columns as f32).sqrt(),
        };
        // Weights of norms are factors, so they lie around 1. Other vectors lie around 0.
        let middle = if decl.name.ends_with("norm") { 1.0 } else { 0.0 };
        let elements = decl.shape.iter().product();
        let values: Vec<f32> = (0..elements).map(|_| middle + spread * random.normal()).collect();
        if matches!(decl.role, WeightRole::Vector | WeightRole::Router) {
            return Ok(Tensor::from_f32(&decl.shape, &values));
        }
        quantized(&decl.shape, self.format, &values)
            .map_err(|reason| BackendError::Weight { name: decl.name.clone(), reason })
    }
}

fn quantized(shape: &[usize], format: Format, values: &[f32]) -> Result<Tensor, String> {
    let columns = *shape.last().unwrap_or(&1);
    if let Format::Scaled(format) = format {
        let rounding = codec::scaled::E8m0Rounding::default();
        return codec::scaled::quantize(shape, &format, values, rounding)
            .map_err(|error| error.to_string());
    }
    if !columns.is_multiple_of(format.block_len()) {
        return Err(format!("cannot make {shape:?} in {format}"));
    }
    let codes = codec::quantize(format, values);
    Tensor::new(shape.to_vec(), format, lathe_tensor::Bytes::new(codes)).map_err(|e| e.to_string())
}

//! Matrices that engines run as one: those of a linear op (query, key and value; gate and up), and
//! gate and up of an expert. vLLM and others ask of them to share NVFP4's global scale.

use lathe_program::{Op, Weight};
use lathe_tensor::{Format, ScaleType};

use super::Job;
use crate::error::QuantError;

impl Job<'_> {
    /// For each matrix of `weight` (one, or one an expert) the largest magnitude of all that it is
    /// run with; nothing if the format has no global scale.
    pub(super) fn fused_largest(&mut self, weight: Weight) -> Result<Vec<f32>, QuantError> {
        let global =
            matches!(self.recipe.format, Format::Scaled(it) if it.scale == ScaleType::E4M3Global);
        let Some(op) = self.targets.get(&weight).filter(|_| global) else { return Ok(Vec::new()) };
        let together: Vec<Weight> = match &self.program.ops[*op] {
            Op::Linear { parts, .. } => parts.iter().map(|part| part.weight).collect(),
            Op::Experts { spec, .. } if weight != spec.down => vec![spec.gate, spec.up],
            _ => vec![weight],
        };
        let mut together = together;
        together.retain(|other| self.targets.get(other) == Some(op));
        if let Some(found) = self.fused.get(&together[0]) {
            return Ok(found.clone());
        }
        let mut largest: Vec<f32> = Vec::new();
        for weight in &together {
            let (shape, values) = self.load(*weight)?;
            let matrices = if shape.len() > 2 { shape[0] } else { 1 };
            largest.resize(matrices, 0.0);
            let parts = values.chunks((values.len() / matrices.max(1)).max(1));
            for (largest, part) in largest.iter_mut().zip(parts) {
                *largest = part.iter().fold(*largest, |most, value| most.max(value.abs()));
            }
        }
        self.fused.insert(together[0], largest.clone());
        Ok(largest)
    }
}

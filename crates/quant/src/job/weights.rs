//! A weight at each stage of a job: rotated, scaled, rounded.

use lathe_program::Weight;
use lathe_tensor::{Bytes, Format, Tensor, codec};

use super::Job;
use crate::error::QuantError;

impl Job<'_> {
    /// The current state of a weight: quantized (with its correction, then as floats), scaled, or
    /// unchanged.
    pub(super) fn current(&self, weight: Weight) -> Result<Tensor, QuantError> {
        match (self.ledger.finished.get(&weight), self.ledger.corrections.get(&weight)) {
            (Some(tensor), None) => Ok(tensor.clone()),
            (Some(tensor), Some(correction)) => {
                let mut values = tensor.to_f32();
                correction.add_to(&mut values);
                Ok(Tensor::from_f32_vec(tensor.shape.clone(), values))
            }
            (None, _) => self.unrounded(weight),
        }
    }

    /// A weight after rotations and scales, before rounding.
    pub(super) fn unrounded(&self, weight: Weight) -> Result<Tensor, QuantError> {
        if let Some(norm) = self.ledger.norms.get(&weight) {
            return Ok(norm.clone());
        }
        let columns =
            self.plan.targets.get(&weight).is_some_and(|op| self.ledger.columns.contains_key(op));
        if !columns
            && !self.ledger.rows.contains_key(&weight)
            && !self.plan.rotated_formats.contains_key(&weight)
        {
            return Ok(self.plan.weights.load(weight)?);
        }
        let (shape, values) = self.load(weight)?;
        Ok(Tensor::from_f32_vec(shape, values))
    }

    /// The shape and values of a weight with its row and column scales applied.
    pub(super) fn load(&self, weight: Weight) -> Result<(Vec<usize>, Vec<f32>), QuantError> {
        let (shape, mut values) = self.plan.rotated(weight)?;
        let columns = self.columns_of(weight);
        let rows = self.ledger.rows.get(&weight);
        let width = match shape.as_slice() {
            [] | [_] => 1,
            [.., columns] => (*columns).max(1),
        };
        for (index, row) in values.chunks_mut(width).enumerate() {
            if let Some(scales) = rows {
                row.iter_mut().for_each(|value| *value /= scales[index]);
            }
            if let Some(scales) = columns {
                row.iter_mut().zip(scales).for_each(|(value, scale)| *value *= scale);
            }
        }
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let what = format!("element {at} is {}", values[at]);
            return Err(QuantError::NotFinite { tensor: self.plan.name(weight), what });
        }
        Ok((shape, values))
    }

    /// A weight that is not quantized, in a float format. It is never whole in `f32`.
    pub(super) fn floats(&self, weight: Weight, format: Format) -> Result<Tensor, QuantError> {
        let scaled = self.ledger.rows.contains_key(&weight) || self.columns_of(weight).is_some();
        let tensor = self.plan.weights.load(weight)?;
        let mut codes = Vec::with_capacity(format.bytes_for(&tensor.shape).unwrap_or(0));
        match scaled || !self.plan.is_rotated(weight) {
            true => codes = codec::quantize(format, &self.load(weight)?.1),
            false => self.plan.rotate(weight, &tensor, &mut |part| {
                codes.extend_from_slice(&codec::quantize(format, part));
                // An embedding may be half of a small model, so its pages are released on the way.
                self.plan.weights.release();
            })?,
        }
        let at = |source| QuantError::Format { tensor: self.plan.name(weight), source };
        Tensor::new(tensor.shape, format, Bytes::new(codes)).map_err(at)
    }

    /// Scales of the input channels of a matrix.
    fn columns_of(&self, weight: Weight) -> Option<&Vec<f32>> {
        self.plan.targets.get(&weight).and_then(|op| self.ledger.columns.get(op))
    }
}

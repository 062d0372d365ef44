//! All weights as `f32`. Tensors that several weights share are kept once.

use std::sync::Arc;

use lathe_tensor::Tensor;
use rayon::prelude::*;

use crate::backend::{BackendError, WeightSource};
use crate::op::Weight;
use crate::program::Program;

pub(super) struct Weights {
    values: Vec<Arc<Vec<f32>>>,
    bytes: usize,
}

impl Weights {
    pub(super) fn load(program: &Program, source: &dyn WeightSource) -> Result<Self, BackendError> {
        let tensors = (0..program.weights.len())
            .map(|index| tensor(program, source, Weight(index as u32)))
            .collect::<Result<Vec<Tensor>, BackendError>>()?;
        let first_with_bytes = |index: usize| {
            let same = |other: &Tensor| is_same(other, &tensors[index]);
            tensors[..index].iter().position(same).unwrap_or(index)
        };
        let originals: Vec<usize> = (0..tensors.len()).map(first_with_bytes).collect();
        let owned: Vec<Option<Arc<Vec<f32>>>> = (0..tensors.len())
            .into_par_iter()
            .map(|index| (originals[index] == index).then(|| Arc::new(tensors[index].to_f32())))
            .collect();
        let bytes = owned.iter().flatten().map(|values| 4 * values.len()).sum();
        let values = originals.iter().filter_map(|original| owned[*original].clone()).collect();
        Ok(Self { values, bytes })
    }

    pub(super) fn get(&self, weight: Weight) -> &[f32] {
        &self.values[weight.0 as usize]
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}

fn tensor(
    program: &Program,
    source: &dyn WeightSource,
    weight: Weight,
) -> Result<Tensor, BackendError> {
    let decl = program.weight(weight);
    let tensor = source.tensor(weight)?;
    if tensor.shape != decl.shape {
        let reason = format!("found shape {:?}, expected {:?}", tensor.shape, decl.shape);
        return Err(BackendError::Weight { name: decl.name.clone(), reason });
    }
    Ok(tensor)
}

/// Whether both are views of the same bytes (a head tied to the embedding).
fn is_same(a: &Tensor, b: &Tensor) -> bool {
    a.codes.as_ptr() == b.codes.as_ptr()
        && a.shape == b.shape
        && a.format == b.format
        && a.scales.as_ptr() == b.scales.as_ptr()
        && a.zeros.as_ptr() == b.zeros.as_ptr()
        && a.global == b.global
        && !a.codes.is_empty()
}

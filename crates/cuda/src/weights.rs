//! `Weights`: a program's weights on the device, as `f32` or `bf16`, each tensor once.

use std::sync::Arc;

use lathe_program::{BackendError, Program, Weight, WeightRole, WeightSource};
use lathe_tensor::{FloatType, Format, Tensor};

use crate::device::{Device, Memory};

/// How a weight's numbers lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
}

impl Stored {
    /// The ending of the kernels that read it.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::Bf16 => "bf16",
        }
    }
}

#[derive(Clone)]
struct Placed {
    memory: Arc<Memory>,
    stored: Stored,
}

pub(crate) struct Weights {
    placed: Vec<Placed>,
    bytes: usize,
}

impl Weights {
    pub(crate) fn load(
        device: &Arc<Device>,
        program: &Program,
        source: &dyn WeightSource,
    ) -> Result<Self, BackendError> {
        let mut weights = Weights { placed: Vec::new(), bytes: 0 };
        // Tensors keep their bytes alive, so that equal addresses mean equal tensors.
        let mut loaded: Vec<Tensor> = Vec::new();
        for (index, decl) in program.weights.iter().enumerate() {
            let tensor = source.tensor(Weight(index as u32))?;
            if tensor.shape != decl.shape {
                let reason = format!("found shape {:?}, expected {:?}", tensor.shape, decl.shape);
                return Err(BackendError::Weight { name: decl.name.clone(), reason });
            }
            let vector = decl.role == WeightRole::Vector;
            let shared = loaded.iter().position(|other| is_same(other, &tensor));
            let shared = shared.map(|other| weights.placed[other].clone());
            let placed = match shared.filter(|it| !vector || it.stored == Stored::F32) {
                Some(placed) => placed,
                None => {
                    let placed = place(device, &tensor, vector)?;
                    weights.bytes += placed.memory.bytes();
                    placed
                }
            };
            weights.placed.push(placed);
            loaded.push(tensor);
        }
        Ok(weights)
    }

    pub(crate) fn address(&self, weight: Weight) -> u64 {
        self.placed[weight.0 as usize].memory.address()
    }

    /// The address of what may be absent.
    pub(crate) fn optional(&self, weight: Option<Weight>) -> u64 {
        weight.map_or(0, |weight| self.address(weight))
    }

    pub(crate) fn stored(&self, weight: Weight) -> Stored {
        self.placed[weight.0 as usize].stored
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

/// Vectors are `f32`; matrices stay `bf16` or `f32`, and `f16` becomes `f32`, which holds it.
fn place(device: &Arc<Device>, tensor: &Tensor, vector: bool) -> Result<Placed, BackendError> {
    let (stored, bytes) = match tensor.format {
        Format::Float(FloatType::BF16) if !vector => (Stored::Bf16, 2 * tensor.elements()),
        Format::Float(_) => (Stored::F32, 4 * tensor.elements()),
        other if vector => {
            return Err(unsupported(format!("vectors in {other:?}")));
        }
        other => return Err(unsupported(format!("weights in {other:?}"))),
    };
    let memory = device.allocate(bytes, "the weights")?;
    match stored {
        Stored::Bf16 => memory.write(0, &tensor.codes[..])?,
        Stored::F32 => memory.write(0, &tensor.to_f32())?,
    }
    Ok(Placed { memory: Arc::new(memory), stored })
}

pub(crate) fn unsupported(feature: String) -> BackendError {
    BackendError::Unsupported { backend: "cuda", feature }
}

/// Whether both are views of the same bytes (a head tied to the embedding).
fn is_same(a: &Tensor, b: &Tensor) -> bool {
    a.codes.as_ptr() == b.codes.as_ptr()
        && a.shape == b.shape
        && a.format == b.format
        && !a.codes.is_empty()
}

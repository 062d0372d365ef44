//! `Weights`: a program's weights on the device, as `f32` or `bf16`, each tensor once. The `bf16`
//! matrices of products are laid out for the tensor cores, unless the executor is exact.

use std::sync::Arc;

use lathe_program::{BackendError, Op, Program, Weight, WeightRole, WeightSource};
use lathe_tensor::{FloatType, Format, Tensor};

use crate::device::{Device, Memory};
use crate::parameters::Pack;

/// Outputs of a tile and columns of a block of [`Stored::Packed`].
pub(crate) const TILE: usize = 16;
pub(crate) const BLOCK_COLUMNS: usize = 32;

/// How a weight's numbers lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
    /// `bf16` in fragment order (`kernels/fast/product.cu`).
    Packed,
}

impl Stored {
    /// The ending of the kernels that read it.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::Bf16 => "bf16",
            Stored::Packed => "packed",
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
        exact: bool,
    ) -> Result<Self, BackendError> {
        let packable = if exact { vec![false; program.weights.len()] } else { packable(program) };
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
            let usable = |it: &Placed| match it.stored {
                Stored::F32 => true,
                Stored::Bf16 => !vector,
                Stored::Packed => packable[index],
            };
            let placed = match shared.filter(usable) {
                Some(placed) => placed,
                None => {
                    let placed = place(device, &tensor, vector, packable[index])?;
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

/// By weight: whether every op that reads it takes [`Stored::Packed`].
fn packable(program: &Program) -> Vec<bool> {
    let mut packable: Vec<bool> = program
        .weights
        .iter()
        .map(|decl| decl.shape.len() == 2 && decl.shape[1].is_multiple_of(BLOCK_COLUMNS))
        .collect();
    for op in &program.ops {
        if !matches!(op, Op::Linear { .. } | Op::Logits { .. } | Op::Embed { .. }) {
            op.weights().iter().for_each(|weight| packable[weight.0 as usize] = false);
        }
    }
    packable
}

/// Vectors are `f32`; matrices stay `bf16` or `f32`, and `f16` becomes `f32`, which holds it.
fn place(
    device: &Arc<Device>,
    tensor: &Tensor,
    vector: bool,
    pack: bool,
) -> Result<Placed, BackendError> {
    let what = "the weights";
    match tensor.format {
        Format::Float(FloatType::BF16) if !vector => {
            let rows = device.allocate(2 * tensor.elements(), what)?;
            rows.write(0, &tensor.codes[..])?;
            if !pack {
                return Ok(Placed { memory: Arc::new(rows), stored: Stored::Bf16 });
            }
            let (outputs, width) = (tensor.shape[0], tensor.shape[1]);
            let memory = device.allocate(outputs.next_multiple_of(TILE) * width * 2, what)?;
            let words = (memory.bytes() / 4) as u64;
            let (from, out) = (rows.address(), memory.address());
            let parameters =
                Pack { rows: from, out, words, outputs: outputs as u32, width: width as u32 };
            device.launch("pack_bf16", [1024, 1], (256, 0), &parameters)?;
            Ok(Placed { memory: Arc::new(memory), stored: Stored::Packed })
        }
        Format::Float(_) => {
            let memory = device.allocate(4 * tensor.elements(), what)?;
            memory.write(0, &tensor.to_f32())?;
            Ok(Placed { memory: Arc::new(memory), stored: Stored::F32 })
        }
        other if vector => Err(unsupported(format!("vectors in {other:?}"))),
        other => Err(unsupported(format!("weights in {other:?}"))),
    }
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

//! `Weights`: a program's weights on the device, each tensor once. The matrices of products are
//! laid out for the tensor cores, in `bf16` or as codes with scales, unless the executor is exact.

use std::sync::Arc;

use lathe_program::{BackendError, Op, Program, Weight, WeightRole, WeightSource};
use lathe_tensor::{FloatType, Format, Tensor};

use crate::device::{Device, Memory};
use crate::packed::{BLOCK_COLUMNS, PackedFormat, pack};

/// How a weight's numbers lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32,
    Bf16,
    /// In fragment order.
    Packed(PackedFormat),
}

impl Stored {
    /// The ending of the kernels that read it.
    pub(crate) fn suffix(self) -> &'static str {
        match self {
            Stored::F32 => "f32",
            Stored::Bf16 => "bf16",
            Stored::Packed(PackedFormat::Bf16) => "packed",
            Stored::Packed(format) => format.name(),
        }
    }

    pub(crate) fn packed(self) -> Option<PackedFormat> {
        if let Stored::Packed(format) = self { Some(format) } else { None }
    }
}

#[derive(Clone)]
struct Placed {
    memory: Arc<Memory>,
    /// Of outputs, `f32`.
    scales: Option<Arc<Memory>>,
    stored: Stored,
}

impl Placed {
    fn plain(memory: Memory, stored: Stored) -> Self {
        Placed { memory: Arc::new(memory), scales: None, stored }
    }
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
                Stored::Packed(_) => packable[index],
            };
            let placed = match shared.filter(usable) {
                Some(placed) => placed,
                None => {
                    let placed = place(device, &tensor, vector, packable[index], exact)?;
                    let scales = placed.scales.as_ref().map_or(0, |scales| scales.bytes());
                    weights.bytes += placed.memory.bytes() + scales;
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

    /// Of the scales of the outputs; 0 if there are none.
    pub(crate) fn scales(&self, weight: Weight) -> u64 {
        self.placed[weight.0 as usize].scales.as_ref().map_or(0, |scales| scales.address())
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

/// Vectors are `f32`. Matrices stay `bf16` or `f32`, and `f16` becomes `f32`, which holds it.
/// Codes with scales become `f32` where the executor is exact, and else have a layout of their own.
fn place(
    device: &Arc<Device>,
    tensor: &Tensor,
    vector: bool,
    packable: bool,
    exact: bool,
) -> Result<Placed, BackendError> {
    let what = "the weights";
    let columns = tensor.shape.last().copied().unwrap_or(0);
    let format = PackedFormat::of(tensor.format, columns).filter(|_| packable && !vector);
    if let Some(format) = format {
        let matrix = pack(device, tensor, format)?;
        return Ok(Placed {
            memory: Arc::new(matrix.codes),
            scales: matrix.scales.map(Arc::new),
            stored: Stored::Packed(format),
        });
    }
    match tensor.format {
        Format::Float(FloatType::BF16) if !vector => {
            let rows = device.allocate(2 * tensor.elements(), what)?;
            rows.write(0, &tensor.codes[..])?;
            Ok(Placed::plain(rows, Stored::Bf16))
        }
        other if vector && !matches!(other, Format::Float(_)) => {
            Err(unsupported(format!("vectors in {other}")))
        }
        other if !exact && !matches!(other, Format::Float(_)) => {
            Err(unsupported(format!("these weights in {other}: {:?}", tensor.shape)))
        }
        _ => {
            let memory = device.allocate(4 * tensor.elements(), what)?;
            memory.write(0, &tensor.to_f32())?;
            Ok(Placed::plain(memory, Stored::F32))
        }
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

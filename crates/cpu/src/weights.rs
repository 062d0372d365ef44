//! Loads each weight from its source and lays it out for the ops that read it.

use lathe_program::{BackendError, ExpertsSpec, Op, Program, Weight, WeightSource};
use lathe_tensor::{Element, Format, Tensor};
use rayon::prelude::*;

use crate::isa::Isa;
use crate::linear::Matrix;
use crate::pack::PackedMatrix;

/// A weight, laid out in each form that some op reads.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    table: Option<Tensor>,
    matrix: Option<Matrix>,
    experts: Option<Vec<Matrix>>,
    floats: Option<Vec<f32>>,
    /// Whether the readers of `floats` lay them out once more, so that they need not be kept.
    passing: bool,
}

/// The forms of a weight that ops need.
#[derive(Debug, Clone, Copy, Default)]
struct Needs {
    table: bool,
    /// For a use as a matrix, whether activations may be rounded.
    matrix: Option<Rounding>,
    experts: Option<usize>,
    floats: bool,
    passing: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Rounding {
    Allowed,
    Never,
}

/// All weights of a program.
#[derive(Debug)]
pub(crate) struct Weights {
    loaded: Vec<Loaded>,
    names: Vec<String>,
}

impl Weights {
    /// Loads every weight that an op of `program` reads, in parallel.
    ///
    /// # Errors
    /// The source's error, or [`BackendError::Weight`] for a tensor whose shape is not the declared
    /// one.
    pub(crate) fn load(
        program: &Program,
        source: &dyn WeightSource,
        isa: Isa,
        exact: bool,
    ) -> Result<Self, BackendError> {
        let needs = needs(program);
        let loaded = needs
            .par_iter()
            .enumerate()
            .map(|(index, needs)| load(program, Weight(index as u32), *needs, source, isa, exact))
            .collect::<Result<Vec<_>, _>>()?;
        let names = program.weights.iter().map(|w| w.name.clone()).collect();
        Ok(Self { loaded, names })
    }

    /// The weight as a table whose rows are looked up.
    pub(crate) fn table(&self, weight: Weight) -> Tensor {
        self.get(weight, |l| l.table.clone())
    }

    /// The weight as a matrix for products.
    pub(crate) fn matrix(&self, weight: Weight) -> Matrix {
        self.get(weight, |l| l.matrix.clone())
    }

    /// The weight as one matrix for each expert.
    pub(crate) fn experts(&self, weight: Weight) -> Vec<Matrix> {
        self.get(weight, |l| l.experts.clone())
    }

    /// The weight as floats.
    pub(crate) fn floats(&self, weight: Weight) -> Vec<f32> {
        self.get(weight, |l| l.floats.clone())
    }

    fn get<T>(&self, weight: Weight, form: impl Fn(&Loaded) -> Option<T>) -> T {
        let index = weight.0 as usize;
        form(&self.loaded[index])
            .unwrap_or_else(|| panic!("{} was not loaded in this form", self.names[index]))
    }

    /// Bytes of all weights without those of latent attentions, which lay theirs out themselves.
    pub(crate) fn bytes(&self) -> usize {
        let bytes = |l: &Loaded| {
            l.table.as_ref().map_or(0, Tensor::byte_len)
                + l.matrix.as_ref().map_or(0, Matrix::bytes)
                + l.experts.iter().flatten().map(Matrix::bytes).sum::<usize>()
                + l.floats.as_ref().filter(|_| !l.passing).map_or(0, |f| size_of_val(f.as_slice()))
        };
        self.loaded.iter().map(bytes).sum()
    }
}

fn needs(program: &Program) -> Vec<Needs> {
    let mut needs = vec![Needs::default(); program.weights.len()];
    for op in &program.ops {
        match op {
            Op::Embed { table, .. } => needs[table.0 as usize].table = true,
            Op::Linear { parts, .. } => {
                for part in parts {
                    needs[part.weight.0 as usize].matrix = Some(Rounding::Allowed);
                    part.bias.iter().for_each(|b| needs[b.0 as usize].floats = true);
                }
            }
            Op::Logits { head, .. } => needs[head.0 as usize].matrix = Some(Rounding::Allowed),
            Op::Route { spec, .. } => {
                // A rounded input could choose another expert. The few bytes that rounding saves
                // are not worth that.
                needs[spec.weight.0 as usize].matrix = Some(Rounding::Never);
                let vectors = spec.bias.iter().chain(&spec.correction);
                vectors.for_each(|v| needs[v.0 as usize].floats = true);
            }
            Op::Experts { spec, .. } => experts_needs(spec, &mut needs),
            Op::AttendLatent { spec, .. } => {
                for matrix in [spec.key_up, spec.value_up] {
                    let need = &mut needs[matrix.0 as usize];
                    (need.floats, need.passing) = (true, true);
                }
            }
            other => {
                other.weights().iter().for_each(|w| needs[w.0 as usize].floats = true);
            }
        }
    }
    needs
}

fn experts_needs(spec: &ExpertsSpec, needs: &mut [Needs]) {
    for matrix in [spec.gate, spec.up, spec.down] {
        needs[matrix.0 as usize].experts = Some(spec.experts);
    }
    for bias in [spec.gate_bias, spec.up_bias, spec.down_bias].into_iter().flatten() {
        needs[bias.0 as usize].floats = true;
    }
}

fn load(
    program: &Program,
    weight: Weight,
    needs: Needs,
    source: &dyn WeightSource,
    isa: Isa,
    exact: bool,
) -> Result<Loaded, BackendError> {
    let mut loaded = Loaded { passing: needs.passing, ..Loaded::default() };
    if !needs.table && !needs.floats && needs.matrix.is_none() && needs.experts.is_none() {
        return Ok(loaded);
    }
    let decl = program.weight(weight);
    let tensor = source.tensor(weight)?;
    if tensor.shape != decl.shape {
        return Err(BackendError::Weight {
            name: decl.name.clone(),
            reason: format!("expected shape {:?}, found {:?}", decl.shape, tensor.shape),
        });
    }
    let tensor = with_kernels(tensor);
    let named = |error| match error {
        BackendError::Weight { reason, .. } => {
            BackendError::Weight { name: decl.name.clone(), reason }
        }
        BackendError::Unsupported { backend, feature } => {
            BackendError::Unsupported { backend, feature: format!("{feature} ({})", decl.name) }
        }
        other => other,
    };
    // In programs with routers, rows in the prefill form are multiplied in two parts. That pays on
    // AMX only.
    let one_form = program.routings > 0 && isa != Isa::Amx;
    let pack = |tensor: &Tensor, exact| {
        let packed = Matrix::pack(tensor, isa, exact)?;
        Ok(if one_form { packed.without_prefill_form() } else { packed })
    };
    if let Some(rounding) = needs.matrix {
        let exact = exact || rounding == Rounding::Never;
        loaded.matrix = Some(pack(&tensor, exact).map_err(named)?);
    }
    if let Some(experts) = needs.experts {
        let pack = |part: &Tensor| pack(part, exact);
        loaded.experts = Some(pack_experts(&tensor, experts, pack).map_err(named)?);
    }
    if needs.floats {
        loaded.floats = Some(tensor.to_f32());
    }
    if needs.table {
        loaded.table = Some(tensor);
    }
    Ok(loaded)
}

/// Converts floats of eight and six bits to `f32` if no kernel reads their scales (tiles of fewer
/// than 32 columns; published checkpoints have 128). `f32` holds each product of number and scale
/// without rounding, in four times the memory.
fn with_kernels(tensor: Tensor) -> Tensor {
    let float8 = |element| {
        matches!(element, Element::F8E4M3 | Element::F8E5M2 | Element::F6E2M3 | Element::F6E3M2)
    };
    let refused = || PackedMatrix::check(tensor.format, tensor.columns()).is_err();
    match tensor.format {
        Format::Scaled(format) if float8(format.element) && refused() => {
            Tensor::from_f32_vec(tensor.shape.clone(), tensor.to_f32())
        }
        _ => tensor,
    }
}

fn pack_experts(
    tensor: &Tensor,
    experts: usize,
    pack: impl Fn(&Tensor) -> Result<Matrix, BackendError> + Sync,
) -> Result<Vec<Matrix>, BackendError> {
    let rows = tensor.rows() / experts.max(1);
    let pack_one = |expert: usize| {
        let part = tensor.slice_rows(expert * rows..(expert + 1) * rows).map_err(|error| {
            BackendError::Weight { name: String::new(), reason: error.to_string() }
        })?;
        pack(&part)
    };
    (0..experts).into_par_iter().map(pack_one).collect()
}

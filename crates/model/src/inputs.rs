//! What a checkpoint's configuration says of inputs, as the inputs of canonical matrices.

use std::collections::BTreeMap;

use lathe_program::{InputTransform, Op, Program, StaticScale, Weight, WeightRole};
use lathe_tensor::ActivationFormat;

use crate::checkpoint::{Checkpoint, InputScheme, ModuleInput};
use crate::lower::{LowerOptions, lower};
use crate::model::ModelError;
use crate::names::Rules;
use crate::spec::{DecoderSpec, SpecError};
use crate::weights::ModelWeights;

/// What `scheme`, which names modules, means for the matrices of `spec`.
pub(crate) fn inputs_of(
    spec: &DecoderSpec,
    checkpoint: &Checkpoint,
    rules: &[Rules],
    scheme: &InputScheme,
    at: &dyn Fn(SpecError) -> ModelError,
) -> Result<BTreeMap<String, InputTransform>, ModelError> {
    let program = lower(spec, &LowerOptions::new(spec.context_max)).map_err(at)?;
    let weights = ModelWeights::new(checkpoint, spec, rules, None, &program)?;
    let mut inputs = BTreeMap::new();
    for (index, decl) in program.weights.iter().enumerate() {
        let modules = weights.tensors_of(Weight(index as u32)).iter();
        let mut modules = modules.filter_map(|tensor| tensor.strip_suffix(".weight"));
        // A table and vectors multiply nothing; a tied head is the table.
        let matrix = !matches!(decl.role, WeightRole::Embedding | WeightRole::Vector);
        if !matrix || (decl.role == WeightRole::Head && spec.tied_head) {
            continue;
        }
        let Some(first) = modules.next() else { continue };
        let mut input = Stored::of_module(checkpoint, scheme, first).map_err(at)?;
        for other in modules {
            let found = Stored::of_module(checkpoint, scheme, other).map_err(at)?;
            let apart = || format!("{first} and {other} with different inputs");
            input = input.joined(found).ok_or_else(|| at(SpecError::feature(apart())))?;
        }
        if !input.0.is_nothing() {
            inputs.insert(decl.name.clone(), input.0);
        }
    }
    join_experts(&program, &mut inputs).map_err(at)?;
    Ok(inputs)
}

/// Gate and up of all experts of a layer read one input.
fn join_experts(
    program: &Program,
    inputs: &mut BTreeMap<String, InputTransform>,
) -> Result<(), SpecError> {
    for op in &program.ops {
        let Op::Experts { spec, .. } = op else { continue };
        let [gate, up] = [spec.gate, spec.up].map(|weight| &program.weight(weight).name);
        let of = |name: &String| Stored(inputs.get(name).copied().unwrap_or_default());
        let apart = || SpecError::feature(format!("{gate} and {up} with different inputs"));
        let joined = of(gate).joined(of(up)).ok_or_else(apart)?;
        if !joined.0.is_nothing() {
            inputs.extend([gate, up].map(|name| (name.clone(), joined.0)));
        }
    }
    Ok(())
}

/// What is done to an input, the scale that the files store included.
#[derive(Clone, Copy)]
struct Stored(InputTransform);

impl Stored {
    fn of_module(
        checkpoint: &Checkpoint,
        scheme: &InputScheme,
        module: &str,
    ) -> Result<Self, SpecError> {
        let ModuleInput { transform, stored_scale } = scheme.of_module(module)?;
        if transform.is_nothing() {
            return Self::beside_codes(checkpoint, module);
        }
        let Some(ending) = stored_scale else { return Ok(Stored(transform)) };
        let name = format!("{module}.{ending}");
        let expected = || "one positive number, for `input_activations` says that it is stored";
        let wrong = |found: &dyn std::fmt::Display| SpecError::value(&name, found, expected());
        let tensor = checkpoint.tensor(&name).map_err(|error| wrong(&error))?;
        let scale = match tensor.to_f32()[..] {
            [scale] => StaticScale::new(scale).ok_or_else(|| wrong(&scale))?,
            ref all => return Err(wrong(&format!("{} numbers", all.len()))),
        };
        Ok(Stored(InputTransform { scale: Some(scale), ..transform }))
    }

    /// What the method that quantized the weights stores of the input of `module`.
    fn beside_codes(checkpoint: &Checkpoint, module: &str) -> Result<Self, SpecError> {
        let name = || format!("the scale of the inputs of {module}");
        let expected = "one positive number";
        let found = checkpoint.stored_input(module);
        let found = found.map_err(|error| SpecError::value(name(), error, expected))?;
        let Some((format, scale)) = found else { return Ok(Stored(InputTransform::default())) };
        let wrong = || SpecError::value(name(), scale, expected);
        let scale = Some(StaticScale::new(scale).ok_or_else(wrong)?);
        Ok(Stored(InputTransform { hadamard: None, format: Some(format), scale }))
    }

    /// What is done to one input for two matrices, under the wider of two stored scales; `None` if
    /// they differ in something else.
    fn joined(self, other: Self) -> Option<Self> {
        let without = |it: Self| InputTransform { scale: None, ..it.0 };
        let (a, b) = (self.0.scale, other.0.scale);
        if without(self) != without(other) || a.is_some() != b.is_some() {
            return None;
        }
        // NVFP4's is divided by.
        let scale = match self.0.format {
            Some(ActivationFormat::Nvfp4) => a.min(b),
            _ => a.max(b),
        };
        Some(Stored(InputTransform { scale, ..self.0 }))
    }
}

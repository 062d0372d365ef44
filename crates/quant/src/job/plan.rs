//! The plan of a job: what becomes of every weight. It is complete before anything is computed and
//! does not change.

use std::collections::BTreeMap;

use lathe_model::weights::ModelWeights;
use lathe_program::{Op, Program, Weight, WeightRole};
use lathe_tensor::{ActivationFormat, FloatType, Format, Tensor};

use crate::error::QuantError;
use crate::matrix::{Matrix, check_shape};
use crate::recipe::{Recipe, TechniqueStep};
use crate::rotate::turned;
use crate::rotate::turns::Turns;
use crate::rotated::rotated;
use crate::targets::targets;
use crate::technique::{Apply, Stage, correction_bits};

/// What a recipe does to a model's weights.
pub(super) struct Plan<'a> {
    pub program: &'a Program,
    pub weights: &'a ModelWeights<'a>,
    pub recipe: &'a Recipe,
    /// The quantized matrices, with the op that reads each.
    pub targets: BTreeMap<Weight, usize>,
    /// The rotations of each weight. They come first.
    turns: Turns,
    /// The float formats that the rotated weights have in the file.
    pub rotated_formats: BTreeMap<Weight, Format>,
    /// Whether the job runs calibration.
    pub calibrated: bool,
}

impl<'a> Plan<'a> {
    /// Plans and checks.
    ///
    /// # Errors
    /// If a tensor does not fit its format, or a technique lacks what it requires.
    pub(super) fn new(
        weights: &'a ModelWeights<'a>,
        recipe: &'a Recipe,
        calibrated: bool,
    ) -> Result<Self, QuantError> {
        let program = weights.program();
        let targets = targets(program, recipe)?;
        let turns = turns_of(program, recipe)?;
        let mut rotated_formats = BTreeMap::new();
        for weight in turns.weights() {
            let format = Format::Float(float_of(weights.load(weight)?.format));
            rotated_formats.insert(weight, format);
        }
        if recipe.budget.is_some() {
            return Err(QuantError::Recipe("its budget was not planned".to_owned()));
        }
        let plan = Plan { program, weights, recipe, targets, turns, rotated_formats, calibrated };
        plan.check()?;
        Ok(plan)
    }

    fn check(&self) -> Result<(), QuantError> {
        for weight in self.targets.keys() {
            let decl = self.program.weight(*weight);
            let rounding = self.recipe.rounding_of(&decl.name)?;
            let [.., rows, columns] = decl.shape[..] else { continue };
            let name = &decl.name;
            let matrix = Matrix { name, rows, columns, values: &[], fused_largest: None };
            check_shape(&matrix, self.recipe.format_of(name))?;
            let prepares = |step: &&TechniqueStep| {
                step.technique.stage == Stage::Prepare && step.applies_to(&decl.name)
            };
            let correction = self.recipe.correction_of(name)?;
            if let Some(step) = correction {
                self.check_correction(step, *weight)?;
            }
            let steps = self.recipe.steps.iter().filter(prepares).chain([rounding]);
            let mut steps = steps.chain(correction);
            if let Some(step) = steps.find(|step| step.needs_calibration() && !self.calibrated) {
                let (technique, tensor) = (step.technique.name, decl.name.clone());
                return Err(QuantError::Unobserved { technique, tensor });
            }
        }
        Ok(())
    }

    /// Refuses a correction of a matrix that an adapter cannot name.
    fn check_correction(&self, step: &TechniqueStep, weight: Weight) -> Result<(), QuantError> {
        let refuse = |reason: &str| {
            let (technique, tensor) = (step.technique.name, self.name(weight));
            Err(QuantError::Technique { technique, tensor, reason: reason.to_owned() })
        };
        if self.program.weight(weight).role == WeightRole::Experts {
            return refuse(
                "it is a stack of experts, expected matrices that are modules of their own; \
                 `tensors` of the step can name those",
            );
        }
        let op = &self.program.ops[self.targets[&weight]];
        let rounded = self.program.ops.iter().any(|maker| match maker {
            Op::Transform { transform, out, .. } => {
                transform.format.is_some() && op.inputs().any(|it| it == *out)
            }
            _ => false,
        });
        match rounded {
            true => refuse(
                "its input is rounded while the model runs, and an adapter reads it as it is; \
                 expected no `activations`",
            ),
            false => Ok(()),
        }
    }

    /// The canonical name of a weight.
    pub(super) fn name(&self, weight: Weight) -> String {
        self.program.weight(weight).name.clone()
    }

    /// Numbers of all matrices that are quantized.
    pub(super) fn elements(&self) -> usize {
        let of_weight =
            |weight: &Weight| self.program.weight(*weight).shape.iter().product::<usize>();
        self.targets.keys().map(of_weight).sum()
    }

    /// Whether calibration finds input scales.
    pub(super) fn finds_input_scales(&self) -> bool {
        self.calibrated && self.recipe.activations == Some(ActivationFormat::Nvfp4)
    }

    /// Elements of a block of the input of `weight`, if the input is rotated while the model runs.
    pub(super) fn rotation_of(&self, weight: Weight) -> Option<usize> {
        let mut all = rotated(self.program).into_iter();
        all.find_map(|(other, block)| (other == weight).then_some(block))
    }

    /// Bits of one weight when it is quantized, with its correction.
    pub(super) fn bits_of(&self, weight: Weight) -> Result<f64, QuantError> {
        let decl = self.program.weight(weight);
        let elements: usize = decl.shape.iter().product();
        let codes = elements as f64 * self.recipe.format_of(&decl.name).bits_per_weight();
        Ok(codes + bits_of_correction(self.recipe, &decl.name, &decl.shape)?)
    }

    /// Whether rotations change a weight.
    pub(super) fn is_rotated(&self, weight: Weight) -> bool {
        !self.turns.of(weight).is_empty()
    }

    /// The shape and the values of a weight after its rotations.
    pub(super) fn rotated(&self, weight: Weight) -> Result<(Vec<usize>, Vec<f32>), QuantError> {
        let tensor = self.weights.load(weight)?;
        if !self.is_rotated(weight) {
            let values = tensor.to_f32();
            return Ok((tensor.shape, values));
        }
        let mut values = Vec::with_capacity(tensor.shape.iter().product());
        self.rotate(weight, &tensor, &mut |part| values.extend_from_slice(part))?;
        Ok((tensor.shape, values))
    }

    /// Hands out a weight after its rotations, one part after the other.
    pub(super) fn rotate(
        &self,
        weight: Weight,
        tensor: &Tensor,
        take: &mut dyn FnMut(&[f32]),
    ) -> Result<(), QuantError> {
        let norm = |norm| Ok(self.weights.load(norm)?.to_f32());
        turned::<QuantError>(tensor, self.turns.of(weight), norm, take)
    }
}

/// Bits of the correction of tensor `name` of `shape`. 0 if it has none.
///
/// # Errors
/// If it is corrected twice.
pub(crate) fn bits_of_correction(
    recipe: &Recipe,
    name: &str,
    shape: &[usize],
) -> Result<f64, QuantError> {
    Ok(match (recipe.correction_of(name)?, shape) {
        (Some(step), [rows, columns]) => correction_bits(*rows, *columns, &step.parameters),
        _ => 0.0,
    })
}

/// The changes of weights by the recipe's rotations, and by those that the program does while it
/// runs.
fn turns_of(program: &Program, recipe: &Recipe) -> Result<Turns, QuantError> {
    let mut turns = Turns::default();
    for step in &recipe.steps {
        if let Apply::Program(apply) = step.technique.apply {
            turns = apply(program, &step.parameters)?;
        }
    }
    turns.fold_inputs(program);
    Ok(turns)
}

/// The type of a float format. BF16 for formats that are read as floats but stored otherwise.
pub(super) fn float_of(format: Format) -> FloatType {
    match format {
        Format::Float(float) => float,
        _ => FloatType::BF16,
    }
}

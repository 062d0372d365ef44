//! Experts: stacks of matrices, each of which is quantized alone.
//!
//! Calibration runs every token through every expert, whatever the router chose (like
//! llm-compressor's `calibrate_all_experts`). So a rare expert sees as much as any other. The
//! router's choices are counted for the report. A small program of an expert's two matrices and
//! activation makes its hidden values, on the calibration's backend.

use lathe_program::{
    ExpertsSpec, LinearSpec, Op, Program, ProgramBuilder, Value, Weight, WeightRole,
};
use lathe_tensor::{Bytes, GlobalScale, Tensor, TensorError};

use super::layer::LayerPass;
use super::reports::WeightReport;
use crate::calibrate::{Calibration, Seen, Stream};
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, Outcome};
use crate::recipe::TechniqueStep;
use crate::section::Section;
use crate::statistics::{Asymmetry, Statistics};

/// The statistics of one expert's hidden values.
pub(super) struct ExpertSeen {
    statistics: Statistics,
    /// How they differ from the float model's, if a technique asks.
    asymmetry: Option<Asymmetry>,
}

/// The statistics of an expert, by its number.
type SeenOf<'a> = dyn FnMut(usize) -> Result<Option<ExpertSeen>, QuantError> + 'a;

impl LayerPass<'_, '_> {
    /// Quantizes the experts of op `op`, if it has experts among the targets.
    pub(super) fn round_experts(
        &mut self,
        op: usize,
        calibration: &Calibration<'_>,
    ) -> Result<(), QuantError> {
        let program = self.job.plan.program;
        let Op::Experts { input, spec, .. } = &program.ops[op] else { return Ok(()) };
        let seen = self.statistics(op);
        for weight in [spec.down, spec.gate, spec.up] {
            if !self.job.plan.targets.contains_key(&weight)
                || self.job.ledger.finished.contains_key(&weight)
            {
                continue;
            }
            let step = self.job.plan.recipe.rounding_of(&self.job.plan.name(weight))?;
            if spec.weigh_input && step.needs_calibration() {
                return Err(QuantError::Technique {
                    technique: step.technique.name,
                    tensor: self.job.plan.name(weight),
                    reason: "its input depends on the router's weights".to_owned(),
                });
            }
            if weight != spec.down {
                self.round_together(step, weight, seen.as_deref())?;
                continue;
            }
            self.round_down(step, spec, *input, calibration)?;
        }
        Ok(())
    }

    /// Quantizes the last matrices of the experts of `spec`, each with the statistics of its own
    /// hidden values. Gate and up stay unrounded until down has seen their output.
    fn round_down(
        &mut self,
        step: &TechniqueStep,
        spec: &ExpertsSpec,
        input: Value,
        calibration: &Calibration<'_>,
    ) -> Result<(), QuantError> {
        let hidden = self.hidden_program(spec, input);
        let weights = [Some(spec.gate), Some(spec.up), spec.gate_bias, spec.up_bias];
        let loaded = weights.iter().flatten().map(|weight| Ok(self.job.load(*weight)?.1));
        let loaded = loaded.collect::<Result<Vec<Vec<f32>>, QuantError>>()?;
        let (experts, products) = (spec.experts, step.needs_products());
        let part_of = |expert: usize, weight: Weight| {
            let shape = &hidden.program.weights[weight.0 as usize].shape;
            let all = &loaded[weight.0 as usize];
            let len = all.len() / experts;
            Tensor::from_f32(shape, &all[expert * len..][..len])
        };
        let width = self.job.plan.program.value_width(input);
        let rows = |rows: &Vec<f32>| Stream { width, values: rows.clone().into() };
        let (stream, float) =
            (rows(&self.experts.rows[&input]), self.experts.floats.get(&input).map(rows));
        let seen_of = |expert: usize| -> Result<ExpertSeen, QuantError> {
            let mut part = |weight: Weight| Ok(part_of(expert, weight));
            let mut floats = Vec::new();
            if let Some(float) = &float {
                let mut keep = |window: Seen<'_>| floats.extend_from_slice(window.taps[0]);
                calibration.run(&hidden, Some(float), &mut part, &mut keep)?;
            }
            let width = hidden.program.capture_widths()[0];
            let new = if products { Statistics::new } else { Statistics::without_products };
            let (mut statistics, mut at) = (new(width), 0);
            let mut asymmetry = float.as_ref().map(|_| Asymmetry::new(width));
            let mut add = |window: Seen<'_>| {
                let rows = window.taps[0];
                statistics.add(rows);
                if let Some(asymmetry) = &mut asymmetry {
                    asymmetry.add(&floats[at..at + rows.len()], rows);
                    at += rows.len();
                }
            };
            calibration.run(&hidden, Some(&stream), &mut part, &mut add)?;
            Ok(ExpertSeen { statistics, asymmetry })
        };
        let scales = self.job.plan.finds_input_scales();
        let mut largest = 0.0f32;
        let mut seen = |expert: usize| {
            if !step.needs_calibration() && !scales {
                return Ok(None);
            }
            let seen = seen_of(expert)?;
            largest = seen.statistics.largest().iter().fold(largest, |most, x| most.max(*x));
            Ok(step.needs_calibration().then_some(seen))
        };
        self.round_stack(step, spec.down, &mut seen)?;
        if scales {
            self.keep_input_scale(&[spec.down], largest);
        }
        Ok(())
    }

    /// A program that makes one expert's hidden values from its inputs. Weights 0 to 3 are gate, up
    /// and their biases.
    fn hidden_program(&self, spec: &ExpertsSpec, input: Value) -> Section {
        let (width, hidden) = (self.job.plan.program.value_width(input), spec.hidden);
        let Program { vocabulary, context_max, kv, .. } = self.job.plan.program;
        let mut b = ProgramBuilder::new(*vocabulary, *context_max, kv.block_tokens);
        let mut matrix = |name: &str| b.weight(name, &[hidden, width], WeightRole::Linear, None);
        let (gate, up) = (matrix("gate"), matrix("up"));
        let mut bias = |name: &str, there: Option<Weight>| {
            there.map(|_| b.weight(name, &[hidden], WeightRole::Vector, None))
        };
        let gate_bias = bias("gate_bias", spec.gate_bias);
        let up_bias = bias("up_bias", spec.up_bias);
        let x = b.input(width, "inputs");
        let parts = vec![
            LinearSpec::new(gate, "gate").bias(gate_bias),
            LinearSpec::new(up, "up").bias(up_bias),
        ];
        let made = b.linear(x, parts);
        let out = b.activate(made[0], Some(made[1]), spec.activation, "hidden");
        let out = b.transform(out, spec.hidden_transform, "hidden_input");
        b.capture(out, 0);
        let program = b.finish();
        let weights = (0..program.weights.len() as u32).map(Weight).collect();
        Section { weights, program }
    }

    /// Quantizes a stack whose matrices read the same input.
    fn round_together(
        &mut self,
        step: &TechniqueStep,
        weight: Weight,
        statistics: Option<&Statistics>,
    ) -> Result<(), QuantError> {
        let (shape, values) = self.job.load(weight)?;
        let names = self.names_of_matrices(weight, shape[0]);
        let asymmetry = self.job.plan.targets.get(&weight).and_then(|op| self.asymmetry(*op));
        let fused = self.job.fused_largest(weight)?;
        let matrices = names.iter().zip(values.chunks(shape[1] * shape[2])).enumerate();
        let matrices = matrices.map(|(expert, (name, values))| Matrix {
            name,
            rows: shape[1],
            columns: shape[2],
            values,
            fused_largest: fused.get(expert).copied(),
        });
        let asymmetry = asymmetry.as_ref();
        let group = Group { matrices: matrices.collect(), statistics, asymmetry, tied: None };
        let mut tensors = Vec::with_capacity(names.len());
        self.round_of_stack(step, weight, &group, &mut tensors)?;
        self.keep_stack(weight, &tensors)
    }

    /// Quantizes a stack, one matrix at a time. `seen_of` gives the statistics of each matrix's
    /// input.
    pub(super) fn round_stack(
        &mut self,
        step: &TechniqueStep,
        weight: Weight,
        seen_of: &mut SeenOf<'_>,
    ) -> Result<(), QuantError> {
        let (shape, values) = self.job.load(weight)?;
        let names = self.names_of_matrices(weight, shape[0]);
        let fused = self.job.fused_largest(weight)?;
        let mut tensors = Vec::with_capacity(names.len());
        let matrices = names.iter().zip(values.chunks(shape[1] * shape[2])).enumerate();
        for (expert, (name, values)) in matrices {
            let seen = seen_of(expert)?;
            let fused_largest = fused.get(expert).copied();
            let (rows, columns) = (shape[1], shape[2]);
            let matrices = vec![Matrix { name, rows, columns, values, fused_largest }];
            let statistics = seen.as_ref().map(|seen| &seen.statistics);
            let asymmetry = seen.as_ref().and_then(|seen| seen.asymmetry.as_ref());
            let group = Group { matrices, statistics, asymmetry, tied: None };
            self.round_of_stack(step, weight, &group, &mut tensors)?;
        }
        self.keep_stack(weight, &tensors)
    }

    fn names_of_matrices(&self, weight: Weight, experts: usize) -> Vec<String> {
        let name = self.job.plan.name(weight);
        (0..experts).map(|expert| format!("{name}[{expert}]")).collect()
    }

    /// Quantizes some matrices of a stack and appends them to `tensors`.
    fn round_of_stack(
        &mut self,
        step: &TechniqueStep,
        weight: Weight,
        group: &Group<'_>,
        tensors: &mut Vec<Tensor>,
    ) -> Result<(), QuantError> {
        let format = self.job.plan.recipe.format_of(&self.job.plan.name(weight));
        let outcome = (step.technique.group())(group, format, &step.parameters)?;
        let Outcome::Quantized(list) = outcome else {
            let message = format!("{} rounds nothing", step.technique.name);
            return Err(QuantError::Recipe(message));
        };
        for (matrix, quantized) in group.matrices.iter().zip(list) {
            let (tensor, technique) = (matrix.name.to_owned(), step.technique.name);
            let report = quantized.report;
            self.job.ledger.reports.tensors.push(WeightReport {
                tensor,
                technique,
                report,
                correction: None,
            });
            tensors.push(quantized.tensor);
            self.job.tell(matrix.values.len());
        }
        Ok(())
    }

    fn keep_stack(&mut self, weight: Weight, tensors: &[Tensor]) -> Result<(), QuantError> {
        let at = |source| QuantError::Format { tensor: self.job.plan.name(weight), source };
        let stack = stacked(tensors).map_err(at)?;
        self.job.ledger.finished.insert(weight, stack);
        Ok(())
    }
}

/// Stacks matrices of one shape and format.
fn stacked(matrices: &[Tensor]) -> Result<Tensor, TensorError> {
    let first = &matrices[0];
    let join = |plane: fn(&Tensor) -> &[u8]| {
        Bytes::new(matrices.iter().flat_map(plane).copied().collect::<Vec<u8>>())
    };
    let globals = matrices.iter().flat_map(|matrix| match &matrix.global {
        GlobalScale::Divide(all) => all.as_slice(),
        GlobalScale::One | GlobalScale::Multiply(_) => &[],
    });
    let global = match first.global {
        GlobalScale::Divide(_) => GlobalScale::Divide(globals.copied().collect()),
        _ => GlobalScale::One,
    };
    Tensor::new_scaled(
        [&[matrices.len()], first.shape.as_slice()].concat(),
        first.format,
        join(|matrix| &matrix.codes),
        join(|matrix| &matrix.scales),
        join(|matrix| &matrix.zeros),
        global,
    )
}

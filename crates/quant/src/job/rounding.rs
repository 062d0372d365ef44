//! Rounds the matrices of a linear op and adds their corrections.

use lathe_program::{Op, Weight};
use lathe_tensor::Tensor;

use super::Job;
use super::layer::LayerPass;
use super::reports::{CorrectionReport, WeightReport};
use crate::correction::Correction;
use crate::error::QuantError;
use crate::matrix::{Group, Matrix, MatrixReport, Outcome, Quantized};
use crate::recipe::{Recipe, TechniqueStep};
use crate::statistics::Statistics;
use crate::technique::correction_rounds;

/// The step that rounds a matrix and the step that corrects it.
#[derive(Clone, Copy)]
struct Steps<'a> {
    rounding: &'a TechniqueStep,
    correction: Option<&'a TechniqueStep>,
}

/// A quantized matrix with its correction.
struct Made {
    tensor: Tensor,
    /// Its error, after the correction.
    report: MatrixReport,
    correction: Option<(Correction, CorrectionReport)>,
}

impl From<Quantized> for Made {
    fn from(Quantized { tensor, report }: Quantized) -> Self {
        Made { tensor, report, correction: None }
    }
}

/// The loss by which two results for one matrix are compared.
fn loss(report: &MatrixReport) -> f64 {
    report.output_error.unwrap_or(-report.sqnr_db)
}

fn quantized(
    step: &TechniqueStep,
    group: &Group<'_>,
    recipe: &Recipe,
) -> Result<Vec<Quantized>, QuantError> {
    let format = recipe.format_of(group.matrices[0].name);
    match (step.technique.group())(group, format, &step.parameters)? {
        Outcome::Quantized(list) => Ok(list),
        Outcome::Scaled(_) => {
            Err(QuantError::Recipe(format!("{} rounds nothing", step.technique.name)))
        }
    }
}

impl LayerPass<'_, '_> {
    /// Quantizes the matrices of one linear op. Matrices with the same steps and format are rounded
    /// together.
    pub(super) fn round_group(&mut self, op: usize) -> Result<(), QuantError> {
        let Job { plan, ledger, .. } = &*self.job;
        let Op::Linear { parts, .. } = &plan.program.ops[op] else { return Ok(()) };
        let ours = |weight: &Weight| {
            plan.targets.get(weight) == Some(&op) && !ledger.finished.contains_key(weight)
        };
        let mut left: Vec<Weight> = parts.iter().map(|part| part.weight).filter(ours).collect();
        let statistics = self.statistics(op);
        while let Some(first) = left.first() {
            let (recipe, first) = (self.job.plan.recipe, self.job.plan.name(*first));
            let steps = Steps::of(recipe, &first)?;
            let format = recipe.format_of(&first);
            let same = |name: &str| {
                let correction = recipe.correction_of(name).ok().flatten();
                let both =
                    correction.map(std::ptr::from_ref) == steps.correction.map(std::ptr::from_ref);
                both && steps.rounding.applies_to(name) && recipe.format_of(name) == format
            };
            let (together, others): (Vec<Weight>, Vec<Weight>) =
                left.iter().partition(|it| same(&self.job.plan.name(**it)));
            self.round(&together, statistics.as_deref())?;
            left = others;
        }
        Ok(())
    }

    /// Quantizes `weights`, which share their steps, their format and their input.
    pub(super) fn round(
        &mut self,
        weights: &[Weight],
        statistics: Option<&Statistics>,
    ) -> Result<(), QuantError> {
        let names: Vec<String> = weights.iter().map(|weight| self.job.plan.name(*weight)).collect();
        let values = weights.iter().map(|it| self.job.load(*it)).collect::<Result<Vec<_>, _>>()?;
        let fused = weights.iter().map(|weight| self.job.fused_largest(*weight));
        let fused = fused.collect::<Result<Vec<_>, _>>()?;
        let matrices = names.iter().zip(&values).zip(&fused);
        let matrices = matrices.map(|((name, (shape, values)), fused)| Matrix {
            name,
            rows: shape[0],
            columns: shape[1],
            values,
            fused_largest: fused.first().copied(),
        });
        let asymmetry = self.job.plan.targets.get(&weights[0]).and_then(|op| self.asymmetry(*op));
        let asymmetry = asymmetry.as_ref();
        let group = Group { matrices: matrices.collect(), statistics, asymmetry, tied: None };
        let steps = Steps::of(self.job.plan.recipe, &names[0])?;
        let technique = steps.rounding.technique.name;
        let made: Vec<Made> = match steps.correction {
            None => {
                let list = quantized(steps.rounding, &group, self.job.plan.recipe)?;
                list.into_iter().map(Made::from).collect()
            }
            Some(correction) => {
                let rotation = self.job.plan.rotation_of(weights[0]);
                corrected((steps.rounding, correction), &group, rotation, self.job.plan.recipe)?
            }
        };
        self.job.tell(values.iter().map(|(_, values)| values.len()).sum());
        for ((weight, tensor), made) in weights.iter().zip(names).zip(made) {
            let (correction, report) = made.correction.unzip();
            self.job.ledger.reports.tensors.push(WeightReport {
                tensor,
                technique,
                report: made.report,
                correction: report,
            });
            self.job.ledger.finished.insert(*weight, made.tensor);
            self.job.ledger.corrections.extend(correction.map(|it| (*weight, it)));
        }
        Ok(())
    }
}

impl<'a> Steps<'a> {
    fn of(recipe: &'a Recipe, name: &str) -> Result<Self, QuantError> {
        let rounding = recipe.rounding_of(name)?;
        Ok(Steps { rounding, correction: recipe.correction_of(name)? })
    }
}

/// Rounds the matrices of `group` by the first of `steps` and corrects the error by the second. The
/// correction says for how many rounds. From the second round on, the matrix less its last
/// correction is rounded. For each matrix the round with the least loss is kept. NVFP4's global
/// scale stays that of the original matrices, because matrices that run as one share it.
fn corrected(
    (rounding, correction): (&TechniqueStep, &TechniqueStep),
    group: &Group<'_>,
    rotation: Option<usize>,
    recipe: &Recipe,
) -> Result<Vec<Made>, QuantError> {
    let mut left: Vec<Vec<f32>> = Vec::new();
    let mut best: Vec<Made> = Vec::new();
    for round in 1..=correction_rounds(&correction.parameters) {
        let mut now = group.clone();
        now.matrices.iter_mut().zip(&left).for_each(|(it, left)| it.values = left);
        let list = quantized(rounding, &now, recipe)?;
        let tensors: Vec<Tensor> = list.iter().map(|it| it.tensor.clone()).collect();
        let apply = correction.technique.errors();
        let found = apply(group, &tensors, rotation, &correction.parameters)?;
        let mut made = Vec::new();
        left.clear();
        for ((matrix, quantized), (correction_found, note)) in
            group.matrices.iter().zip(list).zip(found)
        {
            let Quantized { tensor, report: rounded } = quantized;
            let uncorrected = match round {
                1 => rounded.clone(),
                _ => MatrixReport::new(matrix, &tensor, group.statistics),
            };
            let mut values = vec![0f32; matrix.values.len()];
            correction_found.add_to(&mut values);
            left.push(matrix.values.iter().zip(&values).map(|(w, it)| w - it).collect());
            values.iter_mut().zip(tensor.to_f32()).for_each(|(sum, code)| *sum += code);
            let mut report = MatrixReport::of(matrix, values, group.statistics);
            report.notes.extend(rounded.notes.into_iter().chain(note));
            let correction_report = CorrectionReport {
                technique: correction.technique.name,
                rank: correction_found.rank(),
                bytes: correction_found.bytes(),
                round,
                uncorrected: MatrixReport { notes: Vec::new(), ..uncorrected },
            };
            let correction = Some((correction_found, correction_report));
            made.push(Made { tensor, report, correction });
        }
        if best.is_empty() {
            best = made;
            continue;
        }
        for (best, made) in best.iter_mut().zip(made) {
            if loss(&made.report) < loss(&best.report) {
                *best = made;
            }
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests;

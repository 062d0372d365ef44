//! The pass over one layer. It observes the inputs of the layer's matrices, scales their channels
//! and rounds them. A pass lives as long as its layer; its results go to the job's ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use lathe_program::{Op, Program, Value, Weight};
use lathe_tensor::{Bytes, Format, Tensor, codec};

use super::Job;
use super::plan::float_of;
use super::reports::PreparedReport;
use super::routed::{Coverage, ExpertInputs};
use crate::calibrate::{Calibration, Observed, Prefixes, Stream};
use crate::error::QuantError;
use crate::fold::{Fold, fold_of};
use crate::matrix::{Group, Matrix, Outcome};
use crate::recipe::{Prefix, TechniqueStep};
use crate::section::Section;
use crate::statistics::{Asymmetry, Statistics};
use crate::technique::Stage;

/// A job at one layer, with the statistics of the layer's inputs.
pub(super) struct LayerPass<'j, 'a> {
    pub job: &'j mut Job<'a>,
    seen: Observed,
    /// How inputs differ from the float model's, if a technique asks.
    asymmetries: BTreeMap<Value, Asymmetry>,
    /// The inputs of the layer's experts.
    pub experts: ExpertInputs,
}

impl<'j, 'a> LayerPass<'j, 'a> {
    /// A pass without statistics, for weights that need no calibration.
    pub(super) fn unobserved(job: &'j mut Job<'a>) -> Self {
        LayerPass {
            job,
            seen: Observed::default(),
            asymmetries: BTreeMap::new(),
            experts: ExpertInputs::default(),
        }
    }

    /// Runs a layer before it is quantized and keeps statistics of the inputs of `ops`. Also
    /// returns the streams after the layer if the recipe asks for them. Otherwise the run ends with
    /// the last observed input.
    pub(super) fn observe(
        job: &'j mut Job<'a>,
        calibration: &Calibration<'_>,
        ops: &BTreeSet<usize>,
        range: Range<usize>,
        out: Value,
        prefixes: &Prefixes,
    ) -> Result<(Self, Option<Prefixes>), QuantError> {
        let (program, recipe) = (job.plan.program, job.plan.recipe);
        let Prefixes { stream, float } = prefixes;
        let whole = recipe.prefix == Prefix::Float || float.is_some();
        let inputs: BTreeSet<Value> = ops.iter().flat_map(|op| program.ops[*op].inputs()).collect();
        let mut taps: Vec<Value> = inputs.iter().copied().collect();
        taps.extend(whole.then_some(out));
        let routers = range.clone();
        let section = match whole {
            true => range,
            false => range.start..end_of_inputs(program, range, &inputs),
        };
        let section = Section::new(program, section, &taps)?;
        let width = |value: &Value| (*value, program.value_width(*value));
        let mut seen = Observed::new(inputs.iter().map(width), recipe.needs_products());
        let mut experts = ExpertInputs::new(program, ops);
        let mut coverage = Coverage::new(program, routers);
        let mut weight = |weight| job.current(weight);
        let mut prepared = calibration.prepare(&section, Some(stream), &mut weight)?;
        let mut beside = match float {
            Some(float) => Some(calibration.prepare(&section, Some(float), &mut weight)?),
            None => None,
        };
        let new = |(value, width)| (value, Asymmetry::new(width));
        let mut asymmetries: BTreeMap<Value, Asymmetry> = match float {
            Some(_) => inputs.iter().map(width).map(new).collect(),
            None => BTreeMap::new(),
        };
        let (mut after, mut float_after) = (Vec::new(), Vec::new());
        for window in 0..prepared.windows() {
            let mut floats: Vec<Vec<f32>> = Vec::new();
            if let Some(beside) = &mut beside {
                beside.run(window, &mut |seen| {
                    floats.extend(seen.taps.iter().map(|rows| rows.to_vec()));
                })?;
                float_after.extend_from_slice(&floats[inputs.len()]);
            }
            prepared.run(window, &mut |window| {
                seen.add(&taps, window.taps);
                for (at, (value, rows)) in taps.iter().zip(window.taps).enumerate() {
                    let float = (!floats.is_empty()).then(|| floats[at].as_slice());
                    experts.add(*value, rows, float);
                    if let Some(asymmetry) = asymmetries.get_mut(value) {
                        asymmetry.add(&floats[at], rows);
                    }
                }
                coverage.add(window.routings);
                if let Some(rows) = window.taps.get(inputs.len()) {
                    after.extend_from_slice(rows);
                }
            })?;
        }
        job.check_finite(&seen, ops)?;
        let width = program.value_width(out);
        let float = float.as_ref().map(|_| Stream { width, values: float_after.into() });
        job.ledger.reports.coverage.extend(coverage.finish());
        let after = Prefixes { stream: Stream { width, values: after.into() }, float };
        Ok((LayerPass { job, seen, asymmetries, experts }, whole.then_some(after)))
    }

    /// Applies the recipe to the `ops` of the layer. An op comes before the op that makes its
    /// input, so that the rows of a matrix are final when its own columns are scaled.
    pub(super) fn apply(
        &mut self,
        ops: &BTreeSet<usize>,
        calibration: &Calibration<'_>,
    ) -> Result<(), QuantError> {
        let recipe = self.job.plan.recipe;
        for step in recipe.steps.iter().filter(|it| it.technique.stage == Stage::Prepare) {
            for op in ops.iter().rev() {
                self.prepare_group(step, *op)?;
            }
        }
        for op in ops {
            self.round_group(*op)?;
        }
        self.find_input_scales(ops);
        for op in ops {
            self.round_experts(*op, calibration)?;
        }
        Ok(())
    }

    fn prepare_group(&mut self, step: &TechniqueStep, op: usize) -> Result<(), QuantError> {
        let technique = step.technique.name;
        let program = self.job.plan.program;
        let Op::Linear { parts, .. } = &program.ops[op] else { return Ok(()) };
        let names: Vec<String> =
            parts.iter().map(|part| program.weight(part.weight).name.clone()).collect();
        if !names.iter().all(|name| step.applies_to(name)) {
            return Ok(());
        }
        let mut report = PreparedReport { tensors: names, technique, skipped: None, scales: None };
        let all = parts.iter().all(|part| self.job.plan.targets.contains_key(&part.weight));
        let fold = match fold_of(program, op) {
            _ if !all => Err("not all of its matrices are quantized".to_owned()),
            fold => fold,
        };
        let fold = match fold {
            Ok(fold) => fold,
            // If the recipe names the tensor, this is an error. Otherwise the group stays unscaled.
            Err(reason) if step.tensors.is_some() => {
                let tensor = report.tensors.join(", ");
                return Err(QuantError::Technique { technique, tensor, reason });
            }
            Err(reason) => {
                report.skipped = Some(reason);
                self.job.ledger.reports.prepared.push(report);
                return Ok(());
            }
        };
        let values =
            parts.iter().map(|part| self.job.load(part.weight)).collect::<Result<Vec<_>, _>>()?;
        let statistics = self.statistics(op);
        let matrices = report.tensors.iter().zip(&values).map(|(name, (shape, values))| Matrix {
            name,
            rows: shape[0],
            columns: shape[1],
            values,
            fused_largest: None,
        });
        let tied = match fold {
            Fold::Values { heads, .. } => Some(heads.sources()),
            _ => None,
        };
        let (statistics, tied) = (statistics.as_deref(), tied.as_deref());
        let group = Group { matrices: matrices.collect(), statistics, asymmetry: None, tied };
        // Matrices that share scales of channels have one format. If not, that of the first one is
        // used.
        let format = self.job.plan.recipe.format_of(&report.tensors[0]);
        let outcome = (step.technique.group())(&group, format, &step.parameters)?;
        if let Outcome::Scaled(scales) = outcome {
            let scales = self.put(fold, scales)?;
            let least = scales.iter().copied().fold(f32::INFINITY, f32::min);
            report.scales = Some([least, scales.iter().copied().fold(0.0, f32::max)]);
            match self.job.ledger.columns.get_mut(&op) {
                None => drop(self.job.ledger.columns.insert(op, scales)),
                Some(before) => before.iter_mut().zip(scales).for_each(|(a, b)| *a *= b),
            }
        }
        self.job.ledger.reports.prepared.push(report);
        Ok(())
    }

    /// Folds `scales` into the weights before a group. Returns the scales in effect: a norm in its
    /// file's format cannot be divided by every number exactly.
    fn put(&mut self, fold: Fold, scales: Vec<f32>) -> Result<Vec<f32>, QuantError> {
        let divide = |rows: &mut BTreeMap<Weight, Vec<f32>>, weight, scales: &[f32]| {
            let all = rows.entry(weight).or_insert_with(|| vec![1.0; scales.len()]);
            all.iter_mut().zip(scales).for_each(|(all, scale)| *all *= scale);
        };
        match fold {
            Fold::Values { weight, bias, heads } => {
                let mut of_rows = vec![1f32; heads.values * heads.width];
                for (source, scale) in heads.sources().into_iter().zip(&scales) {
                    of_rows[source] = *scale;
                }
                for weight in [Some(weight), bias].into_iter().flatten() {
                    divide(&mut self.job.ledger.rows, weight, &of_rows);
                }
                Ok(scales)
            }
            Fold::Rows { weight, bias } => {
                for weight in [Some(weight), bias].into_iter().flatten() {
                    divide(&mut self.job.ledger.rows, weight, &scales);
                }
                Ok(scales)
            }
            Fold::Norm { weight, bias, offset } => {
                let (shape, old) = match self.job.ledger.norms.get(&weight) {
                    Some(tensor) => (tensor.shape.clone(), tensor.to_f32()),
                    None => self.job.plan.rotated(weight)?,
                };
                let wanted: Vec<f32> =
                    old.iter().zip(&scales).map(|(w, s)| (offset + w) / s - offset).collect();
                let float = Format::Float(float_of(self.job.plan.weights.load(weight)?.format));
                let codes = Bytes::new(codec::quantize(float, &wanted));
                let new = Tensor::new(shape, float, codes).map_err(|source| {
                    QuantError::Format { tensor: self.job.plan.name(weight), source }
                })?;
                let came =
                    old.iter().zip(new.to_f32()).map(|(old, new)| (offset + old) / (offset + new));
                let scales: Vec<f32> = came
                    .zip(scales)
                    .map(|(came, asked)| if came.is_finite() && came > 0.0 { came } else { asked })
                    .collect();
                self.job.ledger.norms.insert(weight, new);
                if let Some(bias) = bias {
                    divide(&mut self.job.ledger.rows, bias, &scales);
                }
                Ok(scales)
            }
        }
    }

    /// The statistics of an op's input, with its channels scaled.
    pub(super) fn statistics(&self, op: usize) -> Option<Arc<Statistics>> {
        let statistics = self.seen.of(self.job.plan.program.ops[op].inputs().next()?)?;
        Some(match self.job.ledger.columns.get(&op) {
            Some(scales) => Arc::new(statistics.divided_by(scales)),
            None => Arc::clone(statistics),
        })
    }

    /// How an op's input differs from the float model's, with its channels scaled.
    pub(super) fn asymmetry(&self, op: usize) -> Option<Asymmetry> {
        let found = self.asymmetries.get(&self.job.plan.program.ops[op].inputs().next()?)?;
        Some(match self.job.ledger.columns.get(&op) {
            Some(scales) => found.divided_by(scales),
            None => found.clone(),
        })
    }
}

impl Job<'_> {
    /// Refuses inputs of `ops` that are NaN or infinite: no statistics can be made of them.
    fn check_finite(&self, seen: &Observed, ops: &BTreeSet<usize>) -> Result<(), QuantError> {
        let good = |op: usize| {
            let mut inputs = self.plan.program.ops[op].inputs().filter_map(|it| seen.of(it));
            inputs.all(|statistics| statistics.is_finite())
        };
        let mut targets = self.plan.targets.iter();
        match targets.find(|(_, op)| ops.contains(op) && !good(**op)) {
            None => Ok(()),
            Some((weight, _)) => Err(QuantError::NotFinite {
                tensor: self.plan.name(*weight),
                what: "its inputs in the calibration text are NaN or infinite".to_owned(),
            }),
        }
    }
}

/// The end of the shortest run of `range` that contains every op which makes one of `inputs`, and
/// every router.
fn end_of_inputs(program: &Program, range: Range<usize>, inputs: &BTreeSet<Value>) -> usize {
    let needed = |op: &usize| {
        let op = &program.ops[*op];
        matches!(op, Op::Route { .. }) || op.outputs().any(|out| inputs.contains(&out))
    };
    range.clone().rev().find(needed).map_or(range.start, |op| op + 1)
}

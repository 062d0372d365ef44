//! A job: a recipe applied to a model. It plans what becomes of every weight, checks that it can
//! be, chooses the scales of channels, and then makes quantized weights one at a time.

use std::collections::{BTreeMap, BTreeSet};

use lathe_model::export::{Replacement, ReplacementError};
use lathe_model::weights::ModelWeights;
use lathe_program::{Op, Program, Weight, WeightRole};
use lathe_tensor::{Bytes, Format, Tensor, codec};
use serde::Serialize;

use crate::calibrate::Calibration;
use crate::error::QuantError;
use crate::fold::{Fold, fold_of};
use crate::matrix::{Group, Matrix, Outcome, Report, check_shape};
use crate::recipe::{Recipe, TechniqueStep, matches};
use crate::technique::Stage;

/// What became of one weight.
#[derive(Debug, Clone, Serialize)]
pub struct WeightReport {
    /// Canonical name.
    pub tensor: String,
    /// The technique that chose its codes.
    pub technique: &'static str,
    /// What it cost.
    #[serde(flatten)]
    pub report: Report,
}

/// What became of the scales of one group's channels.
#[derive(Debug, Clone, Serialize)]
pub struct PreparedReport {
    /// Canonical names of the group's matrices.
    pub tensors: Vec<String>,
    /// The technique.
    pub technique: &'static str,
    /// Why nothing was scaled, if so.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The least and the largest scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scales: Option<[f32; 2]>,
}

/// How far a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Elements of matrices that are done.
    pub done: usize,
    /// Elements of all matrices that are to be quantized.
    pub total: usize,
}

/// A recipe applied to a model.
pub struct Job<'a> {
    program: &'a Program,
    weights: &'a ModelWeights<'a>,
    recipe: &'a Recipe,
    calibration: Option<&'a Calibration>,
    /// The op of each matrix that is quantized.
    targets: BTreeMap<Weight, usize>,
    /// Scales of the input channels of an op.
    columns: BTreeMap<usize, Vec<f32>>,
    /// What rows of a matrix, or elements of a vector, are divided by.
    rows: BTreeMap<Weight, Vec<f32>>,
    /// Norms that took scales.
    norms: BTreeMap<Weight, Tensor>,
    progress: Box<dyn FnMut(Progress) + 'a>,
    done: usize,
    /// What became of each weight, in the order in which they were written.
    pub reports: Vec<WeightReport>,
    /// What became of each group that was to be prepared.
    pub prepared: Vec<PreparedReport>,
}

/// The matrices that a recipe quantizes, with the op that reads each.
///
/// # Errors
/// If a pattern names nothing, or names what cannot be quantized.
pub fn targets(program: &Program, recipe: &Recipe) -> Result<BTreeMap<Weight, usize>, QuantError> {
    let mut readers: BTreeMap<Weight, usize> = BTreeMap::new();
    for (index, op) in program.ops.iter().enumerate() {
        if let Op::Linear { parts, .. } = op {
            for part in parts {
                readers.entry(part.weight).or_insert(index);
            }
        }
    }
    let lists = [recipe.tensors.as_ref(), Some(&recipe.keep)];
    let of_steps = recipe.steps.iter().filter_map(|step| step.tensors.as_ref());
    for pattern in lists.into_iter().flatten().chain(of_steps).flatten() {
        if !program.weights.iter().any(|decl| matches(pattern, &decl.name)) {
            return Err(QuantError::Recipe(format!("no tensor is called `{pattern}`")));
        }
    }
    let mut found = BTreeMap::new();
    for (index, decl) in program.weights.iter().enumerate() {
        let weight = Weight(index as u32);
        let named =
            recipe.tensors.as_ref().map(|list| list.iter().any(|it| matches(it, &decl.name)));
        let kept = recipe.keep.iter().any(|it| matches(it, &decl.name));
        let linear = decl.role == WeightRole::Linear && readers.contains_key(&weight);
        if kept || !named.unwrap_or(linear) {
            continue;
        }
        // Vectors that a pattern for a whole layer sweeps along stay what they are.
        let exact = recipe.tensors.iter().flatten().any(|it| *it == decl.name);
        match readers.get(&weight) {
            Some(op) if linear => drop(found.insert(weight, *op)),
            _ if exact || decl.role == WeightRole::Experts => {
                let role = format!("{:?}", decl.role).to_lowercase();
                return Err(QuantError::Recipe(format!(
                    "tensor {} ({role}) cannot be quantized here, expected linear layers",
                    decl.name
                )));
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Err(QuantError::Recipe("it quantizes no tensor of this model".to_owned()));
    }
    Ok(found)
}

impl<'a> Job<'a> {
    /// Plans `recipe` for the model whose weights are `weights`, and checks that every tensor that
    /// it names can be what it says. Nothing is computed yet; `progress` hears of each matrix.
    ///
    /// # Errors
    /// If a tensor does not fit the format, a technique lacks what it requires, or a group that is
    /// named for scaling has nothing to take the scales.
    pub fn new(
        weights: &'a ModelWeights<'a>,
        recipe: &'a Recipe,
        calibration: Option<&'a Calibration>,
        progress: impl FnMut(Progress) + 'a,
    ) -> Result<Self, QuantError> {
        let program = weights.program();
        let targets = targets(program, recipe)?;
        let job = Job {
            program,
            weights,
            recipe,
            calibration,
            targets,
            columns: BTreeMap::new(),
            rows: BTreeMap::new(),
            norms: BTreeMap::new(),
            progress: Box::new(progress),
            done: 0,
            reports: Vec::new(),
            prepared: Vec::new(),
        };
        job.check()?;
        Ok(job)
    }

    fn check(&self) -> Result<(), QuantError> {
        for (weight, op) in &self.targets {
            let decl = self.program.weight(*weight);
            let step = self.recipe.rounding_of(&decl.name)?;
            let (rows, columns) = (decl.shape[0], decl.shape[1]);
            let matrix = Matrix { name: &decl.name, rows, columns, values: &[] };
            check_shape(&matrix, self.recipe.format)?;
            let seen = self.calibration.and_then(|it| it.of(*op)).is_some_and(|it| it.rows() > 0);
            if step.technique.calibrated && !seen {
                let (technique, tensor) = (step.technique.name, decl.name.clone());
                return Err(QuantError::Unobserved { technique, tensor });
            }
        }
        Ok(())
    }

    /// Chooses the scales of channels, for the steps that do so. Consumers come before what makes
    /// their inputs, so that a matrix's rows are final when its own columns are scaled.
    ///
    /// # Errors
    /// If a weight cannot be read or a technique refuses.
    pub fn prepare(&mut self) -> Result<(), QuantError> {
        let ops: BTreeSet<usize> = self.targets.values().copied().collect();
        for step in self.recipe.steps.iter().filter(|it| it.technique.stage == Stage::Prepare) {
            for op in ops.iter().rev() {
                self.prepare_group(step, *op)?;
            }
        }
        Ok(())
    }

    fn prepare_group(&mut self, step: &TechniqueStep, op: usize) -> Result<(), QuantError> {
        let technique = step.technique.name;
        let Op::Linear { parts, .. } = &self.program.ops[op] else { return Ok(()) };
        let names: Vec<String> =
            parts.iter().map(|part| self.program.weight(part.weight).name.clone()).collect();
        if !names.iter().all(|name| step.applies_to(name)) {
            return Ok(());
        }
        let mut report = PreparedReport { tensors: names, technique, skipped: None, scales: None };
        let all = parts.iter().all(|part| self.targets.contains_key(&part.weight));
        let fold = match fold_of(self.program, op) {
            _ if !all => Err("not all of its matrices are quantized".to_owned()),
            fold => fold,
        };
        let fold = match fold {
            Ok(fold) => fold,
            // A recipe that names the tensor means it; one that says nothing takes what there is.
            Err(reason) if step.tensors.is_some() => {
                let tensor = report.tensors.join(", ");
                return Err(QuantError::Technique { technique, tensor, reason });
            }
            Err(reason) => {
                report.skipped = Some(reason);
                self.prepared.push(report);
                return Ok(());
            }
        };
        let values =
            parts.iter().map(|part| self.load(part.weight)).collect::<Result<Vec<_>, _>>()?;
        let statistics = self.statistics(op);
        let matrices = report.tensors.iter().zip(&values).map(|(name, (shape, values))| Matrix {
            name,
            rows: shape[0],
            columns: shape[1],
            values,
        });
        let group = Group { matrices: matrices.collect(), statistics: statistics.as_ref() };
        let outcome = (step.technique.apply)(&group, self.recipe.format, &step.parameters)?;
        if let Outcome::Scaled(scales) = outcome {
            let scales = self.put(fold, scales)?;
            let least = scales.iter().copied().fold(f32::INFINITY, f32::min);
            report.scales = Some([least, scales.iter().copied().fold(0.0, f32::max)]);
            match self.columns.get_mut(&op) {
                None => drop(self.columns.insert(op, scales)),
                Some(before) => before.iter_mut().zip(scales).for_each(|(a, b)| *a *= b),
            }
        }
        self.prepared.push(report);
        Ok(())
    }

    /// Divides what feeds a group by `scales`; what they came to be, for a norm in the bits of its
    /// file cannot be divided by any number.
    fn put(&mut self, fold: Fold, scales: Vec<f32>) -> Result<Vec<f32>, QuantError> {
        let divide = |rows: &mut BTreeMap<Weight, Vec<f32>>, weight, scales: &[f32]| {
            let all = rows.entry(weight).or_insert_with(|| vec![1.0; scales.len()]);
            all.iter_mut().zip(scales).for_each(|(all, scale)| *all *= scale);
        };
        match fold {
            Fold::Rows { weight, bias } => {
                for weight in [Some(weight), bias].into_iter().flatten() {
                    divide(&mut self.rows, weight, &scales);
                }
                Ok(scales)
            }
            Fold::Norm { weight, bias, offset } => {
                let tensor = match self.norms.get(&weight) {
                    Some(tensor) => tensor.clone(),
                    None => self.weights.load(weight)?,
                };
                let old = tensor.to_f32();
                let wanted: Vec<f32> =
                    old.iter().zip(&scales).map(|(w, s)| (offset + w) / s - offset).collect();
                let float = Format::Float(float_of(tensor.format));
                let codes = Bytes::new(codec::quantize(float, &wanted));
                let new = Tensor::new(tensor.shape.clone(), float, codes)
                    .map_err(|source| QuantError::Format { tensor: self.name(weight), source })?;
                let came =
                    old.iter().zip(new.to_f32()).map(|(old, new)| (offset + old) / (offset + new));
                let scales: Vec<f32> = came
                    .zip(scales)
                    .map(|(came, asked)| if came.is_finite() && came > 0.0 { came } else { asked })
                    .collect();
                self.norms.insert(weight, new);
                if let Some(bias) = bias {
                    divide(&mut self.rows, bias, &scales);
                }
                Ok(scales)
            }
        }
    }

    fn name(&self, weight: Weight) -> String {
        self.program.weight(weight).name.clone()
    }

    /// What calibration saw of an op's input, as its scaled channels would have been.
    fn statistics(&self, op: usize) -> Option<crate::Statistics> {
        let statistics = self.calibration?.of(op)?;
        Some(match self.columns.get(&op) {
            Some(scales) => statistics.divided_by(scales),
            None => statistics.clone(),
        })
    }

    /// A weight with the scales of its rows and columns in it.
    fn load(&self, weight: Weight) -> Result<(Vec<usize>, Vec<f32>), QuantError> {
        let tensor = self.weights.load(weight)?;
        let mut values = tensor.to_f32();
        let columns = self.targets.get(&weight).and_then(|op| self.columns.get(op));
        let rows = self.rows.get(&weight);
        let width = match tensor.shape.len() {
            1 => 1,
            _ => tensor.columns().max(1),
        };
        for (index, row) in values.chunks_mut(width).enumerate() {
            if let Some(scales) = rows {
                row.iter_mut().for_each(|value| *value /= scales[index]);
            }
            if let Some(scales) = columns {
                row.iter_mut().zip(scales).for_each(|(value, scale)| *value *= scale);
            }
        }
        Ok((tensor.shape, values))
    }

    /// Quantizes one matrix.
    fn quantize(&mut self, weight: Weight) -> Result<Tensor, QuantError> {
        let name = self.name(weight);
        let step = self.recipe.rounding_of(&name)?;
        let (shape, values) = self.load(weight)?;
        let statistics = self.statistics(self.targets[&weight]);
        let matrix = Matrix { name: &name, rows: shape[0], columns: shape[1], values: &values };
        let group = Group { matrices: vec![matrix], statistics: statistics.as_ref() };
        let outcome = (step.technique.apply)(&group, self.recipe.format, &step.parameters)?;
        let Outcome::Quantized(mut list) = outcome else {
            let message = format!("{} rounds nothing", step.technique.name);
            return Err(QuantError::Recipe(message));
        };
        let quantized = list.pop().expect("one of one matrix");
        self.done += values.len();
        let elements =
            |weight: &Weight| self.program.weight(*weight).shape.iter().product::<usize>();
        let total = self.targets.keys().map(elements).sum();
        (self.progress)(Progress { done: self.done, total });
        let (technique, report) = (step.technique.name, quantized.report);
        self.reports.push(WeightReport { tensor: name, technique, report });
        Ok(quantized.tensor)
    }
}

fn float_of(format: Format) -> lathe_tensor::FloatType {
    match format {
        Format::Float(float) => float,
        _ => lathe_tensor::FloatType::BF16,
    }
}

impl Replacement for Job<'_> {
    fn format(&self, weight: Weight) -> Option<Format> {
        if self.targets.contains_key(&weight) {
            return Some(self.recipe.format);
        }
        if let Some(norm) = self.norms.get(&weight) {
            return Some(norm.format);
        }
        let kept = self.program.weight(weight).role == WeightRole::Linear;
        match self.recipe.format {
            // A GGUF writer would round what is kept to the format of all others.
            Format::Ggml(_) if kept => Some(Format::F16),
            // Biases and matrices whose rows were scaled.
            _ => self.rows.contains_key(&weight).then_some(Format::F32),
        }
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        if self.targets.contains_key(&weight) {
            return Ok(self.quantize(weight)?);
        }
        if let Some(norm) = self.norms.get(&weight) {
            return Ok(norm.clone());
        }
        let format = Replacement::format(self, weight).unwrap_or(Format::F32);
        let (shape, values) = self.load(weight)?;
        Ok(Tensor::new(shape, format, Bytes::new(codec::quantize(format, &values)))?)
    }
}

#[cfg(test)]
mod tests;

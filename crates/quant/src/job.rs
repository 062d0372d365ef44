//! A job: a recipe applied to a model. It plans what becomes of every weight, checks that it can
//! be, and makes quantized weights: layer by layer behind a calibration that runs through what is
//! quantized already, or one at a time when the writer asks, if nothing has to be calibrated.

mod experts;
mod explain;
mod fused;
mod inputs;
mod resume;
mod rounding;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use lathe_model::export::{Replacement, ReplacementError};
use lathe_model::spec::DecoderSpec;
use lathe_model::weights::ModelWeights;
use lathe_program::{Op, Program, StaticScale, Value, Weight, WeightRole};
use lathe_tensor::{Bytes, Format, Tensor, codec};
use serde::{Deserialize, Deserializer, Serialize};

use crate::calibrate::{Calibration, Observed, Prefixes, Stream};
use crate::correction::Correction;
use crate::error::QuantError;
use crate::fold::{Fold, fold_of};
use crate::matrix::{Group, Matrix, Outcome, Report, check_shape};
use crate::recipe::{Prefix, Recipe, TechniqueStep};
use crate::rotate::turned;
use crate::rotate::turns::Turns;
use crate::section::{Layers, Section};
use crate::statistics::{Asymmetry, Statistics};
use crate::targets::targets;
use crate::technique::{Apply, Stage};
pub use experts::CoverageReport;
use experts::{Coverage, ExpertInputs};
use inputs::set_input_scales;
use resume::Store;
pub(crate) use rounding::bits_of_correction;

/// The registry's own spelling of a technique's name. Not spelt as the reference that it is where
/// it is deserialized: it does not borrow from what is read.
pub type TechniqueName = &'static str;

/// What became of one matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WeightReport {
    /// Canonical name.
    pub tensor: String,
    /// The technique that chose its codes.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// What it cost, with its correction if it has one.
    #[serde(flatten)]
    pub report: Report,
    /// What runs beside it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub correction: Option<CorrectionReport>,
}

/// What runs beside one quantized matrix.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CorrectionReport {
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// Columns of the first matrix and rows of the second.
    pub rank: usize,
    /// Bytes of both.
    pub bytes: usize,
    /// Which of the technique's rounds lost least, from 1 on.
    pub round: usize,
    /// What the codes alone cost.
    pub uncorrected: Report,
}

/// What became of the scales of one group's channels.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PreparedReport {
    /// Canonical names of the group's matrices.
    pub tensors: Vec<String>,
    /// The technique.
    #[serde(deserialize_with = "technique_named")]
    pub technique: TechniqueName,
    /// Why nothing was scaled, if so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub skipped: Option<String>,
    /// The least and the largest scale.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scales: Option<[f32; 2]>,
}

/// The technique that is called so.
fn technique_named<'de, D: Deserializer<'de>>(source: D) -> Result<TechniqueName, D::Error> {
    let name = String::deserialize(source)?;
    let technique = crate::technique::find(&name).map_err(serde::de::Error::custom)?;
    Ok(technique.name)
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
    /// Of the layer at hand.
    seen: Observed,
    /// The same: how inputs differ from the float model's, where a technique asks for it.
    asymmetries: BTreeMap<Value, Asymmetry>,
    /// What is quantized already.
    finished: BTreeMap<Weight, Tensor>,
    /// What runs beside quantized matrices.
    corrections: BTreeMap<Weight, Correction>,
    /// The op of each matrix that is quantized.
    targets: BTreeMap<Weight, usize>,
    /// Scales of the input channels of an op.
    columns: BTreeMap<usize, Vec<f32>>,
    /// What rows of a matrix, or elements of a vector, are divided by.
    rows: BTreeMap<Weight, Vec<f32>>,
    /// Norms that took scales.
    norms: BTreeMap<Weight, Tensor>,
    /// What rotations make of weights before anything else.
    turns: Turns,
    /// The floats in which the file has the weights that rotations change.
    turned: BTreeMap<Weight, Format>,
    /// Largest magnitudes of matrices that engines run as one, by the first of them.
    fused: BTreeMap<Weight, Vec<f32>>,
    /// Whether calibration will be, or was, run.
    calibrated: bool,
    /// Scales of inputs that calibration found, by the matrix that reads them.
    input_scales: BTreeMap<Weight, StaticScale>,
    progress: Box<dyn FnMut(Progress) + 'a>,
    done: usize,
    /// What became of each weight, in the order in which they were written.
    pub reports: Vec<WeightReport>,
    /// What became of each group that was to be prepared.
    pub prepared: Vec<PreparedReport>,
    /// How many tokens of the calibration each expert was chosen for.
    pub coverage: Vec<CoverageReport>,
}

impl<'a> Job<'a> {
    /// Plans `recipe` for the model whose weights are `weights`, of the program that has the
    /// recipe's inputs ([`crate::inputs::with_inputs`]), and checks that every tensor that it names
    /// can be what it says. Nothing is computed yet; `calibrated` says whether
    /// [`Self::calibrate`] will be called, `progress` hears of each matrix.
    ///
    /// # Errors
    /// If a tensor does not fit the format, or a technique lacks what it requires.
    pub fn new(
        weights: &'a ModelWeights<'a>,
        recipe: &'a Recipe,
        calibrated: bool,
        progress: impl FnMut(Progress) + 'a,
    ) -> Result<Self, QuantError> {
        let program = weights.program();
        let targets = targets(program, recipe)?;
        let turns = turns_of(program, recipe)?;
        let mut turned = BTreeMap::new();
        for weight in turns.weights() {
            turned.insert(weight, Format::Float(float_of(weights.load(weight)?.format)));
        }
        if recipe.budget.is_some() {
            return Err(QuantError::Recipe("its budget was not planned".to_owned()));
        }
        let job = Job {
            program,
            weights,
            recipe,
            seen: Observed::default(),
            asymmetries: BTreeMap::new(),
            finished: BTreeMap::new(),
            corrections: BTreeMap::new(),
            targets,
            columns: BTreeMap::new(),
            rows: BTreeMap::new(),
            norms: BTreeMap::new(),
            turns,
            turned,
            fused: BTreeMap::new(),
            calibrated,
            input_scales: BTreeMap::new(),
            progress: Box::new(progress),
            done: 0,
            reports: Vec::new(),
            prepared: Vec::new(),
            coverage: Vec::new(),
        };
        job.check()?;
        Ok(job)
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

    /// Quantizes layer after layer: the text runs through a layer, the recipe is applied to what
    /// was seen of its inputs, and what the quantized layer makes of the text is the next one's
    /// input ([`Prefix::Quantized`]), so that a layer can make up for those before it.
    ///
    /// # Errors
    /// If the text cannot be used, a layer cannot be run by itself, or a technique refuses.
    pub fn calibrate(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
    ) -> Result<(), QuantError> {
        calibration.check(self.program)?;
        self.calibrate_layers(spec, calibration, None)
    }

    /// As [`Self::calibrate`], with each finished layer in `folder`, which is made if there is
    /// none: a job with the same recipe, model and text goes on from what an earlier one left
    /// there. The caller removes it when the result is written.
    ///
    /// # Errors
    /// As [`Self::calibrate`]; [`QuantError::Resume`] if the folder holds another run's layers, or
    /// cannot be written or read.
    pub fn calibrate_resumable(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
        folder: &Path,
    ) -> Result<(), QuantError> {
        calibration.check(self.program)?;
        let store = self.store(folder, calibration)?;
        self.calibrate_layers(spec, calibration, Some(store))
    }

    fn calibrate_layers(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
        mut store: Option<Store>,
    ) -> Result<(), QuantError> {
        let layers = Layers::of(self.program, spec)?;
        let section = Section::new(self.program, layers.before, &[layers.stream])?;
        let restored = store.as_mut().map(|store| self.restore(store)).transpose()?.flatten();
        let (first, mut prefixes) = match restored {
            Some(found) => found,
            None => {
                let stream = self.stream_of(&section, calibration, None)?;
                let float = self.recipe.is_asymmetric().then(|| stream.clone());
                (0, Prefixes { stream, float })
            }
        };
        // Whoever estimates the rest shall know where this run began.
        self.tell(0);
        for (layer, (ops, out)) in layers.layers.into_iter().enumerate().skip(first) {
            prefixes = self.calibrate_layer(calibration, ops, out, &prefixes)?;
            // No layer reads what another has read.
            self.weights.release();
            if let Some(store) = &mut store {
                self.save(store, layer, &prefixes)?;
            }
        }
        match self.targets.keys().find(|weight| !self.finished.contains_key(weight)) {
            None => Ok(()),
            Some(weight) => Err(QuantError::Calibration(format!(
                "tensor {} is in no layer",
                self.name(*weight)
            ))),
        }
    }

    /// Quantizes the layer whose ops are `range`; the streams after it.
    fn calibrate_layer(
        &mut self,
        calibration: &Calibration<'_>,
        range: Range<usize>,
        out: Value,
        prefixes: &Prefixes,
    ) -> Result<Prefixes, QuantError> {
        let Prefixes { stream, float } = prefixes;
        let ops: BTreeSet<usize> =
            self.targets.values().copied().filter(|op| range.contains(op)).collect();
        let mut plain = Section::new(self.program, range.clone(), &[out])?;
        if ops.is_empty() {
            let through = |it: &Stream| self.stream_of(&plain, calibration, Some(it));
            let float = float.as_ref().map(through).transpose()?;
            return Ok(Prefixes { stream: through(stream)?, float });
        }
        let (experts, after) = self.observe_layer(calibration, &ops, range, out, prefixes)?;
        self.apply_steps(&ops)?;
        self.find_input_scales(&ops);
        for op in &ops {
            self.round_experts(*op, calibration, &experts)?;
        }
        (self.seen, self.asymmetries) = Default::default();
        match (self.recipe.prefix, after) {
            (Prefix::Float, Some(after)) => Ok(after),
            (_, after) => {
                set_input_scales(&mut plain, &self.input_scales);
                let stream = self.stream_of(&plain, calibration, Some(stream))?;
                Ok(Prefixes { stream, float: after.and_then(|it| it.float) })
            }
        }
    }

    /// Runs a layer as it was and keeps what is seen of the inputs of `ops`; what experts read, and
    /// the streams after it if somebody asks for them: otherwise the layer ends where all is seen.
    fn observe_layer(
        &mut self,
        calibration: &Calibration<'_>,
        ops: &BTreeSet<usize>,
        range: Range<usize>,
        out: Value,
        prefixes: &Prefixes,
    ) -> Result<(ExpertInputs, Option<Prefixes>), QuantError> {
        let Prefixes { stream, float } = prefixes;
        let whole = self.recipe.prefix == Prefix::Float || float.is_some();
        let inputs: BTreeSet<Value> =
            ops.iter().flat_map(|op| self.program.ops[*op].inputs()).collect();
        let mut taps: Vec<Value> = inputs.iter().copied().collect();
        taps.extend(whole.then_some(out));
        let routers = range.clone();
        let section = match whole {
            true => range,
            false => range.start..self.end_of_inputs(range, &inputs),
        };
        let section = Section::new(self.program, section, &taps)?;
        let width = |value: &Value| (*value, self.program.value_width(*value));
        let mut seen = Observed::new(inputs.iter().map(width), self.recipe.needs_products());
        let mut experts = ExpertInputs::new(self.program, ops);
        let mut coverage = Coverage::new(self.program, routers);
        let mut weight = |weight| self.current(weight);
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
        let width = self.program.value_width(out);
        let float = float.as_ref().map(|_| Stream { width, values: float_after.into() });
        self.coverage.extend(coverage.finish());
        (self.seen, self.asymmetries) = (seen, asymmetries);
        let after = Prefixes { stream: Stream { width, values: after.into() }, float };
        Ok((experts, whole.then_some(after)))
    }

    /// Behind the last of ops `range` that makes one of `inputs`, or that routes.
    fn end_of_inputs(&self, range: Range<usize>, inputs: &BTreeSet<Value>) -> usize {
        let needed = |op: &usize| {
            let op = &self.program.ops[*op];
            matches!(op, Op::Route { .. }) || op.outputs().any(|out| inputs.contains(&out))
        };
        range.clone().rev().find(needed).map_or(range.start, |op| op + 1)
    }

    /// What a section with one tap makes of `stream`, with weights as far as they have become.
    fn stream_of(
        &self,
        section: &Section,
        calibration: &Calibration<'_>,
        stream: Option<&Stream>,
    ) -> Result<Stream, QuantError> {
        self.stream_by(section, calibration, stream, &mut |weight| self.current(weight))
    }

    /// What a section with one tap makes of `stream`, with the weights that `weight` says.
    fn stream_by(
        &self,
        section: &Section,
        calibration: &Calibration<'_>,
        stream: Option<&Stream>,
        weight: &mut dyn FnMut(Weight) -> Result<Tensor, QuantError>,
    ) -> Result<Stream, QuantError> {
        let width = section.program.capture_widths()[0];
        let mut values = Vec::with_capacity(calibration.tokens.len() * width);
        calibration.run(section, stream, weight, &mut |window| {
            values.extend_from_slice(window.taps[0]);
        })?;
        Ok(Stream { width, values: values.into() })
    }

    /// A weight as far as it has become: quantized (with its correction, as floats then), scaled,
    /// or what it was.
    fn current(&self, weight: Weight) -> Result<Tensor, QuantError> {
        match (self.finished.get(&weight), self.corrections.get(&weight)) {
            (Some(tensor), None) => Ok(tensor.clone()),
            (Some(tensor), Some(correction)) => {
                let mut values = tensor.to_f32();
                correction.add_to(&mut values);
                Ok(Tensor::from_f32_vec(tensor.shape.clone(), values))
            }
            (None, _) => self.unrounded(weight),
        }
    }

    /// A weight as rotations and scales leave it, before it is rounded.
    fn unrounded(&self, weight: Weight) -> Result<Tensor, QuantError> {
        if let Some(norm) = self.norms.get(&weight) {
            return Ok(norm.clone());
        }
        let columns = self.targets.get(&weight).is_some_and(|op| self.columns.contains_key(op));
        if !columns && !self.rows.contains_key(&weight) && !self.turned.contains_key(&weight) {
            return Ok(self.weights.load(weight)?);
        }
        let (shape, values) = self.load(weight)?;
        Ok(Tensor::from_f32_vec(shape, values))
    }

    /// The recipe on the linear `ops` of a layer. Consumers come before what makes their inputs, so
    /// that a matrix's rows are final when its own columns are scaled.
    fn apply_steps(&mut self, ops: &BTreeSet<usize>) -> Result<(), QuantError> {
        let recipe = self.recipe;
        for step in recipe.steps.iter().filter(|it| it.technique.stage == Stage::Prepare) {
            for op in ops.iter().rev() {
                self.prepare_group(step, *op)?;
            }
        }
        for op in ops {
            self.round_group(*op)?;
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
            fused_largest: None,
        });
        let tied = match fold {
            Fold::Values { heads, .. } => Some(heads.sources()),
            _ => None,
        };
        let (statistics, tied) = (statistics.as_deref(), tied.as_deref());
        let group = Group { matrices: matrices.collect(), statistics, asymmetry: None, tied };
        // Matrices that share scales of channels have one format, or the first one's is as good.
        let format = self.recipe.format_of(&report.tensors[0]);
        let outcome = (step.technique.group())(&group, format, &step.parameters)?;
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
            Fold::Values { weight, bias, heads } => {
                let mut of_rows = vec![1f32; heads.values * heads.width];
                for (source, scale) in heads.sources().into_iter().zip(&scales) {
                    of_rows[source] = *scale;
                }
                for weight in [Some(weight), bias].into_iter().flatten() {
                    divide(&mut self.rows, weight, &of_rows);
                }
                Ok(scales)
            }
            Fold::Rows { weight, bias } => {
                for weight in [Some(weight), bias].into_iter().flatten() {
                    divide(&mut self.rows, weight, &scales);
                }
                Ok(scales)
            }
            Fold::Norm { weight, bias, offset } => {
                let (shape, old) = match self.norms.get(&weight) {
                    Some(tensor) => (tensor.shape.clone(), tensor.to_f32()),
                    None => self.turned(weight)?,
                };
                let wanted: Vec<f32> =
                    old.iter().zip(&scales).map(|(w, s)| (offset + w) / s - offset).collect();
                let float = Format::Float(float_of(self.weights.load(weight)?.format));
                let codes = Bytes::new(codec::quantize(float, &wanted));
                let new = Tensor::new(shape, float, codes)
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
    fn statistics(&self, op: usize) -> Option<Arc<Statistics>> {
        let statistics = self.seen.of(self.program.ops[op].inputs().next()?)?;
        Some(match self.columns.get(&op) {
            Some(scales) => Arc::new(statistics.divided_by(scales)),
            None => Arc::clone(statistics),
        })
    }

    /// How an op's input differs from the float model's, as its scaled channels would.
    fn asymmetry(&self, op: usize) -> Option<Asymmetry> {
        let found = self.asymmetries.get(&self.program.ops[op].inputs().next()?)?;
        Some(match self.columns.get(&op) {
            Some(scales) => found.divided_by(scales),
            None => found.clone(),
        })
    }

    /// A weight with the scales of its rows and columns in it.
    fn load(&self, weight: Weight) -> Result<(Vec<usize>, Vec<f32>), QuantError> {
        let (shape, mut values) = self.turned(weight)?;
        let columns = self.columns_of(weight);
        let rows = self.rows.get(&weight);
        let width = match shape.as_slice() {
            [] | [_] => 1,
            [.., columns] => (*columns).max(1),
        };
        for (index, row) in values.chunks_mut(width).enumerate() {
            if let Some(scales) = rows {
                row.iter_mut().for_each(|value| *value /= scales[index]);
            }
            if let Some(scales) = columns {
                row.iter_mut().zip(scales).for_each(|(value, scale)| *value *= scale);
            }
        }
        Ok((shape, values))
    }

    /// A weight as rotations leave it.
    fn turned(&self, weight: Weight) -> Result<(Vec<usize>, Vec<f32>), QuantError> {
        let tensor = self.weights.load(weight)?;
        if self.turns.of(weight).is_empty() {
            let values = tensor.to_f32();
            return Ok((tensor.shape, values));
        }
        let mut values = Vec::with_capacity(tensor.shape.iter().product());
        self.turn(weight, &tensor, &mut |part| values.extend_from_slice(part))?;
        Ok((tensor.shape, values))
    }

    /// Hands out what rotations make of a weight, part after part.
    fn turn(
        &self,
        weight: Weight,
        tensor: &Tensor,
        take: &mut dyn FnMut(&[f32]),
    ) -> Result<(), QuantError> {
        let norm = |norm| Ok(self.weights.load(norm)?.to_f32());
        turned::<QuantError>(tensor, self.turns.of(weight), norm, take)
    }

    /// A weight that is not quantized, in a format of floats: never all of it in `f32`.
    fn floats(&self, weight: Weight, format: Format) -> Result<Tensor, QuantError> {
        let scaled = self.rows.contains_key(&weight) || self.columns_of(weight).is_some();
        let tensor = self.weights.load(weight)?;
        let mut codes = Vec::with_capacity(format.bytes_for(&tensor.shape).unwrap_or(0));
        match scaled || self.turns.of(weight).is_empty() {
            true => codes = codec::quantize(format, &self.load(weight)?.1),
            false => self.turn(weight, &tensor, &mut |part| {
                codes.extend_from_slice(&codec::quantize(format, part));
                // An embedding may be half of a small model: its pages leave as it goes.
                self.weights.release();
            })?,
        }
        let at = |source| QuantError::Format { tensor: self.name(weight), source };
        Tensor::new(tensor.shape, format, Bytes::new(codes)).map_err(at)
    }

    /// Scales of the input channels of a matrix.
    fn columns_of(&self, weight: Weight) -> Option<&Vec<f32>> {
        self.targets.get(&weight).and_then(|op| self.columns.get(op))
    }
}

impl Job<'_> {
    /// `elements` more are done.
    fn tell(&mut self, elements: usize) {
        self.done += elements;
        let elements =
            |weight: &Weight| self.program.weight(*weight).shape.iter().product::<usize>();
        let total = self.targets.keys().map(elements).sum();
        (self.progress)(Progress { done: self.done, total });
    }
}

/// What the recipe's rotations, and those that the program does while it runs, make of its weights.
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

fn float_of(format: Format) -> lathe_tensor::FloatType {
    match format {
        Format::Float(float) => float,
        _ => lathe_tensor::FloatType::BF16,
    }
}

impl Replacement for Job<'_> {
    fn stores_input_scales(&self) -> bool {
        self.finds_input_scales()
    }

    fn input_scale(&self, weight: Weight) -> Option<StaticScale> {
        self.input_scales.get(&weight).copied()
    }

    fn format(&self, weight: Weight) -> Option<Format> {
        if self.targets.contains_key(&weight) {
            return Some(self.recipe.format_of(&self.name(weight)));
        }
        if let Some(norm) = self.norms.get(&weight) {
            return Some(norm.format);
        }
        let kept = self.program.weight(weight).role == WeightRole::Linear;
        match self.recipe.format {
            // A GGUF writer would round what is kept to the format of all others.
            Format::Ggml(_) if kept => Some(Format::F16),
            // Biases and matrices whose rows were scaled.
            _ if self.rows.contains_key(&weight) => Some(Format::F32),
            _ => self.turned.get(&weight).copied(),
        }
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        if self.targets.contains_key(&weight) {
            self.finish(weight)?;
            // What was read of the model is not read again.
            self.weights.release();
            // The writer asks once: what it has is not kept.
            return Ok(self.finished.remove(&weight).expect("it was just rounded"));
        }
        if let Some(norm) = self.norms.get(&weight) {
            return Ok(norm.clone());
        }
        let format = Replacement::format(self, weight).unwrap_or(Format::F32);
        let tensor = self.floats(weight, format)?;
        self.weights.release();
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests;

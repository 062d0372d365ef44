//! A job: a recipe applied to a model.
//!
//! A `Plan` says what becomes of every weight. A `LayerPass` observes the inputs of one layer's
//! matrices and quantizes them. A `Ledger` holds the results so far. A job runs in one of two
//! ways. With calibration it goes layer by layer, and each layer sees the quantized layers before
//! it. If nothing needs calibration, a weight is quantized when the writer asks for it.

mod experts;
mod explain;
mod fused;
mod inputs;
mod layer;
mod ledger;
mod plan;
mod reports;
mod resume;
mod rounding;
mod routed;
mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;

use lathe_model::export::{Replacement, ReplacementError};
use lathe_model::spec::DecoderSpec;
use lathe_model::weights::ModelWeights;
use lathe_program::{StaticScale, Value, Weight, WeightRole};
use lathe_tensor::{Format, Tensor};

use crate::calibrate::{Calibration, Prefixes, Stream};
use crate::correction::Correction;
use crate::error::QuantError;
use crate::recipe::{Prefix, Recipe};
use crate::section::{Layers, Section};
use inputs::set_input_scales;
use layer::LayerPass;
use ledger::Ledger;
use plan::Plan;
pub(crate) use plan::bits_of_correction;
pub use reports::{
    CorrectionReport, CoverageReport, PreparedReport, Reports, TechniqueName, WeightReport,
};
use resume::Store;
pub use resume::remove_finished_layers;

/// How far a job has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Elements of matrices that are done.
    pub done: usize,
    /// Elements of all matrices that are to be quantized.
    pub total: usize,
}

/// A recipe applied to a model.
pub struct Job<'a> {
    plan: Plan<'a>,
    ledger: Ledger,
    progress: Box<dyn FnMut(Progress) + 'a>,
}

impl<'a> Job<'a> {
    /// Plans `recipe` for the model whose weights are `weights`. `program` includes the recipe's
    /// inputs ([`crate::inputs::with_inputs`]). Checks that every named tensor fits what the recipe
    /// asks of it. Nothing is computed yet. `calibrated` says whether [`Self::calibrate`] will be
    /// called. `progress` is called after each matrix.
    ///
    /// # Errors
    /// If a tensor does not fit its format, or a technique lacks what it requires.
    pub fn new(
        weights: &'a ModelWeights<'a>,
        recipe: &'a Recipe,
        calibrated: bool,
        progress: impl FnMut(Progress) + 'a,
    ) -> Result<Self, QuantError> {
        let plan = Plan::new(weights, recipe, calibrated)?;
        Ok(Job { plan, ledger: Ledger::default(), progress: Box::new(progress) })
    }

    /// Quantizes layer by layer. The text runs through a layer, and the recipe is applied with the
    /// statistics of the layer's inputs. With [`Prefix::Quantized`] the output of the quantized
    /// layer is the input of the next one, so that a layer can compensate the errors of those
    /// before it.
    ///
    /// # Errors
    /// If the text cannot be used, a layer cannot be run alone, or a technique refuses.
    pub fn calibrate(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
    ) -> Result<(), QuantError> {
        calibration.check(self.plan.program)?;
        self.calibrate_layers(spec, calibration, None)
    }

    /// As [`Self::calibrate`], and saves each finished layer in `folder`, which is created if it
    /// does not exist. A job with the same recipe, model and text continues from the layers that it
    /// finds there. The caller removes the folder after the result is written.
    ///
    /// # Errors
    /// As [`Self::calibrate`]; [`QuantError::Resume`] if the folder holds layers of another run, or
    /// cannot be read or written.
    pub fn calibrate_resumable(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
        folder: &Path,
    ) -> Result<(), QuantError> {
        calibration.check(self.plan.program)?;
        let store = self.store(folder, calibration)?;
        self.calibrate_layers(spec, calibration, Some(store))
    }

    fn calibrate_layers(
        &mut self,
        spec: &DecoderSpec,
        calibration: &Calibration<'_>,
        mut store: Option<Store>,
    ) -> Result<(), QuantError> {
        let layers = Layers::of(self.plan.program, spec)?;
        let section = Section::new(self.plan.program, layers.before, &[layers.stream])?;
        let restored = store.as_mut().map(|store| self.restore(store)).transpose()?.flatten();
        let (first, mut prefixes) = match restored {
            Some(found) => found,
            None => {
                let stream = self.stream_of(&section, calibration, None)?;
                let float = self.plan.recipe.is_asymmetric().then(|| stream.clone());
                (0, Prefixes { stream, float })
            }
        };
        // Tells where this run begins, so that the remaining time can be estimated.
        self.tell(0);
        for (layer, (ops, out)) in layers.layers.into_iter().enumerate().skip(first) {
            prefixes = self.calibrate_layer(calibration, ops, out, &prefixes)?;
            // The next layer reads none of the pages that this one read.
            self.plan.weights.release();
            if let Some(store) = &mut store {
                self.save(store, layer, &prefixes)?;
            }
        }
        match self.plan.targets.keys().find(|weight| !self.ledger.finished.contains_key(weight)) {
            None => Ok(()),
            Some(weight) => Err(QuantError::Calibration(format!(
                "tensor {} is in no layer",
                self.plan.name(*weight)
            ))),
        }
    }

    /// Quantizes the layer whose ops are `range`. Returns the streams after it.
    fn calibrate_layer(
        &mut self,
        calibration: &Calibration<'_>,
        range: Range<usize>,
        out: Value,
        prefixes: &Prefixes,
    ) -> Result<Prefixes, QuantError> {
        let Prefixes { stream, float } = prefixes;
        let ops: BTreeSet<usize> =
            self.plan.targets.values().copied().filter(|op| range.contains(op)).collect();
        let mut plain = Section::new(self.plan.program, range.clone(), &[out])?;
        if ops.is_empty() {
            let through = |it: &Stream| self.stream_of(&plain, calibration, Some(it));
            let float = float.as_ref().map(through).transpose()?;
            return Ok(Prefixes { stream: through(stream)?, float });
        }
        let (mut pass, after) = LayerPass::observe(self, calibration, &ops, range, out, prefixes)?;
        pass.apply(&ops, calibration)?;
        match (self.plan.recipe.prefix, after) {
            (Prefix::Float, Some(after)) => Ok(after),
            (_, after) => {
                set_input_scales(&mut plain, &self.ledger.input_scales);
                let stream = self.stream_of(&plain, calibration, Some(stream))?;
                Ok(Prefixes { stream, float: after.and_then(|it| it.float) })
            }
        }
    }

    /// The output of a section with one tap for `stream`, with each weight in its current state.
    fn stream_of(
        &self,
        section: &Section,
        calibration: &Calibration<'_>,
        stream: Option<&Stream>,
    ) -> Result<Stream, QuantError> {
        self.stream_by(section, calibration, stream, &mut |weight| self.current(weight))
    }

    /// The output of a section with one tap for `stream`. `weight` loads the weights.
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

    /// Quantizes a weight that needs no calibration.
    fn finish(&mut self, weight: Weight) -> Result<(), QuantError> {
        if self.ledger.finished.contains_key(&weight) {
            return Ok(());
        }
        let step = self.plan.recipe.rounding_of(&self.plan.name(weight))?;
        let role = self.plan.program.weight(weight).role;
        let mut pass = LayerPass::unobserved(self);
        match role {
            WeightRole::Experts => pass.round_stack(step, weight, &mut |_| Ok(None)),
            _ => pass.round(&[weight], None),
        }
    }

    /// Reports that `elements` more are done.
    fn tell(&mut self, elements: usize) {
        self.ledger.done += elements;
        let (done, total) = (self.ledger.done, self.plan.elements());
        (self.progress)(Progress { done, total });
    }

    /// The reports so far.
    pub fn reports(&self) -> &Reports {
        &self.ledger.reports
    }

    /// The reports, when the job is over.
    pub fn into_reports(self) -> Reports {
        self.ledger.reports
    }

    /// The corrections that run beside quantized matrices, so far.
    pub fn corrections(&self) -> &BTreeMap<Weight, Correction> {
        &self.ledger.corrections
    }

    /// Mean bits of the weights that the recipe quantizes. Scales and corrections count.
    ///
    /// # Errors
    /// If a weight is corrected twice.
    pub fn bits_per_weight(&self) -> Result<f64, QuantError> {
        let (mut bits, mut elements) = (0.0, 0.0);
        for weight in self.plan.targets.keys() {
            elements += self.plan.program.weight(*weight).shape.iter().product::<usize>() as f64;
            bits += self.plan.bits_of(*weight)?;
        }
        Ok(bits / elements)
    }
}

impl Replacement for Job<'_> {
    fn stores_input_scales(&self) -> bool {
        self.plan.finds_input_scales()
    }

    fn input_scale(&self, weight: Weight) -> Option<StaticScale> {
        self.ledger.input_scales.get(&weight).copied()
    }

    fn format(&self, weight: Weight) -> Option<Format> {
        if self.plan.targets.contains_key(&weight) {
            return Some(self.plan.recipe.format_of(&self.plan.name(weight)));
        }
        if let Some(norm) = self.ledger.norms.get(&weight) {
            return Some(norm.format);
        }
        let kept = self.plan.program.weight(weight).role == WeightRole::Linear;
        match self.plan.recipe.format {
            // Without this, a GGUF writer would round kept weights to the format of all others.
            Format::Ggml(_) if kept => Some(Format::F16),
            // Biases, and matrices whose rows were scaled.
            _ if self.ledger.rows.contains_key(&weight) => Some(Format::F32),
            _ => self.plan.rotated_formats.get(&weight).copied(),
        }
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        if self.plan.targets.contains_key(&weight) {
            self.finish(weight)?;
            // The model's pages that were read are not read again.
            self.plan.weights.release();
            // The writer asks once for each weight, so it need not be kept.
            return Ok(self.ledger.finished.remove(&weight).expect("it was just rounded"));
        }
        if let Some(norm) = self.ledger.norms.get(&weight) {
            return Ok(norm.clone());
        }
        let format = Replacement::format(self, weight).unwrap_or(Format::F32);
        let tensor = self.floats(weight, format)?;
        self.plan.weights.release();
        Ok(tensor)
    }
}

#[cfg(test)]
mod tests;

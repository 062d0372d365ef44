//! The pass that measures a job's result. A text that calibration did not see runs through the
//! model one layer at a time, in several streams at once.
//!
//! After each layer there are these streams: that of the float model, that of the quantized model,
//! and one for each layer so far with that layer alone quantized. A layer is prepared twice, with
//! and without its codes, and all streams run through it together. A model of `L` layers takes
//! about `L^2 / 2` runs of a layer, and memory for two layers and `L + 2` streams of `[tokens,
//! width]`. The float model is the one after rotations and scales, which equals the file's but for
//! rounding. The file's own weights run as well if their distributions are asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use lathe_model::spec::DecoderSpec;
use lathe_program::{Op, Value, Weight};
use lathe_tensor::codec::scaled::{E8m0Rounding, quantize};
use lathe_tensor::{Block, Element, ScaleType, ScaledFormat, Tensor, ZeroPoint};
use rayon::prelude::*;

use super::{Job, Progress};
use crate::calibrate::{Calibration, Stream};
use crate::error::QuantError;
use crate::explain::{
    Corrected, Distribution, Divergence, DivergenceSum, Explanation, Histogram, LayerExplanation,
    TensorExplanation, advise, budgets, explain_tensor, kl_divergence, log_softmax,
};
use crate::recipe::Prefix;
use crate::section::{Layers, Section};
use crate::statistics::Statistics;
use crate::technique::Stage;

/// Tokens whose logits are in memory at once, in each of two streams.
const LOGITS_TOKENS: usize = 32;
/// Output errors that are computed for each matrix: six rounds, its own error, and that of its
/// inputs.
const OUTPUT_ERRORS: usize = 8;
/// The format for the estimate of activation errors: int8 with a scale for each token.
const ACTIVATION: ScaledFormat = ScaledFormat {
    element: Element::Int(8),
    block: Block::Channel,
    scale: ScaleType::F32,
    zero: ZeroPoint::None,
};

/// The model that a stream runs through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    /// The file's weights.
    File,
    /// After rotations and scales, before anything is rounded.
    Prepared,
    /// What the job made.
    Quantized,
}

/// Statistics of an input of linear layers.
struct Input {
    seen: Statistics,
    /// Statistics of the error of rounding it to [`ACTIVATION`].
    rounded: Statistics,
}

/// The streams after a layer.
struct Streams {
    /// The stream of the file's weights, if the job rotates or scales them.
    file: Option<Stream>,
    float: Stream,
    quantized: Stream,
    /// For each layer so far, the stream with that layer alone quantized.
    alone: Vec<Stream>,
}

/// The state of the pass through the text.
struct TextPass<'a, 'b> {
    text: Calibration<'a>,
    streams: Streams,
    weights: Distribution,
    activations: Distribution,
    work: Progress,
    progress: &'b mut dyn FnMut(Progress),
}

impl Job<'_> {
    /// Measures the job's result on `text`, which calibration should not have seen. Takes as many
    /// whole windows as the text has. Weights that needed no calibration are quantized first.
    /// `progress` counts work in no particular unit.
    ///
    /// # Errors
    /// If the text cannot be used, a layer cannot be run alone, or a technique refuses.
    pub fn explain(
        &mut self,
        spec: &DecoderSpec,
        text: &Calibration<'_>,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Explanation, QuantError> {
        text.check(self.plan.program)?;
        let window = text.window.clamp(1, self.plan.program.context_max).min(text.tokens.len());
        let tokens = text.tokens.len() / window * window;
        let text = Calibration { window, tokens: &text.tokens[..tokens], ..*text };
        let layers = Layers::of(self.plan.program, spec)?;
        let section = Section::new(self.plan.program, layers.before, &[layers.stream])?;
        let prepares = self
            .plan
            .recipe
            .steps
            .iter()
            .any(|it| matches!(it.technique.stage, Stage::Rotate | Stage::Prepare));
        let float = self.through(Version::Prepared, &text, &section, None)?;
        let streams = Streams {
            file: prepares
                .then(|| self.through(Version::File, &text, &section, None))
                .transpose()?,
            quantized: float.clone(),
            float,
            alone: Vec::new(),
        };
        let work = Progress { done: 0, total: self.work(&layers.layers, tokens) };
        let (weights, activations) = Default::default();
        let mut pass = TextPass { text, streams, weights, activations, work, progress };
        if prepares {
            pass.weights.after = Some(Histogram::default());
            pass.activations.after = Some(Histogram::default());
        }
        pass.tell(0);
        let mut found = Vec::new();
        let end = layers.layers.last().map_or(0, |(range, _)| range.end);
        for (index, (range, out)) in layers.layers.into_iter().enumerate() {
            found.push(self.explain_layer(&mut pass, index, range, out)?);
        }
        let kl = self.divergences(&mut pass, end)?;
        for (layer, kl) in found.iter_mut().zip(&kl[1..]) {
            layer.kl = *kl;
        }
        let name = |step: &crate::recipe::TechniqueStep| step.technique.name.to_owned();
        let mut explanation = Explanation {
            format: self.plan.recipe.format.to_string(),
            techniques: self.plan.recipe.steps.iter().map(name).collect(),
            quantized_prefix: self.plan.recipe.prefix == Prefix::Quantized,
            tokens,
            window,
            kl: kl[0],
            budgets: budgets(&found, self.float_bits()?),
            layers: found,
            weights: pass.weights,
            activations: pass.activations,
            advice: Vec::new(),
        };
        explanation.advice = advise(&explanation);
        Ok(explanation)
    }

    /// Mean bits, in the file, of a number of the quantized tensors.
    fn float_bits(&self) -> Result<f64, QuantError> {
        match self.plan.targets.keys().next() {
            Some(weight) => Ok(self.plan.weights.load(*weight)?.format.bits_per_weight()),
            None => Ok(16.0),
        }
    }

    /// The approximate multiplications of the whole pass: layers and head.
    fn work(&self, layers: &[(Range<usize>, Value)], tokens: usize) -> usize {
        let layer = |(index, (range, _)): (usize, &(Range<usize>, Value))| {
            self.work_of_layer(index, range, tokens)
        };
        let end = layers.last().map_or(0, |(range, _)| range.end);
        let head = self.elements(end..self.plan.program.ops.len()) * (layers.len() + 2) * tokens;
        layers.iter().enumerate().map(layer).sum::<usize>() + head
    }

    /// The multiplications of a layer's matrices for each stream's tokens, and of the errors of its
    /// quantized matrices: half of `H` with each number of a matrix, for each of [`OUTPUT_ERRORS`].
    fn work_of_layer(&self, index: usize, range: &Range<usize>, tokens: usize) -> usize {
        let errors = |(weight, _): (&Weight, &usize)| {
            let shape = &self.plan.program.weight(*weight).shape;
            shape.iter().product::<usize>() * shape.last().copied().unwrap_or(1) * OUTPUT_ERRORS / 2
        };
        let targets = self.plan.targets.iter().filter(|(_, op)| range.contains(op));
        self.elements(range.clone()) * (index + 3) * tokens + targets.map(errors).sum::<usize>()
    }

    /// Numbers of the matrices that the ops of `range` read.
    fn elements(&self, range: Range<usize>) -> usize {
        let size =
            |weight: &Weight| self.plan.program.weight(*weight).shape.iter().product::<usize>();
        let of_op = |op: &Op| match op {
            Op::Linear { parts, .. } => parts.iter().map(|part| size(&part.weight)).sum(),
            Op::Experts { spec, .. } => [spec.gate, spec.up, spec.down].iter().map(size).sum(),
            Op::Logits { head, .. } => size(head),
            _ => 0,
        };
        self.plan.program.ops[range].iter().map(of_op).sum::<usize>()
    }

    fn version(&self, version: Version, weight: Weight) -> Result<Tensor, QuantError> {
        match version {
            Version::File => Ok(self.plan.weights.load(weight)?),
            Version::Prepared => self.unrounded(weight),
            Version::Quantized => self.current(weight),
        }
    }

    /// The output of a section with one tap for `stream`.
    fn through(
        &self,
        version: Version,
        text: &Calibration<'_>,
        section: &Section,
        stream: Option<&Stream>,
    ) -> Result<Stream, QuantError> {
        self.stream_by(section, text, stream, &mut |weight| self.version(version, weight))
    }

    /// The outputs of a layer with one tap for several streams, which run one after the other.
    fn all_through(
        &self,
        version: Version,
        text: &Calibration<'_>,
        (range, out): (Range<usize>, Value),
        streams: &[&Stream],
    ) -> Result<Vec<Stream>, QuantError> {
        let (table, rows) = joined(streams);
        // The tokens only give the number of rows. The stream has the values.
        let text = Calibration { tokens: &vec![0; rows], ..*text };
        let section = Section::new(self.plan.program, range, &[out])?;
        let made = self.through(version, &text, &section, Some(&table))?;
        let part = rows / streams.len().max(1) * made.width;
        let parts = made.values.chunks(part.max(1));
        Ok(parts
            .map(|values| Stream { width: made.width, values: values.to_vec().into() })
            .collect())
    }

    fn explain_layer(
        &mut self,
        pass: &mut TextPass<'_, '_>,
        index: usize,
        range: Range<usize>,
        out: Value,
    ) -> Result<LayerExplanation, QuantError> {
        let weights: Vec<(Weight, usize)> =
            self.plan.targets.iter().map(|(a, b)| (*a, *b)).collect();
        let weights: Vec<(Weight, usize)> =
            weights.into_iter().filter(|(_, op)| range.contains(op)).collect();
        for (weight, _) in &weights {
            self.finish(*weight)?;
        }
        let ops: BTreeSet<usize> = weights.iter().map(|(_, op)| *op).collect();
        let inputs = self.see_inputs(pass, &ops, range.clone())?;
        let mut tensors = Vec::new();
        for (weight, op) in &weights {
            tensors.push(self.explain_weight(pass, *weight, *op, &inputs)?);
        }

        let layer = (range.clone(), out);
        if let Some(file) = &pass.streams.file {
            let made = self.all_through(Version::File, &pass.text, layer.clone(), &[file])?;
            pass.streams.file = made.into_iter().next();
        }
        let streams = &pass.streams;
        let before: Vec<&Stream> = [&streams.float].into_iter().chain(&streams.alone).collect();
        let floats = self.all_through(Version::Prepared, &pass.text, layer.clone(), &before)?;
        let before = [&streams.float, &streams.quantized];
        let made = self.all_through(Version::Quantized, &pass.text, layer, &before)?;
        let mut floats = floats.into_iter();
        let float = floats.next().expect("a stream for each that went in");
        let [alone, quantized] = <[Stream; 2]>::try_from(made)
            .unwrap_or_else(|_| unreachable!("a stream for each that went in"));
        let errors = (relative_error(&quantized, &float), relative_error(&alone, &float));
        let file = pass.streams.file.take();
        let alone = floats.chain([alone]).collect();
        pass.streams = Streams { file, float, quantized, alone };
        let tokens = pass.text.tokens.len();
        pass.tell(self.work_of_layer(index, &range, tokens));

        let elements: usize = tensors.iter().map(|it| it.elements).sum();
        let bits = weights.iter().map(|(weight, _)| self.plan.bits_of(*weight));
        let bits = bits.sum::<Result<f64, QuantError>>()?;
        Ok(LayerExplanation {
            layer: index,
            tensors,
            elements,
            bits: bits / elements.max(1) as f64,
            stream_error: errors.0,
            alone_error: errors.1,
            kl: Divergence::default(),
        })
    }

    /// Runs the float streams up to the inputs of `ops` and keeps their statistics.
    fn see_inputs(
        &self,
        pass: &mut TextPass<'_, '_>,
        ops: &BTreeSet<usize>,
        range: Range<usize>,
    ) -> Result<BTreeMap<Value, Input>, QuantError> {
        let taps: BTreeSet<Value> =
            ops.iter().flat_map(|op| self.plan.program.ops[*op].inputs()).collect();
        let taps: Vec<Value> = taps.into_iter().collect();
        let Some(last) = ops.last() else { return Ok(BTreeMap::new()) };
        // Ops after the last input are not run.
        let section = Section::new(self.plan.program, range.start..*last, &taps)?;
        let width = |value: Value| self.plan.program.value_width(value);
        let mut inputs: BTreeMap<Value, Input> = taps
            .iter()
            .map(|value| {
                let new = || Statistics::new(width(*value));
                (*value, Input { seen: new(), rounded: new() })
            })
            .collect();
        let TextPass { text, streams, activations, .. } = pass;
        let Distribution { before, after } = activations;
        let own = after.as_mut().unwrap_or(before);
        let mut failed = None;
        let mut weight = |weight| self.version(Version::Prepared, weight);
        text.run(&section, Some(&streams.float), &mut weight, &mut |seen| {
            for (value, rows) in taps.iter().zip(seen.taps) {
                rows.chunks(width(*value)).for_each(|row| own.add(row));
                let input = inputs.get_mut(value).expect("a tap");
                input.seen.add(rows);
                match rounding_of(rows, width(*value)) {
                    Ok(difference) => input.rounded.add(&difference),
                    Err(error) => failed = Some(error),
                }
            }
        })?;
        if let Some(source) = failed {
            return Err(QuantError::Format { tensor: "activations".to_owned(), source });
        }
        if let Some(file) = &streams.file {
            let mut weight = |weight| self.version(Version::File, weight);
            text.run(&section, Some(file), &mut weight, &mut |seen| {
                for (value, rows) in taps.iter().zip(seen.taps) {
                    rows.chunks(width(*value)).for_each(|row| before.add(row));
                }
            })?;
        }
        Ok(inputs)
    }

    fn explain_weight(
        &self,
        pass: &mut TextPass<'_, '_>,
        weight: Weight,
        op: usize,
        inputs: &BTreeMap<Value, Input>,
    ) -> Result<TensorExplanation, QuantError> {
        let (shape, values) = self.load(weight)?;
        // The analysis takes the codes alone. The error with a correction is reported beside.
        let quantized = &self.ledger.finished[&weight];
        let Distribution { before, after } = &mut pass.weights;
        if let Some(after) = after {
            before.add(&self.plan.weights.load(weight)?.to_f32());
            after.add(&values);
        } else {
            before.add(&values);
        }
        let input = self.plan.program.ops[op].inputs().next().and_then(|value| inputs.get(&value));
        // An expert's last matrix reads the hidden values, not the op's input.
        let columns = shape.last().copied().unwrap_or(1);
        let hidden =
            matches!(&self.plan.program.ops[op], Op::Experts { spec, .. } if spec.down == weight);
        let input = input.filter(|it| !hidden && it.seen.width() == columns);
        let energy = |statistics: &Statistics| statistics.quadratic().sum(&values);
        let whole = input.map(|it| energy(&it.seen));
        let rounded = input.map(|it| energy(&it.rounded));
        let corrected = self.ledger.corrections.get(&weight).map(|correction| {
            let mut difference = quantized.to_f32();
            correction.add_to(&mut difference);
            difference.iter_mut().zip(&values).for_each(|(a, b)| *a -= b);
            let squares = |all: &[f32]| all.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>();
            let outputs = input.zip(whole).filter(|(_, whole)| *whole > 0.0);
            Corrected {
                rank: correction.rank(),
                bits: correction.bytes() as f64 * 8.0 / values.len() as f64,
                weights: squares(&difference) / squares(&values).max(f64::MIN_POSITIVE),
                outputs: outputs.map(|(it, whole)| it.seen.quadratic().sum(&difference) / whole),
            }
        });
        Ok(TensorExplanation {
            corrected,
            tensor: self.plan.name(weight),
            format: quantized.format.to_string(),
            elements: values.len(),
            error: explain_tensor(&values, quantized, input.map(|it| &it.seen)),
            activation_int8: whole
                .zip(rounded)
                .map(|(all, part)| if all > 0.0 { part / all } else { 0.0 }),
            output_energy: whole,
        })
    }

    /// KL to the float stream, for the quantized stream and for each stream with one layer
    /// quantized.
    fn divergences(
        &self,
        pass: &mut TextPass<'_, '_>,
        first_op: usize,
    ) -> Result<Vec<Divergence>, QuantError> {
        let end = self.plan.program.ops.len();
        let head = self.plan.program.ops[first_op..].iter().find_map(|op| match op {
            Op::Logits { scale, softcap, .. } => Some((*scale, *softcap)),
            _ => None,
        });
        let Some((scale, softcap)) = head else {
            let reason = "the program makes no logits".to_owned();
            return Err(QuantError::Calibration(reason));
        };
        let Streams { float, quantized, alone, .. } = &pass.streams;
        let streams: Vec<&Stream> = [float, quantized].into_iter().chain(alone).collect();
        let tokens = pass.text.tokens.len();
        // A few tokens of every stream at a time, so that the float model's logits are not kept
        // longer.
        let rows = (1..=LOGITS_TOKENS).rev().find(|rows| tokens.is_multiple_of(*rows)).unwrap_or(1);
        let width = float.width;
        let parts = (0..tokens / rows).flat_map(|at| {
            streams.iter().map(move |stream| &stream.values[at * rows * width..][..rows * width])
        });
        let table = Stream { width, values: parts.flatten().copied().collect::<Vec<f32>>().into() };
        let all = tokens * streams.len();
        let section = Section::new(self.plan.program, first_op..end, &[])?;
        let text = Calibration { tokens: &vec![0; all], window: rows, ..pass.text };
        let vocabulary = self.plan.program.vocabulary;
        let final_logit = |x: f32| match softcap {
            Some(cap) => cap * (x * scale / cap).tanh(),
            None => x * scale,
        };
        let mut sums = vec![DivergenceSum::default(); streams.len() - 1];
        let (mut base, mut at) = (Vec::new(), 0);
        let work = self.elements(first_op..end) * rows;
        let mut weight = |weight| self.version(Version::Prepared, weight);
        let (progress, done) = (&mut *pass.progress, &mut pass.work);
        text.run(&section, Some(&table), &mut weight, &mut |seen| {
            let logits = seen.taps[0].par_chunks(seen.taps[0].len() / rows);
            let rows: Vec<Vec<f64>> = logits
                .map(|row| {
                    let row: Vec<f32> = row[..vocabulary].iter().map(|x| final_logit(*x)).collect();
                    log_softmax(&row)
                })
                .collect();
            match at % streams.len() {
                0 => base = rows,
                stream => base
                    .iter()
                    .zip(&rows)
                    .for_each(|(base, row)| sums[stream - 1].add(kl_divergence(base, row))),
            }
            at += 1;
            done.done += work;
            progress(*done);
        })?;
        Ok(sums.into_iter().map(DivergenceSum::finish).collect())
    }
}

impl TextPass<'_, '_> {
    fn tell(&mut self, work: usize) {
        self.work.done += work;
        (self.progress)(self.work);
    }
}

/// Joins streams of one length to one, and returns its rows.
fn joined(streams: &[&Stream]) -> (Stream, usize) {
    let width = streams.first().map_or(1, |stream| stream.width.max(1));
    let values: Vec<f32> =
        streams.iter().flat_map(|stream| stream.values.iter()).copied().collect();
    let rows = values.len() / width;
    (Stream { width, values: values.into() }, rows)
}

/// The root of the mean over tokens of `|error|^2 / |stream|^2`. Tokens of all sizes count alike.
fn relative_error(found: &Stream, exact: &Stream) -> f64 {
    let width = exact.width.max(1);
    let square = |sum: f64, x: f64| sum + x * x;
    let of_token = |(found, exact): (&[f32], &[f32])| {
        let pairs = found.iter().zip(exact);
        let error = pairs.map(|(a, b)| f64::from(a - b)).fold(0.0, square);
        let whole = exact.iter().map(|x| f64::from(*x)).fold(0.0, square);
        if whole > 0.0 { error / whole } else { 0.0 }
    };
    let tokens = found.values.chunks(width).zip(exact.values.chunks(width));
    let count = (exact.values.len() / width).max(1) as f64;
    (tokens.map(of_token).sum::<f64>() / count).sqrt()
}

/// The error of rounding rows of inputs to [`ACTIVATION`].
fn rounding_of(rows: &[f32], width: usize) -> Result<Vec<f32>, lathe_tensor::TensorError> {
    let shape = [rows.len() / width.max(1), width];
    let rounded = quantize(&shape, &ACTIVATION, rows, E8m0Rounding::Even)?.to_f32();
    Ok(rounded.iter().zip(rows).map(|(a, b)| a - b).collect())
}

#[cfg(test)]
mod tests;

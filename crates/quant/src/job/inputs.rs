//! Scales of inputs that calibration finds and the result stores. NVFP4 has one: it divides the
//! scales of the blocks, so that the largest observed number gets the largest code.
//!
//! While a layer is observed, each row computes its own scale, so that its largest number is exact.
//! The layers after it run with the stored scale, as the written model will.

use std::collections::{BTreeMap, BTreeSet};

use lathe_program::{Op, StaticScale, Weight};
use lathe_tensor::ScaledFormat;
use lathe_tensor::codec::scaled::global_divisor;

use super::layer::LayerPass;
use crate::section::Section;

impl LayerPass<'_, '_> {
    /// Keeps the input scales of the linear layers and of the experts' first matrices among `ops`.
    pub(super) fn find_input_scales(&mut self, ops: &BTreeSet<usize>) {
        if !self.job.plan.finds_input_scales() {
            return;
        }
        for op in ops {
            let weights: Vec<Weight> = match &self.job.plan.program.ops[*op] {
                Op::Linear { parts, .. } => parts.iter().map(|part| part.weight).collect(),
                Op::Experts { spec, .. } => vec![spec.gate, spec.up],
                _ => continue,
            };
            if let Some(seen) = self.statistics(*op) {
                let largest = seen.largest().iter().fold(0.0f32, |most, x| most.max(*x));
                self.keep_input_scale(&weights, largest);
            }
        }
    }

    /// Keeps the scale of the input that `weights` share. `largest` is its largest magnitude.
    pub(super) fn keep_input_scale(&mut self, weights: &[Weight], largest: f32) {
        let scale = StaticScale::new(global_divisor(&ScaledFormat::NVFP4, largest));
        let scale = scale.expect("a divisor is a normal number");
        let ours = weights.iter().filter(|weight| self.job.plan.targets.contains_key(weight));
        let ours: Vec<Weight> = ours.copied().collect();
        self.job.ledger.input_scales.extend(ours.into_iter().map(|weight| (weight, scale)));
    }
}

/// Sets the input scales in the ops of `section`. `scales` is keyed by the matrix that reads.
pub(super) fn set_input_scales(section: &mut Section, scales: &BTreeMap<Weight, StaticScale>) {
    let scale_of = |weight: Weight| scales.get(&section.weights[weight.0 as usize]).copied();
    let mut of_values = BTreeMap::new();
    for op in &mut section.program.ops {
        match op {
            Op::Linear { input, parts } => {
                let scale = parts.iter().find_map(|part| scale_of(part.weight));
                of_values.extend(scale.map(|scale| (*input, scale)));
            }
            Op::Experts { input, spec, .. } => {
                of_values.extend(scale_of(spec.gate).map(|scale| (*input, scale)));
                spec.hidden_transform.scale = scale_of(spec.down);
            }
            _ => {}
        }
    }
    for op in &mut section.program.ops {
        if let Op::Transform { transform, out, .. } = op {
            transform.scale = of_values.get(out).copied();
        }
    }
}

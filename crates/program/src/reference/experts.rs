//! Experts as a grouped product. The rows of each expert run together. Their outputs are summed for
//! each row in the order of its choice.

use super::math::{activate, matmul};
use super::weights::Weights;
use crate::op::ExpertsSpec;

/// A routing in memory: `[rows, experts_per_token]`, the best first.
#[derive(Default, Clone)]
pub(super) struct Routed {
    pub(super) experts: Vec<u32>,
    pub(super) weights: Vec<f32>,
    pub(super) experts_per_token: usize,
}

/// The sum of each row's experts, `[rows, out]`.
pub(super) fn run(
    spec: &ExpertsSpec,
    weights: &Weights,
    input: &[f32],
    [width, out_width]: [usize; 2],
    choices: &Routed,
) -> Vec<f32> {
    let mut outputs = vec![0f32; choices.experts.len() * out_width];
    for expert in 0..spec.experts {
        let number = (spec.first_expert + expert) as u32;
        let slots: Vec<usize> =
            (0..choices.experts.len()).filter(|slot| choices.experts[*slot] == number).collect();
        if slots.is_empty() {
            continue;
        }
        let rows: Vec<u32> = slots.iter().map(|s| (s / choices.experts_per_token) as u32).collect();
        let mut gathered: Vec<f32> = Vec::with_capacity(slots.len() * width);
        for (slot, row) in slots.iter().zip(&rows) {
            let weight = if spec.weigh_input { choices.weights[*slot] } else { 1.0 };
            let row = &input[*row as usize * width..(*row as usize + 1) * width];
            gathered.extend(row.iter().map(|x| x * weight));
        }
        let matrix = |weight, out: usize, k: usize| {
            &weights.get(weight)[expert * out * k..(expert + 1) * out * k]
        };
        let bias = |weight: Option<_>, out: usize| {
            weight.map(|weight| &weights.get(weight)[expert * out..(expert + 1) * out])
        };
        let hidden = spec.hidden;
        let gate_bias = bias(spec.gate_bias, hidden);
        let gate = matmul(matrix(spec.gate, hidden, width), gate_bias, &gathered, width);
        let up_bias = bias(spec.up_bias, hidden);
        let up = matmul(matrix(spec.up, hidden, width), up_bias, &gathered, width);
        let mut inner: Vec<f32> =
            gate.iter().zip(&up).map(|(gate, up)| activate(spec.activation, *gate, *up)).collect();
        spec.hidden_transform.apply(&mut inner, hidden);
        let down_bias = bias(spec.down_bias, out_width);
        let down = matmul(matrix(spec.down, out_width, hidden), down_bias, &inner, hidden);
        for (slot, down) in slots.iter().zip(down.chunks_exact(out_width)) {
            outputs[slot * out_width..(slot + 1) * out_width].copy_from_slice(down);
        }
    }
    sum_choices(&outputs, out_width, choices, spec.weigh_input)
}

fn sum_choices(outputs: &[f32], width: usize, choices: &Routed, weighed: bool) -> Vec<f32> {
    let rows = choices.experts.len() / choices.experts_per_token;
    let mut sums = vec![0f32; rows * width];
    for (slot, output) in outputs.chunks_exact(width).enumerate() {
        let weight = if weighed { 1.0 } else { choices.weights[slot] };
        let row = slot / choices.experts_per_token;
        let sum = &mut sums[row * width..(row + 1) * width];
        sum.iter_mut().zip(output).for_each(|(sum, x)| *sum += weight * x);
    }
    sums
}

//! The arithmetic of the simple ops.

use rayon::prelude::*;

use crate::op::{Activation, NormKind, RopeStyle, RopeTable};
use crate::step::Step;

/// Partial sums of a dot product. They are added as a tree at the end, which rounds less than one
/// sum and gives every caller the same result.
const LANES: usize = 16;

pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; LANES];
    let (a_whole, a_rest) = a.as_chunks::<LANES>();
    let (b_whole, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_whole.iter().zip(b_whole) {
        for i in 0..LANES {
            lanes[i] += a[i] * b[i];
        }
    }
    for (i, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[i] += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `out[rows, n] = input[rows, k] x matrix[n, k]^T + bias[n]`.
pub(super) fn matmul(matrix: &[f32], bias: Option<&[f32]>, input: &[f32], k: usize) -> Vec<f32> {
    let (rows, n) = (input.len() / k, matrix.len() / k);
    let element = |output: usize, row: usize| {
        let weights = &matrix[output * k..(output + 1) * k];
        dot(weights, &input[row * k..(row + 1) * k]) + bias.map_or(0.0, |bias| bias[output])
    };
    let mut out = vec![0f32; rows * n];
    if rows == 1 {
        let outputs = out.par_iter_mut().with_min_len(1 + 65536 / k).enumerate();
        outputs.for_each(|(output, out)| *out = element(output, 0));
        return out;
    }
    // Each thread reads its weights once, so the result is transposed afterwards.
    let mut columns = vec![0f32; rows * n];
    let by_output = columns.par_chunks_mut(rows.max(1)).with_min_len(1 + 65536 / (k * rows.max(1)));
    by_output.enumerate().for_each(|(output, column)| {
        column.iter_mut().enumerate().for_each(|(row, out)| *out = element(output, row));
    });
    out.par_chunks_mut(n).enumerate().for_each(|(row, out)| {
        out.iter_mut().enumerate().for_each(|(output, out)| *out = columns[output * rows + row]);
    });
    out
}

pub(super) fn norm(
    input: &[f32],
    [weight, bias]: [Option<&[f32]>; 2],
    kind: NormKind,
    epsilon: f32,
    [width, groups]: [usize; 2],
) -> Vec<f32> {
    let n = width / groups;
    let mut out = input.to_vec();
    for (index, part) in out.chunks_exact_mut(n).enumerate() {
        let count = n as f64;
        let mean = match kind {
            NormKind::Rms { .. } => 0.0,
            NormKind::Layer => part.iter().map(|x| f64::from(*x)).sum::<f64>() / count,
        };
        let squares = part.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>();
        let inverse = 1.0 / (squares / count + f64::from(epsilon)).sqrt();
        // A vector as wide as the row has one weight for each element. A shorter one repeats.
        let start = index % groups * n;
        let element = |vector: &[f32], i: usize| {
            if vector.len() == n { vector[i] } else { vector[start + i] }
        };
        let offset = match kind {
            NormKind::Rms { offset } => offset,
            NormKind::Layer => 0.0,
        };
        for (i, x) in part.iter_mut().enumerate() {
            let scale = weight.map_or(1.0, |weight| offset + element(weight, i));
            let shift = bias.map_or(0.0, |bias| element(bias, i));
            *x = ((f64::from(*x) - mean) * inverse) as f32 * scale + shift;
        }
    }
    out
}

pub(super) fn rope(
    input: &[f32],
    step: &Step,
    [heads, offset]: [usize; 2],
    table: &RopeTable,
) -> Vec<f32> {
    let mut out = input.to_vec();
    let width = input.len() / step.rows();
    let pairs = table.inverse_frequencies.len();
    let long = step.sequences.iter().flat_map(|it| it.row_range().map(|_| it.long_rope));
    for ((row, position), long) in out.chunks_exact_mut(width).zip(&step.positions).zip(long) {
        // The angle is rounded to `f32`, like in the models' own code. Its sine is exact.
        let turns: Vec<(f32, f32)> = table
            .frequencies(long)
            .iter()
            .map(|frequency| f64::from(*position as f32 * frequency).sin_cos())
            .map(|(sin, cos)| (sin as f32 * table.magnitude, cos as f32 * table.magnitude))
            .collect();
        for head in row.chunks_exact_mut(width / heads) {
            for (i, (sin, cos)) in turns.iter().enumerate() {
                let (a, b) = match table.style {
                    RopeStyle::HalfSplit => (offset + i, offset + i + pairs),
                    RopeStyle::Interleaved => (offset + 2 * i, offset + 2 * i + 1),
                };
                let (x, y) = (head[a], head[b]);
                (head[a], head[b]) = (x * cos - y * sin, y * cos + x * sin);
            }
        }
    }
    out
}

pub(super) fn activate(kind: Activation, gate: f32, up: f32) -> f32 {
    match kind {
        Activation::SwiGlu => silu(gate) * up,
        Activation::GeGluTanh => gelu_tanh(gate) * up,
        Activation::GeGluErf => gelu_erf(gate) * up,
        Activation::SwiGluClamped { alpha, limit } => {
            let gate = gate.min(limit);
            gate * sigmoid(alpha * gate) * (up.clamp(-limit, limit) + 1.0)
        }
        Activation::Silu => silu(gate),
        Activation::GeluTanh => gelu_tanh(gate),
        Activation::ReluSquared => gate.max(0.0).powi(2),
    }
}

pub(super) fn sigmoid(x: f32) -> f32 {
    (1.0 / (1.0 + (-f64::from(x)).exp())) as f32
}

pub(super) fn softcap(cap: Option<f32>, x: f32) -> f32 {
    cap.map_or(x, |cap| cap * (x / cap).tanh())
}

fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

fn gelu_tanh(x: f32) -> f32 {
    let x = f64::from(x);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    (0.5 * x * (1.0 + inner.tanh())) as f32
}

fn gelu_erf(x: f32) -> f32 {
    let x = f64::from(x);
    (0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2))) as f32
}

//! GGUF's K-quants: super-blocks of 256 whose sub-blocks have quantized scales.
//!
//! Q4_K and Q5_K: 8 sub-blocks of 32, `d * scale * code - dmin * min`, 6-bit scales and minima.
//! Q6_K: 16 sub-blocks of 16, `d * scale * (code - 32)`, 8-bit scales.

use half::f16;

use super::search::{
    affine_error, fit_affine, fit_symmetric, importance_weights, round_within, symmetric_error,
};
use super::{half_at, put_half};

const LEN: usize = 256;

/// Offset of the 12 bytes of packed scales in Q4_K and Q5_K.
const SCALES: usize = 4;
const SCALE_MAX: i32 = 63;

pub(super) fn decode_q4_k(block: &[u8], out: &mut [f32]) {
    let codes = &block[16..];
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (d, min) = affine_scales(block, sub);
        let bytes = &codes[sub / 2 * 32..][..32];
        for (out, byte) in out.iter_mut().zip(bytes) {
            *out = d * f32::from(byte >> (4 * (sub % 2)) & 15) - min;
        }
    }
}

pub(super) fn decode_q5_k(block: &[u8], out: &mut [f32]) {
    let (high, codes) = (&block[16..48], &block[48..]);
    for (sub, out) in out.chunks_exact_mut(32).enumerate() {
        let (d, min) = affine_scales(block, sub);
        let bytes = &codes[sub / 2 * 32..][..32];
        for (i, out) in out.iter_mut().enumerate() {
            let code = bytes[i] >> (4 * (sub % 2)) & 15 | (high[i] >> sub & 1) << 4;
            *out = d * f32::from(code) - min;
        }
    }
}

/// Step and offset of sub-block `sub`.
fn affine_scales(block: &[u8], sub: usize) -> (f32, f32) {
    let (scale, min) = unpack_scale_min(&block[SCALES..SCALES + 12], sub);
    (half_at(block, 0) * f32::from(scale), half_at(block, 2) * f32::from(min))
}

/// The 6-bit scale and minimum `sub` of 8. The first four have one byte each. The last four have
/// their low nibbles in bytes 8..12, and their upper two bits in the upper bits of the bytes of the
/// first four.
fn unpack_scale_min(packed: &[u8], sub: usize) -> (u8, u8) {
    if sub < 4 {
        (packed[sub] & 63, packed[sub + 4] & 63)
    } else {
        let low = packed[sub + 4];
        (low & 15 | packed[sub - 4] >> 6 << 4, low >> 4 | packed[sub] >> 6 << 4)
    }
}

fn pack_scales_mins(scales: &[u8; 8], mins: &[u8; 8], packed: &mut [u8]) {
    for i in 0..4 {
        packed[i] = scales[i] | scales[i + 4] >> 4 << 6;
        packed[i + 4] = mins[i] | mins[i + 4] >> 4 << 6;
        packed[i + 8] = scales[i + 4] & 15 | mins[i + 4] << 4;
    }
}

pub(super) fn decode_q6_k(block: &[u8], out: &mut [f32]) {
    let (low, high, scales) = (&block[..128], &block[128..192], &block[192..208]);
    let d = half_at(block, 208);
    for (part, out) in out.chunks_exact_mut(32).enumerate() {
        let (half, quarter) = (part / 4, part % 4);
        let nibbles = &low[half * 64 + part % 2 * 32..][..32];
        let pairs = &high[half * 32..][..32];
        for (lane, out) in out.iter_mut().enumerate() {
            let nibble = nibbles[lane] >> (4 * (quarter / 2)) & 15;
            let code = nibble | (pairs[lane] >> (2 * quarter) & 3) << 4;
            let scale = d * f32::from(scales[part * 2 + lane / 16] as i8);
            *out = scale * (f32::from(code) - 32.0);
        }
    }
}

/// The weight of each squared error. With an importance matrix it is the matrix's entry times a
/// measure of the weight's magnitude, because the error of a large weight is a large part of the
/// output's error. Without one it is the magnitude alone.
fn error_weights(values: &[f32], importance: Option<&[f32]>) -> [f32; LEN] {
    if let Some(importance) = importance {
        return importance_weights(values, importance);
    }
    let squares = values.iter().map(|v| v * v).sum::<f32>();
    let mean = squares / LEN as f32;
    std::array::from_fn(|i| mean.sqrt() + values[i].abs())
}

/// A super-block of Q4_K or Q5_K before it is packed.
struct Affine {
    d: f32,
    dmin: f32,
    scales: [u8; 8],
    mins: [u8; 8],
    error: f32,
}

impl Affine {
    fn step(&self, sub: usize) -> (f32, f32) {
        (self.d * f32::from(self.scales[sub]), self.dmin * f32::from(self.mins[sub]))
    }

    fn code(&self, sub: usize, value: f32, levels: i32) -> u8 {
        let (step, min) = self.step(sub);
        let inverse = if step > 0.0 { 1.0 / step } else { 0.0 };
        round_within(inverse * (value + min), 0, levels) as u8
    }
}

/// The most refits of a super-block's two half-precision factors.
const REFITS: usize = 3;

/// Searches scales for each sub-block and quantizes them. Then it refits the two factors to the
/// codes and repeats this while the error falls.
fn fit_super_block(values: &[f32], weights: &[f32; LEN], levels: i32) -> Affine {
    let sub = |i: usize| (&values[i * 32..][..32], &weights[i * 32..][..32]);
    let fits: [_; 8] = std::array::from_fn(|i| fit_affine(sub(i).0, sub(i).1, levels));
    let largest_scale = fits.iter().fold(0.0f32, |m, f| m.max(f.scale));
    let largest_min = fits.iter().fold(0.0f32, |m, f| m.max(f.min));
    let near = |value: f32, unit: f32| {
        if unit > 0.0 { round_within(value / unit, 0, SCALE_MAX) } else { 0 }
    };
    let choose = |d: f32, dmin: f32, target: &[(f32, f32); 8]| {
        let (d, dmin) = (f16::from_f32(d).to_f32(), f16::from_f32(dmin).to_f32());
        let mut block = Affine { d, dmin, scales: [0; 8], mins: [0; 8], error: 0.0 };
        for i in 0..8 {
            let (values, weights) = sub(i);
            let centre = (near(target[i].0, d), near(target[i].1, dmin));
            let (scale, min, error) = best_neighbour(values, weights, levels, (d, dmin), centre);
            block.scales[i] = scale;
            block.mins[i] = min;
            block.error += error;
        }
        block
    };
    let unit = SCALE_MAX as f32;
    let mut target = fits.map(|f| (f.scale, f.min));
    let mut best = choose(largest_scale / unit, largest_min / unit, &target);
    for _ in 0..REFITS {
        let Some((d, dmin)) = refit_factors(values, weights, levels, &best) else { break };
        target = std::array::from_fn(|i| best.step(i));
        let next = choose(d, dmin, &target);
        if next.error.is_nan() || next.error >= best.error {
            break;
        }
        best = next;
    }
    best
}

/// The codes of scale and minimum near `centre` with the least error.
fn best_neighbour(
    values: &[f32],
    weights: &[f32],
    levels: i32,
    (d, dmin): (f32, f32),
    centre: (i32, i32),
) -> (u8, u8, f32) {
    let mut best = (centre.0 as u8, centre.1 as u8, f32::INFINITY);
    for scale in (centre.0 - 1).max(0)..=(centre.0 + 1).min(SCALE_MAX) {
        for min in (centre.1 - 1).max(0)..=(centre.1 + 1).min(SCALE_MAX) {
            let error = affine_error(values, weights, levels, d * scale as f32, dmin * min as f32);
            if error < best.2 {
                best = (scale as u8, min as u8, error);
            }
        }
    }
    best
}

/// The least-squares `d` and `dmin` for given codes, scales and minima.
fn refit_factors(
    values: &[f32],
    weights: &[f32; LEN],
    levels: i32,
    block: &Affine,
) -> Option<(f32, f32)> {
    let (mut aa, mut ab, mut bb, mut ax, mut bx) = (0.0f64, 0.0f64, 0.0f64, 0.0f64, 0.0f64);
    for (i, (&x, &weight)) in values.iter().zip(weights).enumerate() {
        let code = block.code(i / 32, x, levels);
        let a = f64::from(block.scales[i / 32]) * f64::from(code);
        let b = -f64::from(block.mins[i / 32]);
        let (x, weight) = (f64::from(x), f64::from(weight));
        aa += weight * a * a;
        ab += weight * a * b;
        bb += weight * b * b;
        ax += weight * a * x;
        bx += weight * b * x;
    }
    let determinant = aa * bb - ab * ab;
    let (d, dmin) = if determinant > 0.0 {
        ((ax * bb - bx * ab) / determinant, (bx * aa - ax * ab) / determinant)
    } else if aa > 0.0 {
        (ax / aa, 0.0)
    } else {
        return None;
    };
    (d > 0.0 && dmin >= 0.0).then_some((d as f32, dmin as f32))
}

fn put_affine_header(block: &Affine, out: &mut [u8]) {
    put_half(out, 0, block.d);
    put_half(out, 2, block.dmin);
    pack_scales_mins(&block.scales, &block.mins, &mut out[SCALES..SCALES + 12]);
}

pub(super) fn encode_q4_k(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let block = fit_super_block(values, &error_weights(values, importance), 15);
    put_affine_header(&block, out);
    for i in 0..LEN / 2 {
        let (pair, lane) = (i / 32, i % 32);
        let low = block.code(2 * pair, values[pair * 64 + lane], 15);
        let high = block.code(2 * pair + 1, values[pair * 64 + 32 + lane], 15);
        out[16 + i] = low | high << 4;
    }
}

pub(super) fn encode_q5_k(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let block = fit_super_block(values, &error_weights(values, importance), 31);
    put_affine_header(&block, out);
    out[16..].fill(0);
    for (i, &value) in values.iter().enumerate() {
        let (sub, lane) = (i / 32, i % 32);
        let code = block.code(sub, value, 31);
        out[16 + lane] |= (code >> 4) << sub;
        out[48 + sub / 2 * 32 + lane] |= (code & 15) << (4 * (sub % 2));
    }
}

pub(super) fn encode_q6_k(values: &[f32], importance: Option<&[f32]>, out: &mut [u8]) {
    let weights = error_weights(values, importance);
    let sub = |i: usize| (&values[i * 16..][..16], &weights[i * 16..][..16]);
    let fits: [f32; 16] = std::array::from_fn(|i| fit_symmetric(sub(i).0, sub(i).1, 32));
    let largest = fits.iter().fold(0.0f32, |m, &v| if v.abs() > m.abs() { v } else { m });
    // The largest scale uses the end of the signed range that reaches further.
    let d = f16::from_f32(largest / -128.0).to_f32();
    let inverse = if d == 0.0 { 0.0 } else { 1.0 / d };
    out.fill(0);
    put_half(out, 208, d);
    for (i, &fit) in fits.iter().enumerate() {
        let (values, weights) = sub(i);
        let centre = round_within(fit * inverse, -128, 127);
        let candidates = (centre - 1).max(-128)..=(centre + 1).min(127);
        let scale = candidates
            .map(|scale| (scale, symmetric_error(values, weights, 32, d * scale as f32)))
            .fold((centre, f32::INFINITY), |best, c| if c.1 < best.1 { c } else { best })
            .0;
        out[192 + i] = scale as i8 as u8;
        let step = d * scale as f32;
        let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
        for (lane, &value) in values.iter().enumerate() {
            put_q6_code(out, i * 16 + lane, (round_within(inverse * value, -32, 31) + 32) as u8);
        }
    }
}

fn put_q6_code(out: &mut [u8], i: usize, code: u8) {
    let (half, quarter, lane) = (i / 128, i % 128 / 32, i % 32);
    out[half * 64 + i % 64] |= (code & 15) << (4 * (quarter / 2));
    out[128 + half * 32 + lane] |= (code >> 4) << (2 * quarter);
}

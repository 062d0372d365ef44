//! GGUF's simple types: blocks of 32 with one half-precision scale, and for the `_1` types a
//! minimum. Nibbles `i` and `i + 16` share byte `i`. Encoders follow the Python package `gguf`
//! operation by operation, so that their bytes agree.

use super::{half_at, put_half};

const LEN: usize = 32;
const HALF: usize = LEN / 2;

pub(super) fn decode_q4_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for i in 0..HALF {
        let byte = block[2 + i];
        out[i] = d * (f32::from(byte & 15) - 8.0);
        out[i + HALF] = d * (f32::from(byte >> 4) - 8.0);
    }
}

pub(super) fn decode_q4_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    for i in 0..HALF {
        let byte = block[4 + i];
        out[i] = d * f32::from(byte & 15) + min;
        out[i + HALF] = d * f32::from(byte >> 4) + min;
    }
}

pub(super) fn decode_q5_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    let codes = five_bit_codes(&block[2..]);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = d * (f32::from(code) - 16.0);
    }
}

pub(super) fn decode_q5_1(block: &[u8], out: &mut [f32]) {
    let (d, min) = (half_at(block, 0), half_at(block, 2));
    let codes = five_bit_codes(&block[4..]);
    for (out, code) in out.iter_mut().zip(codes) {
        *out = d * f32::from(code) + min;
    }
}

/// Reads 4 bytes of fifth bits and 16 bytes of nibbles.
fn five_bit_codes(bytes: &[u8]) -> [u8; LEN] {
    let high = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
    std::array::from_fn(|i| {
        let byte = bytes[4 + i % HALF];
        let low = if i < HALF { byte & 15 } else { byte >> 4 };
        low | (((high >> i) & 1) as u8) << 4
    })
}

pub(super) fn decode_q8_0(block: &[u8], out: &mut [f32]) {
    let d = half_at(block, 0);
    for (out, &code) in out.iter_mut().zip(&block[2..]) {
        *out = f32::from(code as i8) * d;
    }
}

pub(super) fn encode_q4_0(values: &[f32], out: &mut [u8]) {
    let d = largest_magnitude(values) / -8.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate(values[i] * inverse + 8.5, 15));
    put_half(out, 0, d);
    put_nibbles(&codes, &mut out[2..]);
}

pub(super) fn encode_q4_1(values: &[f32], out: &mut [u8]) {
    let (min, max) = bounds(values);
    let d = (max - min) / 15.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate((values[i] - min) * inverse + 0.5, 15));
    put_half(out, 0, d);
    put_half(out, 2, min);
    put_nibbles(&codes, &mut out[4..]);
}

pub(super) fn encode_q5_0(values: &[f32], out: &mut [u8]) {
    let d = largest_magnitude(values) / -16.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate(values[i] * inverse + 16.5, 31));
    put_half(out, 0, d);
    put_five_bits(&codes, &mut out[2..]);
}

pub(super) fn encode_q5_1(values: &[f32], out: &mut [u8]) {
    let (min, max) = bounds(values);
    let d = (max - min) / 31.0;
    let inverse = inverse_or_zero(d);
    let codes: [u8; LEN] = std::array::from_fn(|i| truncate((values[i] - min) * inverse + 0.5, 31));
    put_half(out, 0, d);
    put_half(out, 2, min);
    put_five_bits(&codes, &mut out[4..]);
}

pub(super) fn encode_q8_0(values: &[f32], out: &mut [u8]) {
    let max = values.iter().fold(0.0f32, |max, v| max.max(v.abs()));
    let d = max / 127.0;
    let inverse = inverse_or_zero(d);
    put_half(out, 0, d);
    for (out, value) in out[2..].iter_mut().zip(values) {
        *out = round_half_away(value * inverse);
    }
}

/// The first number of the largest magnitude, with its sign.
fn largest_magnitude(values: &[f32]) -> f32 {
    values.iter().fold(values[0], |best, &v| if v.abs() > best.abs() { v } else { best })
}

fn bounds(values: &[f32]) -> (f32, f32) {
    values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(lo, hi), &v| (lo.min(v), hi.max(v)))
}

fn inverse_or_zero(d: f32) -> f32 {
    if d == 0.0 { 0.0 } else { 1.0 / d }
}

/// Truncates to a code of at most `max`. What no code can express (the inverse of a denormal
/// scale overflows) becomes 0: the scale itself is stored as zero then.
fn truncate(value: f32, max: u8) -> u8 {
    wrap_to_byte(value).min(max)
}

/// Rounds ties away from zero; what is no number becomes 0.
fn round_half_away(value: f32) -> u8 {
    let magnitude = value.abs();
    let whole = if magnitude < 256.0 { magnitude as i32 } else { 0 };
    let rounded = whole + i32::from(magnitude - whole as f32 >= 0.5 && magnitude < 256.0);
    (if value < 0.0 { -rounded } else { rounded }) as u8
}

fn wrap_to_byte(value: f32) -> u8 {
    if value.abs() < 2_147_483_648.0 { value as i32 as u8 } else { 0 }
}

fn put_nibbles(codes: &[u8; LEN], out: &mut [u8]) {
    for i in 0..HALF {
        out[i] = codes[i] & 15 | codes[i + HALF] << 4;
    }
}

fn put_five_bits(codes: &[u8; LEN], out: &mut [u8]) {
    let high = (0..LEN).fold(0u32, |bits, i| bits | u32::from(codes[i] >> 4) << i);
    out[..4].copy_from_slice(&high.to_le_bytes());
    put_nibbles(codes, &mut out[4..]);
}

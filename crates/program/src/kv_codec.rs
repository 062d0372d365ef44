//! The scalar codecs of the KV cache formats: the oracle for every kernel that writes or reads a
//! cache. One call stores one vector: a head's key, a head's value, or a latent.
//!
//! Here the bytes of a vector are its scales followed by its codes. A backend may arrange a page
//! differently (scales in a plane of their own), but the numbers must be the same.

use half::{bf16, f16};

use crate::kv::{INT4_GROUP, KvFormat};

/// The kind of a vector. [`KvFormat::Int4`] rotates keys only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvVector {
    /// A head's key, a latent, or a rotary key: rotated.
    Key,
    /// A head's value: not rotated.
    Value,
}

/// The largest finite fp8 e4m3 number.
const F8E4M3_MAX: f32 = 448.0;

/// Stores `values` as [`KvFormat::vector_bytes`] bytes.
///
/// - fp8: `scale = max|x| / 448` in `f32`, codes round to nearest even.
/// - int16: `scale = max|x| / 32767` in `f32`, codes round half away from zero.
/// - int8: `scale = max|x| / 127` in `f32`, codes round half away from zero.
/// - int4: for each 32 elements, after the rotation of keys, `zero = min(x)` and
///   `scale = (max(x) - zero) / 15`, both rounded to `f16` and finite; the code is the nearest to
///   `(x - zero) / scale`, halves away from zero.
///   An even element is the low half of its byte.
///
/// # Panics
/// If `bytes` has another length.
pub fn encode(format: KvFormat, kind: KvVector, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), format.vector_bytes(values.len()), "bytes of a {format:?} vector");
    match format {
        KvFormat::F32 => write_each(values, bytes, f32::to_le_bytes),
        KvFormat::F16 => write_each(values, bytes, |x| f16::from_f32(x).to_le_bytes()),
        KvFormat::BF16 => write_each(values, bytes, |x| bf16::from_f32(x).to_le_bytes()),
        KvFormat::Int16 => {
            encode_scaled(values, bytes, 32767.0, |x| (x.round() as i16).to_le_bytes())
        }
        KvFormat::F8E4M3 => encode_scaled(values, bytes, F8E4M3_MAX, |x| [f8e4m3_from_f32(x)]),
        KvFormat::Int8 => encode_scaled(values, bytes, 127.0, |x| [x.round() as i8 as u8]),
        KvFormat::Int4 => encode_int4(kind, values, bytes),
    }
}

/// Reads what [`encode`] stored.
///
/// # Panics
/// If `bytes` does not have [`KvFormat::vector_bytes`] of `values.len()`.
pub fn decode(format: KvFormat, kind: KvVector, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(bytes.len(), format.vector_bytes(values.len()), "bytes of a {format:?} vector");
    match format {
        KvFormat::F32 => read_each(bytes, values, f32::from_le_bytes),
        KvFormat::F16 => read_each(bytes, values, |b| f16::from_le_bytes(b).to_f32()),
        KvFormat::BF16 => read_each(bytes, values, |b| bf16::from_le_bytes(b).to_f32()),
        KvFormat::Int16 => decode_scaled(bytes, values, |code| f32::from(i16::from_le_bytes(code))),
        KvFormat::F8E4M3 => decode_scaled(bytes, values, |[code]| f8e4m3_to_f32(code)),
        KvFormat::Int8 => decode_scaled(bytes, values, |[code]| f32::from(code as i8)),
        KvFormat::Int4 => decode_int4(kind, bytes, values),
    }
}

/// Replaces `values` by the numbers that the cache would return.
pub fn round_trip(format: KvFormat, kind: KvVector, values: &mut [f32]) {
    if format == KvFormat::F32 {
        return;
    }
    let mut bytes = vec![0; format.vector_bytes(values.len())];
    encode(format, kind, values, &mut bytes);
    decode(format, kind, &bytes, values);
}

/// Multiplies `values` by an orthonormal, symmetric Hadamard matrix, which is its own inverse. If
/// the length is not a power of two, it multiplies blocks of the largest power of two that divides
/// the length.
pub fn hadamard(values: &mut [f32]) {
    if values.is_empty() {
        return;
    }
    let block = 1 << values.len().trailing_zeros();
    let norm = 1.0 / (block as f32).sqrt();
    for part in values.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for start in (0..block).step_by(2 * half) {
                for i in start..start + half {
                    let (a, b) = (part[i], part[i + half]);
                    (part[i], part[i + half]) = (a + b, a - b);
                }
            }
            half *= 2;
        }
        part.iter_mut().for_each(|x| *x *= norm);
    }
}

/// The nearest fp8 e4m3 code, ties to even. Numbers beyond 448 get the largest code, and NaN is
/// 0x7f.
pub fn f8e4m3_from_f32(x: f32) -> u8 {
    let sign = if x.is_sign_negative() { 0x80 } else { 0 };
    if x.is_nan() {
        return sign | 0x7f;
    }
    let magnitude = x.abs().min(F8E4M3_MAX);
    // Below 2^-6 codes are multiples of 2^-9. Above, a power of two has 8 steps. A mantissa that
    // rounds up to the next power of two carries into the exponent.
    let exponent = ((magnitude.to_bits() >> 23) as i32 - 127).max(-6);
    let step = f32::from_bits(((exponent - 3 + 127) as u32) << 23);
    let steps = (magnitude / step).round_ties_even() as u32;
    sign | (((exponent + 6) as u32 * 8) + steps) as u8
}

/// The number of an fp8 e4m3 code.
pub fn f8e4m3_to_f32(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = ((code >> 3 & 15) as i32, f32::from(code & 7));
    if code & 0x7f == 0x7f {
        return f32::NAN;
    }
    let magnitude = match exponent {
        0 => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    sign * magnitude
}

fn write_each<const N: usize>(values: &[f32], bytes: &mut [u8], to: impl Fn(f32) -> [u8; N]) {
    for (value, out) in values.iter().zip(bytes.chunks_exact_mut(N)) {
        out.copy_from_slice(&to(*value));
    }
}

fn read_each<const N: usize>(bytes: &[u8], values: &mut [f32], from: impl Fn([u8; N]) -> f32) {
    for (out, value) in values.iter_mut().zip(bytes.as_chunks::<N>().0) {
        *out = from(*value);
    }
}

fn encode_scaled<const N: usize>(
    values: &[f32],
    bytes: &mut [u8],
    code_max: f32,
    code: impl Fn(f32) -> [u8; N],
) {
    let largest = values.iter().fold(0f32, |max, x| max.max(x.abs()));
    let scale = largest / code_max;
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    let (head, codes) = bytes.split_at_mut(4);
    head.copy_from_slice(&scale.to_le_bytes());
    for (value, out) in values.iter().zip(codes.chunks_exact_mut(N)) {
        out.copy_from_slice(&code((value * inverse).clamp(-code_max, code_max)));
    }
}

fn decode_scaled<const N: usize>(bytes: &[u8], values: &mut [f32], value: impl Fn([u8; N]) -> f32) {
    let (head, codes) = bytes.split_at(4);
    let scale = f32::from_le_bytes([head[0], head[1], head[2], head[3]]);
    for (code, out) in codes.chunks_exact(N).zip(values) {
        *out = value(code.try_into().expect("a whole code")) * scale;
    }
}

/// The scale and the zero of up to 32 elements in [`KvFormat::Int4`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Int4Range {
    /// The difference between neighbouring codes.
    pub scale: f16,
    /// The number of code 0.
    pub zero: f16,
    inverse: f32,
}

/// The largest finite half. Larger numbers are stored as this, not as infinity.
const F16_MAX: f32 = 65504.0;

impl Int4Range {
    /// The range of a group of elements.
    #[inline(always)]
    pub fn of(group: &[f32]) -> Self {
        let (mut least, mut most) = (f32::INFINITY, f32::NEG_INFINITY);
        for &x in group {
            least = if x < least { x } else { least };
            most = if x > most { x } else { most };
        }
        let zero = f16::from_f32(least.clamp(-F16_MAX, F16_MAX));
        let scale = f16::from_f32(((most - zero.to_f32()) / 15.0).clamp(0.0, F16_MAX));
        let inverse = if scale.to_f32() > 0.0 { 1.0 / scale.to_f32() } else { 0.0 };
        Self { scale, zero, inverse }
    }

    /// The code of an element, 0 to 15.
    #[inline(always)]
    pub fn code(&self, value: f32) -> u8 {
        ((value - self.zero.to_f32()) * self.inverse).round().clamp(0.0, 15.0) as u8
    }
}

fn encode_int4(kind: KvVector, values: &[f32], bytes: &mut [u8]) {
    let mut rotated = values.to_vec();
    if kind == KvVector::Key {
        hadamard(&mut rotated);
    }
    let groups = values.len().div_ceil(INT4_GROUP);
    let (scales, codes) = bytes.split_at_mut(4 * groups);
    codes.fill(0);
    for (g, group) in rotated.chunks(INT4_GROUP).enumerate() {
        let range = Int4Range::of(group);
        scales[4 * g..4 * g + 2].copy_from_slice(&range.scale.to_le_bytes());
        scales[4 * g + 2..4 * g + 4].copy_from_slice(&range.zero.to_le_bytes());
        for (i, value) in group.iter().enumerate() {
            let code = range.code(*value);
            let index = g * INT4_GROUP + i;
            codes[index / 2] |= code << (4 * (index % 2));
        }
    }
}

fn decode_int4(kind: KvVector, bytes: &[u8], values: &mut [f32]) {
    let groups = values.len().div_ceil(INT4_GROUP);
    let (scales, codes) = bytes.split_at(4 * groups);
    for (index, out) in values.iter_mut().enumerate() {
        let at = &scales[4 * (index / INT4_GROUP)..];
        let scale = f16::from_le_bytes([at[0], at[1]]).to_f32();
        let zero = f16::from_le_bytes([at[2], at[3]]).to_f32();
        let code = codes[index / 2] >> (4 * (index % 2)) & 15;
        *out = zero + f32::from(code) * scale;
    }
    if kind == KvVector::Key {
        hadamard(values);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wave(n: usize) -> Vec<f32> {
        (0..n).map(|i| (i as f32 * 0.37).sin() * 3.0 + 0.2).collect()
    }

    #[test]
    fn formats_lose_no_more_than_they_must() {
        let bounds = [0.0, 2e-3, 1.3e-2, 6e-5, 0.12, 1.3e-2, 1.5];
        for (format, bound) in KvFormat::ALL.into_iter().zip(bounds) {
            for n in [1, 7, 32, 40, 96] {
                for kind in [KvVector::Key, KvVector::Value] {
                    let values = wave(n);
                    let mut stored = values.clone();
                    round_trip(format, kind, &mut stored);
                    let error = values.iter().zip(&stored).map(|(a, b)| (a - b).abs());
                    let worst = error.fold(0.0, f32::max);
                    assert!(worst <= bound, "{format:?} {kind:?} {n}: {worst}");
                }
            }
        }
    }

    #[test]
    fn zeros_stay_zeros() {
        for format in KvFormat::ALL {
            let mut zeros = vec![0.0; 33];
            round_trip(format, KvVector::Key, &mut zeros);
            assert_eq!(zeros, vec![0.0; 33]);
        }
    }

    #[test]
    fn every_fp8_code_is_its_own_nearest() {
        for code in 0..=255u8 {
            let value = f8e4m3_to_f32(code);
            if !value.is_nan() {
                assert_eq!(f8e4m3_from_f32(value), code, "{value}");
            }
        }
        assert_eq!(f8e4m3_to_f32(f8e4m3_from_f32(1e9)), 448.0);
        assert_eq!(f8e4m3_to_f32(f8e4m3_from_f32(17.0)), 16.0);
        assert_eq!(f8e4m3_to_f32(f8e4m3_from_f32(19.0)), 20.0);
        assert_eq!(f8e4m3_to_f32(f8e4m3_from_f32(0.97)), 1.0);
    }

    #[test]
    fn the_rotation_is_its_own_inverse() {
        for n in [1, 12, 64, 96] {
            let mut values = wave(n);
            hadamard(&mut values);
            hadamard(&mut values);
            for (a, b) in wave(n).iter().zip(&values) {
                assert!((a - b).abs() < 1e-5);
            }
        }
    }
}

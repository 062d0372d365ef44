//! Rounds many numbers to their nearest codes at once. The results are those of
//! [`encode`](super::scale::encode) and [`element::to_f32`] for each number. The loops have no
//! branches and no tables, so compilers vectorize them.

use super::element::{self, FloatParts};
use crate::format::Element;

/// `1.5 * 2^23`. Its neighbours are one apart, and the low bits of its sum with a small integer are
/// that integer in two's complement.
const MAGIC: f32 = 12_582_912.0;

/// How the ratio of a number to its scale becomes a code, and the value of that code.
trait Nearest: Copy {
    fn code_and_value(self, ratio: f32, zero: f32) -> (u8, f32);
}

/// Two's complement integers within bounds.
#[derive(Clone, Copy)]
struct Integer {
    low: f32,
    high: f32,
    mask: u8,
}

impl Nearest for Integer {
    // Not `clamp`, so that NaN becomes the lower bound, as in `encode`.
    #[allow(clippy::manual_clamp)]
    #[inline(always)]
    fn code_and_value(self, ratio: f32, zero: f32) -> (u8, f32) {
        let rounded = (ratio.max(-1e6).min(1e6) + MAGIC) - MAGIC;
        let value = (rounded + zero).max(self.low).min(self.high);
        ((value + MAGIC).to_bits() as u8 & self.mask, value)
    }
}

/// A small float. The fields are what [`element::from_f32`] computes from its parts.
#[derive(Clone, Copy)]
struct SmallFloat {
    max: f32,
    dropped: u32,
    least_normal: u32,
    exponents_apart: u32,
    denormal_magic: f32,
    sign_shift: u32,
    /// The code of NaN and its value.
    nan: (u32, f32),
}

impl SmallFloat {
    fn new(parts: &FloatParts) -> Self {
        let dropped = 23 - parts.mantissa;
        let denormal_exponent = (127 + 1 - parts.bias + dropped as i32) as u32;
        SmallFloat {
            max: parts.max,
            dropped,
            least_normal: ((128 - parts.bias) as u32) << 23,
            exponents_apart: ((127 - parts.bias) as u32) << parts.mantissa,
            denormal_magic: f32::from_bits(denormal_exponent << 23),
            sign_shift: parts.exponent + parts.mantissa,
            nan: parts.nan.map_or((0, 0.0), |code| (u32::from(code), f32::NAN)),
        }
    }
}

impl Nearest for SmallFloat {
    #[inline(always)]
    fn code_and_value(self, ratio: f32, _zero: f32) -> (u8, f32) {
        let magnitude = ratio.abs().min(self.max);
        let bits = magnitude.to_bits();
        let half_less = (1u32 << (self.dropped - 1)) - 1;
        let carried = bits + half_less + (bits >> self.dropped & 1);
        let kept = carried >> self.dropped;
        let normal =
            (kept.wrapping_sub(self.exponents_apart), f32::from_bits(kept << self.dropped));
        let shifted = magnitude + self.denormal_magic;
        let denormal = (
            shifted.to_bits().wrapping_sub(self.denormal_magic.to_bits()),
            shifted - self.denormal_magic,
        );
        let (code, value) = if bits >= self.least_normal { normal } else { denormal };
        let (sign, number) = (ratio.to_bits() >> 31, !ratio.is_nan());
        let signed = (code | sign << self.sign_shift, value.copysign(ratio));
        // An element without a NaN uses plain zero.
        let nan_sign = if self.nan.0 == 0 { 0 } else { sign << self.sign_shift };
        let code = if number { signed.0 } else { self.nan.0 | nan_sign };
        (code as u8, if number { signed.1 } else { self.nan.1 })
    }
}

/// Calls `$loop` with the [`Nearest`] of an element, so that each loop is compiled for each kind.
macro_rules! with_nearest {
    ($kind:expr, $loop:expr) => {
        match element::float_parts($kind) {
            Some(parts) => $loop(SmallFloat::new(parts)),
            None => {
                let high = element::max($kind);
                $loop(Integer { low: -high - 1.0, high, mask: element::mask($kind) })
            }
        }
    };
}

/// `value / step`. Zero if the step is zero.
#[inline(always)]
fn in_steps(value: f32, step: f32) -> f32 {
    if step == 0.0 { 0.0 } else { value / step }
}

/// The code of each of `values` in one block, whose scale is `step` (the global one included).
///
/// # Panics
/// If there is not one code for each value.
pub fn encode_block(kind: Element, values: &[f32], step: f32, zero: i8, codes: &mut [u8]) {
    assert_eq!(codes.len(), values.len(), "a code for each value");
    #[inline(always)]
    fn all(how: impl Nearest, values: &[f32], step: f32, zero: f32, codes: &mut [u8]) {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = how.code_and_value(in_steps(*value, step), zero).0;
        }
    }
    with_nearest!(kind, |how| all(how, values, step, f32::from(zero), codes));
}

/// The value of the nearest code of each of `values` in one block.
///
/// # Panics
/// If there is not one result for each value.
pub fn round_block(kind: Element, values: &[f32], step: f32, zero: i8, rounded: &mut [f32]) {
    assert_eq!(rounded.len(), values.len(), "a result for each value");
    #[inline(always)]
    fn all(how: impl Nearest, values: &[f32], step: f32, zero: f32, rounded: &mut [f32]) {
        for (out, value) in rounded.iter_mut().zip(values) {
            *out = (how.code_and_value(in_steps(*value, step), zero).1 - zero) * step;
        }
    }
    with_nearest!(kind, |how| all(how, values, step, f32::from(zero), rounded));
}

/// The nearest code of each of `values` and its value. Each has its own step and zero point.
///
/// # Panics
/// If there is not one of each for each value.
pub fn round_each(
    kind: Element,
    values: &[f32],
    steps: &[f32],
    zeros: &[f32],
    codes: &mut [u8],
    rounded: &mut [f32],
) {
    let count = values.len();
    let same = [steps.len(), zeros.len(), codes.len(), rounded.len()].iter().all(|n| *n == count);
    assert!(same, "a step, a zero point and a place for each value");
    #[inline(always)]
    fn all(
        how: impl Nearest,
        values: &[f32],
        scales: (&[f32], &[f32]),
        codes: &mut [u8],
        rounded: &mut [f32],
    ) {
        let (steps, zeros) = scales;
        for i in 0..values.len() {
            let (code, value) = how.code_and_value(in_steps(values[i], steps[i]), zeros[i]);
            codes[i] = code;
            rounded[i] = (value - zeros[i]) * steps[i];
        }
    }
    with_nearest!(kind, |how| all(how, values, (steps, zeros), codes, rounded));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::codec::scale::encode;

    fn elements() -> Vec<Element> {
        let floats =
            [Element::F8E4M3, Element::F8E5M2, Element::F6E2M3, Element::F6E3M2, Element::F4E2M1];
        (2..=8).map(Element::Int).chain(floats).collect()
    }

    /// All three loops against the definition, one value at a time.
    fn check(kind: Element, values: &[f32], step: f32, zero: i8) {
        let zero = if matches!(kind, Element::Int(_)) { zero } else { 0 };
        let count = values.len();
        let (mut codes, mut each_codes) = (vec![0; count], vec![0; count]);
        let (mut rounded, mut each) = (vec![0.0; count], vec![0.0; count]);
        encode_block(kind, values, step, zero, &mut codes);
        round_block(kind, values, step, zero, &mut rounded);
        let (steps, zeros) = (vec![step; count], vec![f32::from(zero); count]);
        round_each(kind, values, &steps, &zeros, &mut each_codes, &mut each);
        for (i, value) in values.iter().enumerate() {
            let code = encode(kind, *value, step, zero);
            let expected = (element::to_f32(kind, code) - f32::from(zero)) * step;
            let what = format!("{kind:?} {value} / {step} + {zero}");
            assert_eq!((codes[i], each_codes[i]), (code, code), "{what}");
            for found in [rounded[i], each[i]] {
                let same = found.to_bits() == expected.to_bits();
                assert!(same || found.is_nan() && expected.is_nan(), "{what}: {found} {expected}");
            }
        }
    }

    /// Every code's number, its neighbours, the ties between codes, and what is no number.
    #[test]
    fn ties_ends_denormals_and_nan() {
        for kind in elements() {
            let mut values = vec![f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY];
            values.extend([-0.0, 0.0, 1e-45, -1e-45, 1e30, -1e30, f32::MAX, f32::MIN_POSITIVE]);
            let mut plain: Vec<f32> = (0..=255).map(|code| element::to_f32(kind, code)).collect();
            plain.retain(|value| value.is_finite());
            plain.sort_by(f32::total_cmp);
            for pair in plain.windows(2) {
                let tie = (pair[0] + pair[1]) / 2.0;
                values.extend([pair[0], tie, tie.next_up(), tie.next_down()]);
            }
            for step in [1.0, 0.037, 2f32.powi(-126), 1e-42, 0.0, f32::NAN, f32::INFINITY] {
                let values: Vec<f32> =
                    values.iter().map(|v| v * if step > 0.0 { step } else { 1.0 }).collect();
                for zero in [0, -8, 7, -128, 127] {
                    check(kind, &values, step, zero);
                }
            }
        }
    }

    proptest! {
        #[test]
        fn any_numbers(
            bits in proptest::collection::vec(any::<u32>(), 1..70),
            near in proptest::collection::vec(-20f32..20f32, 1..70),
            step in prop_oneof![1e-6f32..10f32, any::<u32>().prop_map(f32::from_bits)],
            zero in any::<i8>(),
        ) {
            let wild: Vec<f32> = bits.into_iter().map(f32::from_bits).collect();
            let near: Vec<f32> = near.into_iter().map(|v| v * step).collect();
            for kind in elements() {
                check(kind, &wild, step, zero);
                check(kind, &near, step, zero);
            }
        }
    }
}

//! Converts single codes to numbers and back: integers and OCP small floats.
//!
//! OCP 8-bit Floating Point Specification 1.0, OCP Microscaling Formats (MX) 1.0.

use std::sync::LazyLock;

use super::search::round_float_within;
use crate::format::Element;

/// The widths of a small float's parts, in bits, and what its codes mean.
pub(super) struct FloatParts {
    pub exponent: u32,
    pub mantissa: u32,
    pub bias: i32,
    /// The largest finite magnitude.
    pub max: f32,
    /// The code of NaN, if there is one.
    pub nan: Option<u8>,
}

const E4M3: FloatParts =
    FloatParts { exponent: 4, mantissa: 3, bias: 7, max: 448.0, nan: Some(0x7f) };
const E5M2: FloatParts =
    FloatParts { exponent: 5, mantissa: 2, bias: 15, max: 57344.0, nan: Some(0x7e) };
const E2M3: FloatParts = FloatParts { exponent: 2, mantissa: 3, bias: 1, max: 7.5, nan: None };
const E3M2: FloatParts = FloatParts { exponent: 3, mantissa: 2, bias: 3, max: 28.0, nan: None };
const E2M1: FloatParts = FloatParts { exponent: 2, mantissa: 1, bias: 1, max: 6.0, nan: None };

pub(super) fn float_parts(element: Element) -> Option<&'static FloatParts> {
    match element {
        Element::Int(_) => None,
        Element::F8E4M3 => Some(&E4M3),
        Element::F8E5M2 => Some(&E5M2),
        Element::F6E2M3 => Some(&E2M3),
        Element::F6E3M2 => Some(&E3M2),
        Element::F4E2M1 => Some(&E2M1),
    }
}

/// The largest finite value of an element, such as 448 for e4m3 and 127 for 8-bit integers.
pub fn max(element: Element) -> f32 {
    match element {
        Element::Int(bits) => ((1i32 << (bits - 1)) - 1) as f32,
        other => float_parts(other).map_or(0.0, |parts| parts.max),
    }
}

/// Bits of an element's mantissa. 0 for integers.
pub fn mantissa_bits(element: Element) -> u32 {
    float_parts(element).map_or(0, |parts| parts.mantissa)
}

/// The code nearest to `value`, ties to even, denormals kept. Values beyond the largest finite one,
/// infinities too, become that one. NaN becomes the element's NaN. Elements without a NaN get zero,
/// and the scale of the block carries the NaN.
pub fn from_f32(element: Element, value: f32) -> u8 {
    let Some(parts) = float_parts(element) else {
        let limit = max(element);
        return round_float_within(value, -limit - 1.0, limit) as i8 as u8 & mask(element);
    };
    let sign = u8::from(value.is_sign_negative()) << (parts.exponent + parts.mantissa);
    if value.is_nan() {
        return parts.nan.map_or(0, |nan| nan | sign);
    }
    let magnitude = value.abs().min(parts.max);
    let dropped = 23 - parts.mantissa;
    let least_normal = ((128 - parts.bias) as u32) << 23;
    let bits = magnitude.to_bits();
    let code = if bits >= least_normal {
        // Rounds the bits to nearest, ties to even. A carry moves into the exponent.
        let half_less = (1u32 << (dropped - 1)) - 1;
        let rounded = bits + half_less + (bits >> dropped & 1);
        (rounded >> dropped) - (((127 - parts.bias) as u32) << parts.mantissa)
    } else {
        // The neighbours of this number are one denormal step apart, so adding it rounds.
        let exponent = 127 + 1 - parts.bias + dropped as i32;
        let magic = (exponent as u32) << 23;
        (magnitude + f32::from_bits(magic)).to_bits() - magic
    };
    code as u8 | sign
}

/// `floor(log2(value))` of a value that is not negative. Very small for zero.
pub fn exponent_of(value: f32) -> i32 {
    match value.to_bits() >> 23 {
        0 if value == 0.0 => i32::MIN / 2,
        0 => -149 + (31 - value.to_bits().leading_zeros() as i32),
        exponent => exponent as i32 - 127,
    }
}

/// The bits of a byte that a code has.
pub(super) fn mask(element: Element) -> u8 {
    (0xffu16 >> (8 - element.bits())) as u8
}

/// The value of the low bits of `code` as `element`, before any scale.
pub fn to_f32(element: Element, code: u8) -> f32 {
    table(element)[usize::from(code & mask(element))]
}

/// The value of each code of an element. The unused upper codes repeat the lower ones.
pub fn table(element: Element) -> &'static [f32; 256] {
    /// The values of one element, computed at the first use.
    macro_rules! values {
        ($element:expr) => {{
            static VALUES: LazyLock<[f32; 256]> =
                LazyLock::new(|| std::array::from_fn(|code| decode($element, code as u8)));
            &VALUES
        }};
    }
    static INTEGERS: LazyLock<[[f32; 256]; 9]> = LazyLock::new(|| {
        std::array::from_fn(|bits| {
            std::array::from_fn(|code| f32::from(int_to_i8(code as u8, bits.max(1) as u8)))
        })
    });
    match element {
        Element::Int(bits) => &INTEGERS[usize::from(bits)],
        Element::F8E4M3 => values!(Element::F8E4M3),
        Element::F8E5M2 => values!(Element::F8E5M2),
        Element::F6E2M3 => values!(Element::F6E2M3),
        Element::F6E3M2 => values!(Element::F6E3M2),
        Element::F4E2M1 => values!(Element::F4E2M1),
    }
}

fn decode(element: Element, code: u8) -> f32 {
    let Some(parts) = float_parts(element) else {
        return f32::from(int_to_i8(code, element.bits() as u8));
    };
    match element {
        Element::F8E4M3 if code & 0x7f == 0x7f => f32::NAN,
        // e5m2 is the upper byte of an IEEE half, infinities and NaN included.
        Element::F8E5M2 => half::f16::from_bits(u16::from(code) << 8).to_f32(),
        _ => value_of(parts, code & mask(element)),
    }
}

fn value_of(parts: &FloatParts, code: u8) -> f32 {
    let FloatParts { exponent, mantissa, bias, .. } = *parts;
    let fraction = f32::from(code & ((1 << mantissa) - 1)) / (1u32 << mantissa) as f32;
    let power = i32::from(code >> mantissa) & ((1 << exponent) - 1);
    let magnitude = match power {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(power - bias),
    };
    if code >> (exponent + mantissa) & 1 == 1 { -magnitude } else { magnitude }
}

/// The value of a two's complement code of `bits` bits.
pub fn int_to_i8(code: u8, bits: u8) -> i8 {
    let unused = 8 - u32::from(bits);
    ((code << unused) as i8) >> unused
}

/// The value of an e8m0 scale, `2^(code - 127)`. 255 is NaN. 0 gives the `f32` denormal 2^-127.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The e8m0 code of `2^exponent`. An exponent out of range gets the nearest end of the range.
pub fn e8m0_from_exponent(exponent: i32) -> u8 {
    (exponent.clamp(-127, 127) + 127) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [Element; 8] = [
        Element::Int(2),
        Element::Int(5),
        Element::Int(8),
        Element::F8E4M3,
        Element::F8E5M2,
        Element::F6E2M3,
        Element::F6E3M2,
        Element::F4E2M1,
    ];

    #[test]
    fn every_code_is_its_own_nearest() {
        for element in ALL {
            for code in 0..=mask(element) {
                let value = to_f32(element, code);
                if value.is_finite() {
                    assert_eq!(from_f32(element, value), code, "{element:?} {value}");
                }
            }
            let largest = max(element);
            assert_eq!(to_f32(element, from_f32(element, f32::INFINITY)), largest);
            assert_eq!(to_f32(element, from_f32(element, 1e30)), largest);
            assert!(to_f32(element, from_f32(element, -1e30)) <= -largest);
        }
        assert!(to_f32(Element::F8E4M3, from_f32(Element::F8E4M3, f32::NAN)).is_nan());
        assert!(to_f32(Element::F8E5M2, from_f32(Element::F8E5M2, f32::NAN)).is_nan());
    }

    #[test]
    fn exponents() {
        for (value, exponent) in [(1.0, 0), (1.99, 0), (0.5, -1), (1e-45, -149), (3e-45, -148)] {
            assert_eq!(exponent_of(value), exponent, "{value}");
        }
        assert_eq!(exponent_of(f32::MIN_POSITIVE), -126);
        assert_eq!(e8m0_to_f32(e8m0_from_exponent(-500)), 2f32.powi(-127));
        assert_eq!(e8m0_to_f32(e8m0_from_exponent(3)), 8.0);
    }
}

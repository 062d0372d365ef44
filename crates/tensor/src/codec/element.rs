//! The number that a single code stands for: integers and OCP small floats.

use crate::format::Element;

/// The value of an fp8 e4m3 code (no infinities; `0x7f` and `0xff` are NaN).
pub fn f8e4m3_to_f32(code: u8) -> f32 {
    if code & 0x7f == 0x7f { f32::NAN } else { small_float(code, 4, 3, 7) }
}

/// The value of an fp8 e5m2 code (IEEE-like, with infinities and NaN).
pub fn f8e5m2_to_f32(code: u8) -> f32 {
    // e5m2 is the upper byte of an IEEE half.
    half::f16::from_bits(u16::from(code) << 8).to_f32()
}

/// The value of an fp6 e2m3 code (the low 6 bits).
pub fn f6e2m3_to_f32(code: u8) -> f32 {
    small_float(code & 0x3f, 2, 3, 1)
}

/// The value of an fp6 e3m2 code (the low 6 bits).
pub fn f6e3m2_to_f32(code: u8) -> f32 {
    small_float(code & 0x3f, 3, 2, 3)
}

/// The value of an fp4 e2m1 code (the low 4 bits).
pub fn f4e2m1_to_f32(code: u8) -> f32 {
    small_float(code & 0xf, 2, 1, 1)
}

/// The value of an e8m0 scale, `2^(code - 127)`; 255 is NaN. 0 gives the `f32` denormal 2^-127.
pub fn e8m0_to_f32(code: u8) -> f32 {
    match code {
        0 => f32::from_bits(1 << 22),
        255 => f32::NAN,
        exponent => f32::from_bits(u32::from(exponent) << 23),
    }
}

/// The value of a two's complement code of `bits` bits.
pub fn int_to_i8(code: u8, bits: u8) -> i8 {
    let unused = 8 - u32::from(bits);
    ((code << unused) as i8) >> unused
}

/// The value of the low bits of `code` as `element`, before any scale.
pub fn to_f32(element: Element, code: u8) -> f32 {
    match element {
        Element::Int(bits) => f32::from(int_to_i8(code, bits)),
        Element::F8E4M3 => f8e4m3_to_f32(code),
        Element::F8E5M2 => f8e5m2_to_f32(code),
        Element::F6E2M3 => f6e2m3_to_f32(code),
        Element::F6E3M2 => f6e3m2_to_f32(code),
        Element::F4E2M1 => f4e2m1_to_f32(code),
    }
}

/// sign, `exponent` bits, `mantissa` bits, with denormals and without special values.
fn small_float(code: u8, exponent: u32, mantissa: u32, bias: i32) -> f32 {
    let fraction = f32::from(code & ((1 << mantissa) - 1)) / (1u32 << mantissa) as f32;
    let power = i32::from(code >> mantissa) & ((1 << exponent) - 1);
    let magnitude = match power {
        0 => fraction * 2f32.powi(1 - bias),
        _ => (1.0 + fraction) * 2f32.powi(power - bias),
    };
    if code >> (exponent + mantissa) & 1 == 1 { -magnitude } else { magnitude }
}

//! How the cache stores a number: codes of whole bytes, and their scales.

use lathe_program::{BackendError, KvFormat, KvLayout};

use crate::lanes::Lanes;

/// A code of whole bytes. A number is the code times the scale of its vector, if the vector has
/// one.
pub(crate) trait Code {
    /// Bytes of a code.
    const BYTES: usize;
    /// Whether each vector has an `f32` scale.
    const SCALED: bool;
    /// Sixteen numbers.
    /// # Safety
    /// 16 codes at `from` are readable.
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L;
    /// One number.
    /// # Safety
    /// A code at `from` is readable.
    unsafe fn one(from: *const u8) -> f32;
    /// Stores `x * inverse_scale`.
    /// # Safety
    /// A code at `to` is writable.
    unsafe fn put(x: f32, inverse_scale: f32, to: *mut u8);
    /// Stores sixteen `x * inverse_scale`.
    /// # Safety
    /// 16 codes at `to` are writable.
    #[inline(always)]
    unsafe fn put_lanes<L: Lanes>(x: L, inverse_scale: f32, to: *mut u8) {
        for (i, x) in x.to_array().into_iter().enumerate() {
            // SAFETY: the caller vouches for 16 codes.
            unsafe { Self::put(x, inverse_scale, to.add(i * Self::BYTES)) };
        }
    }
    /// The scale for a vector whose largest magnitude is `largest`.
    fn scale(largest: f32) -> f32;
}

/// IEEE binary32.
pub(crate) struct F32;
/// IEEE binary16.
pub(crate) struct F16;
/// bfloat16.
pub(crate) struct Bf16;
/// Signed words under a scale.
pub(crate) struct I16;
/// Signed bytes under a scale.
pub(crate) struct I8;
/// fp8 e4m3 under a scale.
pub(crate) struct E4m3;

impl Code for F32 {
    const BYTES: usize = 4;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn put_lanes<L: Lanes>(x: L, _: f32, to: *mut u8) {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { x.store(to.cast()) };
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        unsafe { from.cast::<f32>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn put(x: f32, _: f32, to: *mut u8) {
        // SAFETY: the caller vouches for the code.
        unsafe { to.cast::<f32>().write_unaligned(x) }
    }
    #[inline(always)]
    fn scale(_: f32) -> f32 {
        1.0
    }
}

/// The largest half. Larger numbers are stored as this and not as infinity, which would turn a
/// masked product into NaN.
const F16_MAX: f32 = 65504.0;

impl Code for F16 {
    const BYTES: usize = 2;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn put_lanes<L: Lanes>(x: L, _: f32, to: *mut u8) {
        let x = x.min(L::splat(F16_MAX)).max(L::splat(-F16_MAX));
        // SAFETY: the caller vouches for 16 codes.
        unsafe { x.store_f16(to.cast()) };
    }
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load_f16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        half::f16::from_bits(unsafe { from.cast::<u16>().read_unaligned() }).to_f32()
    }
    #[inline(always)]
    unsafe fn put(x: f32, _: f32, to: *mut u8) {
        let bits = half::f16::from_f32(x.clamp(-F16_MAX, F16_MAX)).to_bits();
        // SAFETY: the caller vouches for the code.
        unsafe { to.cast::<u16>().write_unaligned(bits) }
    }
    #[inline(always)]
    fn scale(_: f32) -> f32 {
        1.0
    }
}

impl Code for Bf16 {
    const BYTES: usize = 2;
    const SCALED: bool = false;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load_bf16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        half::bf16::from_bits(unsafe { from.cast::<u16>().read_unaligned() }).to_f32()
    }
    #[inline(always)]
    unsafe fn put(x: f32, _: f32, to: *mut u8) {
        // SAFETY: the caller vouches for the code.
        unsafe { to.cast::<u16>().write_unaligned(half::bf16::from_f32(x).to_bits()) }
    }
    #[inline(always)]
    fn scale(_: f32) -> f32 {
        1.0
    }
}

impl Code for I16 {
    const BYTES: usize = 2;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load_i16(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        f32::from(unsafe { from.cast::<i16>().read_unaligned() })
    }
    #[inline(always)]
    unsafe fn put(x: f32, inverse_scale: f32, to: *mut u8) {
        let code = (x * inverse_scale).round().clamp(-32767.0, 32767.0) as i16;
        // SAFETY: the caller vouches for the code.
        unsafe { to.cast::<i16>().write_unaligned(code) }
    }
    #[inline(always)]
    fn scale(largest: f32) -> f32 {
        largest / 32767.0
    }
}

impl Code for I8 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load_i8(from.cast()) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        f32::from(unsafe { from.cast::<i8>().read() })
    }
    #[inline(always)]
    unsafe fn put(x: f32, inverse_scale: f32, to: *mut u8) {
        let code = (x * inverse_scale).round().clamp(-127.0, 127.0) as i8;
        // SAFETY: the caller vouches for the code.
        unsafe { to.cast::<i8>().write(code) }
    }
    #[inline(always)]
    fn scale(largest: f32) -> f32 {
        largest / 127.0
    }
}

impl Code for E4m3 {
    const BYTES: usize = 1;
    const SCALED: bool = true;
    #[inline(always)]
    unsafe fn lanes<L: Lanes>(from: *const u8) -> L {
        // SAFETY: the caller vouches for 16 codes.
        unsafe { L::load_e4m3(from) }
    }
    #[inline(always)]
    unsafe fn one(from: *const u8) -> f32 {
        // SAFETY: the caller vouches for the code.
        let code = u32::from(unsafe { from.read() });
        let bits = ((code & 0x80) << 24) | ((code & 0x7f) << 20);
        f32::from_bits(bits) * f32::from_bits(0x7b80_0000)
    }
    #[inline(always)]
    unsafe fn put(x: f32, inverse_scale: f32, to: *mut u8) {
        // SAFETY: the caller vouches for the code.
        unsafe { to.write(encode_e4m3(x * inverse_scale)) }
    }
    #[inline(always)]
    fn scale(largest: f32) -> f32 {
        largest / 448.0
    }
}

/// The nearest e4m3 code, ties to even, largest magnitude 448.
fn encode_e4m3(x: f32) -> u8 {
    // Times 2^-120, an e4m3 number (subnormals too) is a float whose low 20 bits are zero.
    let bits = (x.abs().min(448.0) * f32::from_bits(0x0380_0000)).to_bits();
    let rounded = bits + 0x7_ffff + ((bits >> 20) & 1);
    ((rounded >> 20) as u8 & 0x7f) | ((x.to_bits() >> 24) as u8 & 0x80)
}

/// The most elements of a vector, because a vector is rotated on the stack.
pub(crate) const ELEMENTS_MAX: usize = 2048;

/// Checks that these kernels read and write `layout` in `format`.
pub(crate) fn check(format: KvFormat, layout: &KvLayout) -> Result<(), BackendError> {
    let vectors = layout.layers.iter().flat_map(|layer| layer.shape.vectors());
    let longest = vectors.map(|(_, elements)| elements).max().unwrap_or(0);
    if format == KvFormat::Int4 && longest > ELEMENTS_MAX {
        return Err(BackendError::Unsupported {
            backend: "cpu",
            feature: format!(
                "the int4 KV cache with vectors of {longest} elements (at most {ELEMENTS_MAX})"
            ),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn e4m3_codes_survive_a_round_trip() {
        for code in (0..=0x7eu8).chain(0x80..=0xfe) {
            // SAFETY: `code` is one readable byte.
            let value = unsafe { E4m3::one(&code) };
            assert_eq!(encode_e4m3(value), code, "{code:#x} is {value}");
        }
        assert_eq!(encode_e4m3(1e9), 0x7e);
        assert_eq!(encode_e4m3(1.0 / 1024.0), 0, "half of the smallest goes to even");
        assert_eq!(encode_e4m3(3.0 / 1024.0), 2);
    }
}

//! [`Simd`] in plain Rust: the semantics that the other implementations are tested against.

use super::{ByteCodes, ByteDots, SEGMENT, Simd};
use half::f16;
use lathe_tensor::{Element, codec::element};

/// Arrays of sixteen, which the compiler may vectorize. Most methods are calls: inlining their
/// loops into each kernel would cost minutes of building for little speed.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

impl Simd for Portable {
    type Codes = ByteCodes;
    type F = [f32; 16];
    type I = [u32; 16];
    type B = [u8; 64];

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self::F {
        [x; 16]
    }
    #[inline(always)]
    unsafe fn load(p: *const f32) -> Self::F {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { p.cast::<[f32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store(p: *mut f32, x: Self::F) {
        // SAFETY: the caller gives 64 writable bytes.
        unsafe { p.cast::<[f32; 16]>().write_unaligned(x) }
    }
    #[inline(never)]
    unsafe fn load_f16(p: *const u16) -> Self::F {
        // SAFETY: the caller gives 32 readable bytes.
        let bits = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        bits.map(|b| f16::from_bits(b).to_f32())
    }
    #[inline(never)]
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] * b[i])
    }
    #[inline(never)]
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i] + b[i])
    }
    #[inline(never)]
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }
    #[inline(always)]
    unsafe fn to_f(x: Self::I) -> Self::F {
        x.map(|v| v as i32 as f32)
    }
    #[inline(always)]
    unsafe fn bits_to_f(x: Self::I) -> Self::F {
        x.map(f32::from_bits)
    }
    #[inline(always)]
    unsafe fn load_i(p: *const u32) -> Self::I {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { p.cast::<[u32; 16]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn load_u16(p: *const u16) -> Self::I {
        // SAFETY: the caller gives 32 readable bytes.
        let words = unsafe { p.cast::<[u16; 16]>().read_unaligned() };
        words.map(u32::from)
    }
    #[inline(never)]
    unsafe fn load_e4m3(p: *const u8) -> Self::F {
        // SAFETY: the caller gives 16 readable bytes.
        let codes = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        codes.map(|code| element::to_f32(Element::F8E4M3, code))
    }
    #[inline(never)]
    unsafe fn load_e5m2(p: *const u8) -> Self::F {
        // SAFETY: the caller gives 16 readable bytes.
        let codes = unsafe { p.cast::<[u8; 16]>().read_unaligned() };
        codes.map(|code| element::to_f32(Element::F8E5M2, code))
    }
    #[inline(always)]
    unsafe fn load_i8(p: *const i8) -> Self::I {
        // SAFETY: the caller gives 16 readable bytes.
        let bytes = unsafe { p.cast::<[i8; 16]>().read_unaligned() };
        bytes.map(|b| b as i32 as u32)
    }
    #[inline(always)]
    unsafe fn shr<const N: u32>(x: Self::I) -> Self::I {
        x.map(|v| v >> N)
    }
    #[inline(always)]
    unsafe fn shl<const N: u32>(x: Self::I) -> Self::I {
        x.map(|v| v << N)
    }
    #[inline(always)]
    unsafe fn shr_by(x: Self::I, n: u32) -> Self::I {
        x.map(|v| v >> n)
    }
    #[inline(always)]
    unsafe fn and(x: Self::I, mask: u32) -> Self::I {
        x.map(|v| v & mask)
    }
    #[inline(always)]
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|i| a[i] | b[i])
    }
    #[inline(always)]
    unsafe fn load_b(p: *const u8) -> Self::B {
        // SAFETY: the caller gives 64 readable bytes.
        unsafe { p.cast::<[u8; 64]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_b(p: *mut u8, x: Self::B) {
        // SAFETY: the caller gives 64 writable bytes.
        unsafe { p.cast::<[u8; 64]>().write_unaligned(x) }
    }
    #[inline(never)]
    unsafe fn lookup(table: &[u8; 16], index: Self::B) -> Self::B {
        index.map(|i| table[usize::from(i & 15)])
    }
    #[inline(always)]
    unsafe fn b_to_i(x: Self::B) -> Self::I {
        bytemuck::cast(x)
    }
    #[inline(never)]
    unsafe fn low4(x: Self::B) -> Self::B {
        x.map(|v| v & 15)
    }
    #[inline(never)]
    unsafe fn high4(x: Self::B) -> Self::B {
        x.map(|v| v >> 4)
    }
    #[inline(never)]
    unsafe fn merge<const LEFT: u32, const RIGHT: u32, const MASK: u8>(
        codes: Self::B,
        plane: Self::B,
    ) -> Self::B {
        std::array::from_fn(|i| codes[i] | ((plane[i] << LEFT >> RIGHT) & MASK))
    }
    #[inline(never)]
    unsafe fn dot_step(acc: Self::I, codes: Self::B, x: Self::B) -> Self::I {
        std::array::from_fn(|lane| {
            let product =
                |b: usize| i32::from(codes[4 * lane + b]) * i32::from(x[4 * lane + b] as i8);
            acc[lane].wrapping_add((product(0) + product(1) + product(2) + product(3)) as u32)
        })
    }
}

impl ByteDots for Portable {
    #[inline(never)]
    unsafe fn dot<const N: usize>(
        [_, low_bits]: [u32; 2],
        start: i32,
        codes: &[Self::B; N],
        x: *const i8,
    ) -> Self::I {
        let mut sum = [start; 16];
        for (j, code) in codes.iter().enumerate() {
            for b in 0..4 {
                let at = 4 * j + b;
                // SAFETY: the caller gives 4 * N readable bytes, and as many `SEGMENT` further.
                let (high, low) = unsafe { (*x.add(at), *x.add(SEGMENT + at)) };
                let factor = (i32::from(high) << low_bits) + i32::from(low);
                for lane in 0..16 {
                    sum[lane] += i32::from(code[4 * lane + b]) * factor;
                }
            }
        }
        sum.map(|v| v as u32)
    }
}

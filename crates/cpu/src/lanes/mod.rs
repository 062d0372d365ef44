//! Sixteen `f32` lanes: the vector on which every float kernel of this crate is written once.
//!
//! The width is the same on every instruction set: one AVX-512 register, two of AVX2, four of NEON,
//! an array elsewhere. So memory layouts and the order of additions are the same too. A kernel is a
//! struct that implements [`Kernel`]. [`dispatch`] compiles it once for each instruction set and
//! picks the copy at run time.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
pub(crate) mod product;

use crate::isa::Isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use crate::isa::features::with_features;

/// Numbers in a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen `f32`. Methods may be called only where the instruction set exists, and [`dispatch`]
/// guarantees that. Methods that touch memory say what must be readable or writable.
pub(crate) trait Lanes: Copy {
    /// Rows of a matrix product that are computed together, with their sums in registers.
    const BLOCK_ROWS: usize;
    /// Vectors of columns of a matrix product that are computed together.
    const BLOCK_VECTORS: usize;

    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// # Safety
    /// 16 floats at `from` are readable.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// 16 floats at `to` are writable.
    unsafe fn store(self, to: *mut f32);
    /// Loads the first `n` floats (16 at most). The other lanes are zero.
    /// # Safety
    /// `n` floats at `from` are readable.
    unsafe fn load_first(from: *const f32, n: usize) -> Self {
        if n >= LANES {
            // SAFETY: the caller vouches for 16 floats.
            return unsafe { Self::load(from) };
        }
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the caller vouches for `n` floats.
        unsafe { std::ptr::copy_nonoverlapping(from, lanes.as_mut_ptr(), n) };
        // SAFETY: the array holds 16 floats.
        unsafe { Self::load(lanes.as_ptr()) }
    }
    /// Stores the first `n` lanes (16 at most).
    /// # Safety
    /// `n` floats at `to` are writable.
    unsafe fn store_first(self, to: *mut f32, n: usize) {
        if n >= LANES {
            // SAFETY: the caller vouches for 16 floats.
            return unsafe { self.store(to) };
        }
        let lanes = self.to_array();
        // SAFETY: the caller vouches for `n` floats.
        unsafe { std::ptr::copy_nonoverlapping(lanes.as_ptr(), to, n) };
    }
    /// Sixteen IEEE halves, widened.
    /// # Safety
    /// 16 halves at `from` are readable.
    unsafe fn load_f16(from: *const u16) -> Self;
    /// Rounds to IEEE halves, nearest even.
    /// # Safety
    /// 16 halves at `to` are writable.
    unsafe fn store_f16(self, to: *mut u16);
    /// Sixteen bfloat16, widened.
    /// # Safety
    /// 16 halves at `from` are readable.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Sixteen signed bytes as numbers.
    /// # Safety
    /// 16 bytes at `from` are readable.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Sixteen signed words as numbers.
    /// # Safety
    /// 16 words at `from` are readable.
    unsafe fn load_i16(from: *const i16) -> Self;
    /// Sixteen fp8 e4m3 codes as numbers. Codes that mean NaN are never stored, and are read as
    /// 480.
    /// # Safety
    /// 16 bytes at `from` are readable.
    unsafe fn load_e4m3(from: *const u8) -> Self;
    /// One IEEE half, widened, in all lanes.
    /// # Safety
    /// A half at `from` is readable.
    unsafe fn splat_f16(from: *const u16) -> Self;
    /// The low or the high halves of sixteen bytes, as numbers from 0 to 15.
    /// # Safety
    /// 16 bytes at `from` are readable.
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self;
    /// The low halves of eight bytes, then their high halves, as numbers from 0 to 15.
    /// # Safety
    /// 8 bytes at `from` are readable.
    unsafe fn load_u4(from: *const u8) -> Self;
    /// `self + other`.
    fn add(self, other: Self) -> Self;
    /// `self - other`.
    fn sub(self, other: Self) -> Self;
    /// `self * other`.
    fn mul(self, other: Self) -> Self;
    /// `self / other`.
    fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, fused where the instruction set fuses.
    fn fma(self, factor: Self, addend: Self) -> Self;
    /// The larger of each pair.
    fn max(self, other: Self) -> Self;
    /// The smaller of each pair.
    fn min(self, other: Self) -> Self;
    /// To the nearest integer, ties to even.
    fn round(self) -> Self;
    /// `self * 2^n` for integers `n` in `-126..=127` and a normal result.
    fn scale_power(self, n: Self) -> Self;
    /// Zero where `probe < limit`, `self` elsewhere.
    fn zero_below(self, probe: Self, limit: Self) -> Self;
    /// The sum of the lanes, in a fixed order.
    fn sum(self) -> f32;
    /// The largest lane.
    fn largest(self) -> f32;
    /// Asks for the cache line at `at`, which need not be readable.
    fn prefetch(at: *const u8);
    /// The lanes as an array.
    fn to_array(self) -> [f32; LANES] {
        let mut lanes = [0.0f32; LANES];
        // SAFETY: the array holds 16 floats.
        unsafe { self.store(lanes.as_mut_ptr()) };
        lanes
    }
}

/// A piece of work that is written once for all instruction sets.
pub(crate) trait Kernel {
    type Output;
    /// Does the work with vectors `L`. Implementations must be `#[inline(always)]`. Then the body
    /// is compiled within [`dispatch`]'s functions, which enable the instructions.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// The vectors that float kernels use: an implementation of [`Lanes`]. A value exists only where
/// its instructions were detected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Width(Vectors);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vectors {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Width {
    /// The vectors of `isa`.
    ///
    /// # Panics
    /// If this machine lacks `isa`.
    pub(crate) fn of(isa: Isa) -> Self {
        assert!(isa.is_available(), "this machine has {isa}");
        Self(match isa {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 | Isa::Amx => Vectors::Avx512,
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 | Isa::AvxVnni => Vectors::Avx2,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon | Isa::NeonDot => Vectors::Neon,
            // Other instruction sets are portable, or of another architecture and so not available.
            _ => Vectors::Portable,
        })
    }

    /// All that this machine has, each once.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let mut all: Vec<Self> =
            Isa::ALL.into_iter().filter(|isa| isa.is_available()).map(Self::of).collect();
        all.dedup();
        all
    }
}

/// Runs `kernel` with the vectors of `width`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(width: Width, kernel: K) -> K::Output {
    match width.0 {
        // SAFETY: a `Width` exists only where its instructions were detected.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx512 => unsafe { run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Vectors::Avx2 => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Vectors::Neon => unsafe { run_neon(kernel) },
        Vectors::Portable => kernel.run::<portable::Portable>(),
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx512 =>
    unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<avx512::Avx512>()
    }
}

#[cfg(target_arch = "x86_64")]
with_features! { avx2 =>
    unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<avx2::Avx2>()
    }
}

#[cfg(target_arch = "aarch64")]
with_features! { neon =>
    unsafe fn run_neon<K: Kernel>(kernel: K) -> K::Output {
        kernel.run::<neon::Neon>()
    }
}

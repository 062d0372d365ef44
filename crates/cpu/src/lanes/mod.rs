//! Sixteen `f32` lanes: the vector on which every float kernel of this crate is written once.
//!
//! The width is the same on every instruction set (one AVX-512 register, two of AVX2, four of
//! NEON, an array elsewhere), so that layouts and the order of additions within a kernel are too. A kernel is a
//! struct that implements [`Kernel`]; [`dispatch`] compiles it once for each instruction set and
//! picks the copy at run time. What the kernels compute is no concern of this module.

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

/// Lanes of a vector.
pub(crate) const LANES: usize = 16;

/// Sixteen `f32`. Methods are safe to call only where the instruction set is there, which
/// [`dispatch`] sees to; those that touch memory say what must be readable or writable.
pub(crate) trait Lanes: Copy {
    /// Rows of the register block of a matrix product.
    const BLOCK_ROWS: usize;
    /// Vectors in a row of the register block of a matrix product.
    const BLOCK_VECTORS: usize;

    /// All lanes `x`.
    fn splat(x: f32) -> Self;
    /// # Safety
    /// 16 floats at `from` are readable.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// 16 floats at `to` are writable.
    unsafe fn store(self, to: *mut f32);
    /// The first `n` floats (16 at most), zeros after them.
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
    /// Sixteen fp8 e4m3 codes as numbers; codes that mean NaN are never stored and read as 480.
    /// # Safety
    /// 16 bytes at `from` are readable.
    unsafe fn load_e4m3(from: *const u8) -> Self;
    /// One IEEE half, widened, in all lanes.
    /// # Safety
    /// A half at `from` is readable.
    unsafe fn splat_f16(from: *const u16) -> Self;
    /// The low or high halves of sixteen bytes as numbers 0 to 15.
    /// # Safety
    /// 16 bytes at `from` are readable.
    unsafe fn load_half_bytes(from: *const u8, high: bool) -> Self;
    /// The low halves of eight bytes and then their high halves, as numbers 0 to 15.
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
    /// What it returns.
    type Output;
    /// Does the work with vectors `L`. Implementations are `#[inline(always)]`, so that the body
    /// is compiled within [`dispatch`]'s functions, which enable the instructions.
    fn run<L: Lanes>(self) -> Self::Output;
}

/// Which implementation of [`Lanes`] to use. A value other than `Portable` exists only where its
/// instructions were detected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Width(Kind);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Portable,
    #[cfg(target_arch = "aarch64")]
    Neon,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
}

impl Width {
    /// The widest that `isa` allows on this machine.
    pub(crate) fn of(isa: Isa) -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let name = isa.name();
            let (avx2, avx512) = Self::detected();
            if avx512 && (name.starts_with("avx512") || name.starts_with("amx")) {
                return Self(Kind::Avx512);
            }
            if avx2 && name != "portable" {
                return Self(Kind::Avx2);
            }
        }
        #[cfg(target_arch = "aarch64")]
        if isa != Isa::Portable && Isa::Neon.is_available() {
            return Self(Kind::Neon);
        }
        let _ = isa;
        Self(Kind::Portable)
    }

    /// All that this machine has.
    #[cfg(test)]
    pub(crate) fn available() -> Vec<Self> {
        let mut all = vec![Self(Kind::Portable)];
        #[cfg(target_arch = "aarch64")]
        all.extend(Isa::Neon.is_available().then_some(Self(Kind::Neon)));
        #[cfg(target_arch = "x86_64")]
        {
            let (avx2, avx512) = Self::detected();
            all.extend(avx2.then_some(Self(Kind::Avx2)));
            all.extend(avx512.then_some(Self(Kind::Avx512)));
        }
        all
    }

    #[cfg(target_arch = "x86_64")]
    fn detected() -> (bool, bool) {
        let avx2 = std::is_x86_feature_detected!("avx2")
            && std::is_x86_feature_detected!("fma")
            && std::is_x86_feature_detected!("f16c");
        let avx512 = avx2
            && std::is_x86_feature_detected!("avx512f")
            && std::is_x86_feature_detected!("avx512bw")
            && std::is_x86_feature_detected!("avx512dq")
            && std::is_x86_feature_detected!("avx512vl");
        (avx2, avx512)
    }
}

/// Runs `kernel` with the vectors of `width`.
#[inline]
pub(crate) fn dispatch<K: Kernel>(width: Width, kernel: K) -> K::Output {
    match width.0 {
        // SAFETY: a `Width` exists only where its instructions were detected.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx512 => unsafe { run_avx512(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "x86_64")]
        Kind::Avx2 => unsafe { run_avx2(kernel) },
        // SAFETY: as above.
        #[cfg(target_arch = "aarch64")]
        Kind::Neon => unsafe { run_neon(kernel) },
        Kind::Portable => kernel.run::<portable::Portable>(),
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")]
unsafe fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<avx512::Avx512>()
}

#[cfg(target_arch = "aarch64")]
#[target_feature(enable = "neon")]
unsafe fn run_neon<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<neon::Neon>()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<avx2::Avx2>()
}

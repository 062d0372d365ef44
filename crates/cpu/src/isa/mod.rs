//! Which instructions the kernels may use, chosen at run time.
//!
//! [`Isa`] is the public choice. Kernels are written against `Simd`: sixteen lanes of `f32` or
//! `i32`, and sixty-four bytes of codes, on every machine. A kernel is one generic function. Each
//! implementation of `Simd` has a wrapper with the attribute `#[target_feature]` (`features.rs`),
//! into which the kernel is inlined and so compiled for those features.
//!
//! Invariant: every implementation rounds alike. Products and sums are in `f32`, fused where the
//! method says so. Integer dots are exact. So the integer kernels agree to the bit across
//! instruction sets.

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
pub(crate) mod features;
#[cfg(target_arch = "aarch64")]
pub(crate) mod neon;
pub(crate) mod portable;

use lathe_program::BackendError;
use lathe_tensor::suggest::one_of;

/// Positions along k whose activations share a scale. Kernels advance by one segment.
pub(crate) const SEGMENT: usize = 32;

/// Repeats a block with a constant `$r` from 0 to `$n - 1`, without a loop. Arrays that are indexed
/// by it stay in registers.
macro_rules! unroll {
    ($r:ident in $n:expr => $body:block) => {
        unroll!(@ $r, $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15)
    };
    (@ $r:ident, $n:expr, $body:block, $($i:literal)*) => {
        $( if $i < $n { let $r: usize = $i; $body } )*
    };
}
pub(crate) use unroll;

/// An instruction set that kernels exist for. Those of one architecture are ordered from the
/// weakest to the strongest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, which runs everywhere.
    Portable,
    /// NEON, which every 64-bit Arm processor has.
    Neon,
    /// NEON with the dot product of signed bytes (Arm v8.2).
    NeonDot,
    /// AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-VNNI.
    AvxVnni,
    /// AVX-512 F, BW, DQ, VL and VNNI, with BF16 where present.
    Avx512,
    /// All of AVX-512 above, and AMX tiles of BF16 and INT8.
    Amx,
}

impl Isa {
    /// All of them, weakest first.
    pub const ALL: [Isa; 7] =
        [Isa::Portable, Isa::Neon, Isa::NeonDot, Isa::Avx2, Isa::AvxVnni, Isa::Avx512, Isa::Amx];

    /// The strongest that this machine has.
    pub fn detect() -> Isa {
        Isa::ALL.into_iter().rev().find(|isa| isa.is_available()).unwrap_or(Isa::Portable)
    }

    /// Whether this machine (and operating system) can run it.
    pub fn is_available(self) -> bool {
        match self {
            Isa::Portable => true,
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => features::neon(),
            #[cfg(target_arch = "aarch64")]
            Isa::NeonDot => features::neon_dot(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => features::avx2(),
            #[cfg(target_arch = "x86_64")]
            Isa::AvxVnni => features::avx_vnni(),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => features::avx512(),
            #[cfg(target_arch = "x86_64")]
            Isa::Amx => features::avx512_bf16() && amx::is_available(),
            // Instruction sets of another architecture.
            #[cfg(not(target_arch = "x86_64"))]
            Isa::Avx2 | Isa::AvxVnni | Isa::Avx512 | Isa::Amx => false,
            #[cfg(not(target_arch = "aarch64"))]
            Isa::Neon | Isa::NeonDot => false,
        }
    }

    /// Whether this ISA multiplies pairs of `bf16` on this machine.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn has_bf16_dot(self) -> bool {
        self >= Isa::Avx512 && features::avx512_bf16()
    }

    /// Whether dots of `bf16` pairs are faster than products of `f32` on this processor. AMD's
    /// cores (Zen 4 and later) start one dot of 512 bits a cycle and one product of `f32`, so pairs
    /// are twice as fast. Intel's cores start a dot every second cycle and two products of `f32`
    /// each cycle, so pairs are slower. This is a rule and not a measurement: the same processor
    /// must always compute the same numbers.
    #[cfg(target_arch = "x86_64")]
    pub(crate) fn prefers_bf16_dot(self) -> bool {
        let vendor = std::arch::x86_64::__cpuid(0);
        let name = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
        self.has_bf16_dot() && name.as_flattened() == b"AuthenticAMD"
    }

    /// The name that [`Isa::parse`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dotprod",
            Isa::Avx2 => "avx2",
            Isa::AvxVnni => "avx-vnni",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
        }
    }

    /// Reads a name that [`Isa::name`] gives. `None` for anything else.
    pub fn parse(name: &str) -> Option<Isa> {
        Isa::ALL.into_iter().find(|isa| isa.name() == name)
    }

    /// The choice of the caller. Without one it is what the environment variable `LATHE_ISA` names,
    /// and without that the strongest set of this machine.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] if the machine lacks the choice or `LATHE_ISA` names none.
    pub fn select(choice: Option<Isa>) -> Result<Isa, BackendError> {
        let isa = match choice {
            Some(isa) => isa,
            None => match std::env::var("LATHE_ISA") {
                Ok(name) if !name.is_empty() => Isa::parse(&name).ok_or_else(|| {
                    let known = one_of(&name, &Isa::ALL.map(Isa::name));
                    unsupported(format!("LATHE_ISA={name}: expected {known}"))
                })?,
                _ => return Ok(Isa::detect()),
            },
        };
        if isa.is_available() {
            Ok(isa)
        } else {
            Err(unsupported(format!("the instruction set {} on this machine", isa.name())))
        }
    }
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

fn unsupported(feature: String) -> BackendError {
    BackendError::Unsupported { backend: "cpu", feature }
}

/// Asks for the cache line at `at`. The address need not be readable.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch of any address is allowed.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: as above; `asm!` because the intrinsic is not stable.
    unsafe {
        std::arch::asm!(
            "prfm pldl1keep, [{}]",
            in(reg) at,
            options(nostack, preserves_flags, readonly)
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = at;
}

/// Sixteen lanes of numbers and what kernels do with them.
///
/// # Safety
/// Every method may be called only where the implementation's instructions exist. Pointers must be
/// readable (or writable) for the whole vector: 64 bytes unless the method says less. No alignment
/// is required.
pub(crate) trait Simd: Copy + 'static {
    /// The form of coded activations for this instruction set: [`ByteCodes`] or [`WordCodes`].
    type Codes: 'static;
    /// Sixteen `f32`.
    type F: Copy;
    /// Sixteen `i32` (or `u32`).
    type I: Copy;
    /// Sixty-four bytes: four neighbours along k for each of sixteen lanes.
    type B: Copy;

    unsafe fn splat(x: f32) -> Self::F;
    unsafe fn load(p: *const f32) -> Self::F;
    unsafe fn store(p: *mut f32, x: Self::F);
    /// Sixteen `f16` (32 bytes), widened.
    unsafe fn load_f16(p: *const u16) -> Self::F;
    unsafe fn mul(a: Self::F, b: Self::F) -> Self::F;
    unsafe fn add(a: Self::F, b: Self::F) -> Self::F;
    /// `a * b + c`, rounded once.
    unsafe fn fma(a: Self::F, b: Self::F, c: Self::F) -> Self::F;
    /// Converts `i32` lanes, rounding to nearest even.
    unsafe fn to_f(x: Self::I) -> Self::F;
    /// The bits of `i32` lanes as `f32`.
    unsafe fn bits_to_f(x: Self::I) -> Self::F;

    unsafe fn load_i(p: *const u32) -> Self::I;
    /// Sixteen `u16` (32 bytes), widened.
    unsafe fn load_u16(p: *const u16) -> Self::I;
    /// Sixteen fp8 e4m3 numbers (16 bytes, none a NaN), widened.
    unsafe fn load_e4m3(p: *const u8) -> Self::F;
    /// Sixteen fp8 e5m2 numbers (16 bytes), widened.
    unsafe fn load_e5m2(p: *const u8) -> Self::F;
    /// Sixteen `i8` (16 bytes), widened with sign.
    unsafe fn load_i8(p: *const i8) -> Self::I;
    unsafe fn shr<const N: u32>(x: Self::I) -> Self::I;
    unsafe fn shl<const N: u32>(x: Self::I) -> Self::I;
    /// [`Simd::shr`] by an amount that becomes a constant when loops are unrolled.
    unsafe fn shr_by(x: Self::I, n: u32) -> Self::I;
    unsafe fn and(x: Self::I, mask: u32) -> Self::I;
    unsafe fn or(a: Self::I, b: Self::I) -> Self::I;

    unsafe fn load_b(p: *const u8) -> Self::B;
    unsafe fn store_b(p: *mut u8, x: Self::B);
    unsafe fn b_to_i(x: Self::B) -> Self::I;
    /// `table[index]` of each byte, all below 16.
    unsafe fn lookup(table: &[u8; 16], index: Self::B) -> Self::B;
    /// The low four bits of each byte.
    unsafe fn low4(x: Self::B) -> Self::B;
    /// The high four bits of each byte, moved down.
    unsafe fn high4(x: Self::B) -> Self::B;
    /// `codes | (plane << LEFT >> RIGHT) & MASK`, a byte at a time.
    unsafe fn merge<const LEFT: u32, const RIGHT: u32, const MASK: u8>(
        codes: Self::B,
        plane: Self::B,
    ) -> Self::B;
    /// One instruction of an integer dot, or the instructions that replace it. It is used to
    /// measure their rate.
    unsafe fn dot_step(acc: Self::I, codes: Self::B, x: Self::B) -> Self::I;
}

/// Coded activations as bytes: the high bytes of a segment, then its low bytes. [`ByteDots`]
/// multiplies them.
pub(crate) struct ByteCodes;

/// Coded activations as `i16`. Four neighbours along k lie in the order 0, 2, 1, 3. [`WordDots`]
/// multiplies them.
pub(crate) struct WordCodes;

/// Integer dots of codes with activations that are [`ByteCodes`].
///
/// # Safety
/// As [`Simd`].
pub(crate) trait ByteDots: Simd<Codes = ByteCodes> {
    /// `start + sum over j and b of codes[j][lane, b] * (2^n * high[4 j + b] + low[4 j + b])`,
    /// exact. `widths` is `[bits, n]`, and `codes` are unsigned with `bits` bits. `high` is at
    /// `x` and `low` `SEGMENT` bytes further: `4 * N` signed bytes each, none of them -128.
    unsafe fn dot<const N: usize>(
        widths: [u32; 2],
        start: i32,
        codes: &[Self::B; N],
        x: *const i8,
    ) -> Self::I;
}

/// Integer dots of codes with activations that are [`WordCodes`].
///
/// # Safety
/// As [`Simd`].
pub(crate) trait WordDots: Simd<Codes = WordCodes> {
    /// `start[r] + sum over j and b of codes[j][lane, b] * x[r][4 j + b]` for `R` rows of `x`,
    /// which are `stride` bytes apart; exact.
    unsafe fn dots<const N: usize, const R: usize>(
        start: *const i32,
        codes: &[Self::B; N],
        x: *const i8,
        stride: usize,
    ) -> [Self::I; R];
    /// Writes codes as words in the order of [`WordCodes`]: 128 bytes.
    unsafe fn store_words(p: *mut u8, codes: Self::B);
    /// [`WordDots::dots`] with `2 * pairs` codes a lane that [`WordDots::store_words`] wrote.
    unsafe fn dot_words<const R: usize>(
        pairs: usize,
        start: *const i32,
        codes: *const u8,
        x: *const u8,
        stride: usize,
    ) -> [Self::I; R];
}

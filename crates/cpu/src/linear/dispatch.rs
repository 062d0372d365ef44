//! From a matrix's layout, operand and ISA, and a number of rows, to a kernel.

use lathe_tensor::{FloatType, GgmlType};

use super::kernels::*;
use crate::isa::Isa;
use crate::isa::portable::Portable;
#[cfg(target_arch = "x86_64")]
use crate::isa::{avx2::Avx2, avx512::Avx512};
use crate::pack::{Layout, Operand};

/// A kernel instantiated for one ISA and number of rows. Unsafe as [`Kernel::run`].
pub(crate) type PanelFn = unsafe fn(&PanelArgs);

/// An ISA as something that kernels are compiled for.
trait Target {
    /// Rows that its registers hold: 4, 8 or 16.
    const ROWS_MAX: usize;
    fn entry<K: Kernel, const R: usize>() -> PanelFn;
}

struct PortableTarget;

impl Target for PortableTarget {
    const ROWS_MAX: usize = 4;
    fn entry<K: Kernel, const R: usize>() -> PanelFn {
        unsafe fn run<K: Kernel, const R: usize>(args: &PanelArgs) {
            // SAFETY: as `Kernel::run`; plain Rust runs everywhere.
            unsafe { K::run::<Portable, R>(args) }
        }
        run::<K, R>
    }
}

/// A target whose kernels are compiled with `$features`.
#[cfg(target_arch = "x86_64")]
macro_rules! target {
    ($name:ident, $simd:ty, $rows:literal, $features:literal) => {
        struct $name;

        impl Target for $name {
            const ROWS_MAX: usize = $rows;
            fn entry<K: Kernel, const R: usize>() -> PanelFn {
                #[target_feature(enable = $features)]
                unsafe fn run<K: Kernel, const R: usize>(args: &PanelArgs) {
                    // SAFETY: as `Kernel::run`.
                    unsafe { K::run::<$simd, R>(args) }
                }
                run::<K, R>
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
target!(Avx2Target, Avx2<false>, 4, "avx2,fma,f16c");
#[cfg(target_arch = "x86_64")]
target!(AvxVnniTarget, Avx2<true>, 4, "avx2,fma,f16c,avxvnni");
#[cfg(target_arch = "x86_64")]
target!(Avx512Target, Avx512, 16, "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni");
#[cfg(target_arch = "x86_64")]
target!(
    Avx512Bf16Target,
    Avx512,
    16,
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16"
);

/// The kernel for the first rows of `left`, and how many it takes. `left` is a number of rows
/// that blocks are padded to, or what is left of one.
pub(crate) fn kernel(isa: Isa, layout: Layout, operand: Operand, left: usize) -> (PanelFn, usize) {
    match (isa, operand) {
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, Operand::Bf16) => for_rows::<Avx512Bf16Target, Bf16Pairs>(left),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx512, _) => for_target::<Avx512Target>(layout, operand, left),
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, Operand::Int8(_)) if is_x86_feature_detected!("avxvnni") => {
            for_integers::<AvxVnniTarget>(layout, left)
        }
        #[cfg(target_arch = "x86_64")]
        (Isa::Avx2, _) => for_target::<Avx2Target>(layout, operand, left),
        _ => for_target::<PortableTarget>(layout, operand, left),
    }
}

fn for_target<T: Target>(layout: Layout, operand: Operand, left: usize) -> (PanelFn, usize) {
    match (layout, operand) {
        (_, Operand::Int8(_)) => for_integers::<T>(layout, left),
        (Layout::Float(FloatType::F32), _) => for_rows::<T, F32Kernel>(left),
        (Layout::Float(FloatType::F16), _) => for_rows::<T, F16Kernel>(left),
        (Layout::Float(FloatType::BF16), _) => for_rows::<T, Bf16Widened>(left),
        (Layout::Coded(kind), _) => match kind {
            GgmlType::Q4_0 => for_rows::<T, Exact<Simple<4, 8, false>>>(left),
            GgmlType::Q4_1 => for_rows::<T, Exact<Simple<4, 0, true>>>(left),
            GgmlType::Q5_0 => for_rows::<T, Exact<Simple<5, 16, false>>>(left),
            GgmlType::Q5_1 => for_rows::<T, Exact<Simple<5, 0, true>>>(left),
            GgmlType::Q8_0 => for_rows::<T, Exact<Simple<8, 128, false>>>(left),
            GgmlType::Q4_K => for_rows::<T, Exact<SuperMin<4>>>(left),
            GgmlType::Q5_K => for_rows::<T, Exact<SuperMin<5>>>(left),
            GgmlType::Q6_K => for_rows::<T, Exact<SuperSigned>>(left),
            GgmlType::IQ4_NL | GgmlType::IQ4_XS => unreachable!("refused when packed"),
        },
    }
}

fn for_integers<T: Target>(layout: Layout, left: usize) -> (PanelFn, usize) {
    let Layout::Coded(kind) = layout else { unreachable!("floats have no integer kernel") };
    match kind {
        GgmlType::Q4_0 => for_rows::<T, Integer<Simple<4, 8, false>>>(left),
        GgmlType::Q4_1 => for_rows::<T, Integer<Simple<4, 0, true>>>(left),
        GgmlType::Q5_0 => for_rows::<T, Integer<Simple<5, 16, false>>>(left),
        GgmlType::Q5_1 => for_rows::<T, Integer<Simple<5, 0, true>>>(left),
        GgmlType::Q8_0 => for_rows::<T, Integer<Simple<8, 128, false>>>(left),
        GgmlType::Q4_K => for_rows::<T, Integer<SuperMin<4>>>(left),
        GgmlType::Q5_K => for_rows::<T, Integer<SuperMin<5>>>(left),
        GgmlType::Q6_K => for_rows::<T, Integer<SuperSigned>>(left),
        GgmlType::IQ4_NL | GgmlType::IQ4_XS => unreachable!("refused when packed"),
    }
}

/// The instance for the most rows that `left`, the registers and the kernel allow. Only default
/// kernels are instantiated for many numbers of rows: each instance costs seconds of building.
fn for_rows<T: Target, K: Kernel>(left: usize) -> (PanelFn, usize) {
    let most = left.min(T::ROWS_MAX);
    match most {
        16.. if T::ROWS_MAX >= 16 && K::TUNED => (T::entry::<K, 16>(), 16),
        12.. if T::ROWS_MAX >= 16 && K::TUNED => (T::entry::<K, 12>(), 12),
        8.. if T::ROWS_MAX >= 8 => (T::entry::<K, 8>(), 8),
        6.. if T::ROWS_MAX >= 8 && K::TUNED => (T::entry::<K, 6>(), 6),
        4.. => (T::entry::<K, 4>(), 4),
        2.. if K::TUNED => (T::entry::<K, 2>(), 2),
        _ => (T::entry::<K, 1>(), 1),
    }
}

//! From a matrix's layout, operand and ISA, and a number of rows, to a kernel.

use lathe_tensor::{FloatType, GgmlType};

use super::kernels::*;
use crate::isa::Isa;
use crate::isa::portable::Portable;
use crate::pack::{Layout, Operand};

/// A kernel instantiated for one ISA and number of rows. Unsafe as [`Kernel::run`].
pub(crate) type PanelFn = unsafe fn(&PanelArgs);

/// An ISA as something that kernels are compiled for.
trait Target {
    /// Rows that its registers hold: a power of two times... one of 4, 8, 16.
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

/// The kernel for `rows` rows or a part of them, and how many rows it takes at once. `rows` is
/// one of those that blocks are padded to.
pub(crate) fn kernel(isa: Isa, layout: Layout, operand: Operand, rows: usize) -> (PanelFn, usize) {
    match isa {
        Isa::Portable => for_target::<PortableTarget>(layout, operand, rows),
    }
}

fn for_target<T: Target>(layout: Layout, operand: Operand, rows: usize) -> (PanelFn, usize) {
    let rows = rows.min(T::ROWS_MAX);
    let f = match (layout, operand) {
        (Layout::Float(FloatType::F32), _) => for_rows::<T, F32Kernel>(rows),
        (Layout::Float(FloatType::F16), _) => for_rows::<T, F16Kernel>(rows),
        (Layout::Float(FloatType::BF16), Operand::Bf16) => for_rows::<T, Bf16Pairs>(rows),
        (Layout::Float(FloatType::BF16), _) => for_rows::<T, Bf16Widened>(rows),
        (Layout::Coded(kind), operand) => match kind {
            GgmlType::Q4_0 => for_coded::<T, Simple<4, 8, false>>(operand, rows),
            GgmlType::Q4_1 => for_coded::<T, Simple<4, 0, true>>(operand, rows),
            GgmlType::Q5_0 => for_coded::<T, Simple<5, 16, false>>(operand, rows),
            GgmlType::Q5_1 => for_coded::<T, Simple<5, 0, true>>(operand, rows),
            GgmlType::Q8_0 => for_coded::<T, Simple<8, 128, false>>(operand, rows),
            GgmlType::Q4_K => for_coded::<T, SuperMin<4>>(operand, rows),
            GgmlType::Q5_K => for_coded::<T, SuperMin<5>>(operand, rows),
            GgmlType::Q6_K => for_coded::<T, SuperSigned>(operand, rows),
            GgmlType::IQ4_NL | GgmlType::IQ4_XS => unreachable!("refused when packed"),
        },
    };
    (f, rows)
}

fn for_coded<T: Target, C: Coded>(operand: Operand, rows: usize) -> PanelFn {
    match operand {
        Operand::Int8(_) => for_rows::<T, Integer<C>>(rows),
        _ => for_rows::<T, Exact<C>>(rows),
    }
}

fn for_rows<T: Target, K: Kernel>(rows: usize) -> PanelFn {
    match rows {
        1 => T::entry::<K, 1>(),
        2 => T::entry::<K, 2>(),
        4 => T::entry::<K, 4>(),
        6 if T::ROWS_MAX > 4 => T::entry::<K, 6>(),
        8 if T::ROWS_MAX > 4 => T::entry::<K, 8>(),
        12 if T::ROWS_MAX > 8 => T::entry::<K, 12>(),
        16 if T::ROWS_MAX > 8 => T::entry::<K, 16>(),
        _ => unreachable!("no kernel for {rows} rows"),
    }
}

//! AMX products of rows in the prefill form ([`super`]). Sums are tiles 0 to 3, rows tiles 4 and 5,
//! weights tiles 6 and 7.

use std::arch::asm;

use super::super::amx::{configure, release};
use super::super::block::BLOCK;
use super::products::{Products, TileOperands};

/// Products by AMX.
pub(super) struct TileProducts;

/// Runs every `$line` for each segment, and then advances all pointers.
macro_rules! products {
    ($run:expr, $($line:literal),+ $(,)?) => {
        asm!(
            "2:",
            $($line,)+
            "add {a0}, {step}",
            "add {a1}, {step}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) $run.rows[0] => _,
            a1 = inout(reg) $run.rows[1] => _,
            b0 = inout(reg) $run.weights[0] => _,
            b1 = inout(reg) $run.weights[1] => _,
            step = in(reg) $run.rows_step,
            line = in(reg) 64usize,
            n = inout(reg) $run.segments => _,
            options(nostack)
        )
    };
}

impl Products for TileProducts {
    unsafe fn configure() {
        // SAFETY: as the caller promises.
        unsafe { configure(BLOCK) }
    }

    unsafe fn release() {
        // SAFETY: as the caller promises.
        unsafe { release() }
    }

    unsafe fn one_block(run: &TileOperands, sums: *mut f32, panels: usize) {
        // SAFETY: as the caller promises; the compiler knows nothing of tile registers.
        unsafe {
            begin(run, sums, 2);
            if panels == 2 {
                products!(
                    run,
                    "tileloadd tmm4, [{a0} + {line} * 1]",
                    "tileloadd tmm6, [{b0} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + {line} * 1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                );
            } else {
                products!(
                    run,
                    "tileloadd tmm4, [{a0} + {line} * 1]",
                    "tileloadd tmm6, [{b0} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                );
            }
            end(sums, 2);
        }
    }

    unsafe fn two_by_two(run: &TileOperands, sums: *mut f32) {
        // SAFETY: as in `one_block`.
        unsafe {
            begin(run, sums, 4);
            products!(
                run,
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {line} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            );
            end(sums, 4);
        }
    }
}

/// Loads the sums of one or two blocks and two panels, or sets them to zero if they start here.
///
/// # Safety
/// Tiles are configured, and `sums` has `tiles` tiles.
unsafe fn begin(run: &TileOperands, sums: *mut f32, tiles: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        if run.fresh {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack)
            );
            return;
        }
        asm!(
            "tileloadd tmm0, [{c} + {line} * 1]",
            "tileloadd tmm1, [{c} + {line} * 1 + 1024]",
            c = in(reg) sums, line = in(reg) 64usize, options(nostack, readonly)
        );
        if tiles == 4 {
            asm!(
                "tileloadd tmm2, [{c} + {line} * 1 + 2048]",
                "tileloadd tmm3, [{c} + {line} * 1 + 3072]",
                c = in(reg) sums, line = in(reg) 64usize, options(nostack, readonly)
            );
        }
    }
}

/// Stores the sums that [`begin`] loaded.
///
/// # Safety
/// As [`begin`].
unsafe fn end(sums: *mut f32, tiles: usize) {
    // SAFETY: as the caller promises.
    unsafe {
        asm!(
            "tilestored [{c} + {line} * 1], tmm0",
            "tilestored [{c} + {line} * 1 + 1024], tmm1",
            c = in(reg) sums, line = in(reg) 64usize, options(nostack)
        );
        if tiles == 4 {
            asm!(
                "tilestored [{c} + {line} * 1 + 2048], tmm2",
                "tilestored [{c} + {line} * 1 + 3072], tmm3",
                c = in(reg) sums, line = in(reg) 64usize, options(nostack)
            );
        }
    }
}

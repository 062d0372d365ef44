//! AMX: products of tiles of sixteen rows by sixteen outputs, for rows in the prefill form ([`prompt`]).
//!
//! Small batches of decoding rows stay with AVX-512: integer tiles give the same bits, but were no faster (8 and 16
//! rows of Q4_0: 1437 and 2574 us against 1123 and 2234 for 8192 x 2048, one thread, measured): the sums of
//! each scale must leave the tiles, and asking the memory for lines takes the buffers that loads of tiles need.
//!
//! Costs measured on Sapphire Rapids (quiet, 2.9 GHz), in cycles: a product of whole tiles 16, whatever
//! the type, and a load of a tile from the first-level cache 8, from the second 18 to 20, from the third
//! about 100; a store 16; four loads and four products overlap to 64. A neighbour on the same physical
//! core makes loops that mix loads and products four times slower, and leaves products alone as they are:
//! on shared machines measure such a loop, not the products, beside a figure.

pub(super) mod prompt;

use std::arch::asm;

/// Bytes of a tile of sixteen rows.
const TILE_BYTES: usize = 1024;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    column_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 16 rows of 64 bytes.
static CONFIG: TileConfig = TileConfig {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    column_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// Makes the eight tiles of this thread whole ones.
///
/// # Safety
/// AMX is available, and [`release`] follows on this thread.
unsafe fn configure() {
    // SAFETY: the configuration is valid and belongs to this thread until it is released.
    unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) }
}

/// Gives the tiles back, so that switching threads does not save them.
///
/// # Safety
/// AMX is available.
unsafe fn release() {
    // SAFETY: as the caller promises.
    unsafe { asm!("tilerelease", options(nomem, nostack)) }
}

/// Whether this processor has AMX with `bf16` and `int8`, and the system lets this process use it
/// (Linux hands the tile registers out on request, once a process).
pub(crate) fn is_available() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count};
    // Bits 22, 24, 25 of EDX: AMX-BF16, AMX-TILE, AMX-INT8.
    const NEEDED: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    let has = __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & NEEDED == NEEDED;
    has && permitted()
}

#[cfg(target_os = "linux")]
fn permitted() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` and the number of the tile data's state component.
    const REQUEST: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: the call has no effect on memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn permitted() -> bool {
    false
}

/// `steps` times four independent products of whole tiles, to measure their rate.
///
/// # Safety
/// AMX is available.
pub(crate) unsafe fn peak(int8: bool, steps: usize) {
    let zeros = [0u8; TILE_BYTES];
    macro_rules! products {
        ($instruction:literal) => {
            asm!(
                "ldtilecfg [{config}]",
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "tileloadd tmm4, [{zeros} + {line} * 1]",
                "tileloadd tmm5, [{zeros} + {line} * 1]",
                "tileloadd tmm6, [{zeros} + {line} * 1]",
                "tileloadd tmm7, [{zeros} + {line} * 1]",
                "2:",
                concat!($instruction, " tmm0, tmm4, tmm6"),
                concat!($instruction, " tmm1, tmm4, tmm7"),
                concat!($instruction, " tmm2, tmm5, tmm6"),
                concat!($instruction, " tmm3, tmm5, tmm7"),
                "dec {n}",
                "jnz 2b",
                "tilerelease",
                config = in(reg) &raw const CONFIG,
                zeros = in(reg) zeros.as_ptr(),
                line = in(reg) 64usize,
                n = inout(reg) steps.max(1) => _,
                options(nostack)
            )
        };
    }
    // SAFETY: the caller promises AMX; the configuration is this thread's until it is released.
    unsafe {
        if int8 {
            products!("tdpbusd");
        } else {
            products!("tdpbf16ps");
        }
    }
}

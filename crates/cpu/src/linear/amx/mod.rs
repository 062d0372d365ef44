//! AMX: products of tiles of up to sixteen rows by sixteen outputs. Rows in the prefill form are in
//! `prompt/tiles.rs`. Rows in the decoding form are in [`decode`]: all of them for `bf16` weights,
//! and batches of them for weights of four bits.
//!
//! Costs in cycles on Sapphire Rapids: a product of whole tiles takes 16, whatever the type.
//! Loading a tile takes 8 from the first-level cache, 18 to 20 from the second and about 100 from
//! the third. A store takes 16. Four loads and four products overlap to 64. A busy neighbour on the
//! same physical core makes a loop of loads and products four times slower, but not a loop of
//! products alone. So such a mixed loop shows whether a shared machine is quiet.

pub(super) mod decode;

use std::arch::asm;

use super::block::TILE_BYTES;

/// The operand of `ldtilecfg`.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    column_bytes: [u16; 16],
    rows: [u8; 16],
}

/// Eight tiles of 64 bytes a row. Tiles 0 to 3 (sums) and 4 and 5 (activations) have `rows` rows,
/// tiles 6 and 7 (weights) have 16.
const fn config_of(rows: u8) -> TileConfig {
    let mut config = TileConfig {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        column_bytes: [0; 16],
        rows: [0; 16],
    };
    let mut tile = 0;
    while tile < 8 {
        config.column_bytes[tile] = 64;
        config.rows[tile] = if tile < 6 { rows } else { 16 };
        tile += 1;
    }
    config
}

/// One for each number of rows, from 1 on.
static CONFIGS: [TileConfig; 16] = {
    let mut configs = [const { config_of(1) }; 16];
    let mut rows = 1;
    while rows <= 16 {
        configs[rows - 1] = config_of(rows as u8);
        rows += 1;
    }
    configs
};

/// Configures this thread's tiles for `rows` rows of activations, 1 to 16.
///
/// # Safety
/// AMX is available, and [`release`] follows on this thread.
pub(crate) unsafe fn configure(rows: usize) {
    let config = &raw const CONFIGS[rows - 1];
    // SAFETY: the configuration is valid and belongs to this thread until it is released.
    unsafe { asm!("ldtilecfg [{}]", in(reg) config, options(nostack, readonly)) }
}

/// Releases the tiles, so that a switch of threads need not save them.
///
/// # Safety
/// AMX is available.
pub(crate) unsafe fn release() {
    // SAFETY: as the caller promises.
    unsafe { asm!("tilerelease", options(nomem, nostack)) }
}

/// Computes `steps` times four independent products of whole tiles, to measure their rate.
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
                config = in(reg) &raw const CONFIGS[15],
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

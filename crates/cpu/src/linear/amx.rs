//! Products by AMX tiles: sixteen rows of `bf16` activations against sixteen outputs at a time.
//!
//! A packed panel of `bf16` weights is a run of tiles as it lies in memory (a segment is 16 pairs
//! of positions x 16 lanes, 1 KB); the codes of other formats are decoded once for a whole prefill
//! chunk and rounded to `bf16`. Only rows in the prefill form come here: decoding rows stay with the
//! kernels that round nothing, which memory holds back as much. A program with routers, where a
//! little error may send a token to another expert, has its rows multiplied in two parts, the
//! nearest `bf16` and what that leaves.
//!
//! Cost. `tdpbf16ps` takes 16 cycles for 16 x 16 x 32 products (measured on Sapphire Rapids, 3.0 GHz:
//! 16.5), loads of two tiles 17 from the first-level cache, and they overlap; two blocks of rows
//! against two panels load four tiles for four products. Decoding costs about 130 cycles a segment
//! and panel: a fifth on top for the 32 blocks of a 512-row chunk by prediction, a tenth as measured
//! (8192 x 2048, two threads: 1547 GOP/s in Q4_0, 1720 in `bf16`, of 2466 that tiles gave in registers
//! in that run). Everything that is walked more than once lies densely: sums as tiles and not as rows
//! of `out`, blocks of activations an odd number of kilobytes apart; powers of two between them cost
//! a third of the speed.
//!
//! Invariant (batch invariance): a row's sum takes segments in order from zero, whatever rows lie
//! beside it in the tile: tiles always have sixteen rows, and those past the block's are computed
//! from whatever lies there and thrown away.

use std::arch::asm;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::Output;
use super::activations::{Activations, BLOCK, TILE_PANELS};
use super::dispatch::{ExpandFn, Tiles};
use super::kernels::{BATCH, Scratch};
use crate::pack::layout::SEGMENT;
use crate::pack::{PANEL, PackedMatrix};

/// Bytes of a tile: a segment of a panel, or of a block of rows.
const TILE_BYTES: usize = 1024;
/// Segments that are multiplied before the next panels come: meanwhile the weights of two panels stay
/// in the first-level cache, and the activations of 512 rows in the second.
const SLICE_SEGMENTS: usize = 16;
/// How far ahead packed weights are asked for.
const AHEAD_BYTES: usize = 4096;

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

/// Multiplies the rows in the prefill form, of `blocks` of their slots, by `panels`. `sums` has a tile for each of the blocks, rounded up to
/// an even number, and of [`TILE_PANELS`] panels.
///
/// # Safety
/// AMX is available, the activations serve the matrix, `out` is `[rows, out]`, and nobody else
/// touches `sums` and the elements of these rows and panels.
pub(super) unsafe fn multiply(
    matrix: &PackedMatrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
    sums: *mut f32,
) {
    if panels.is_empty() || blocks.is_empty() {
        return;
    }
    let job = Job { matrix, activations, blocks, out, sums };
    // SAFETY: the configuration is valid and belongs to this thread until it is released; the
    // rest as the caller promises.
    unsafe {
        asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly));
        for first in panels.clone().step_by(TILE_PANELS) {
            job.panels(first..panels.end.min(first + TILE_PANELS));
        }
        asm!("tilerelease", options(nomem, nostack));
    }
}

/// Two panels' slices as tiles.
#[repr(C, align(64))]
struct Expanded([[u8; SLICE_SEGMENTS * TILE_BYTES]; 2]);

struct Job<'a> {
    matrix: &'a PackedMatrix,
    activations: &'a Activations,
    blocks: Range<usize>,
    out: &'a Output<'a>,
    /// `[pairs of panels][pairs of blocks][2 blocks][2 panels][16][16]`.
    sums: *mut f32,
}

impl Job<'_> {
    /// The sums of a block (counted from the first of these) and a panel of those at once.
    fn tile(&self, block: usize, panel: usize) -> *mut f32 {
        let pairs = self.blocks.len().div_ceil(2);
        let tile = ((panel / 2 * pairs + block / 2) * 2 + block % 2) * 2 + panel % 2;
        self.sums.wrapping_add(tile * BLOCK * PANEL)
    }

    /// Multiplies all blocks by up to [`TILE_PANELS`] panels.
    ///
    /// # Safety
    /// As [`multiply`], with tiles configured.
    unsafe fn panels(&self, panels: Range<usize>) {
        let total = self.matrix.segments();
        let mut expanded = MaybeUninit::<Expanded>::uninit();
        for first in (0..total).step_by(SLICE_SEGMENTS) {
            let segments = first..total.min(first + SLICE_SEGMENTS);
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                // SAFETY: as the caller promises.
                unsafe {
                    let weights = match self.matrix.kernels.tiles {
                        Tiles::Expanded(expand) => {
                            let to = expanded.as_mut_ptr();
                            self.expand(expand, pair.clone(), segments.clone(), to)
                        }
                        _ => [panel, pair.end - 1]
                            .map(|panel| self.matrix.panel(panel).add(first * TILE_BYTES)),
                    };
                    self.blocks(weights, pair.len(), panel - panels.start, segments.clone());
                }
            }
        }
        // SAFETY: as the caller promises.
        unsafe { self.store(panels) };
    }

    /// Decodes `segments` of up to two panels.
    ///
    /// # Safety
    /// As [`multiply`]; `to` may be written.
    unsafe fn expand(
        &self,
        expand: ExpandFn,
        panels: Range<usize>,
        segments: Range<usize>,
        to: *mut Expanded,
    ) -> [*const u8; 2] {
        let mut scratch = MaybeUninit::<Scratch>::uninit();
        // SAFETY: `expand` writes the numbers of each batch before they are rounded, and a scratch
        // holds plain numbers; both places have room for a slice.
        unsafe {
            let places = [0, 1].map(|i| (&raw mut (*to).0[i]).cast::<u8>());
            for (panel, place) in panels.zip(places) {
                for first in segments.clone().step_by(BATCH) {
                    let count = BATCH.min(segments.end - first);
                    let scratch = &mut *scratch.as_mut_ptr();
                    let packed = self.matrix.segment(panel, first);
                    expand(packed, count, &self.matrix.constants, scratch);
                    let tiles = place.add((first - segments.start) * TILE_BYTES);
                    round_to_tiles(scratch.weights.as_ptr(), count, tiles);
                }
            }
            places.map(<*mut u8>::cast_const)
        }
    }

    /// Adds the products of `segments` of one or two panels to all blocks, two at a time.
    ///
    /// # Safety
    /// As [`multiply`]; `weights` has the tiles of the segments of each panel, the first of which is
    /// number `panel` of those at once.
    unsafe fn blocks(
        &self,
        weights: [*const u8; 2],
        panels: usize,
        panel: usize,
        segments: Range<usize>,
    ) {
        let slots = self.activations.tiled_rows();
        let whole = |block: usize| block < self.blocks.end && (block + 1) * BLOCK <= slots;
        for part in 0..self.activations.tile_parts() {
            for block in self.blocks.clone().step_by(2) {
                let last = self.blocks.end - 1;
                let [first, second] = [block, last.min(block + 1)]
                    .map(|block| self.activations.tile(part, block, segments.start));
                let tiles = Tile {
                    rows: [first.0, second.0],
                    rows_step: first.1,
                    weights,
                    segments: segments.len(),
                    fresh: segments.start == 0 && part == 0,
                };
                let sums = self.tile(block - self.blocks.start, panel);
                // SAFETY: as the caller promises.
                unsafe {
                    if whole(block) && whole(block + 1) && panels == 2 {
                        tiles.two_by_two(sums);
                        continue;
                    }
                    tiles.one_block(sums, panels);
                    if block < last {
                        let second = Tile { rows: [second.0; 2], rows_step: second.1, ..tiles };
                        second.one_block(sums.add(2 * SUMS), panels);
                    }
                }
            }
        }
    }

    /// Writes the sums to `out`, or adds them to it, with the bias.
    ///
    /// # Safety
    /// As [`multiply`].
    unsafe fn store(&self, panels: Range<usize>) {
        let slots =
            self.blocks.start * BLOCK..(self.blocks.end * BLOCK).min(self.activations.tiled_rows());
        for slot in slots {
            let row = self.activations.tiled_row_of(slot);
            for panel in panels.clone() {
                let from = panel * PANEL;
                let width = (self.matrix.rows() - from).min(PANEL);
                let block = slot / BLOCK - self.blocks.start;
                let tile = self.tile(block, panel - panels.start);
                // SAFETY: the row's elements of these panels are this worker's.
                let (sums, to) = unsafe {
                    let to = self.out.pointer.add(row * self.matrix.rows() + from);
                    let sums = tile.add(slot % BLOCK * PANEL);
                    (
                        std::slice::from_raw_parts(sums, width),
                        std::slice::from_raw_parts_mut(to, width),
                    )
                };
                self.out.store(sums, from, to);
            }
        }
    }
}

/// The operands of one run of tile products.
struct Tile {
    /// The first segment of each block of rows.
    rows: [*const u8; 2],
    /// Bytes from a block's segment to the next.
    rows_step: usize,
    /// The first segment of each panel.
    weights: [*const u8; 2],
    segments: usize,
    /// Whether the sums start from zero.
    fresh: bool,
}

/// Floats of a tile of sums.
const SUMS: usize = BLOCK * PANEL;

impl Tile {
    /// One block and one or two panels.
    ///
    /// # Safety
    /// As [`Tile::two_by_two`].
    unsafe fn one_block(&self, sums: *mut f32, panels: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            if panels == 2 {
                self.one_by_two(sums);
            } else {
                self.one_by_one(sums);
            }
        }
    }

    /// Zeroes the sums if they start here.
    ///
    /// # Safety
    /// `sums` has `tiles` tiles.
    unsafe fn begin(&self, sums: *mut f32, tiles: usize) {
        if self.fresh {
            // SAFETY: as the caller promises.
            unsafe { sums.write_bytes(0, tiles * SUMS) };
        }
    }

    /// Two blocks and two panels.
    ///
    /// # Safety
    /// Tiles are configured, `sums` has the tiles and the operands all segments.
    unsafe fn two_by_two(&self, sums: *mut f32) {
        // SAFETY: as the caller promises; the compiler knows nothing of tile registers.
        unsafe {
            self.begin(sums, 4);
            asm!(
                "tileloadd tmm0, [{c} + {line} * 1]",
                "tileloadd tmm1, [{c} + {line} * 1 + 1024]",
                "tileloadd tmm2, [{c} + {line} * 1 + 2048]",
                "tileloadd tmm3, [{c} + {line} * 1 + 3072]",
                "2:",
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {line} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {a0}, {step}",
                "add {a1}, {step}",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {line} * 1], tmm0",
                "tilestored [{c} + {line} * 1 + 1024], tmm1",
                "tilestored [{c} + {line} * 1 + 2048], tmm2",
                "tilestored [{c} + {line} * 1 + 3072], tmm3",
                c = in(reg) sums,
                a0 = inout(reg) self.rows[0] => _,
                a1 = inout(reg) self.rows[1] => _,
                b0 = inout(reg) self.weights[0] => _,
                b1 = inout(reg) self.weights[1] => _,
                step = in(reg) self.rows_step,
                line = in(reg) 64usize,
                n = inout(reg) self.segments => _,
                options(nostack)
            );
        }
    }

    /// # Safety
    /// As [`Tile::two_by_two`].
    unsafe fn one_by_two(&self, sums: *mut f32) {
        // SAFETY: as in `two_by_two`; a prefetch of any address is allowed.
        unsafe {
            self.begin(sums, 2);
            asm!(
                "tileloadd tmm0, [{c} + {line} * 1]",
                "tileloadd tmm1, [{c} + {line} * 1 + 1024]",
                "2:",
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "mov {i}, {ahead}",
                "3:",
                "prefetcht0 [{b0} + {i}]",
                "prefetcht0 [{b1} + {i}]",
                "prefetcht0 [{b0} + {i} + 64]",
                "prefetcht0 [{b1} + {i} + 64]",
                "prefetcht0 [{b0} + {i} + 128]",
                "prefetcht0 [{b1} + {i} + 128]",
                "prefetcht0 [{b0} + {i} + 192]",
                "prefetcht0 [{b1} + {i} + 192]",
                "add {i}, 256",
                "cmp {i}, {ahead} + 1024",
                "jne 3b",
                "add {a0}, {step}",
                "add {b0}, 1024",
                "add {b1}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {line} * 1], tmm0",
                "tilestored [{c} + {line} * 1 + 1024], tmm1",
                c = in(reg) sums,
                a0 = inout(reg) self.rows[0] => _,
                b0 = inout(reg) self.weights[0] => _,
                b1 = inout(reg) self.weights[1] => _,
                step = in(reg) self.rows_step,
                line = in(reg) 64usize,
                n = inout(reg) self.segments => _,
                i = out(reg) _,
                ahead = const AHEAD_BYTES,
                options(nostack)
            );
        }
    }

    /// # Safety
    /// As [`Tile::two_by_two`].
    unsafe fn one_by_one(&self, sums: *mut f32) {
        // SAFETY: as in `two_by_two`.
        unsafe {
            self.begin(sums, 1);
            asm!(
                "tileloadd tmm0, [{c} + {line} * 1]",
                "2:",
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "add {a0}, {step}",
                "add {b0}, 1024",
                "dec {n}",
                "jnz 2b",
                "tilestored [{c} + {line} * 1], tmm0",
                c = in(reg) sums,
                a0 = inout(reg) self.rows[0] => _,
                b0 = inout(reg) self.weights[0] => _,
                step = in(reg) self.rows_step,
                line = in(reg) 64usize,
                n = inout(reg) self.segments => _,
                options(nostack)
            );
        }
    }
}

/// Rounds `[segments][32][16]` numbers to tiles of `bf16` pairs `[segments][16][16][2]`.
///
/// # Safety
/// AVX-512 with BF16 is available; both places hold the segments.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
unsafe fn round_to_tiles(numbers: *const f32, segments: usize, tiles: *mut u8) {
    use std::arch::x86_64::*;
    // SAFETY: as the caller promises; the cast is between vectors of the same size.
    unsafe {
        // The first number's sixteen lanes and the second's, side by side, then lane by lane.
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
        let order = _mm512_loadu_si512(order.as_ptr().cast());
        for pair in 0..segments * SEGMENT / 2 {
            let first = _mm512_loadu_ps(numbers.add(2 * pair * PANEL));
            let second = _mm512_loadu_ps(numbers.add((2 * pair + 1) * PANEL));
            let both = _mm512_cvtne2ps_pbh(second, first);
            let both = std::mem::transmute::<__m512bh, __m512i>(both);
            let words = _mm512_permutexvar_epi16(order, both);
            _mm512_storeu_si512(tiles.add(64 * pair).cast(), words);
        }
    }
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

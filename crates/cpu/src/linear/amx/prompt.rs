//! Rows in the prefill form: `bf16` activations times `bf16` weights.
//!
//! A packed panel of `bf16` weights is a run of tiles as it lies in memory (a segment is 16 pairs
//! of positions x 16 lanes, 1 KB); the codes of other formats are decoded to such tiles, once for a pass
//! of rows. A program with routers, where a little error may send a
//! token to another expert, has its rows multiplied in two parts, the nearest `bf16` and what that leaves.
//!
//! Cost. Two blocks of rows against two panels load four tiles for four products of 16 cycles: with random
//! numbers (which cost the core a fifth of its clock), the activations and the weights in the second-level cache, that runs at
//! 1.66 to 1.77 TFLOP/s a thread of 2.33 with both in the first; with either in the third at half of it. So a pass takes as
//! many rows as fit the second-level cache with all of k, or with a slice of 64 segments (256 rows); sums stay
//! in registers for all of k or a slice: storing and loading them every 8 segments costs 43 %. Decoding
//! takes about 90 cycles a segment and panel by prediction, a quarter of the products' time for the 16 blocks of a pass; measured
//! in Q4_0, 512 rows, 8192 x 2048: products 78 % of the time, decoding 13 %, sums to `out` 7 %, rows 2 %,
//! together 0.97 TFLOP/s. Asking for the next panels' bytes from within the loop gains nothing: such requests
//! take the fill buffers that tile loads from the second-level cache need.
//!
//! Invariant (batch invariance): a row's sum takes segments in order from zero, whatever rows lie
//! beside it in the tile: tiles always have sixteen rows, and those past the block's are computed
//! from whatever lies there and thrown away.

use std::arch::asm;
use std::arch::x86_64::*;
use std::ops::Range;

use super::super::Output;
use super::super::activations::{
    Activations, BLOCK, TILE_PANELS, TILE_ROWS, TILE_SEGMENTS, TileScratch,
};
use super::super::codes::{Coded, Decoded, Group, Tail, group_scale, unroll};
use super::super::dispatch::Tiles;
use super::super::kernels::{Float, prefetch};
use super::{TILE_BYTES, configure, release};
use crate::isa::Simd;
use crate::isa::avx512::Avx512;
use crate::pack::layout::{Constants, SEGMENT};
use crate::pack::{PANEL, PackedMatrix};

/// Floats of a tile of sums.
const SUMS: usize = BLOCK * PANEL;
/// How far ahead packed weights are asked for.
const AHEAD_BYTES: usize = 4096;

/// Blocks of rows of a pass, of `blocks` in all: as many passes of as equal length as the cache allows.
pub(in super::super) fn pass_blocks(segments: usize, parts: usize, blocks: usize) -> usize {
    let most = TILE_ROWS * TILE_SEGMENTS / (BLOCK * slice_segments(segments) * parts);
    let passes = blocks.div_ceil(most.max(2)).max(1);
    blocks.div_ceil(passes).next_multiple_of(2)
}

/// Segments of a slice of k, of `segments` in all: whole chunks of every format.
fn slice_segments(segments: usize) -> usize {
    let slices = segments.div_ceil(TILE_SEGMENTS).max(1);
    segments.div_ceil(slices).next_multiple_of(8)
}

/// Multiplies the rows in the prefill form, of `blocks` of their slots (one pass, see [`pass_blocks`]), by `panels`.
///
/// # Safety
/// AMX is available, the activations serve the matrix, `out` is `[rows, out]`, and nobody else
/// touches `scratch` and the elements of these rows and panels.
pub(in super::super) unsafe fn multiply(
    matrix: &PackedMatrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
    scratch: TileScratch,
) {
    if panels.is_empty() || blocks.is_empty() {
        return;
    }
    let slice = slice_segments(matrix.segments());
    let at_once = if slice < matrix.segments() { TILE_PANELS } else { 2 };
    // SAFETY: as the caller promises.
    unsafe {
        configure(BLOCK);
        let job = Job { matrix, activations, blocks, out, scratch, slice };
        for first in panels.clone().step_by(at_once) {
            job.panels(first..panels.end.min(first + at_once));
        }
        release();
    }
}

struct Job<'a> {
    matrix: &'a PackedMatrix,
    activations: &'a Activations,
    /// A pass.
    blocks: Range<usize>,
    out: &'a Output<'a>,
    /// Sums are `[pairs of panels][pairs of blocks][2 blocks][2 panels][16][16]`.
    scratch: TileScratch,
    /// Segments of a slice.
    slice: usize,
}

impl Job<'_> {
    /// The sums of a pair of blocks (counted from the first of these) and a pair of panels of those at once.
    fn sums(&self, block: usize, panel: usize) -> *mut f32 {
        if self.slice >= self.matrix.segments() {
            // Written to `out` at once.
            return self.scratch.sums;
        }
        let pairs = self.blocks.len().div_ceil(2);
        self.scratch.sums.wrapping_add((panel / 2 * pairs + block / 2) * 4 * SUMS)
    }

    /// Multiplies the blocks by `panels`, a slice of k after the other.
    ///
    /// # Safety
    /// As [`multiply`], with tiles configured; the scratch has the sums of so many panels.
    unsafe fn panels(&self, panels: Range<usize>) {
        let total = self.matrix.segments();
        for first in (0..total).step_by(self.slice) {
            let segments = first..total.min(first + self.slice);
            for panel in panels.clone().step_by(2) {
                let pair = panel..panels.end.min(panel + 2);
                // SAFETY: as the caller promises.
                unsafe {
                    let weights = self.weights(pair.clone(), segments.clone());
                    self.blocks(weights, pair, panels.start, segments.clone());
                }
            }
        }
    }

    /// The tiles of `segments` of up to two panels: where they lie, or decoded.
    ///
    /// # Safety
    /// As [`multiply`].
    unsafe fn weights(&self, panels: Range<usize>, segments: Range<usize>) -> [*const u8; 2] {
        let Tiles::Expanded(expand) = self.matrix.kernels.tiles else {
            return [panels.start, panels.end - 1]
                .map(|panel| self.matrix.segment(panel, segments.start));
        };
        let places =
            [0, 1].map(|i| self.scratch.weights.wrapping_add(i * TILE_SEGMENTS * TILE_BYTES));
        for (panel, place) in panels.zip(places) {
            let packed = self.matrix.segment(panel, segments.start);
            // SAFETY: as the caller promises; a place has room for a slice.
            unsafe { expand(packed, segments.len(), &self.matrix.constants, place) };
        }
        places.map(<*mut u8>::cast_const)
    }

    /// Adds the products of `segments` of one or two panels to all blocks, two at a time.
    ///
    /// # Safety
    /// As [`multiply`]; `weights` has the tiles of the segments of each of `pair`; the panels at once begin with `first_panel`.
    unsafe fn blocks(
        &self,
        weights: [*const u8; 2],
        pair: Range<usize>,
        first_panel: usize,
        segments: Range<usize>,
    ) {
        let parts = self.activations.tile_parts();
        let (panels, panel) = (pair.len(), pair.start - first_panel);
        let slots = self.activations.tiled_rows();
        let whole = |block: usize| block < self.blocks.end && (block + 1) * BLOCK <= slots;
        for block in self.blocks.clone().step_by(2) {
            let last = self.blocks.end - 1;
            let sums = self.sums(block - self.blocks.start, panel);
            for part in 0..parts {
                let [first, second] = [block, last.min(block + 1)]
                    .map(|block| self.activations.tile(part, block, segments.start));
                let tiles = Tile {
                    rows: [first.0, second.0],
                    rows_step: first.1,
                    weights,
                    segments: segments.len(),
                    fresh: segments.start == 0 && part == 0,
                };
                // SAFETY: as the caller promises.
                unsafe {
                    if whole(block) && whole(block + 1) && panels == 2 {
                        tiles.two_by_two(sums);
                    } else {
                        tiles.one_block(sums, panels);
                        if block < last {
                            let second = Tile { rows: [second.0; 2], rows_step: second.1, ..tiles };
                            second.one_block(sums.add(2 * SUMS), panels);
                        }
                    }
                }
            }
            // At once: the lines of `out` arrive while the next blocks are multiplied.
            if segments.end == self.matrix.segments() {
                let blocks = block..(block + 2).min(self.blocks.end);
                // SAFETY: as the caller promises.
                unsafe { self.store(blocks, pair.clone(), sums) };
            }
        }
    }

    /// Writes the sums of two blocks and two panels to `out`, or adds them to it, with the bias.
    ///
    /// # Safety
    /// As [`multiply`].
    #[target_feature(enable = "avx512f")]
    unsafe fn store(&self, blocks: Range<usize>, panels: Range<usize>, sums: *const f32) {
        let width = self.matrix.rows();
        let slots = blocks.start * BLOCK..(blocks.end * BLOCK).min(self.activations.tiled_rows());
        for slot in slots {
            let row = self.activations.tiled_row_of(slot);
            let tile = (slot / BLOCK - blocks.start) * 2;
            for panel in panels.clone() {
                let from = panel * PANEL;
                let lanes = (width - from).min(PANEL);
                let mask = (u32::MAX >> (32 - lanes)) as __mmask16;
                // SAFETY: the row's elements of these panels are this worker's, and the mask
                // keeps to the lanes that exist.
                unsafe {
                    let at = (tile + panel - panels.start) * SUMS + slot % BLOCK * PANEL;
                    let to = self.out.pointer.add(row * width + from);
                    let mut sum = _mm512_loadu_ps(sums.add(at));
                    if let Some(bias) = self.out.bias {
                        let bias = _mm512_maskz_loadu_ps(mask, bias.as_ptr().add(from));
                        sum = _mm512_add_ps(sum, bias);
                    }
                    if let Some(scale) = self.out.accumulate {
                        let scaled = _mm512_mul_ps(sum, _mm512_set1_ps(scale));
                        sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), scaled);
                    }
                    _mm512_mask_storeu_ps(to, mask, sum);
                }
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

/// `$line`s for each segment, after which everything is moved on. Sums are
/// tiles 0 to 3, rows 4 and 5, weights 6 and 7.
macro_rules! run {
    ($tile:expr, $($line:literal),+ $(,)?) => {
        asm!(
            "2:",
            $($line,)+
            "add {a0}, {step}",
            "add {a1}, {step}",
            "add {b0}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            a0 = inout(reg) $tile.rows[0] => _,
            a1 = inout(reg) $tile.rows[1] => _,
            b0 = inout(reg) $tile.weights[0] => _,
            b1 = inout(reg) $tile.weights[1] => _,
            step = in(reg) $tile.rows_step,
            line = in(reg) 64usize,
            n = inout(reg) $tile.segments => _,
            options(nostack)
        )
    };
}

impl Tile {
    /// One block and one or two panels.
    ///
    /// # Safety
    /// As [`Tile::two_by_two`].
    unsafe fn one_block(&self, sums: *mut f32, panels: usize) {
        // SAFETY: as the caller promises; the compiler knows nothing of tile registers.
        unsafe {
            self.begin(sums, 2);
            if panels == 2 {
                run!(
                    self,
                    "tileloadd tmm4, [{a0} + {line} * 1]",
                    "tileloadd tmm6, [{b0} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                    "tileloadd tmm7, [{b1} + {line} * 1]",
                    "tdpbf16ps tmm1, tmm4, tmm7",
                );
            } else {
                run!(
                    self,
                    "tileloadd tmm4, [{a0} + {line} * 1]",
                    "tileloadd tmm6, [{b0} + {line} * 1]",
                    "tdpbf16ps tmm0, tmm4, tmm6",
                );
            }
            self.end(sums, 2);
        }
    }

    /// Loads the sums of one or two blocks and two panels, or zeros them if they start here.
    ///
    /// # Safety
    /// Tiles are configured, and `sums` has `tiles` tiles.
    unsafe fn begin(&self, sums: *mut f32, tiles: usize) {
        // SAFETY: as the caller promises.
        unsafe {
            if self.fresh {
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

    /// Stores what [`Tile::begin`] loads.
    ///
    /// # Safety
    /// As [`Tile::begin`].
    unsafe fn end(&self, sums: *mut f32, tiles: usize) {
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

    /// Two blocks and two panels.
    ///
    /// # Safety
    /// Tiles are configured, `sums` has the tiles and the operands all segments.
    unsafe fn two_by_two(&self, sums: *mut f32) {
        // SAFETY: as in `one_block`.
        unsafe {
            self.begin(sums, 4);
            run!(
                self,
                "tileloadd tmm4, [{a0} + {line} * 1]",
                "tileloadd tmm6, [{b0} + {line} * 1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{b1} + {line} * 1]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{a1} + {line} * 1]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
            );
            self.end(sums, 4);
        }
    }
}

/// Decodes `segments` (whole chunks) to tiles of `bf16` pairs `[segments][16][16][2]`.
///
/// # Safety
/// AVX-512 with BF16 is available; both places hold the segments.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
pub(in super::super) unsafe fn to_tiles<C: Coded>(
    packed: *const u8,
    segments: usize,
    constants: &Constants,
    tiles: *mut u8,
) {
    // SAFETY: as the caller promises; a chunk has at most eight segments of two parts.
    unsafe {
        let in_chunk = C::segments(constants);
        let chunk_bytes = in_chunk * C::SEGMENT_BYTES + C::tail_bytes(constants);
        let (mut packed, mut tiles) = (packed, tiles);
        let (mut scales, mut mins) = ([0f32; 16 * PANEL], [0f32; 8 * PANEL]);
        let order = lane_by_lane();
        for _ in 0..segments / in_chunk {
            prefetch(packed.wrapping_add(AHEAD_BYTES), chunk_bytes);
            let tail = packed.add(in_chunk * C::SEGMENT_BYTES);
            let out = Decoded { scales: scales.as_mut_ptr(), mins: mins.as_mut_ptr() };
            C::scales::<Avx512>(tail, constants, out);
            for segment in 0..in_chunk {
                let codes = C::codes::<Avx512>(packed);
                let min = match C::MIN {
                    true => Avx512::load(mins.as_ptr().add(segment * PANEL)),
                    false => _mm512_setzero_ps(),
                };
                unroll!(j in 8 => {
                    let part = segment * C::PARTS + j * C::PARTS / 8;
                    let scale = Avx512::load(scales.as_ptr().add(part * PANEL));
                    let [first, second] = four_pairs::<C>(codes[j], scale, min, order);
                    _mm512_storeu_si512(tiles.add(128 * j).cast(), first);
                    _mm512_storeu_si512(tiles.add(128 * j + 64).cast(), second);
                });
                packed = packed.add(C::SEGMENT_BYTES);
                tiles = tiles.add(TILE_BYTES);
            }
            packed = packed.add(C::tail_bytes(constants));
        }
    }
}

/// [`to_tiles`] of fp8 under the scales of [`Group`].
///
/// # Safety
/// As [`to_tiles`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
pub(in super::super) unsafe fn to_tiles_of_floats<W: Float>(
    packed: *const u8,
    segments: usize,
    constants: &Constants,
    tiles: *mut u8,
) {
    // SAFETY: as the caller promises.
    unsafe {
        let pairs = constants.group_segments * SEGMENT / 2;
        let (mut packed, mut tiles) = (packed, tiles);
        let order = lane_by_lane();
        for _ in 0..segments / constants.group_segments {
            let tail = packed.add(pairs * W::PAIR_BYTES);
            let scale = group_scale::<Avx512>(tail, constants.scale);
            for _ in 0..pairs {
                let (even, odd) = W::pair::<Avx512>(packed);
                let pair = bf16_pairs(_mm512_mul_ps(even, scale), _mm512_mul_ps(odd, scale), order);
                _mm512_storeu_si512(tiles.cast(), pair);
                packed = packed.add(W::PAIR_BYTES);
                tiles = tiles.add(64);
            }
            packed = packed.add(Group::<false>::tail_bytes(constants));
        }
    }
}

/// The order that puts the first numbers' sixteen lanes and the second's, side by side, lane by lane.
#[inline]
#[target_feature(enable = "avx512f")]
fn lane_by_lane() -> __m512i {
    let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * PANEL) as u16);
    // SAFETY: both are 64 bytes of plain data.
    unsafe { std::mem::transmute(order) }
}

/// Two numbers of each lane, rounded and side by side.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn bf16_pairs(first: __m512, second: __m512, order: __m512i) -> __m512i {
    let both = _mm512_cvtne2ps_pbh(second, first);
    // SAFETY: both are 64 bytes of plain data.
    let both = unsafe { std::mem::transmute::<__m512bh, __m512i>(both) };
    _mm512_permutexvar_epi16(order, both)
}

/// `(code - zero) * scale + min` of four positions as two vectors of `bf16` pairs.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512vnni,avx512bf16")]
fn four_pairs<C: Coded>(
    codes: __m512i,
    scale: __m512,
    min: __m512,
    order: __m512i,
) -> [__m512i; 2] {
    let zero = _mm512_set1_ps(-C::ZERO as f32);
    // A zero point that is a power of two times a scale is exact, so it can go with the min.
    let exact = C::ZERO & (C::ZERO - 1) == 0;
    let bias = if exact { _mm512_fmadd_ps(zero, scale, min) } else { min };
    let value = |word: __m512i| {
        let code = _mm512_cvtepi32_ps(word);
        let code = if exact { code } else { _mm512_add_ps(code, zero) };
        _mm512_fmadd_ps(code, scale, bias)
    };
    let byte = _mm512_set1_epi32(255);
    let numbers = [
        value(_mm512_and_si512(codes, byte)),
        value(_mm512_and_si512(_mm512_srli_epi32::<8>(codes), byte)),
        value(_mm512_and_si512(_mm512_srli_epi32::<16>(codes), byte)),
        value(_mm512_srli_epi32::<24>(codes)),
    ];
    let pair = |first, second| bf16_pairs(first, second, order);
    [pair(numbers[0], numbers[1]), pair(numbers[2], numbers[3])]
}

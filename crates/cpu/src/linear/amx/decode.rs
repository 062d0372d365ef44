//! Rows in the decoding form.
//!
//! `bf16` weights are tiles as they lie in memory. Rows come in two parts: the nearest `bf16`, and
//! the nearest `bf16` of what that leaves. Together they err by `2^-17` of a number. Both parts
//! multiply a tile of weights while it is loaded, so weights are read once and memory sets the
//! pace.
//!
//! Nibbles meet codes of activations, `16 * high + low`. One product of tiles does a segment: the
//! tile of weights has sixteen times each nibble, which the high bytes multiply, and each nibble,
//! which the low bytes multiply. The sums of a segment must leave the tiles, because each lane has
//! its own scale. Four steps run side by side, each for another segment, to hide what that costs:
//! decoding of the third next segment, the product of this one, storing the sums of the one before,
//! and scaling the sums of the third before. If they ran in order, loads would wait for stores.
//! docs/performance-notes.md has predictions and measurements.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use super::super::activations::Activations;
use super::super::block::{BLOCK, BlockView, CODE_BYTES, TILE_BYTES, padded_rows};
use super::super::codes::{Coded, Decoded};
use super::super::kernels::{AHEAD_BYTES, load_acc, prefetch, store_acc};
use super::super::matrix::Matrix;
use super::super::output::{Output, store};
use super::super::table::{Args, BatchFn, RunFn};
use super::{configure, release};
use crate::isa::avx512::Avx512;
use crate::isa::{Simd, unroll};
use crate::pack::PANEL;
use crate::pack::layout::Constants;

/// Panels of `bf16` that a block of rows multiplies at once.
const PANELS: usize = 4;

/// Multiplies `blocks` of rows in the decoding form, in two parts, by `panels` of `bf16` weights.
///
/// # Safety
/// AMX is available, the activations serve the matrix, whose packed panels are tiles, `out` is
/// `[rows, out]`, and nobody else touches the elements of these rows and panels.
pub(crate) unsafe fn multiply_split(
    matrix: &Matrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
) {
    if panels.is_empty() || blocks.is_empty() {
        return;
    }
    let mut sums = Aligned([[0f32; BLOCK * PANEL]; PANELS]);
    let mut panel = panels.start;
    while panel < panels.end {
        let count = if panels.end - panel >= PANELS { PANELS } else { 1 };
        for block in blocks.clone() {
            let rows = activations.block_rows(matrix, block);
            // SAFETY: as the caller promises.
            unsafe {
                configure(rows);
                let split = SplitBlock::new(matrix, activations, panel, block);
                if count == PANELS {
                    split.four_panels(&mut sums.0);
                } else {
                    split.one_panel(&mut sums.0[0]);
                }
                for (index, sums) in sums.0[..count].iter().enumerate() {
                    store(matrix, activations, sums, block, panel + index, out);
                }
            }
        }
        panel += count;
    }
    // SAFETY: as the caller promises.
    unsafe { release() };
}

/// A value that begins on a line of the cache.
#[repr(C, align(64))]
struct Aligned<T>(T);

/// One block of rows and some panels.
struct SplitBlock {
    /// The rows' first segment, one pointer for each part.
    rows: [*const u8; 2],
    /// Bytes from a segment of the rows to the next.
    step: usize,
    weights: *const u8,
    panel_bytes: usize,
    segments: usize,
}

/// Adds the products of one segment of the panel at `$at` with both parts to `$sum`, and fetches
/// lines that are read later.
macro_rules! panel {
    ($sum:literal, $tile:literal, $at:literal) => {
        concat!(
            "tileloadd ",
            $tile,
            ", [{",
            $at,
            "} + {line} * 1]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead}]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 64]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 128]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 192]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 256]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 320]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 384]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 448]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 512]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 576]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 640]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 704]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 768]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 832]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 896]\n",
            "prefetcht0 [{",
            $at,
            "} + {ahead} + 960]\n",
            "tdpbf16ps ",
            $sum,
            ", tmm4, ",
            $tile,
            "\n",
            "tdpbf16ps ",
            $sum,
            ", tmm5, ",
            $tile,
            "\n",
            "add {",
            $at,
            "}, 1024",
        )
    };
}

/// For each segment, loads both parts of its rows and then runs every `$line`.
macro_rules! run {
    ($split:expr, $segments:expr, [$($line:expr),+ $(,)?], $($name:ident = $at:expr),+) => {
        asm!(
            "2:",
            "tileloadd tmm4, [{first} + {line} * 1]",
            "tileloadd tmm5, [{second} + {line} * 1]",
            $($line,)+
            "add {first}, {step}",
            "add {second}, {step}",
            "dec {n}",
            "jnz 2b",
            first = inout(reg) $split.rows[0].wrapping_add($segments.start * $split.step) => _,
            second = inout(reg) $split.rows[1].wrapping_add($segments.start * $split.step) => _,
            $($name = inout(reg) $at => _,)+
            step = in(reg) $split.step,
            line = in(reg) 64usize,
            ahead = in(reg) $split.ahead(&$segments),
            n = inout(reg) $segments.len() => _,
            options(nostack, readonly)
        )
    };
}

impl SplitBlock {
    fn new(matrix: &Matrix, activations: &Activations, panel: usize, block: usize) -> SplitBlock {
        let [first, second] = [0, 1].map(|part| activations.split_rows(part, block));
        SplitBlock {
            rows: [first.0, second.0],
            step: first.1,
            weights: matrix.packed.panel(panel),
            panel_bytes: matrix.panel_bytes(),
            segments: matrix.segments(),
        }
    }

    /// The address of a segment of one of these panels.
    fn at(&self, panel: usize, segment: usize) -> *const u8 {
        self.weights.wrapping_add(panel * self.panel_bytes + segment * TILE_BYTES)
    }

    /// The segments in two runs. Behind the end of the last run lie panels that are being read
    /// already.
    fn runs(&self) -> [Range<usize>; 2] {
        let turn = self.segments.saturating_sub(AHEAD_BYTES / TILE_BYTES);
        [0..turn, turn..self.segments]
    }

    /// How far ahead a run of four panels fetches.
    fn ahead(&self, run: &Range<usize>) -> usize {
        let last = run.end == self.segments;
        AHEAD_BYTES + if last { (PANELS - 1) * self.panel_bytes } else { 0 }
    }

    /// # Safety
    /// As [`multiply_split`], with tiles configured; the matrix has four panels from this one on.
    unsafe fn four_panels(&self, sums: &mut [[f32; BLOCK * PANEL]; PANELS]) {
        // SAFETY: as the caller promises; the compiler knows nothing of tile registers, and any
        // address may be asked for.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                options(nomem, nostack)
            );
            for run in self.runs().into_iter().filter(|run| !run.is_empty()) {
                let [b0, b1, b2, b3] = [0, 1, 2, 3].map(|panel| self.at(panel, run.start));
                run!(
                    self,
                    run,
                    [
                        panel!("tmm0", "tmm6", "b0"),
                        panel!("tmm1", "tmm7", "b1"),
                        panel!("tmm2", "tmm6", "b2"),
                        panel!("tmm3", "tmm7", "b3"),
                    ],
                    b0 = b0,
                    b1 = b1,
                    b2 = b2,
                    b3 = b3
                );
            }
            asm!(
                "tilestored [{c} + {line} * 1], tmm0",
                "tilestored [{c} + {line} * 1 + 1024], tmm1",
                "tilestored [{c} + {line} * 1 + 2048], tmm2",
                "tilestored [{c} + {line} * 1 + 3072], tmm3",
                c = in(reg) sums.as_mut_ptr(), line = in(reg) 64usize, options(nostack)
            );
        }
    }

    /// # Safety
    /// As [`multiply_split`], with tiles configured.
    unsafe fn one_panel(&self, sums: &mut [f32; BLOCK * PANEL]) {
        let run = 0..self.segments;
        // SAFETY: as in `four_panels`.
        unsafe {
            asm!("tilezero tmm0", options(nomem, nostack));
            run!(self, run, [panel!("tmm0", "tmm6", "b0")], b0 = self.at(0, 0));
            asm!(
                "tilestored [{c} + {line} * 1], tmm0",
                c = in(reg) sums.as_mut_ptr(), line = in(reg) 64usize, options(nostack)
            );
        }
    }
}

/// The least number of rows for which products of tiles are faster than AVX-512.
const BATCH_ROWS: usize = 6;

/// Multiplies `blocks` of rows in the decoding form by `panels` of nibbles, if they have enough
/// rows for tiles. Returns the blocks that are left.
///
/// # Safety
/// AMX is available, the activations serve the matrix, whose kernel `batch` is, `out` is `[rows,
/// out]`, and nobody else touches the elements of these rows and panels.
pub(crate) unsafe fn multiply_nibbles(
    matrix: &Matrix,
    activations: &Activations,
    panels: Range<usize>,
    blocks: Range<usize>,
    out: &Output<'_>,
    batch: BatchFn,
) -> Range<usize> {
    let rows_of = |block| padded_rows(activations.block_rows(matrix, block));
    // Only the last block may have fewer than sixteen rows.
    let few = blocks.clone().next_back().filter(|last| rows_of(*last) < BATCH_ROWS);
    let many = blocks.start..few.unwrap_or(blocks.end);
    if many.is_empty() || panels.is_empty() {
        return many.end..blocks.end;
    }
    let mut configured = 0;
    for panel in panels {
        for block in many.clone() {
            let rows = rows_of(block);
            let mut product = [0f32; BLOCK * PANEL];
            // SAFETY: as the caller promises.
            unsafe {
                // Configuring takes a hundred cycles.
                if rows != configured {
                    configure(rows);
                    configured = rows;
                }
                let acc = product.as_mut_ptr();
                batch(rows)(&activations.args_of_panel(matrix, panel, (block, 0), acc));
                store(matrix, activations, &product, block, panel, out);
            }
        }
    }
    // SAFETY: as the caller promises.
    unsafe { release() };
    many.end..blocks.end
}

/// The kernel of nibbles for a block that is padded to `rows`, which is at least [`BATCH_ROWS`].
/// Tiles must be configured for that number.
pub(crate) fn nibbles_of<C: Coded>(rows: usize) -> RunFn {
    match rows {
        0..=6 => nibbles::<C, 6>,
        7..=8 => nibbles::<C, 8>,
        9..=12 => nibbles::<C, 12>,
        _ => nibbles::<C, 16>,
    }
}

/// Tiles of weights that are decoded ahead, and tiles of sums that wait to be scaled.
const RING: usize = 4;
/// Segments between decoding and product, and between product and scaling.
const LAG: usize = 3;

/// Memory between the steps of a segment.
#[repr(C, align(64))]
struct Ring {
    weights: [[u8; TILE_BYTES]; RING],
    sums: [[u8; TILE_BYTES]; RING],
}

/// A place in a panel that advances by one segment.
struct Walk {
    at: *const u8,
    /// Segments left in the chunk.
    left: usize,
}

impl Walk {
    /// The next segment's codes, and its number in its chunk.
    #[inline(always)]
    fn next<C: Coded>(&mut self, in_chunk: usize, tail_bytes: usize) -> (*const u8, usize) {
        let (codes, index) = (self.at, in_chunk - self.left);
        self.left -= 1;
        self.at = codes.wrapping_add(C::SEGMENT_BYTES);
        if self.left == 0 {
            (self.at, self.left) = (self.at.wrapping_add(tail_bytes), in_chunk);
        }
        (codes, index)
    }
}

/// The scales of a panel, read one segment after another.
struct ScaleWalk {
    walk: Walk,
    /// The scales of the current chunk.
    scales: [f32; 8 * PANEL],
    mins: [f32; 8 * PANEL],
}

impl ScaleWalk {
    fn new(walk: Walk) -> ScaleWalk {
        ScaleWalk { walk, scales: [0.0; 8 * PANEL], mins: [0.0; 8 * PANEL] }
    }

    /// Scale and min of the next segment.
    ///
    /// # Safety
    /// The panel has another segment; a chunk has at most eight, of one part.
    #[inline]
    #[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
    unsafe fn next<C: Coded>(&mut self, constants: &Constants) -> (__m512, Option<__m512>) {
        let in_chunk = C::segments(constants);
        let (codes, index) = self.walk.next::<C>(in_chunk, C::tail_bytes(constants));
        let (scales, mins) = (self.scales.as_mut_ptr(), self.mins.as_mut_ptr());
        // SAFETY: as the caller promises.
        unsafe {
            if index == 0 {
                let tail = codes.add(in_chunk * C::SEGMENT_BYTES);
                C::scales::<Avx512>(tail, constants, Decoded { scales, mins });
            }
            let min = C::MIN.then(|| Avx512::load(mins.add(index * PANEL)));
            (Avx512::load(scales.add(index * PANEL)), min)
        }
    }
}

/// Adds the products of a panel's segments to the accumulators of `R` rows. The integer sums of a
/// segment, and the order in which they are added, are those of the other kernels.
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn nibbles<C: Coded, const R: usize>(args: &Args<'_>) {
    const { assert!(C::BITS == 4 && C::PARTS == 1) };
    // SAFETY: as the caller promises; a chunk has at most eight segments.
    unsafe {
        let (constants, total) = (args.constants, args.segments);
        let (in_chunk, tail_bytes) = (C::segments(constants), C::tail_bytes(constants));
        let mut ring = MaybeUninit::<Ring>::uninit();
        let weights = (&raw mut (*ring.as_mut_ptr()).weights).cast::<u8>();
        let sums = (&raw mut (*ring.as_mut_ptr()).sums).cast::<u8>();
        let weights_at = |i: usize| weights.add(i % RING * TILE_BYTES);
        let sums_at = |i: usize| sums.add(i % RING * TILE_BYTES);
        let mut acc = load_acc::<Avx512, R>(args.acc);
        let mut rows = args.rows;
        let mut in_front = Walk { at: args.weights, left: in_chunk };
        let mut behind = ScaleWalk::new(Walk { at: args.weights, left: in_chunk });
        let mut decode_next = |i: usize| {
            let (codes, _) = in_front.next::<C>(in_chunk, tail_bytes);
            prefetch(codes.wrapping_add(AHEAD_BYTES), constants.segment_bytes);
            decode::<C>(codes, weights_at(i));
        };
        for i in 0..LAG.min(total) {
            decode_next(i);
        }
        let mut x = args.rows.x;
        macro_rules! step {
            (
                $s:expr, $i:literal, $sum:literal, $rows:literal, $weights:literal, $before:literal
            ) => {
                let s = $s;
                if s >= total + LAG {
                    break;
                }
                if s < total {
                    asm!(
                        concat!("tilezero ", $sum),
                        concat!("tileloadd ", $rows, ", [{x} + {line} * 1]"),
                        concat!("tileloadd ", $weights, ", [{w} + {line} * 1]"),
                        concat!("tdpbsud ", $sum, ", ", $rows, ", ", $weights),
                        x = in(reg) x, w = in(reg) weights_at($i), line = in(reg) 64usize,
                        options(nostack, readonly)
                    );
                    x = x.wrapping_add(args.rows.stride * CODE_BYTES);
                }
                if s + LAG < total {
                    decode_next($i + LAG);
                }
                if s >= 1 && s <= total {
                    asm!(
                        concat!("tilestored [{c} + {line} * 1], ", $before),
                        c = in(reg) sums_at($i + RING - 1), line = in(reg) 64usize,
                        options(nostack)
                    );
                }
                if s >= LAG {
                    let (scale, min) = behind.next::<C>(constants);
                    add_scaled::<R>(sums_at($i + RING - LAG), scale, min, &rows, &mut acc);
                    rows = rows.after::<CODE_BYTES>(1, 1);
                }
            };
        }
        for first in (0..total + LAG).step_by(RING) {
            step!(first, 0, "tmm0", "tmm4", "tmm6", "tmm3");
            step!(first + 1, 1, "tmm1", "tmm5", "tmm7", "tmm0");
            step!(first + 2, 2, "tmm2", "tmm4", "tmm6", "tmm1");
            step!(first + 3, 3, "tmm3", "tmm5", "tmm7", "tmm2");
        }
        store_acc::<Avx512, R>(args.acc, acc);
    }
}

/// Writes a segment's nibbles as a tile: sixteen times each nibble, then each nibble.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn decode<C: Coded>(packed: *const u8, tile: *mut u8) {
    // SAFETY: the caller gives a segment and room for a tile.
    unsafe {
        let codes = C::codes::<Avx512>(packed);
        unroll!(j in 8 => {
            // The shift moves no bit into a neighbouring byte.
            Avx512::store_b(tile.add(64 * j), _mm512_slli_epi16::<4>(codes[j]));
            Avx512::store_b(tile.add(TILE_BYTES / 2 + 64 * j), codes[j]);
        });
    }
}

/// Adds a segment's sums, `[R][16]`, to the accumulators as the other kernels do.
#[inline]
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")]
unsafe fn add_scaled<const R: usize>(
    sums: *const u8,
    scale: __m512,
    min: Option<__m512>,
    rows: &BlockView,
    acc: &mut [__m512; R],
) {
    // SAFETY: the caller gives a tile of sums and `R` rows.
    unsafe {
        unroll!(r in R => {
            let start = _mm512_set1_epi32(*rows.offsets.add(r));
            let dot = _mm512_add_epi32(Avx512::load_b(sums.add(64 * r)), start);
            let factor = Avx512::mul(scale, Avx512::splat(*rows.scales.add(r)));
            acc[r] = Avx512::fma(factor, Avx512::to_f(dot), acc[r]);
            if let Some(min) = min {
                acc[r] = Avx512::fma(min, Avx512::splat(*rows.sums.add(r)), acc[r]);
            }
        });
    }
}

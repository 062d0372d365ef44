//! The products of attention on AMX tiles, for rows in the prefill form: both operands are rounded to
//! `bf16`, sums are `f32`.
//!
//! Cost, by prediction for a tile of 64 positions, 64 query vectors and 64 elements: 32 products of 16 cycles
//! for the scores and as many for the values, 300 cycles to round each operand; the vector units
//! take 8192 cycles for each product in `f32`.
//!
//! Invariant (batch invariance): a row's sum takes pairs of positions or elements in their order from the
//! beginning of the tile; what a row does not see adds exact zeros.

use std::arch::asm;
use std::arch::x86_64::*;
use std::mem::MaybeUninit;
use std::ops::Range;

use crate::cache::TILE;
use crate::lanes::LANES;
use crate::linear::amx::WHOLE;

/// Most elements of a key or a value.
pub const DIM_MAX: usize = 256;
/// Rows whose operand is rounded at once.
const ROWS: usize = 64;
/// Rows of a tile, and columns.
const SIDE: usize = 16;
/// Terms of a product of tiles.
const DEPTH: usize = 32;
const TILE_BYTES: usize = 1024;
/// Bytes of an operand.
const OPERAND_BYTES: usize = ROWS * DIM_MAX * 2;
const _: () = assert!(ROWS >= TILE && LANES == SIDE);

/// `c[rows, columns] = a[rows, depth] * b[depth, columns]`, or added to what `c` holds.
#[derive(Clone, Copy)]
pub struct TileProduct<'a> {
    /// `[rows, depth]`, and floats from a row to the next.
    pub a: (*const f32, usize),
    /// `[depth, columns]`, likewise.
    pub b: (*const f32, usize),
    /// `[rows, columns]`, likewise.
    pub c: (*mut f32, usize),
    /// Rows of `a` and `c`.
    pub rows: usize,
    /// Columns of `b` and `c`, whole vectors.
    pub columns: usize,
    /// Columns of `a` and rows of `b` that are multiplied; those before and after count as zeros.
    pub depth: &'a Range<usize>,
    /// Whether sums start at what `c` holds, and not at 0.
    pub accumulate: bool,
}

/// Operands as tiles.
#[repr(C, align(64))]
struct Operands {
    a: [u8; OPERAND_BYTES],
    b: [u8; OPERAND_BYTES],
    /// Two tiles of sums, where rows do not fill them.
    c: [f32; 2 * SIDE * SIDE],
}

/// Makes tiles ready for [`TileProduct::run`] on this thread.
///
/// # Safety
/// AMX is available, and [`end`] follows.
pub unsafe fn begin() {
    // SAFETY: as the caller promises.
    unsafe { WHOLE.load() }
}

/// Gives the tiles back.
///
/// # Safety
/// AMX is available.
pub unsafe fn end() {
    // SAFETY: as the caller promises.
    unsafe { crate::linear::amx::release() }
}

impl TileProduct<'_> {
    /// Computes it.
    ///
    /// # Safety
    /// AMX and AVX-512 with BF16 are available, [`begin`] was called; the matrices lie in memory of these shapes
    /// and strides, `c` overlaps neither other and nobody else touches it. `depth` and `columns` are at most
    /// [`DIM_MAX`], and one of them at most 64.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub unsafe fn run(self) {
        let mut operands = MaybeUninit::<Operands>::uninit();
        let operands = operands.as_mut_ptr();
        let steps = self.depth.end.div_ceil(DEPTH);
        debug_assert!(
            steps * DEPTH * self.columns * 2 <= OPERAND_BYTES && steps * DEPTH <= DIM_MAX
        );
        // SAFETY: the operands have room for 64 rows and for all of `b`; the rest as the caller promises.
        unsafe {
            let a = (&raw mut (*operands).a).cast::<u8>();
            let b = (&raw mut (*operands).b).cast::<u8>();
            self.round_b(steps, b);
            for first in (0..self.rows).step_by(ROWS) {
                let rows = ROWS.min(self.rows - first);
                self.round_a(first, rows, steps, a);
                for row in (0..rows).step_by(SIDE) {
                    let a = a.add(row * steps * DEPTH * 2);
                    let count = SIDE.min(rows - row);
                    let spare = (&raw mut (*operands).c).cast::<f32>();
                    self.row_of_tiles(a, b, (first + row, count), steps, spare);
                }
            }
        }
    }

    /// Rounds `rows` rows from `first` on to `[blocks of 16 rows][steps][16][32]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn round_a(&self, first: usize, rows: usize, steps: usize, to: *mut u8) {
        // SAFETY: loads are masked to the depth that exists.
        unsafe {
            for row in 0..rows {
                let from = self.a.0.add((first + row) * self.a.1);
                let to = to.add(row / SIDE * steps * TILE_BYTES + row % SIDE * 64);
                for step in 0..steps {
                    let half = |k: usize| _mm512_maskz_loadu_ps(self.mask(k), from.wrapping_add(k));
                    let k = step * DEPTH;
                    let both = _mm512_cvtne2ps_pbh(half(k + LANES), half(k));
                    let both = std::mem::transmute::<__m512bh, __m512i>(both);
                    _mm512_storeu_si512(to.add(step * TILE_BYTES).cast(), both);
                }
            }
        }
    }

    /// Which of the 16 terms from `k` on are multiplied.
    fn mask(&self, k: usize) -> __mmask16 {
        let below = |end: usize| (1u32 << end.saturating_sub(k).min(LANES)) - 1;
        (below(self.depth.end) & !below(self.depth.start)) as __mmask16
    }

    /// Rounds `b` to `[columns / 16][steps][16 pairs][16][2]`.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    unsafe fn round_b(&self, steps: usize, to: *mut u8) {
        let order: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * LANES) as u16);
        // SAFETY: rows outside of the depth are not read.
        unsafe {
            let order = _mm512_loadu_si512(order.as_ptr().cast());
            for pair in 0..steps * DEPTH / 2 {
                let row = |k: usize, column: usize| match self.depth.contains(&k) {
                    true => _mm512_loadu_ps(self.b.0.add(k * self.b.1 + column)),
                    false => _mm512_setzero_ps(),
                };
                for column in (0..self.columns).step_by(LANES) {
                    let both =
                        _mm512_cvtne2ps_pbh(row(2 * pair + 1, column), row(2 * pair, column));
                    let both = std::mem::transmute::<__m512bh, __m512i>(both);
                    let words = _mm512_permutexvar_epi16(order, both);
                    let tile = column / LANES * steps + pair / SIDE;
                    _mm512_storeu_si512(to.add(tile * TILE_BYTES + pair % SIDE * 64).cast(), words);
                }
            }
        }
    }

    /// `count` rows from `row` on times all columns, two tiles at a time.
    unsafe fn row_of_tiles(
        &self,
        a: *const u8,
        b: *const u8,
        (row, count): (usize, usize),
        steps: usize,
        spare: *mut f32,
    ) {
        for column in (0..self.columns).step_by(2 * LANES) {
            let width = (self.columns - column).min(2 * LANES);
            // SAFETY: the tiles are within the operands, and the rows and columns within `c`; the
            // spare has room for two tiles.
            unsafe {
                let to = self.c.0.add(row * self.c.1 + column);
                let b = b.add(column / LANES * steps * TILE_BYTES);
                if count == SIDE {
                    multiply(a, b, steps, (to, self.c.1), width, self.accumulate);
                    continue;
                }
                for r in (0..count).filter(|_| self.accumulate) {
                    std::ptr::copy_nonoverlapping(to.add(r * self.c.1), spare.add(r * 32), width);
                }
                multiply(a, b, steps, (spare, 2 * LANES), width, self.accumulate);
                for r in 0..count {
                    std::ptr::copy_nonoverlapping(spare.add(r * 32), to.add(r * self.c.1), width);
                }
            }
        }
    }
}

/// One tile of rows times one or two of columns.
///
/// # Safety
/// Tiles are configured; the operands have `steps` tiles each, `c` 16 rows of `width` floats.
unsafe fn multiply(
    a: *const u8,
    b: *const u8,
    steps: usize,
    c: (*mut f32, usize),
    width: usize,
    accumulate: bool,
) {
    let (sums, line) = (c.0, c.1 * 4);
    let second = if width > LANES { steps * TILE_BYTES } else { 0 };
    let other = if width > LANES { 64 } else { 0 };
    // SAFETY: as the caller promises; with one tile of columns the second is the first once more.
    unsafe {
        if accumulate {
            asm!(
                "tileloadd tmm0, [{c} + {line} * 1]",
                "tileloadd tmm1, [{d} + {line} * 1]",
                c = in(reg) sums, d = in(reg) sums.wrapping_byte_add(other), line = in(reg) line,
                options(nostack, readonly)
            );
        } else {
            asm!("tilezero tmm0", "tilezero tmm1", options(nomem, nostack));
        }
        asm!(
            "2:",
            "tileloadd tmm4, [{a} + {row} * 1]",
            "tileloadd tmm6, [{b} + {row} * 1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{b1} + {row} * 1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "add {a}, 1024",
            "add {b}, 1024",
            "add {b1}, 1024",
            "dec {n}",
            "jnz 2b",
            "tilestored [{d} + {line} * 1], tmm1",
            "tilestored [{c} + {line} * 1], tmm0",
            a = inout(reg) a => _,
            b = inout(reg) b => _,
            b1 = inout(reg) b.wrapping_add(second) => _,
            n = inout(reg) steps => _,
            c = in(reg) sums, d = in(reg) sums.wrapping_byte_add(other), line = in(reg) line,
            row = in(reg) 64usize,
            options(nostack)
        );
    }
}

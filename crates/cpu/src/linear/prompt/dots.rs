//! Products by AVX-512's dots of `bf16` pairs. They are used where dots are faster than `f32` and
//! there is no AMX ([`crate::isa::Isa::prefers_bf16_dot`]).
//!
//! Cost: for each pair of positions, eight rows and two panels take ten loads and sixteen dots. The
//! dots are the limit, even at one a cycle. Both halves of a block read the weights from the
//! first-level cache.

use std::arch::x86_64::*;

use super::super::block::{BLOCK, TILE_BYTES};
use super::products::{Products, SUMS, TileOperands};
use crate::isa::Simd;
use crate::isa::avx512::Avx512;
use crate::pack::PANEL;

/// Products by AVX-512 with BF16.
pub(super) struct Dots;

/// Pairs of positions in a segment.
const PAIRS: usize = 16;
/// Bytes of a row's segment, and of one pair of positions in all lanes.
const LINE: usize = 64;

impl Products for Dots {
    unsafe fn configure() {}

    unsafe fn release() {}

    unsafe fn one_block(run: &TileOperands, sums: *mut f32, panels: usize) {
        // SAFETY: as the caller promises; a block has two halves.
        unsafe {
            for first in [0, BLOCK / 2] {
                match panels {
                    2 => half_block::<2>(run, 0, first, sums),
                    _ => half_block::<1>(run, 0, first, sums),
                }
            }
        }
    }

    unsafe fn two_by_two(run: &TileOperands, sums: *mut f32) {
        // SAFETY: as in `one_block`.
        unsafe {
            for block in 0..2 {
                for first in [0, BLOCK / 2] {
                    half_block::<2>(run, block, first, sums.add(block * 2 * SUMS));
                }
            }
        }
    }
}

/// Multiplies eight rows of a block, from `first` on, by `P` panels. The sums are `[P][16][16]`.
///
/// # Safety
/// AVX-512 with BF16 is available; otherwise as [`Products::one_block`].
#[target_feature(enable = "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512bf16")]
unsafe fn half_block<const P: usize>(
    run: &TileOperands,
    block: usize,
    first: usize,
    sums: *mut f32,
) {
    const ROWS: usize = BLOCK / 2;
    // SAFETY: as the caller promises; tiles have sixteen rows of a line, whatever the block has.
    unsafe {
        let at = |panel: usize, row: usize| sums.add(panel * SUMS + (first + row) * PANEL);
        let mut acc = [[_mm512_setzero_ps(); ROWS]; P];
        if !run.fresh {
            for (panel, acc) in acc.iter_mut().enumerate() {
                for (row, acc) in acc.iter_mut().enumerate() {
                    *acc = Avx512::load(at(panel, row));
                }
            }
        }
        let mut rows = run.rows[block].add(first * LINE);
        let mut weights = run.weights;
        for _ in 0..run.segments {
            for pair in 0..PAIRS {
                let lines: [_; P] =
                    std::array::from_fn(|panel| Avx512::load_b(weights[panel].add(pair * LINE)));
                for row in 0..ROWS {
                    let x = rows.add(row * LINE + pair * 4).cast();
                    for (acc, line) in acc.iter_mut().zip(lines) {
                        acc[row] = Avx512::dot_bf16(acc[row], line, x);
                    }
                }
            }
            rows = rows.add(run.rows_step);
            weights = weights.map(|panel| panel.wrapping_add(TILE_BYTES));
        }
        for (panel, acc) in acc.iter().enumerate() {
            for (row, acc) in acc.iter().enumerate() {
                Avx512::store(at(panel, row), *acc);
            }
        }
    }
}

//! How products of many rows are cut into tiles for `kernels/fast/gemm.cu`, and what memory they
//! need.

use lathe_program::{Op, Program, Weight};

use crate::packed::{BLOCK_COLUMNS, PackedFormat, TILE};
use crate::units::PROCESSORS;
use crate::weights::Weights;

/// As in `gemm.cu`.
pub(crate) const GEMM_THREADS: usize = 3 * 128;
pub(crate) const PREPARE_THREADS: usize = 256;
pub(crate) const FINISH_ROWS: usize = 2;
pub(crate) const GEMM_OUTPUTS: usize = 8 * TILE;
const RING_BYTES: usize = 222 * 1024;
const STAGES_MAX: usize = 12;
const PART_COLUMNS: usize = 64;

/// A kernel of `gemm.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GemmKernel {
    /// Columns of a tile: rows times `parts`.
    pub(crate) columns: usize,
    /// Blocks of the weights' columns in a stage.
    blocks: usize,
    /// Parts of an activation: 2 keep nearly all of its bits, 1 rounds it to `bf16`.
    pub(crate) parts: usize,
}

/// By the most rows that each is for.
const KERNELS: [(usize, GemmKernel); 6] = [
    (8, GemmKernel { columns: 16, blocks: 4, parts: 2 }),
    (16, GemmKernel { columns: 32, blocks: 4, parts: 2 }),
    (32, GemmKernel { columns: 64, blocks: 4, parts: 2 }),
    (64, GemmKernel { columns: 128, blocks: 2, parts: 2 }),
    (128, GemmKernel { columns: 128, blocks: 2, parts: 1 }),
    (usize::MAX, GemmKernel { columns: 256, blocks: 2, parts: 1 }),
];

impl GemmKernel {
    pub(crate) fn of(rows: usize) -> GemmKernel {
        let last = KERNELS[KERNELS.len() - 1];
        KERNELS.into_iter().find(|(most, _)| rows <= *most).unwrap_or(last).1
    }

    pub(crate) fn all() -> impl Iterator<Item = GemmKernel> {
        KERNELS.into_iter().map(|(_, kernel)| kernel)
    }

    pub(crate) fn name(self, format: PackedFormat, paired: bool) -> String {
        let GemmKernel { columns, parts, .. } = self;
        let paired = if paired { "paired_" } else { "" };
        format!("gemm_{paired}{}_{columns}_{parts}", format.name())
    }

    /// Shared memory of a block: the ring, its barriers, and room to begin at a multiple of 1024.
    pub(crate) fn shared_bytes(self, format: PackedFormat) -> usize {
        let scales = if matches!(format, PackedFormat::Int4 { .. }) { 1024 } else { 0 };
        let weights = GEMM_OUTPUTS / TILE * self.blocks * format.block_bytes() + scales;
        let stage = weights + self.columns * self.blocks * BLOCK_COLUMNS * 2;
        (RING_BYTES / stage).min(STAGES_MAX) * (stage + 16) + 1024
    }

    /// Rows times parts, up to whole tiles.
    pub(crate) fn padded(self, rows: usize) -> usize {
        (rows * self.parts).next_multiple_of(self.columns)
    }

    /// How a product is cut. `tiles` are those of 16 outputs of all segments.
    pub(crate) fn cut(self, rows: usize, tiles: usize, width: usize, paired: bool) -> GemmCut {
        let across = self.padded(rows) / self.columns;
        // A tile takes as many outputs of the gate as of the up matrix.
        let down = (tiles / if paired { 2 } else { 1 }).div_ceil(if paired { 4 } else { 8 });
        let slabs = (width / BLOCK_COLUMNS).div_ceil(self.blocks);
        let whole = (across * down).div_ceil(PROCESSORS) * slabs;
        let share = (across * down * slabs).div_ceil(PROCESSORS);
        // Shares keep all blocks busy and cost a second kernel.
        let shared = whole * SHARE_GAIN.1 > share * SHARE_GAIN.0;
        GemmCut { across, down, slabs, share: if shared { share } else { 0 } }
    }

    /// Elements of the sums that a product keeps between blocks or kernels.
    fn sums(self, cut: GemmCut) -> usize {
        let pieces = PROCESSORS + if cut.share > 0 { cut.across * cut.down } else { 0 };
        pieces * self.columns / self.parts * GEMM_OUTPUTS
    }
}

/// Blocks take shares of tiles where whole tiles would take more than 11 / 10 of the time.
const SHARE_GAIN: (usize, usize) = (11, 10);

/// See `struct Gemm` of `gemm.cu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct GemmCut {
    pub(crate) across: usize,
    pub(crate) down: usize,
    pub(crate) slabs: usize,
    pub(crate) share: usize,
}

/// The products with matrices in fragment order: tiles of 16 outputs, width, whether there are two.
fn products<'a>(
    program: &'a Program,
    weights: &'a Weights,
) -> impl Iterator<Item = (usize, usize, bool)> + 'a {
    let packed = |weight: &Weight| weights.stored(*weight).packed().is_some();
    let tiles = |weight: &Weight| program.weight(*weight).shape[0].div_ceil(TILE);
    program.ops.iter().filter_map(move |op| match op {
        Op::Linear { input, parts } => {
            let held = parts.iter().map(|part| part.weight).filter(packed);
            let tiles = held.map(|weight| tiles(&weight)).sum();
            Some((tiles, program.value_width(*input), parts.len() == 2))
        }
        Op::Logits { input, head, .. } if packed(head) => {
            Some((tiles(head), program.value_width(*input), false))
        }
        _ => None,
    })
}

/// Bytes of the prepared activations of the widest product.
pub(crate) fn prepared_bytes(program: &Program, weights: &Weights, rows_max: usize) -> usize {
    let columns = GemmKernel::all().map(|kernel| kernel.columns).max().unwrap_or(0);
    let padded = rows_max.next_multiple_of(columns);
    let widest = products(program, weights).map(|(_, width, _)| width).max().unwrap_or(0);
    widest.next_multiple_of(PART_COLUMNS) * padded * 2
}

/// Elements of the sums that products keep between blocks or kernels.
pub(crate) fn sums(program: &Program, weights: &Weights, rows_max: usize) -> usize {
    let of = |(tiles, width, two): (usize, usize, bool)| {
        // More rows than a tile's add whole tiles.
        let last = GemmKernel::of(usize::MAX);
        let rows = KERNELS.iter().map(|(most, _)| *most).filter(|most| *most < rows_max);
        let rows = rows.chain((1..=rows_max).step_by(last.columns)).chain([rows_max]);
        let sums = rows.flat_map(|rows| {
            let kernel = GemmKernel::of(rows);
            let cut = |paired| kernel.sums(kernel.cut(rows, tiles, width, paired));
            [cut(false), if two { cut(true) } else { 0 }]
        });
        sums.max().unwrap_or(0)
    };
    products(program, weights).map(of).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROWS: [usize; 12] = [5, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 4096];

    #[test]
    fn a_block_fits_the_shared_memory() {
        let int4 = PackedFormat::Int4 { group_units: 2, half_scales: false };
        for kernel in GemmKernel::all() {
            for format in [PackedFormat::Bf16, PackedFormat::Fp8, int4] {
                let bytes = kernel.shared_bytes(format);
                assert!(bytes <= crate::units::SHARED_BYTES, "{kernel:?}, {format:?}: {bytes}");
            }
        }
    }

    #[test]
    fn tiles_hold_all_rows_and_outputs() {
        for rows in ROWS {
            let kernel = GemmKernel::of(rows);
            for (tiles, paired) in [(1, false), (384, false), (1792, true), (8016, false)] {
                let cut = kernel.cut(rows, tiles, 4096, paired);
                assert!(cut.across * kernel.columns >= rows * kernel.parts, "{rows}: {cut:?}");
                let outputs = cut.down * if paired { 4 } else { 8 };
                assert!(outputs >= tiles / if paired { 2 } else { 1 }, "{rows}: {cut:?}");
            }
        }
    }

    /// Blocks with shares reach the end of the last tile.
    #[test]
    fn shares_cover_all_stages() {
        for rows in ROWS {
            let cut = GemmKernel::of(rows).cut(rows, 256, 14336, false);
            let all = cut.across * cut.down * cut.slabs;
            assert!(cut.share == 0 || cut.share * PROCESSORS >= all, "{rows}: {cut:?}");
        }
        assert!(GemmKernel::of(8).cut(8, 256, 4096, false).share > 0);
        assert_eq!(GemmKernel::of(4096).cut(4096, 1792, 4096, true).share, 0);
    }
}

//! Products of rows in the prefill form, on AMX tiles of `bf16` in two parts.
//!
//! A number is split into the nearest `bf16` and the nearest `bf16` of what that leaves. Together
//! they err by `2^-17` of the number. Of the four products of parts, the product of the two smaller
//! parts is left out, which is `2^-16` of the largest. The cache's codes of 16 bits are exact in
//! two parts. With one part, attention would move SmolLM2's log-probabilities by 0.002 nats on
//! average.
//!
//! docs/performance-notes.md has predictions and measurements.
//!
//! An operand is stored as `[blocks of 16][chunks of 32 of k][2 parts][1 KB]`. A chunk of rows has
//! 32 neighbouring numbers of each of sixteen rows. A chunk of columns has sixteen pairs of k, with
//! the pairs of all columns side by side.
//!
//! Invariant: chunks are added in order. In each chunk three products are added in order: the
//! greater parts, the smaller part of the rows by the greater part of the columns, and the greater
//! by the smaller. Other rows and columns of a block change nothing.

use std::ops::Range;

use crate::isa::Isa;
use crate::lanes::LANES;

/// Rows or columns of a tile.
pub(crate) const BLOCK: usize = 16;
/// Positions along k in a tile.
pub(crate) const CHUNK: usize = 32;
/// Bytes of a tile.
const PART: usize = 1024;
/// Bytes of a chunk: a tile of each part.
const CHUNK_BYTES: usize = 2 * PART;

/// Floats that an operand of `lines` rows or columns takes, with `k` numbers in each.
pub(crate) fn operand_floats(lines: usize, k: usize) -> usize {
    lines.div_ceil(BLOCK) * k.div_ceil(CHUNK) * CHUNK_BYTES / size_of::<f32>()
}

/// Up to two blocks of rows by up to two blocks of columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Blocks {
    /// The first chunks of the blocks of rows. With one block both pointers are the same.
    pub rows: [*const u8; 2],
    /// The first chunks of the blocks of columns, likewise.
    pub columns: [*const u8; 2],
    /// Chunks of each.
    pub chunks: usize,
    /// The sums, `[16 x blocks of rows, stride]`.
    pub sums: *mut f32,
    /// Floats from a row of sums to the next.
    pub stride: usize,
    /// Blocks of rows and of columns: 1 or 2.
    pub counts: (usize, usize),
    /// Whether the sums start from zero, whatever they hold.
    pub fresh: bool,
}

/// Functions that split operands and multiply blocks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SplitProducts {
    /// Splits a block of rows. Its safety is stated at [`SplitRows`].
    pub rows: unsafe fn(&SplitRows),
    /// Splits columns. Its safety is stated at [`SplitColumns`].
    pub columns: unsafe fn(&SplitColumns),
    /// Must be called before the first product of a piece of work, on its thread.
    pub begin: unsafe fn(),
    /// Computes one product of blocks.
    pub multiply: unsafe fn(&Blocks),
    /// Must be called after the last product.
    pub end: unsafe fn(),
}

impl SplitProducts {
    /// The functions of `isa`, which this machine must have. `None` if it has none.
    pub(crate) fn of(isa: Isa) -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if isa == Isa::Amx {
            return Some(super::amx::PRODUCTS);
        }
        let _ = isa;
        None
    }
}

/// An operand in memory.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SplitOperand {
    /// The first block.
    pub start: *const u8,
    /// Blocks.
    pub blocks: usize,
}

impl SplitOperand {
    fn block(self, index: usize, chunks: usize) -> *const u8 {
        self.start.wrapping_add(index.min(self.blocks - 1) * chunks * CHUNK_BYTES)
    }
}

/// Adds the product of `rows` and `columns` to the sums `[16 x rows.blocks, stride]`, or overwrites
/// the sums.
///
/// # Safety
/// The operands have `chunks` chunks in each block, the sums are the caller's alone, and `products`
/// has begun.
pub(crate) unsafe fn multiply(
    products: SplitProducts,
    (rows, columns, chunks): (SplitOperand, SplitOperand, usize),
    (sums, stride): (*mut f32, usize),
    fresh: bool,
) {
    for row in (0..rows.blocks).step_by(2) {
        for column in (0..columns.blocks).step_by(2) {
            let blocks = Blocks {
                rows: [row, row + 1].map(|i| rows.block(i, chunks)),
                columns: [column, column + 1].map(|i| columns.block(i, chunks)),
                chunks,
                sums: sums.wrapping_add((row * stride + column) * BLOCK),
                stride,
                counts: ((rows.blocks - row).min(2), (columns.blocks - column).min(2)),
                fresh,
            };
            // SAFETY: as the caller promises.
            unsafe { (products.multiply)(&blocks) };
        }
    }
}

/// Splits a block of rows.
pub(crate) struct SplitRows {
    /// `[16, stride]`. Only numbers in both ranges are read. The others count as zero.
    pub from: *const f32,
    /// Floats from a row to the next.
    pub stride: usize,
    /// The rows that exist.
    pub rows: Range<usize>,
    /// The numbers of each row that exist.
    pub columns: Range<usize>,
    /// Chunks to write.
    pub chunks: usize,
    /// The block, which only this call touches.
    pub to: *mut u8,
}

impl SplitRows {
    /// Chunk `chunk` of row `row`, and the places of its parts.
    ///
    /// # Safety
    /// `from` has what is there, and `to` room for the chunks.
    #[inline(always)]
    pub(crate) unsafe fn chunk(&self, row: usize, chunk: usize) -> ([f32; CHUNK], [*mut u8; 2]) {
        let first = chunk * CHUNK;
        let low = self.columns.start.clamp(first, first + CHUNK) - first;
        let high = self.columns.end.clamp(first, first + CHUNK) - first;
        let from = self.from.wrapping_add(row * self.stride + first);
        let to = self.to.wrapping_add(chunk * CHUNK_BYTES + row * 2 * CHUNK);
        let to = [to, to.wrapping_add(PART)];
        let mut values = [0f32; CHUNK];
        // SAFETY: as the caller promises.
        unsafe {
            if high - low == CHUNK && self.rows.contains(&row) {
                return (from.cast::<[f32; CHUNK]>().read(), to);
            }
            if low < high && self.rows.contains(&row) {
                let there = std::slice::from_raw_parts(from.add(low), high - low);
                values[low..high].copy_from_slice(there);
            }
        }
        (values, to)
    }
}

/// Splits columns. In memory each line has one position along k.
pub(crate) struct SplitColumns {
    /// `[k, stride]`. Lines outside of `lines` count as zero.
    pub from: *const f32,
    /// Floats from a line to the next.
    pub stride: usize,
    /// The lines that exist.
    pub lines: Range<usize>,
    /// Chunks to write.
    pub chunks: usize,
    /// Blocks of columns.
    pub blocks: usize,
    /// The operand, which only this call touches.
    pub to: *mut u8,
}

impl SplitColumns {
    /// Lines `2 * pair` and `2 * pair + 1` of block `block`, and the places of the parts of their
    /// pairs.
    ///
    /// # Safety
    /// `from` has what is there, and `to` room for the operand.
    #[inline(always)]
    pub(crate) unsafe fn pair(
        &self,
        pair: usize,
        block: usize,
    ) -> ([[f32; LANES]; 2], [*mut u8; 2]) {
        let line = |line: usize| {
            if !self.lines.contains(&line) {
                return [0f32; LANES];
            }
            let at = self.from.wrapping_add(line * self.stride + block * BLOCK);
            // SAFETY: the line is there and has the block's columns.
            unsafe { at.cast::<[f32; LANES]>().read() }
        };
        let (chunk, row) = (pair / BLOCK, pair % BLOCK);
        let at = (block * self.chunks + chunk) * CHUNK_BYTES + row * 4 * LANES;
        let to = self.to.wrapping_add(at);
        ([line(2 * pair), line(2 * pair + 1)], [to, to.wrapping_add(PART)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::activations::round_to_bf16;

    /// The same functions without tiles and vectors.
    const SCALAR: SplitProducts = SplitProducts {
        rows: scalar_rows,
        columns: scalar_columns,
        begin: nothing,
        multiply: scalar,
        end: nothing,
    };

    /// A number's two parts.
    fn parts(value: f32) -> (u16, u16) {
        let high = round_to_bf16(value);
        (high, round_to_bf16(value - f32::from_bits(u32::from(high) << 16)))
    }

    unsafe fn scalar_rows(split: &SplitRows) {
        for row in 0..BLOCK {
            for chunk in 0..split.chunks {
                // SAFETY: as the caller promises.
                unsafe {
                    let (values, [high, low]) = split.chunk(row, chunk);
                    for (i, value) in values.into_iter().enumerate() {
                        let parts = parts(value);
                        high.cast::<u16>().add(i).write(parts.0);
                        low.cast::<u16>().add(i).write(parts.1);
                    }
                }
            }
        }
    }

    unsafe fn scalar_columns(split: &SplitColumns) {
        for pair in 0..split.chunks * CHUNK / 2 {
            for block in 0..split.blocks {
                // SAFETY: as the caller promises.
                unsafe {
                    let (lines, [high, low]) = split.pair(pair, block);
                    for lane in 0..LANES {
                        for (i, line) in lines.iter().enumerate() {
                            let parts = parts(line[lane]);
                            high.cast::<u16>().add(2 * lane + i).write(parts.0);
                            low.cast::<u16>().add(2 * lane + i).write(parts.1);
                        }
                    }
                }
            }
        }
    }

    unsafe fn nothing() {}

    unsafe fn scalar(blocks: &Blocks) {
        let widen = |at: *const u8| {
            // SAFETY: the caller's operands have the number.
            f32::from_bits(u32::from(unsafe { at.cast::<u16>().read() }) << 16)
        };
        for i in 0..blocks.counts.0 * BLOCK {
            for j in 0..blocks.counts.1 * BLOCK {
                // SAFETY: the caller's sums have the place.
                let sum = unsafe { &mut *blocks.sums.add(i * blocks.stride + j) };
                if blocks.fresh {
                    *sum = 0.0;
                }
                for chunk in 0..blocks.chunks {
                    for (a, b) in [(0, 0), (PART, 0), (0, PART)] {
                        for k in 0..CHUNK {
                            let row = chunk * CHUNK_BYTES + i % BLOCK * 64 + k * 2 + a;
                            let column =
                                chunk * CHUNK_BYTES + k / 2 * 64 + j % BLOCK * 4 + k % 2 * 2 + b;
                            let x = widen(blocks.rows[i / BLOCK].wrapping_add(row));
                            let y = widen(blocks.columns[j / BLOCK].wrapping_add(column));
                            *sum += x * y;
                        }
                    }
                }
            }
        }
    }

    /// Aligned memory for an operand.
    fn room(lines: usize, k: usize) -> Vec<[f32; 16]> {
        vec![[f32::NAN; 16]; operand_floats(lines, k) / 16]
    }

    /// A product of `[blocks x 16, k]` by `[k, columns]`, where only some rows and lines exist.
    struct Case {
        there: Range<usize>,
        k: usize,
        lines: Range<usize>,
        columns: usize,
        blocks: usize,
        rows: Vec<f32>,
        by: Vec<f32>,
        sums: Vec<f32>,
    }

    impl Case {
        const GAP: usize = 16;

        fn new(there: Range<usize>, k: usize, lines: Range<usize>, columns: usize) -> Case {
            let mut state = k as u64;
            let mut random = |count: usize| -> Vec<f32> {
                let mut next = || {
                    state =
                        state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                    ((state >> 40) as f32 / (1 << 23) as f32 - 1.0) * 3.0
                };
                (0..count).map(|_| next()).collect()
            };
            let blocks = there.end.div_ceil(BLOCK);
            let rows = random(blocks * BLOCK * (k + Self::GAP));
            let (by, sums) =
                (random(k * (columns + Self::GAP)), random(blocks * BLOCK * (columns + Self::GAP)));
            Case { there, k, lines, columns, blocks, rows, by, sums }
        }

        fn chunks(&self) -> usize {
            self.k.div_ceil(CHUNK)
        }

        /// Both operands.
        fn split(&self, products: SplitProducts) -> [Vec<[f32; 16]>; 2] {
            let mut rows = room(self.blocks * BLOCK, self.k);
            let mut columns = room(self.columns, self.k);
            let stride = self.k + Self::GAP;
            for block in 0..self.blocks {
                let first = block * BLOCK;
                let within = |row: usize| row.clamp(first, first + BLOCK) - first;
                let split = SplitRows {
                    from: self.rows[first * stride..].as_ptr(),
                    stride,
                    rows: within(self.there.start)..within(self.there.end),
                    columns: self.lines.clone(),
                    chunks: self.chunks(),
                    to: rows[block * self.chunks() * CHUNK_BYTES / 64..].as_mut_ptr().cast(),
                };
                // SAFETY: the rows are there, the operand has room for the block.
                unsafe { (products.rows)(&split) };
            }
            let split = SplitColumns {
                from: self.by.as_ptr(),
                stride: self.columns + Self::GAP,
                lines: self.lines.clone(),
                chunks: self.chunks(),
                blocks: self.columns / BLOCK,
                to: columns.as_mut_ptr().cast(),
            };
            // SAFETY: the lines are there, the operand has room for its blocks.
            unsafe { (products.columns)(&split) };
            [rows, columns]
        }

        fn check(&self, name: &str, got: &[f32], fresh: bool) {
            let stride = self.columns + Self::GAP;
            for (at, (got, before)) in got.iter().zip(&self.sums).enumerate() {
                let (i, j) = (at / stride, at % stride);
                if j >= self.columns {
                    assert_eq!(got, before, "nothing else is written");
                    continue;
                }
                let start = if fresh { 0.0 } else { f64::from(*before) };
                let (mut exact, mut size) = (start, start.abs());
                for k in self.lines.clone().filter(|_| self.there.contains(&i)) {
                    let x = f64::from(self.rows[i * (self.k + Self::GAP) + k]);
                    let y = f64::from(self.by[k * stride + j]);
                    (exact, size) = (exact + x * y, size + (x * y).abs());
                }
                let error = (f64::from(*got) - exact).abs();
                assert!(error <= size * 2f64.powi(-15), "{name} at {i}, {j}: {error} of {size}");
            }
        }
    }

    #[test]
    fn split_products_are_products() {
        let mut all = vec![("scalar", SCALAR)];
        if Isa::Amx.is_available() {
            all.extend(SplitProducts::of(Isa::Amx).map(|products| ("amx", products)));
        }
        for case in [
            Case::new(0..16, 32, 0..32, 16),
            Case::new(5..41, 64, 3..50, 64),
            Case::new(0..33, 80, 0..80, 48),
            Case::new(0..64, 16, 0..16, 32),
        ] {
            let bits = |parts: &[Vec<[f32; 16]>; 2]| {
                parts.each_ref().map(|p| p.as_flattened().iter().map(|x| x.to_bits()).collect())
            };
            let expected: [Vec<u32>; 2] = bits(&case.split(SCALAR));
            for (name, products) in &all {
                let parts = case.split(*products);
                assert!(bits(&parts) == expected, "{name} splits otherwise");
                let [rows, columns] = [(&parts[0], case.blocks), (&parts[1], case.columns / BLOCK)]
                    .map(|(parts, blocks)| SplitOperand { start: parts.as_ptr().cast(), blocks });
                for fresh in [true, false] {
                    let mut sums = case.sums.clone();
                    let to = (sums.as_mut_ptr(), case.columns + Case::GAP);
                    // SAFETY: the operands and sums have these sizes.
                    unsafe {
                        (products.begin)();
                        multiply(*products, (rows, columns, case.chunks()), to, fresh);
                        (products.end)();
                    }
                    case.check(name, &sums, fresh);
                }
            }
        }
    }

    #[test]
    fn codes_of_sixteen_bits_are_exact_and_nan_stays() {
        for code in i16::MIN..=i16::MAX {
            let (high, low) = parts(f32::from(code));
            let widen = |bits: u16| f32::from_bits(u32::from(bits) << 16);
            assert_eq!(widen(high) + widen(low), f32::from(code));
        }
        for bits in [0x7fff_ffff, 0x7fc0_0000, 0xffff_ffff_u32] {
            assert!(f32::from_bits(u32::from(parts(f32::from_bits(bits)).0) << 16).is_nan());
        }
    }
}

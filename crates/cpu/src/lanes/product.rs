//! Float matrix products in a fixed order of additions. Attention is made of them.
//!
//! Every element of the result is one chain of fused multiply-adds over the depth, ascending, so
//! it does not depend on how many rows or columns are computed together.

use super::{Kernel, LANES, Lanes, Width, dispatch};

/// The right matrix of a product. Its numbers are decoded when they are read.
/// [`DecodedMatrix::lanes`] and [`DecodedMatrix::one`] give the same numbers.
pub(crate) trait DecodedMatrix: Copy {
    /// Rows that share a group. A group begins at a multiple of this number.
    const GROUP: usize;
    /// Bytes of 16 columns' codes in a row.
    const LANES_BYTES: usize;
    /// What decodes the rows of a group, for example their scales.
    type Group<L: Lanes>: Copy;

    /// Reads what decodes 16 columns from `column` on in the group of `row`.
    /// # Safety
    /// The columns are within the matrix, and `row` too.
    unsafe fn group<L: Lanes>(&self, row: usize, column: usize) -> Self::Group<L>;
    /// Sixteen columns of a row of that group.
    /// # Safety
    /// As [`DecodedMatrix::group`].
    unsafe fn lanes<L: Lanes>(&self, group: Self::Group<L>, row: usize, column: usize) -> L;
    /// One number.
    /// # Safety
    /// It is within the matrix.
    unsafe fn one(&self, row: usize, column: usize) -> f32;
    /// The address of a row's codes from `column` on, which is a multiple of 16.
    fn line(&self, row: usize, column: usize) -> *const u8;
}

/// `c[rows, columns] = a[rows, depth] * b[depth, columns]`, or added to what `c` holds.
#[derive(Clone, Copy)]
pub(crate) struct Product<B> {
    /// `[rows, depth]`.
    pub a: *const f32,
    /// Floats from a row of `a` to the next.
    pub a_stride: usize,
    /// `[depth, columns]`.
    pub b: B,
    /// `[rows, columns]`.
    pub c: *mut f32,
    /// Floats from a row of `c` to the next.
    pub c_stride: usize,
    /// Rows of `a` and `c`.
    pub rows: usize,
    /// Columns of `b` and `c`.
    pub columns: usize,
    /// Columns of `a`, rows of `b`.
    pub depth: usize,
    /// Whether the product is added to what `c` holds. Else `c` is overwritten.
    pub accumulate: bool,
    /// Bytes from `b` to a matrix of the same shape that is read next. Its cache lines are fetched
    /// while `b` is read. They need not be readable.
    pub ahead: Option<isize>,
}

impl<B: DecodedMatrix> Product<B> {
    /// Computes it.
    ///
    /// # Safety
    /// All three matrices lie in memory of their shapes and strides; `c` overlaps neither `a` nor
    /// `b` and nobody else touches it.
    pub(crate) unsafe fn run(self, width: Width) {
        dispatch(width, RunProduct(self));
    }

    #[inline(always)]
    unsafe fn compute<L: Lanes>(self) {
        let mut column = 0;
        while column + LANES <= self.columns {
            let vectors = (self.columns - column) / LANES;
            // SAFETY: the blocks tile `c`, whose shape the caller vouches for.
            column += LANES
                * unsafe {
                    match vectors.min(L::BLOCK_VECTORS) {
                        4.. => self.strip::<L, 4>(column),
                        2 | 3 => self.strip::<L, 2>(column),
                        _ => self.strip::<L, 1>(column),
                    }
                };
        }
        // SAFETY: the columns that are left are within the matrices.
        unsafe { self.last_columns(column) };
    }

    /// Computes the last columns, which do not fill a vector, one by one. Only heads of odd sizes
    /// have such columns.
    #[inline(always)]
    unsafe fn last_columns(&self, first: usize) {
        for row in 0..self.rows {
            for column in first..self.columns {
                // SAFETY: the caller vouches for the matrices.
                unsafe {
                    let c = self.c.add(row * self.c_stride + column);
                    let mut sum = if self.accumulate { *c } else { 0.0 };
                    for k in 0..self.depth {
                        let b = self.b.one(k, column);
                        sum = (*self.a.add(row * self.a_stride + k)).mul_add(b, sum);
                    }
                    *c = sum;
                }
            }
        }
    }

    /// Computes all rows of `V` vectors of columns. Returns `V`.
    #[inline(always)]
    unsafe fn strip<L: Lanes, const V: usize>(&self, column: usize) -> usize {
        let mut row = 0;
        while row < self.rows {
            // SAFETY: `row + R <= rows` and `column + 16 V <= columns` for the chosen R.
            row += unsafe {
                match (self.rows - row).min(L::BLOCK_ROWS) {
                    6.. => self.block::<L, 6, V>(row, column),
                    4 | 5 => self.block::<L, 4, V>(row, column),
                    3 => self.block::<L, 3, V>(row, column),
                    2 => self.block::<L, 2, V>(row, column),
                    _ => self.block::<L, 1, V>(row, column),
                }
            };
        }
        V
    }

    /// Computes a block of sums in registers. Returns `R`.
    #[inline(always)]
    unsafe fn block<L: Lanes, const R: usize, const V: usize>(
        &self,
        row: usize,
        column: usize,
    ) -> usize {
        // SAFETY: the caller keeps the block within the matrices.
        unsafe {
            let a = self.a.add(row * self.a_stride);
            let c = self.c.add(row * self.c_stride + column);
            let mut sums = [[L::splat(0.0); V]; R];
            if self.accumulate {
                for r in 0..R {
                    for v in 0..V {
                        sums[r][v] = L::load(c.add(r * self.c_stride + v * LANES));
                    }
                }
            }
            // Only the first block of rows of a strip fetches ahead.
            let ahead = if row == 0 { self.ahead } else { None };
            for first in (0..self.depth).step_by(B::GROUP) {
                let group: [B::Group<L>; V] =
                    std::array::from_fn(|v| self.b.group(first, column + v * LANES));
                for k in first..self.depth.min(first.saturating_add(B::GROUP)) {
                    if let Some(distance) = ahead {
                        let line = self.b.line(k, column).wrapping_offset(distance);
                        for at in (0..V * B::LANES_BYTES).step_by(64) {
                            L::prefetch(line.wrapping_add(at));
                        }
                    }
                    let mut right = [L::splat(0.0); V];
                    for v in 0..V {
                        right[v] = self.b.lanes(group[v], k, column + v * LANES);
                    }
                    for r in 0..R {
                        let left = L::splat(*a.add(r * self.a_stride + k));
                        for v in 0..V {
                            sums[r][v] = left.fma(right[v], sums[r][v]);
                        }
                    }
                }
            }
            for r in 0..R {
                for v in 0..V {
                    sums[r][v].store(c.add(r * self.c_stride + v * LANES));
                }
            }
        }
        R
    }
}

struct RunProduct<B>(Product<B>);

impl<B: DecodedMatrix> Kernel for RunProduct<B> {
    type Output = ();
    #[inline(always)]
    fn run<L: Lanes>(self) {
        // SAFETY: made by `Product::run`, whose caller vouches for the matrices.
        unsafe { self.0.compute::<L>() };
    }
}

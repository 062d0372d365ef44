//! Multi-head latent attention in its absorbed form (DeepSeek-V2, section 2.1.2).
//!
//! A head's score of a cached latent `c` is `q_nope . (key_up c) = (key_up^T q_nope) . c`, so the
//! query is brought to the latent space once and every head attends over the same latents, which
//! are keys and values of one key head; the weighted latent then goes through `value_up`.
//! Prefill uses the same form as decoding: the expanded form would need fewer operations there,
//! but round differently, and text must not depend on how a prompt was cut into steps.

use std::marker::PhantomData;
use std::ops::Range;

use lathe_program::{BackendError, LatentSpec};

use crate::attend::AttendShape;
use crate::cache::code::{Code, F16, F32};
use crate::gang::{Gang, share};
use crate::lanes::Width;
use crate::lanes::product::Product;
use crate::memory::Memory;
use crate::rows::Rows;

/// What a half may differ from a weight by, of the largest weight: halves of small floats of 16
/// bits differ by less, halves of other numbers by more.
const HALF_ERROR: f32 = 1.0 / 65536.0;
/// Rows of one piece of work.
const ROWS: usize = 32;

/// Matrices of all heads, `[heads, depth, columns]`.
#[derive(Debug)]
enum HeadMatrices {
    Full(Vec<f32>),
    Half(Vec<u16>),
}

impl HeadMatrices {
    /// Halves where they hold what a checkpoint's floats of 16 bits hold; numbers under scales
    /// have more bits.
    fn new(values: Vec<f32>, exact: bool) -> Self {
        let halves: Vec<u16> = values.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let lossy = values.iter().zip(&halves).any(|(x, half)| {
            (x - half::f16::from_bits(*half).to_f32()).abs() > largest * HALF_ERROR
        });
        if exact || lossy { Self::Full(values) } else { Self::Half(halves) }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::Full(v) => size_of_val(v.as_slice()),
            Self::Half(v) => size_of_val(v.as_slice()),
        }
    }
}

/// One latent attention, ready to run.
#[derive(Debug)]
pub struct LatentStage {
    /// The numbers of the attention over latents.
    pub shape: AttendShape,
    /// The layer of the cache.
    pub layer: usize,
    /// `[rows, heads * (nope_dim + rope_dim)]`.
    pub query: Rows,
    /// `[rows, heads * value_dim]`.
    pub out: Rows,
    spec: LatentSpec,
    /// `[heads, nope_dim, rank]`.
    key_up: HeadMatrices,
    /// `[heads, rank, value_dim]`.
    value_up: HeadMatrices,
}

impl LatentStage {
    /// Lays the matrices out; `key_up` is `[heads * nope_dim, rank]` and `value_up`
    /// `[heads * value_dim, rank]`.
    pub fn new(
        spec: &LatentSpec,
        layer: usize,
        (query, out): (Rows, Rows),
        key_up: Vec<f32>,
        value_up: &[f32],
        exact: bool,
    ) -> Self {
        let (heads, rank, value_dim) = (spec.heads, spec.rank, spec.value_dim);
        let mut turned = vec![0.0; value_up.len()];
        for head in 0..heads {
            let place = head * value_dim * rank;
            for v in 0..value_dim {
                for r in 0..rank {
                    turned[place + r * value_dim + v] = value_up[place + v * rank + r];
                }
            }
        }
        let shape = Self::shape(spec);
        let (key_up, value_up) =
            (HeadMatrices::new(key_up, exact), HeadMatrices::new(turned, exact));
        Self { shape, layer, query, out, spec: spec.clone(), key_up, value_up }
    }

    /// The attention over latents as one over a single key head.
    pub fn shape(spec: &LatentSpec) -> AttendShape {
        AttendShape {
            kv_heads: 1,
            group: spec.heads,
            key_dim: spec.rank + spec.rope_dim,
            value_dim: spec.rank,
            scale: spec.scale,
            window: spec.window,
            softcap: spec.softcap,
        }
    }

    /// Bytes of the matrices as laid out.
    pub fn bytes(&self) -> usize {
        self.key_up.bytes() + self.value_up.bytes()
    }

    /// Brings the queries of `rows` rows to the latent space.
    ///
    /// # Safety
    /// The query and `scratch.query` are valid for these rows, and nobody else touches the latter.
    pub unsafe fn absorb(
        &self,
        (width, gang): (Width, &Gang),
        rows: usize,
        scratch: &LatentScratch,
    ) {
        let spec = &self.spec;
        let (head_dim, to_dim) = (spec.nope_dim + spec.rope_dim, spec.rank + spec.rope_dim);
        let to = Rows::new(scratch.query.pointer().cast(), spec.heads * to_dim);
        self.each_head(gang, rows, |head, rows| {
            let product = HeadProduct {
                from: self.query,
                from_column: head * head_dim,
                to,
                to_column: head * to_dim,
                rows: rows.clone(),
                depth: spec.nope_dim,
                columns: spec.rank,
            };
            // SAFETY: pieces are disjoint in rows or in the columns of their heads.
            unsafe {
                product.run(width, &self.key_up, head);
                for row in rows {
                    let from = self.query.row(row).add(head * head_dim + spec.nope_dim);
                    let to = to.row(row).add(head * to_dim + spec.rank);
                    std::ptr::copy_nonoverlapping(from, to, spec.rope_dim);
                }
            }
        });
    }

    /// Brings the weighted latents of `rows` rows to values.
    ///
    /// # Safety
    /// As [`LatentStage::absorb`], for `scratch.latents` and the output.
    pub unsafe fn expand(
        &self,
        (width, gang): (Width, &Gang),
        rows: usize,
        scratch: &LatentScratch,
    ) {
        let spec = &self.spec;
        let from = Rows::new(scratch.latents.pointer().cast(), spec.heads * spec.rank);
        self.each_head(gang, rows, |head, rows| {
            let product = HeadProduct {
                from,
                from_column: head * spec.rank,
                to: self.out,
                to_column: head * spec.value_dim,
                rows,
                depth: spec.rank,
                columns: spec.value_dim,
            };
            // SAFETY: as in `absorb`.
            unsafe { product.run(width, &self.value_up, head) };
        });
    }

    /// The query and output of the attention over latents.
    pub fn latent_rows(&self, scratch: &LatentScratch) -> (Rows, Rows) {
        let spec = &self.spec;
        let query =
            Rows::new(scratch.query.pointer().cast(), spec.heads * (spec.rank + spec.rope_dim));
        (query, Rows::new(scratch.latents.pointer().cast(), spec.heads * spec.rank))
    }

    fn each_head(&self, gang: &Gang, rows: usize, work: impl Fn(usize, Range<usize>) + Sync) {
        let pieces = rows.div_ceil(ROWS);
        gang.run(|worker, workers| {
            for item in share(self.spec.heads * pieces, worker, workers) {
                let first = item % pieces * ROWS;
                work(item / pieces, first..rows.min(first + ROWS));
            }
        });
    }
}

/// Memory for queries in the latent space and weighted latents of a step.
#[derive(Debug)]
pub struct LatentScratch {
    query: Memory,
    latents: Memory,
}

impl LatentScratch {
    /// Memory for `rows_max` rows of the widest of `specs`.
    ///
    /// # Errors
    /// [`BackendError::Memory`].
    pub fn new<'a>(
        specs: impl Iterator<Item = &'a LatentSpec>,
        rows_max: usize,
    ) -> Result<Self, BackendError> {
        let (mut query, mut latents) = (0, 0);
        for spec in specs {
            query = query.max(spec.heads * (spec.rank + spec.rope_dim));
            latents = latents.max(spec.heads * spec.rank);
        }
        let floats = |n: usize| Memory::zeroed(n * rows_max * size_of::<f32>(), "latent queries");
        Ok(Self { query: floats(query)?, latents: floats(latents)? })
    }
}

/// One head's columns of some rows times its matrix.
struct HeadProduct {
    from: Rows,
    from_column: usize,
    to: Rows,
    to_column: usize,
    rows: Range<usize>,
    depth: usize,
    columns: usize,
}

impl HeadProduct {
    /// # Safety
    /// Both rows are valid, and nobody else touches these columns of `to`.
    unsafe fn run(&self, width: Width, matrices: &HeadMatrices, head: usize) {
        let place = head * self.depth * self.columns;
        // SAFETY: the caller vouches for the rows; the matrix is `[depth, columns]`.
        unsafe {
            match matrices {
                HeadMatrices::Full(all) => {
                    self.product::<F32>(all[place..].as_ptr().cast()).run(width);
                }
                HeadMatrices::Half(all) => {
                    self.product::<F16>(all[place..].as_ptr().cast()).run(width);
                }
            }
        }
    }

    fn product<B: Code>(&self, matrix: *const u8) -> Product<B> {
        Product {
            a: self.from.row(self.rows.start).wrapping_add(self.from_column),
            a_stride: self.from.width(),
            b: matrix,
            b_stride: self.columns,
            c: self.to.row(self.rows.start).wrapping_add(self.to_column),
            c_stride: self.to.width(),
            rows: self.rows.len(),
            columns: self.columns,
            depth: self.depth,
            accumulate: false,
            ahead: None,
            code: PhantomData,
        }
    }
}

//! Multi-head latent attention (DeepSeek-V2, section 2.1.2), in two forms.
//!
//! *Absorbed.* A head's score of a cached latent `c` is `q_nope . (key_up c) = (key_up^T q_nope) .
//! c`. So the query is multiplied by `key_up^T` once, and every head attends over the same latents,
//! which are the keys and values of one key head. The weighted latent is then multiplied by
//! `value_up`.
//!
//! *Expanded.* The keys and values of a head are made from the latents, one tile of positions at a
//! time, once for up to 512 rows of the step. The rows attend to those.
//!
//! The forms round differently, and text must not depend on how a prompt was cut into steps. So the
//! step says which form a row has ([`lathe_program::StepSequence::expanded`]), and that follows
//! from the model and the request alone. `LatentSpec::expanded_rows` is the rule, in FLOPs. The
//! rest of a prompt after its last whole block, all generated tokens, and trees are absorbed.

use std::ops::Range;

use half::slice::{HalfBitsSliceExt, HalfFloatSliceExt};
use lathe_program::kv_codec::hadamard;
use lathe_program::{BackendError, LatentSpec};

use crate::attend::{AttendShape, ExpandLatents};
use crate::cache::code::{Code, F16, F32};
use crate::cache::store::Plain;
use crate::cache::{TILE, TileBuffers};
use crate::gang::{Gang, share};
use crate::lanes::Width;
use crate::lanes::product::Product;
use crate::memory::Memory;
use crate::rows::Rows;

/// The most by which a half may differ from a weight, relative to the largest weight. Halves of
/// small floats of 16 bits differ by less, halves of other numbers by more.
const HALF_ERROR: f32 = 1.0 / 65536.0;
/// The rows of one piece of work.
const ROWS: usize = 32;

/// Matrices of all heads, `[heads, depth, columns]`.
#[derive(Debug)]
enum HeadMatrices {
    Full(Vec<f32>),
    Half(Vec<u16>),
}

impl HeadMatrices {
    /// Uses halves if they hold the numbers of a checkpoint's floats of 16 bits. Numbers under
    /// scales have more bits.
    fn new(values: Vec<f32>, exact: bool) -> Self {
        let halves: Vec<u16> = values.iter().map(|x| half::f16::from_f32(*x).to_bits()).collect();
        let largest = values.iter().fold(0f32, |largest, x| largest.max(x.abs()));
        let lossy = values.iter().zip(&halves).any(|(x, half)| {
            (x - half::f16::from_bits(*half).to_f32()).abs() > largest * HALF_ERROR
        });
        if exact || lossy { Self::Full(values) } else { Self::Half(halves) }
    }

    /// The matrix of a head, `elements` floats. It is written to `to` unless it is stored as
    /// floats.
    ///
    /// # Safety
    /// `to` has room for them, and nobody else touches it.
    unsafe fn head(&self, head: usize, elements: usize, to: *mut f32) -> *const f32 {
        match self {
            Self::Full(all) => all[head * elements..][..elements].as_ptr(),
            Self::Half(all) => {
                let halves = &all[head * elements..][..elements];
                // SAFETY: the caller gives room for `elements` floats.
                let to = unsafe { std::slice::from_raw_parts_mut(to, elements) };
                halves.reinterpret_cast::<half::f16>().convert_to_f32_slice(to);
                to.as_ptr()
            }
        }
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
pub(crate) struct LatentStage {
    /// The attention over latents.
    pub shape: AttendShape,
    /// The attention over keys and values that are made from latents.
    pub expanded_shape: AttendShape,
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
    /// Lays the matrices out. `key_up` is `[heads * nope_dim, rank]` and `value_up` is `[heads *
    /// value_dim, rank]`. If the cache stores its latents `rotated` (int4), both matrices are
    /// rotated here: `K c = (K H)(H c)`.
    pub(crate) fn new(
        spec: &LatentSpec,
        layer: usize,
        (query, out): (Rows, Rows),
        (mut key_up, mut value_up): (Vec<f32>, Vec<f32>),
        (exact, rotated): (bool, bool),
    ) -> Self {
        if rotated {
            key_up.chunks_exact_mut(spec.rank).for_each(hadamard);
            value_up.chunks_exact_mut(spec.rank).for_each(hadamard);
        }
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
        let [shape, expanded_shape] = Self::shapes(spec);
        let (key_up, value_up) =
            (HeadMatrices::new(key_up, exact), HeadMatrices::new(turned, exact));
        Self { shape, expanded_shape, layer, query, out, spec: spec.clone(), key_up, value_up }
    }

    /// The attention over latents, which has a single key head, and the attention over the keys and
    /// values that are made from them.
    pub(crate) fn shapes(spec: &LatentSpec) -> [AttendShape; 2] {
        let absorbed = AttendShape {
            kv_heads: 1,
            group: spec.heads,
            key_dim: spec.rank + spec.rope_dim,
            value_dim: spec.rank,
            scale: spec.scale,
            window: spec.window,
            softcap: spec.softcap,
            expanded_rank: None,
        };
        let expanded = AttendShape {
            kv_heads: spec.heads,
            group: 1,
            key_dim: spec.nope_dim + spec.rope_dim,
            value_dim: spec.value_dim,
            expanded_rank: Some(spec.rank),
            ..absorbed
        };
        [absorbed, expanded]
    }

    /// Bytes of the matrices.
    pub(crate) fn bytes(&self) -> usize {
        self.key_up.bytes() + self.value_up.bytes()
    }

    /// Multiplies the queries of some rows by `key_up^T`.
    ///
    /// # Safety
    /// The query and `scratch.query` are valid for these rows, and nobody else touches the latter.
    pub(crate) unsafe fn absorb(
        &self,
        (width, gang): (Width, &Gang),
        rows: Range<usize>,
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

    /// Multiplies the weighted latents of some rows by `value_up`.
    ///
    /// # Safety
    /// As [`LatentStage::absorb`], for `scratch.latents` and the output.
    pub(crate) unsafe fn expand(
        &self,
        (width, gang): (Width, &Gang),
        rows: Range<usize>,
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
    pub(crate) fn latent_rows(&self, scratch: &LatentScratch) -> (Rows, Rows) {
        let spec = &self.spec;
        let query =
            Rows::new(scratch.query.pointer().cast(), spec.heads * (spec.rank + spec.rope_dim));
        (query, Rows::new(scratch.latents.pointer().cast(), spec.heads * spec.rank))
    }

    fn each_head(
        &self,
        gang: &Gang,
        rows: Range<usize>,
        work: impl Fn(usize, Range<usize>) + Sync,
    ) {
        let pieces = rows.len().div_ceil(ROWS);
        gang.run(|worker, workers| {
            for item in share(self.spec.heads * pieces, worker, workers) {
                let first = rows.start + item % pieces * ROWS;
                work(item / pieces, first..rows.end.min(first + ROWS));
            }
        });
    }
}

impl ExpandLatents for LatentStage {
    unsafe fn tile(
        &self,
        width: Width,
        head: usize,
        filled: Range<usize>,
        latents: TileBuffers,
        to: TileBuffers,
        matrix: *mut f32,
    ) {
        let LatentSpec { rank, rope_dim, nope_dim, value_dim, .. } = self.spec;
        // SAFETY: the buffers are tiles of these shapes: latents `[rank + rope, TILE]` in columns
        // and `[TILE, rank]` in rows, keys `[nope + rope, TILE]`, values `[TILE, value_dim]`.
        unsafe {
            let key_up = self.key_up.head(head, nope_dim * rank, matrix);
            let keys = Product {
                a: key_up,
                a_stride: rank,
                b: Plain::<F32>::new(latents.keys.cast(), TILE),
                c: to.keys,
                c_stride: TILE,
                rows: nope_dim,
                columns: TILE,
                depth: rank,
                accumulate: false,
                ahead: None,
            };
            keys.run(width);
            let ropes = latents.keys.add(rank * TILE);
            let under = to.keys.add(nope_dim * TILE);
            std::ptr::copy_nonoverlapping(ropes, under, rope_dim * TILE);
            let values = HeadProduct {
                from: Rows::new(latents.values, latents.value_stride),
                from_column: 0,
                to: Rows::new(to.values, to.value_stride),
                to_column: 0,
                rows: filled,
                depth: rank,
                columns: value_dim,
            };
            values.run(width, &self.value_up, head);
        }
    }
}

/// Memory for queries in the latent space and weighted latents of a step.
#[derive(Debug)]
pub(crate) struct LatentScratch {
    query: Memory,
    latents: Memory,
}

impl LatentScratch {
    /// Memory for `rows_max` rows of the widest of `specs`.
    ///
    /// # Errors
    /// [`BackendError::Memory`].
    pub(crate) fn new<'a>(
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

/// The product of one head's columns of some rows and its matrix.
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

    fn product<C: Code>(&self, matrix: *const u8) -> Product<Plain<C>> {
        Product {
            a: self.from.row(self.rows.start).wrapping_add(self.from_column),
            a_stride: self.from.width(),
            b: Plain::new(matrix, self.columns),
            c: self.to.row(self.rows.start).wrapping_add(self.to_column),
            c_stride: self.to.width(),
            rows: self.rows.len(),
            columns: self.columns,
            depth: self.depth,
            accumulate: false,
            ahead: None,
        }
    }
}

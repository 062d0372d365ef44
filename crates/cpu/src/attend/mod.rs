//! Attention over the paged cache, for any mix of prefill chunks, decoding rows and draft trees.
//!
//! Invariant: the result of a row depends only on its own query and on the positions that it sees.
//! Positions are walked in tiles of 64 and spans of 512, both aligned to absolute positions. Each
//! span is summed by itself, and spans are merged in order. So a row has the same bits alone and in
//! a chunk, on one worker and on many, wherever its blocks lie. Positions that a row does not see
//! contribute exactly nothing. Rows in the prefill form have products of their own where the
//! machine has AMX ([`split`]).

#[cfg(target_arch = "x86_64")]
mod amx;
mod plan;
mod softmax;
// Only AMX multiplies numbers that are split in two parts.
#[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
pub(crate) mod split;
mod tile;

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use lathe_program::{BackendError, KvLayerShape, KvLayout, SequenceTables, Step, StepSequence};

use crate::cache::{KvCache, LayerPlace, TileBuffers};
use crate::gang::{Gang, share};
use crate::lanes::{LANES, Width, dispatch};
use crate::memory::Memory;
use crate::rows::Rows;

use plan::AttendPlan;
use softmax::MergeSplits;
use split::SplitProducts;
use tile::{Piece, Scratch, ScratchSizes};

/// Positions of a span. Attention sums each span by itself and merges spans in order.
pub(crate) const SPAN: usize = 512;

/// The most query vectors that share one pass over the keys: rows of a task times query heads of a
/// key head.
const VECTORS_MAX: usize = 64;

/// The same limit for rows whose products are split ([`split`]). Keys and values are split once for
/// all of them.
const VECTORS_SPLIT: usize = 192;

/// The same limit where keys are made from latents.
const VECTORS_EXPANDED: usize = 512;

/// The most floats for spans of one row that several workers compute.
const PARTIAL_FLOATS_MAX: usize = 8 << 20;

/// The sizes and constants of one attention. Latents count as one key head of `rank + rope_dim`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct AttendShape {
    /// Key heads.
    pub kv_heads: usize,
    /// Query heads that share a key head.
    pub group: usize,
    /// Elements of a query or key.
    pub key_dim: usize,
    /// Elements of a value.
    pub value_dim: usize,
    /// The factor of the scores.
    pub scale: f32,
    /// Positions that a query sees, its own included. `None` for all.
    pub window: Option<usize>,
    /// `softcap * tanh(score / softcap)`.
    pub softcap: Option<f32>,
    /// Elements of the latents, if keys and values are made from latents, tile by tile.
    pub expanded_rank: Option<usize>,
}

impl AttendShape {
    fn rows_per_task(&self, split: bool) -> usize {
        // Expanding a tile serves all rows of a task, so a task has many rows.
        let vectors = match self.expanded_rank {
            Some(_) => VECTORS_EXPANDED,
            None if split => VECTORS_SPLIT,
            None => VECTORS_MAX,
        };
        (vectors / self.group).max(1)
    }

    /// The most query vectors of a task.
    fn vectors_max(&self, split: bool) -> usize {
        self.group * self.rows_per_task(split)
    }

    /// Floats of a value row in scratch memory, which is whole vectors.
    fn value_stride(&self) -> usize {
        self.value_dim.next_multiple_of(LANES)
    }

    /// Floats of a stored span: its largest score, the sum of its weights, and the weighted values.
    fn partial_stride(&self) -> usize {
        LANES + self.value_stride()
    }
}

/// The operands of one attention.
pub(crate) struct AttendJob<'a> {
    /// The numbers.
    pub shape: &'a AttendShape,
    /// The cache.
    pub cache: &'a KvCache,
    /// The layer of the cache.
    pub layer: &'a LayerPlace,
    /// The rows and their sequences.
    pub step: &'a Step,
    /// Where the sequences' positions lie in the cache.
    pub tables: &'a SequenceTables,
    /// `[rows, kv_heads * group * key_dim]`.
    pub query: Rows,
    /// A logit for each query head that joins the denominator.
    pub sinks: Option<&'a [f32]>,
    /// `[rows, kv_heads * group * value_dim]`.
    pub out: Rows,
    /// Which rows are computed.
    pub form: RowForm,
    /// Makes keys and values from the layer's latents, if the shape says that they are expanded.
    pub expand: Option<&'a dyn ExpandLatents>,
}

/// Which rows of a step an attention computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RowForm {
    /// All.
    All,
    /// The rows whose latents are expanded.
    Expanded,
    /// The other rows.
    Absorbed,
}

impl RowForm {
    /// The rows of a sequence, counted within it: first those in the prefill form, then the others.
    pub(crate) fn rows(self, sequence: &StepSequence) -> [Range<usize>; 2] {
        let (expanded, all) = (sequence.rows_expanded(), sequence.rows as usize);
        match self {
            RowForm::All => [0..expanded, expanded..all],
            RowForm::Expanded => [0..expanded, 0..0],
            RowForm::Absorbed => [0..0, expanded..all],
        }
    }
}

/// Makes the keys and values of one head and one tile from latents.
pub(crate) trait ExpandLatents: Sync {
    /// `latents` is a tile of latents. Its `keys` have the rotary keys under them. `to` receives
    /// the head's keys, the rotary part last, and the values of the tile's positions `filled`.
    ///
    /// # Safety
    /// Both have room for a tile of their shapes, nobody else touches `to`, and `matrix` has room
    /// for a head's matrix.
    unsafe fn tile(
        &self,
        width: Width,
        head: usize,
        filled: Range<usize>,
        latents: TileBuffers,
        to: TileBuffers,
        matrix: *mut f32,
    );
}

/// Memory for attention, which is kept from step to step.
#[derive(Debug)]
pub(crate) struct Attention {
    width: Width,
    /// The products of rows in the prefill form, if they have their own.
    split: Option<SplitProducts>,
    plan: AttendPlan,
    scratch: Memory,
    sizes: ScratchSizes,
    partials: Memory,
}

impl Attention {
    /// Memory for `workers` workers and attentions of `shapes`.
    ///
    /// # Errors
    /// [`BackendError::Memory`].
    pub(crate) fn new(
        (width, split): (Width, Option<SplitProducts>),
        shapes: &[AttendShape],
        workers: usize,
        rows_max: usize,
        context_max: usize,
    ) -> Result<Self, BackendError> {
        let sizes = ScratchSizes::for_shapes(shapes, split.is_some());
        let scratch = Memory::zeroed(
            workers * sizes.floats() * size_of::<f32>(),
            "attention's scratch memory",
        )?;
        let spans = context_max.div_ceil(SPAN) + 1;
        let wanted = |s: &AttendShape| {
            (plan::ITEMS_PER_WORKER * workers * s.vectors_max(split.is_some()))
                .saturating_mul(spans)
                .saturating_mul(s.partial_stride())
        };
        let partials = shapes.iter().map(wanted).max().unwrap_or(0).min(PARTIAL_FLOATS_MAX);
        let partials = Memory::zeroed(partials * size_of::<f32>(), "attention's partial sums")?;
        let plan = AttendPlan::with_capacity(rows_max, workers);
        Ok(Self { width, split, plan, scratch, sizes, partials })
    }

    /// Whether rows in the prefill form are computed differently from the others.
    pub(crate) fn has_prefill_form(&self) -> bool {
        self.split.is_some()
    }

    /// Computes `job` on all workers of `gang`.
    ///
    /// # Safety
    /// The job's rows are valid for the step's rows, `out` overlaps nothing else and nobody else
    /// touches it; nobody writes the cache meanwhile; the tables hold every position that a row
    /// sees.
    pub(crate) unsafe fn run(&mut self, gang: &Gang, job: &AttendJob<'_>) {
        let shape = job.shape;
        let capacity = self.partials.bytes() / size_of::<f32>() / shape.partial_stride();
        let products = self.split;
        self.plan.fill(job.step, (job.form, products.is_some()), shape, (gang.workers(), capacity));
        let plan = &self.plan;
        let next = AtomicUsize::new(0);
        let items = plan.tasks.len() * shape.kv_heads;
        let partials = Shared(self.partials.pointer().cast::<f32>());
        let work = |worker: usize, _: usize| {
            let scratch = Scratch::of_worker(&self.scratch, &self.sizes, worker, shape);
            loop {
                let item = next.fetch_add(1, Ordering::Relaxed);
                if item >= items {
                    break;
                }
                let (task, head) = (&plan.tasks[item / shape.kv_heads], item % shape.kv_heads);
                let split = products.filter(|_| task.split);
                let piece = Piece { job, task, head, scratch, partials: partials.get(), split };
                // SAFETY: the caller vouches for the job; each piece is run once.
                unsafe { piece.run(self.width) };
            }
        };
        if gang.workers() == 1 || items == 1 {
            work(0, 1)
        } else {
            gang.run(work)
        }
        if plan.splits.is_empty() {
            return;
        }
        let merges: usize = plan.splits.iter().map(|s| s.stored.vectors * shape.kv_heads).sum();
        gang.run(|worker, workers| {
            let scratch = Scratch::of_worker(&self.scratch, &self.sizes, worker, shape);
            let mine = share(merges, worker, workers);
            let partials = partials.get();
            dispatch(self.width, MergeSplits { job, plan, mine, scratch, partials });
        });
    }
}

/// A pointer that workers share. They write disjoint places behind it.
#[derive(Clone, Copy)]
struct Shared(*mut f32);
// SAFETY: tasks write partial sums at places of their own; merges read them after all tasks.
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    fn get(self) -> *mut f32 {
        self.0
    }
}

/// The shape of an attention over the heads of a layer.
pub(crate) fn check_layer(
    layout: &KvLayout,
    layer: u32,
    shape: &AttendShape,
) -> Result<(), BackendError> {
    let found = layout.layers[layer as usize].shape;
    let fits = match found {
        KvLayerShape::Heads { kv_heads, key_dim, value_dim } => {
            (kv_heads, key_dim, value_dim) == (shape.kv_heads, shape.key_dim, shape.value_dim)
        }
        KvLayerShape::Latent { rank, rope_dim } => {
            (1, rank + rope_dim, rank) == (shape.kv_heads, shape.key_dim, shape.value_dim)
        }
    };
    if fits {
        return Ok(());
    }
    Err(BackendError::Device(format!(
        "layer {layer} of the cache holds {found:?}, but its attention is {shape:?}"
    )))
}

//! Which ops run as one kernel, how large the launches of products and attention are, and what
//! memory they need.

use lathe_program::{BufferPlan, KvFormat, LinearPart, NormKind, Op, Program, Value, Weight};

use crate::packed::{PackedFormat, TILE};
use crate::weights::Weights;

/// Rows that `stream_N` takes.
pub(crate) const STREAM_ROWS: usize = 4;
/// As in `product.cu`.
pub(crate) const STREAM_THREADS: usize = 9 * 32;
pub(crate) const STREAM_WARPS: usize = 8;
pub(crate) const PART_TILES: usize = 16;
/// Shared memory of a block, and the fewest chunks in flight that keep the memory busy.
pub(crate) const SHARED_BYTES: usize = 227 * 1024;
pub(crate) const STAGES_MIN: usize = 8;
pub(crate) const STAGES_MAX: usize = 20;
pub(crate) const PROCESSORS: usize = 132;
/// Blocks of split attention that fill the device: six fit a multiprocessor.
pub(crate) const ATTEND_BLOCKS: usize = 6 * PROCESSORS;
/// As in `attend.cu`.
pub(crate) const ATTEND_THREADS: usize = 128;
pub(crate) const ATTEND_SHARES_MAX: usize = 32;
/// As in `prefill.cu`: threads, rows times query heads of a key head in a tile, slots of a stage.
pub(crate) const PREFILL_THREADS: usize = 3 * 128;
pub(crate) const PREFILL_TILE: usize = 128;
const PREFILL_KEYS: usize = 128;
const PREFILL_STAGES: usize = 2;
pub(crate) const BEST_PARTS: usize = 32;
pub(crate) const BEST_THREADS: usize = 256;

/// What follows a product in its kernel, by index of the op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    Nothing,
    Activate(usize),
    Add(usize),
}

/// Ops that run together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// One op.
    Op(usize),
    /// A norm, products of what it makes, and what is done with these.
    Streamed(Streamed),
    /// Turns of queries and keys, and the write of keys and values: three ops from this one on.
    TurnAndStore(usize),
}

/// See [`Unit::Streamed`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Streamed {
    pub(crate) first: usize,
    pub(crate) norm: Option<usize>,
    pub(crate) product: usize,
    pub(crate) after: After,
    pub(crate) end: usize,
}

/// Finds what may run together.
pub(crate) fn units(
    program: &Program,
    weights: &Weights,
    plan: &BufferPlan,
    format: KvFormat,
) -> Vec<Unit> {
    let last_use = program.liveness().iter().map(|lifetime| lifetime.last_use).collect();
    let finder = Finder { program, weights, plan, last_use };
    let mut units = Vec::new();
    let mut at = 0;
    while at < program.ops.len() {
        let (unit, end) = if let Some(streamed) = finder.streamed(at) {
            (Unit::Streamed(streamed), streamed.end)
        } else if format == KvFormat::BF16 && finder.turns_and_stores(at) {
            (Unit::TurnAndStore(at), at + 3)
        } else {
            (Unit::Op(at), at + 1)
        };
        units.push(unit);
        at = end;
    }
    units
}

struct Finder<'a> {
    program: &'a Program,
    weights: &'a Weights,
    /// Which values share memory: a block may not write what others still read.
    plan: &'a BufferPlan,
    last_use: Vec<usize>,
}

impl Finder<'_> {
    /// Whether `value` is read by op `at` and by none after it.
    fn ends_at(&self, value: Value, at: usize) -> bool {
        self.last_use[value.0 as usize] == at
    }

    /// Whether `value` is read by op `at`, which follows the op that makes it, alone.
    fn only(&self, value: Value, at: usize) -> bool {
        self.ends_at(value, at) && self.program.ops[at].inputs().any(|input| input == value)
    }

    fn packed(&self, weight: Weight) -> Option<PackedFormat> {
        self.weights.stored(weight).packed()
    }

    fn streamed(&self, first: usize) -> Option<Streamed> {
        let ops = &self.program.ops;
        let norm = self.normed(first);
        let product = first + usize::from(norm.is_some());
        let found = |after, end| Some(Streamed { first, norm, product, after, end });
        match ops.get(product)? {
            Op::Linear { parts, .. } if self.fits(parts) => {
                let after = self.after(product, parts);
                let end = product + if after == After::Nothing { 1 } else { 2 };
                found(after, end)
            }
            Op::Logits { head, .. } if self.packed(*head).is_some() => {
                found(After::Nothing, product + 1)
            }
            _ => None,
        }
    }

    fn fits(&self, parts: &[LinearPart]) -> bool {
        let format = |part: &LinearPart| self.packed(part.weight);
        let first = parts.first().and_then(format);
        first.is_some() && parts.len() <= 3 && parts.iter().all(|part| format(part) == first)
    }

    /// Op `at`, if it is an RMS norm of whole rows for the next op alone.
    fn normed(&self, at: usize) -> Option<usize> {
        let Op::Norm { input, weight, bias, kind, groups, out, .. } = &self.program.ops[at] else {
            return None;
        };
        let next = self.program.ops.get(at + 1)?;
        let width = self.program.value_width(*input);
        let whole = weight.is_none_or(|weight| self.program.weight(weight).shape == [width]);
        let plain = matches!(kind, NormKind::Rms { .. }) && *groups == 1 && bias.is_none();
        let product = matches!(next, Op::Linear { .. } | Op::Logits { .. });
        (plain && whole && product && self.only(*out, at + 1)).then_some(at)
    }

    fn after(&self, product: usize, parts: &[LinearPart]) -> After {
        let next = product + 1;
        match (parts, self.program.ops.get(next)) {
            ([gate, up], Some(Op::Activate { gate: first, up: Some(second), .. })) => {
                let pair = gate.out == *first && up.out == *second;
                let whole = self.ends_at(gate.out, next) && self.ends_at(up.out, next);
                if pair && whole { After::Activate(next) } else { After::Nothing }
            }
            ([part], Some(Op::Add { left, right, .. })) => {
                let adds = *right == part.out && *left != part.out;
                if adds && self.ends_at(part.out, next) { After::Add(next) } else { After::Nothing }
            }
            _ => After::Nothing,
        }
    }

    fn turns_and_stores(&self, at: usize) -> bool {
        let [
            Op::Rope { input: query, rope: first, offset: a, out: turned, .. },
            Op::Rope { heads: kv_heads, rope: second, offset: b, out, .. },
            Op::WriteKv { key, value, layer },
            ..,
        ] = &self.program.ops[at..]
        else {
            return false;
        };
        let slot = |value: &Value| self.plan.slot(*value);
        let apart = slot(turned) != slot(key)
            && slot(turned) != slot(value)
            && ![query, turned, value].map(slot).contains(&slot(out));
        let layer = self.program.kv.layer(*layer).shape.vectors();
        let width = |value: &Value| self.program.value_width(*value);
        let shaped = layer.map(|(count, dim)| count * dim) == [width(key), width(value)]
            && layer.map(|(count, _)| count) == [*kv_heads; 2];
        first == second && a == b && key == out && apart && shaped
    }
}

/// Bytes of shared memory beside the ring.
pub(crate) fn stream_fixed_bytes(rows: usize, width: usize) -> usize {
    let columns = 2 * rows * (2 * width + 64);
    let parts = PART_TILES / rows * STREAM_WARPS * TILE * rows * 4;
    columns + parts + 4 * STREAM_WARPS * 4
}

/// Chunks of the ring: an even number, since two groups of warps take them by turns.
pub(crate) fn stream_stages(rows: usize, width: usize, chunk_bytes: usize) -> Option<usize> {
    let left = SHARED_BYTES.checked_sub(stream_fixed_bytes(rows, width) + 1024)?;
    let stages = (left / (chunk_bytes + 16)).min(STAGES_MAX) / 2 * 2;
    (stages >= STAGES_MIN).then_some(stages)
}

pub(crate) fn streams(rows: usize, width: usize, chunk_bytes: usize) -> bool {
    (1..=STREAM_ROWS).contains(&rows) && stream_stages(rows, width, chunk_bytes).is_some()
}

/// Elements of the parts that split attention leaves.
pub(crate) fn attention_parts(program: &Program, rows_max: usize) -> usize {
    let of = |op: &Op| match op {
        Op::Attend { spec, .. } => spec.heads * (spec.value_dim + 2),
        _ => 0,
    };
    let widest = program.ops.iter().map(of).max().unwrap_or(0);
    widest * (rows_max + ATTEND_BLOCKS)
}

/// Rows of a sequence that a block of `prefill.cu` takes, whatever the layer.
pub(crate) fn prefill_rows(program: &Program) -> usize {
    let queries = |op: &Op| match op {
        Op::Attend { spec, .. } => Some(spec.heads / spec.kv_heads),
        _ => None,
    };
    let most = program.ops.iter().filter_map(queries).max().unwrap_or(1);
    (PREFILL_TILE / most).max(1)
}

/// Keys and values of the stages, the tile's queries, and room to begin at a multiple of 1024.
pub(crate) fn prefill_shared_bytes(head_dim: usize) -> usize {
    (PREFILL_STAGES * 2 * PREFILL_KEYS + PREFILL_TILE) * head_dim * 2 + 1024
}

/// 64-bit words of the parts of [`CudaExecutor::best`].
pub(crate) fn best_parts(rows_max: usize) -> usize {
    rows_max * BEST_PARTS
}

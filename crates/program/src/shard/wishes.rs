//! The best form of each value: whole on every rank, or some columns on each. It is derived
//! backwards from the ops that work by head or by hidden element.

use std::collections::HashMap;
use std::ops::Range;

use super::{ShardOptions, partition};
use crate::kv::KvLayerShape;
use crate::op::*;
use crate::program::Program;

/// The columns of each rank. Ranks that share a KV head have the same columns.
pub(super) type Columns = Vec<Range<usize>>;

/// The columns of each rank, for values that should be split.
#[derive(Debug, Clone, Default)]
pub(super) struct Wishes(HashMap<Value, Columns>);

/// Whether the columns are equally wide neighbouring parts of `0 .. n`, rank by rank. An all-gather
/// can join such parts.
pub(super) fn is_even(columns: &Columns, n: usize) -> bool {
    let width = columns[0].len();
    let expected = |rank: usize| rank * width..(rank + 1) * width;
    width * columns.len() == n && columns.iter().enumerate().all(|(r, part)| *part == expected(r))
}

/// The columns of `heads` that are `width` elements wide.
pub(super) fn scaled(heads: &Columns, width: usize) -> Columns {
    heads.iter().map(|part| part.start * width..part.end * width).collect()
}

/// The query heads of each rank and the KV heads that they read. KV heads are divided as evenly as
/// possible. If there are fewer than ranks, equally many ranks share each.
pub(super) fn head_split(
    heads: usize,
    kv_heads: usize,
    ranks: usize,
) -> Result<(Columns, Columns), String> {
    let group = heads / kv_heads;
    if kv_heads >= ranks {
        let kv_parts = partition("KV heads", kv_heads, ranks, 1)?;
        return Ok((scaled(&kv_parts, group), kv_parts));
    }
    if !ranks.is_multiple_of(kv_heads) || !heads.is_multiple_of(ranks) {
        return Err(format!("{heads} heads with {kv_heads} KV heads do not divide evenly"));
    }
    let queries = partition("heads", heads, ranks, 1)?;
    let kv = |part: &Range<usize>| part.start / group..part.start / group + 1;
    let kv_parts = queries.iter().map(kv).collect();
    Ok((queries, kv_parts))
}

/// The KV heads of each rank in a cache layer of heads: those that its query heads read.
pub(super) fn kv_heads_of(
    program: &Program,
    layer: KvLayer,
    ranks: usize,
) -> Result<Columns, String> {
    let KvLayerShape::Heads { kv_heads, .. } = program.kv.layer(layer).shape else {
        return Err(format!("layer {} holds latents", layer.0));
    };
    let reader = |op: &Op| match op {
        Op::Attend { layer: read, spec, .. } if *read == layer => Some(spec.heads),
        _ => None,
    };
    let heads = program.ops.iter().find_map(reader).unwrap_or(kv_heads);
    Ok(head_split(heads, kv_heads, ranks)?.1)
}

impl Wishes {
    pub(super) fn of(program: &Program, options: &ShardOptions) -> Result<Self, String> {
        let mut wishes = Self::default();
        for op in program.ops.iter().rev() {
            wishes.add(program, options, op)?;
        }
        Ok(wishes)
    }

    pub(super) fn get(&self, value: Value) -> Option<&Columns> {
        self.0.get(&value)
    }

    fn add(&mut self, program: &Program, options: &ShardOptions, op: &Op) -> Result<(), String> {
        let ranks = options.ranks;
        match op {
            Op::Attend { query, spec, .. } => {
                let (heads, _) = head_split(spec.heads, spec.kv_heads, ranks)?;
                self.0.insert(*query, scaled(&heads, spec.head_dim));
            }
            Op::WriteKv { key, value, layer } => {
                let heads = kv_heads_of(program, *layer, ranks)?;
                let [(_, key_dim), (_, value_dim)] = program.kv.layer(*layer).shape.vectors();
                self.0.insert(*key, scaled(&heads, key_dim));
                self.0.insert(*value, scaled(&heads, value_dim));
            }
            Op::AttendLatent { query, spec, .. } => {
                let (heads, _) = head_split(spec.heads, spec.heads, ranks)?;
                self.0.insert(*query, scaled(&heads, spec.nope_dim + spec.rope_dim));
            }
            Op::Activate { gate, up, .. } => {
                let n = program.value_width(*gate);
                let columns = partition("hidden elements", n, ranks, options.alignment)?;
                up.iter().for_each(|up| drop(self.0.insert(*up, columns.clone())));
                self.0.insert(*gate, columns);
            }
            Op::Rope { input, out, .. } => self.pass(*out, *input),
            // A product and its low-rank correction.
            Op::Add { left, right, out, .. } => {
                self.pass(*out, *left);
                self.pass(*out, *right);
            }
            Op::Norm { input, groups, out, .. } => {
                let wish = self.get(*out);
                let gathers = wish.is_some_and(|wish| is_even(wish, program.value_width(*out)));
                if *groups > 1 || gathers {
                    self.pass(*out, *input);
                }
            }
            // If the gated value is an attention's output, its gate is split by the same heads.
            Op::Gate { input, gate, .. } => self.gate(program, options, *input, *gate)?,
            _ => {}
        }
        Ok(())
    }

    fn pass(&mut self, out: Value, input: Value) {
        if let Some(wish) = self.get(out).cloned() {
            self.0.insert(input, wish);
        }
    }

    fn gate(
        &mut self,
        program: &Program,
        options: &ShardOptions,
        input: Value,
        gate: Value,
    ) -> Result<(), String> {
        let maker = |op: &&Op| op.outputs().any(|value| value == input);
        let heads = match program.ops.iter().find(maker) {
            Some(Op::Attend { spec, .. }) => (spec.heads, spec.kv_heads),
            Some(Op::AttendLatent { spec, .. }) => (spec.heads, spec.heads),
            _ => return Ok(()),
        };
        let width = program.value_width(gate);
        if width.is_multiple_of(heads.0) {
            let (split, _) = head_split(heads.0, heads.1, options.ranks)?;
            self.0.insert(gate, scaled(&split, width / heads.0));
        }
        Ok(())
    }
}

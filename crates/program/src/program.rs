//! `Program`: a decoder's step as a flat list of ops. It also answers the questions of every
//! interpreter: widths, lifetimes of values, and which buffers they may share.

use crate::kv::KvLayout;
use crate::op::{Op, RopeTable, Value, ValueDecl, Weight, WeightDecl};

/// One step of a decoder, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The ops, in order.
    pub ops: Vec<Op>,
    /// The values that the ops make.
    pub values: Vec<ValueDecl>,
    /// The weights that the ops read.
    pub weights: Vec<WeightDecl>,
    /// Rotary tables, shared by layers.
    pub ropes: Vec<RopeTable>,
    /// The shape of the KV cache.
    pub kv: KvLayout,
    /// The number of routings that ops make.
    pub routings: usize,
    /// The vocabulary: logits of a row.
    pub vocabulary: usize,
    /// The most positions of a sequence.
    pub context_max: usize,
}

/// The lifetime of a value, as indexes of ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// The op that makes it.
    pub made: usize,
    /// The last op that reads it; `made` if none does.
    pub last_use: usize,
}

/// The assignment of values to shared buffers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferPlan {
    /// The slot of each value.
    pub slot_of: Vec<u32>,
    /// Elements in a row of each slot.
    pub slot_widths: Vec<usize>,
}

impl BufferPlan {
    /// The slot of `value`.
    pub fn slot(&self, value: Value) -> usize {
        self.slot_of[value.0 as usize] as usize
    }

    /// Elements in a row of all slots together.
    pub fn width_total(&self) -> usize {
        self.slot_widths.iter().sum()
    }
}

impl Program {
    /// The [`crate::StepSequence::expanded`] of a request with `given` tokens (its prompt, or a
    /// text to score). These are whole blocks of as many rows as make the expanded form of latent
    /// attention worthwhile. The two forms round differently. So the choice depends on the model
    /// and on the request alone, and not on the rows of a chunk, which a schedule can change.
    pub fn expanded_until(&self, given: usize) -> usize {
        let rows = self.ops.iter().filter_map(|op| match op {
            Op::AttendLatent { spec, .. } => Some(spec.expanded_rows().unwrap_or(usize::MAX)),
            _ => None,
        });
        rows.max().map_or(0, |rows| given / rows * rows)
    }

    /// Texts of more tokens than this use the long rotary tables, if the program has any. All
    /// tables have the same limit.
    pub fn long_rope_after(&self) -> Option<usize> {
        self.ropes.iter().find_map(|rope| Some(rope.long.as_ref()?.original))
    }

    /// The [`crate::StepSequence::long_rope`] of a text of `tokens` tokens.
    pub fn long_rope(&self, tokens: usize) -> bool {
        self.long_rope_after().is_some_and(|original| tokens > original)
    }

    /// Elements in a row of `value`.
    pub fn value_width(&self, value: Value) -> usize {
        self.values[value.0 as usize].width
    }

    /// The declaration of `weight`.
    pub fn weight(&self, weight: Weight) -> &WeightDecl {
        &self.weights[weight.0 as usize]
    }

    /// The weight called `name`.
    pub fn weight_named(&self, name: &str) -> Option<Weight> {
        let index = self.weights.iter().position(|decl| decl.name == name)?;
        Some(Weight(index as u32))
    }

    /// Width of each tap's value, by tap.
    pub fn capture_widths(&self) -> Vec<usize> {
        let mut taps: Vec<(u32, usize)> = Vec::new();
        for op in &self.ops {
            if let Op::Capture { input, tap } = op {
                taps.push((*tap, self.value_width(*input)));
            }
        }
        taps.sort_unstable();
        taps.into_iter().map(|(_, width)| width).collect()
    }

    /// The number of values from outside ([`Op::Input`]).
    pub fn inputs(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op, Op::Input { .. })).count()
    }

    /// The width of each input, by number.
    pub fn input_widths(&self) -> Vec<usize> {
        let mut inputs: Vec<(u32, usize)> = Vec::new();
        for op in &self.ops {
            if let Op::Input { input, out } = op {
                inputs.push((*input, self.value_width(*out)));
            }
        }
        inputs.sort_unstable();
        inputs.into_iter().map(|(_, width)| width).collect()
    }

    /// Whether the program makes logits.
    pub fn makes_logits(&self) -> bool {
        self.ops.iter().any(|op| matches!(op, Op::Logits { .. }))
    }

    /// The lifetime of each value, by value.
    pub fn liveness(&self) -> Vec<Lifetime> {
        let mut lifetimes = vec![Lifetime { made: 0, last_use: 0 }; self.values.len()];
        for (index, op) in self.ops.iter().enumerate() {
            for value in op.outputs() {
                lifetimes[value.0 as usize] = Lifetime { made: index, last_use: index };
            }
            for value in op.inputs() {
                lifetimes[value.0 as usize].last_use = index;
            }
        }
        lifetimes
    }

    /// Assigns the same buffer to values that are never alive together. An op's output shares a
    /// buffer with one of its inputs only if [`Op::in_place_inputs`] allows it and both are equally
    /// wide.
    pub fn buffer_plan(&self) -> BufferPlan {
        let lifetimes = self.liveness();
        let mut plan = BufferPlan { slot_of: vec![0; self.values.len()], slot_widths: Vec::new() };
        let mut free: Vec<u32> = Vec::new();
        for (index, op) in self.ops.iter().enumerate() {
            let dies = |value: &Value| lifetimes[value.0 as usize].last_use == index;
            let mut dying: Vec<Value> = op.inputs().filter(dies).collect();
            dying.dedup();
            for value in op.outputs() {
                let width = self.value_width(value);
                let taken = op
                    .in_place_inputs()
                    .find(|input| dying.contains(input) && self.value_width(*input) == width);
                plan.slot_of[value.0 as usize] = match taken {
                    Some(input) => {
                        dying.retain(|other| *other != input);
                        plan.slot_of[input.0 as usize]
                    }
                    None => plan.take_slot(&mut free, width),
                };
            }
            free.extend(dying.iter().map(|value| plan.slot_of[value.0 as usize]));
            free.extend(op.outputs().filter(dies).map(|value| plan.slot_of[value.0 as usize]));
        }
        plan
    }
}

impl BufferPlan {
    /// The narrowest free slot that is wide enough, else the widest free one, widened, else a new
    /// one.
    fn take_slot(&mut self, free: &mut Vec<u32>, width: usize) -> u32 {
        let width_of = |slot: &u32| self.slot_widths[*slot as usize];
        let wide_enough = (0..free.len()).filter(|i| width_of(&free[*i]) >= width);
        let best = wide_enough
            .min_by_key(|i| width_of(&free[*i]))
            .or_else(|| (0..free.len()).max_by_key(|i| width_of(&free[*i])));
        match best {
            Some(index) => {
                let slot = free.swap_remove(index);
                let widest = &mut self.slot_widths[slot as usize];
                *widest = (*widest).max(width);
                slot
            }
            None => {
                self.slot_widths.push(width);
                self.slot_widths.len() as u32 - 1
            }
        }
    }
}

//! `Program`: a decoder's step as a flat list of ops, and the questions that every interpreter
//! asks of it: widths, lifetimes of values, which buffers they may share.

use crate::kv::KvLayout;
use crate::op::{Op, RopeTable, Value, ValueDecl, Weight, WeightDecl};

/// One step of a decoder, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct Program {
    /// The ops, in order.
    pub ops: Vec<Op>,
    /// What the ops compute.
    pub values: Vec<ValueDecl>,
    /// What the ops read.
    pub weights: Vec<WeightDecl>,
    /// Rotary tables, shared by layers.
    pub ropes: Vec<RopeTable>,
    /// Shape of the KV cache that the ops write and read.
    pub kv: KvLayout,
    /// Routings that ops make.
    pub routings: usize,
    /// Logits of a row.
    pub vocabulary: usize,
    /// Positions that a sequence may reach.
    pub context_max: usize,
}

/// When a value is alive, in indexes of ops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lifetime {
    /// The op that makes it.
    pub made: usize,
    /// The last op that reads it; `made` if none does.
    pub last_use: usize,
}

/// Which values share a buffer.
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

    /// Elements a row in all slots together.
    pub fn width_total(&self) -> usize {
        self.slot_widths.iter().sum()
    }
}

impl Program {
    /// The [`crate::StepSequence::expanded`] of a request with `given` tokens (its prompt, or a
    /// text to score): whole blocks of as many rows as make the expanded form of latent attention
    /// pay. The two forms round differently, so the choice may depend on nothing that a schedule
    /// can change: not on the rows of a chunk, but on the model and on what was asked.
    pub fn expanded_until(&self, given: usize) -> usize {
        let rows = self.ops.iter().filter_map(|op| match op {
            Op::AttendLatent { spec, .. } => Some(spec.expanded_rows().unwrap_or(usize::MAX)),
            _ => None,
        });
        rows.max().map_or(0, |rows| given / rows * rows)
    }

    /// Texts of more tokens than this turn by the long rotary tables, if the program has some; the
    /// tables agree on it.
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

    /// How many values are fed from outside ([`Op::Input`]).
    pub fn inputs(&self) -> usize {
        self.ops.iter().filter(|op| matches!(op, Op::Input { .. })).count()
    }

    /// Width of each fed value, by number.
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

    /// Whether rows have logits to choose from.
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

    /// Gives values that are never alive together the same buffer. An op's output never shares
    /// a buffer with one of its inputs, except where [`Op::in_place_inputs`] allows it and both
    /// are equally wide.
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
    /// The narrowest free slot that is wide enough, else the widest one, widened, else a new one.
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

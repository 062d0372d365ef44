//! Turns a program's ops into an executor's stages: shares buffers by lifetime and fuses
//! neighbouring ops.
//!
//! A norm, a residual sum before it, or a nonlinearity is computed while the linear group that
//! alone reads it prepares its input. Its result is never stored. A residual sum after a linear
//! layer is fused too: the layer adds its product to the residual's buffer. Fused ops are
//! neighbours, and a linear group reads all of its input before it writes. So the lifetimes of the
//! unfused program hold.

use lathe_program::{
    Activation, AttendSpec, BackendError, BufferPlan, ExpertsSpec, GateKind, KvFormat, KvLayer,
    LatentSpec, NormKind, Op, Program, RouterSpec, Routing, Value, Weight,
};

use crate::attend::{AttendShape, check_layer};
use crate::experts::{ExpertsStage, RouteStage};
use crate::latent::LatentStage;
use crate::linear::Operands;
use crate::memory::{ALIGNMENT, Memory};
use crate::rows::Rows;
use crate::stage::{
    ActivateStage, AddStage, AttendStage, LinearInput, LinearStage, LogitsInput, LogitsStage,
    NormStage, PartStage, RotateStage, Stage,
};
use crate::transform::{Transform, TransformStage};
use crate::weights::Weights;

/// The feature of `op` that the stages do not support, if there is one.
pub(crate) fn unsupported(op: &Op) -> Option<String> {
    let Op::Route { spec, .. } = op else { return None };
    let many = spec.groups.is_some_and(|groups| groups.groups > ROUTER_GROUPS_MAX);
    many.then(|| format!("routers with more than {ROUTER_GROUPS_MAX} groups of experts"))
}

/// The most groups of experts that a router may have.
const ROUTER_GROUPS_MAX: usize = 256;

/// The buffers of a program's values.
#[derive(Debug)]
pub(crate) struct Buffers {
    memory: Memory,
    plan: BufferPlan,
    /// Bytes from the start to each slot.
    offsets: Vec<usize>,
    widths: Vec<usize>,
}

impl Buffers {
    /// Memory for the values of `rows_max` rows.
    ///
    /// # Errors
    /// [`BackendError::Memory`].
    pub(crate) fn new(program: &Program, rows_max: usize) -> Result<Self, BackendError> {
        let plan = program.buffer_plan();
        let mut bytes = 0usize;
        let mut offsets = Vec::with_capacity(plan.slot_widths.len());
        for width in &plan.slot_widths {
            offsets.push(bytes);
            let slot = width.saturating_mul(rows_max).saturating_mul(size_of::<f32>());
            bytes = bytes
                .saturating_add(slot.checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX));
        }
        let memory = Memory::zeroed(bytes, "activations")?;
        let widths = program.values.iter().map(|v| v.width).collect();
        Ok(Self { memory, plan, offsets, widths })
    }

    /// The buffer of `value`.
    pub(crate) fn rows(&self, value: Value) -> Rows {
        let start = self.memory.pointer().wrapping_add(self.offsets[self.plan.slot(value)]);
        Rows::new(start.cast(), self.widths[value.0 as usize])
    }

    fn same(&self, a: Value, b: Value) -> bool {
        self.plan.slot(a) == self.plan.slot(b)
    }
}

/// Makes the stages of a program.
pub(crate) struct Planner<'a> {
    program: &'a Program,
    weights: &'a Weights,
    buffers: &'a Buffers,
    exact: bool,
    kv_format: KvFormat,
    /// The number of ops that read each value.
    readers: Vec<u32>,
}

/// An op that may be computed while the op after it prepares its input.
enum Prelude {
    None,
    Norm(NormStage, Value),
    AddNorm(AddStage, NormStage, Value),
    Activate(ActivateStage, Value),
}

impl<'a> Planner<'a> {
    /// A planner for one program.
    pub(crate) fn new(
        program: &'a Program,
        weights: &'a Weights,
        buffers: &'a Buffers,
        exact: bool,
        kv_format: KvFormat,
    ) -> Self {
        let mut readers = vec![0; program.values.len()];
        for value in program.ops.iter().flat_map(Op::inputs) {
            readers[value.0 as usize] += 1;
        }
        Self { program, weights, buffers, exact, kv_format, readers }
    }

    /// The stages, in order.
    ///
    /// # Errors
    /// [`BackendError::Unsupported`] for an op or a choice without a kernel.
    pub(crate) fn stages(&self) -> Result<Vec<Stage>, BackendError> {
        let mut stages = Vec::new();
        let mut at = 0;
        while at < self.program.ops.len() {
            let (stage, ops) = match self.fused(at) {
                Some(found) => found,
                None => (self.single(&self.program.ops[at])?, 1),
            };
            stages.push(stage);
            at += ops;
        }
        Ok(stages)
    }

    /// A linear group or logits with the ops that are fused into it, and the number of these ops in
    /// all.
    fn fused(&self, at: usize) -> Option<(Stage, usize)> {
        let (prelude, skipped) = self.prelude(at);
        let at = at + skipped;
        match self.program.ops.get(at)? {
            Op::Linear { input, .. } => {
                let source = self.source(prelude, *input)?;
                let mut stage = self.linear(&self.program.ops[at], source)?;
                let residual = self.residual(at);
                if let Some((out, scale)) = residual {
                    stage.parts[0].out = self.rows(out);
                    stage.parts[0].accumulate = Some(scale);
                }
                Some((Stage::Linear(stage), skipped + 1 + usize::from(residual.is_some())))
            }
            Op::Logits { input, head, gather, scale, softcap } => {
                // A sum before the norm would be stored for the asked rows only, so it is not
                // fused.
                let source = match prelude {
                    Prelude::None => LogitsInput::Rows(self.rows(*input)),
                    Prelude::Norm(norm, out) if out == *input => LogitsInput::Norm(norm),
                    _ => return None,
                };
                let matrix = self.weights.matrix(*head);
                let operands = Operands::of([&matrix]);
                let (scale, softcap, gather) = (*scale, *softcap, *gather);
                let stage = LogitsStage { source, matrix, operands, scale, softcap, gather };
                Some((Stage::Logits(stage), skipped + 1))
            }
            _ => None,
        }
    }

    /// The ops that may be fused into the op after them, and their number.
    fn prelude(&self, at: usize) -> (Prelude, usize) {
        let ops = &self.program.ops;
        match (&ops[at], ops.get(at + 1)) {
            (Op::Norm { input, weight, bias, kind, epsilon, groups: 1, out }, _)
                if self.read_once(*out) =>
            {
                let rows = (*input, *out);
                let norm = self.norm(rows, (*weight, *bias), *kind, *epsilon, 1);
                (Prelude::Norm(norm, *out), 1)
            }
            (
                Op::Add { out: sum, left, right, scale },
                Some(Op::Norm { input, weight, bias, kind, epsilon, groups: 1, out }),
            ) if input == sum && self.read_once(*out) => {
                let add = self.add(*left, *right, *scale, *sum);
                let rows = (*input, *out);
                let norm = self.norm(rows, (*weight, *bias), *kind, *epsilon, 1);
                (Prelude::AddNorm(add, norm, *out), 2)
            }
            (Op::Activate { gate, up, kind, out }, _) if self.read_once(*out) => {
                (Prelude::Activate(self.activate(*gate, *up, *kind, *out), *out), 1)
            }
            _ => (Prelude::None, 0),
        }
    }

    fn read_once(&self, value: Value) -> bool {
        self.readers[value.0 as usize] == 1
    }

    /// The input of an op that reads `input`. `None` if the prelude makes another value.
    fn source(&self, prelude: Prelude, input: Value) -> Option<LinearInput> {
        match prelude {
            Prelude::None => Some(LinearInput::Rows(self.rows(input))),
            Prelude::Norm(norm, out) => (out == input).then_some(LinearInput::Norm(norm)),
            Prelude::AddNorm(add, norm, out) => {
                (out == input).then_some(LinearInput::AddNorm(add, norm))
            }
            Prelude::Activate(activate, out) => {
                (out == input).then_some(LinearInput::Activate(activate))
            }
        }
    }

    /// The value that the linear layer at `at` may add its product to, and the factor of the
    /// product.
    fn residual(&self, at: usize) -> Option<(Value, f32)> {
        let Op::Linear { parts, .. } = &self.program.ops[at] else { return None };
        let Some(Op::Add { left, right, scale, out }) = self.program.ops.get(at + 1) else {
            return None;
        };
        let [part] = parts.as_slice() else { return None };
        let fits = *right == part.out
            && left != right
            && self.read_once(part.out)
            && self.buffers.same(*left, *out);
        fits.then_some((*out, *scale))
    }

    fn linear(&self, op: &Op, source: LinearInput) -> Option<LinearStage> {
        let Op::Linear { input, parts } = op else { return None };
        let parts: Vec<PartStage> = parts
            .iter()
            .map(|part| PartStage {
                matrix: self.weights.matrix(part.weight),
                bias: self.floats(part.bias),
                accumulate: None,
                out: self.rows(part.out),
            })
            .collect();
        let operands = Operands::of(parts.iter().map(|p| &p.matrix));
        Some(LinearStage { source, columns: self.program.value_width(*input), operands, parts })
    }

    fn single(&self, op: &Op) -> Result<Stage, BackendError> {
        Ok(match op {
            Op::Embed { table, first_token, multiplier, out } => Stage::Embed {
                table: self.weights.table(*table),
                first_token: *first_token,
                multiplier: *multiplier,
                out: self.rows(*out),
            },
            Op::Input { input, out } => {
                Stage::Input { input: *input as usize, out: self.rows(*out) }
            }
            Op::Norm { input, weight, bias, kind, epsilon, groups, out } => {
                Stage::Norm(self.norm((*input, *out), (*weight, *bias), *kind, *epsilon, *groups))
            }
            Op::Transform { input, transform, out } => Stage::Transform(TransformStage {
                input: self.rows(*input),
                transform: Transform::new(transform),
                out: self.rows(*out),
            }),
            Op::Rope { input, heads, offset, rope, out } => Stage::Rotate(RotateStage {
                input: self.rows(*input),
                heads: *heads,
                offset: *offset,
                style: self.program.ropes[rope.0 as usize].style,
                rope: rope.0 as usize,
                out: self.rows(*out),
            }),
            Op::WriteKv { key: first, value: second, layer }
            | Op::WriteLatent { latent: first, rope_key: second, layer } => Stage::Write {
                layer: layer.0 as usize,
                first: self.rows(*first),
                second: self.rows(*second),
            },
            Op::Attend { query, layer, spec, out } => {
                Stage::Attend(self.attend((*query, *out), *layer, spec)?)
            }
            Op::AttendLatent { query, layer, spec, out } => {
                Stage::AttendLatent(Box::new(self.attend_latent((*query, *out), *layer, spec)?))
            }
            Op::Activate { gate, up, kind, out } => {
                Stage::Activate(self.activate(*gate, *up, *kind, *out))
            }
            Op::Route { input, spec, out } => {
                if let Some(feature) = unsupported(op) {
                    return Err(BackendError::Unsupported { backend: "cpu", feature });
                }
                Stage::Route(Box::new(self.route(*input, spec, *out)))
            }
            Op::Experts { input, routing, spec, out } => {
                Stage::Experts(Box::new(self.experts((*input, *out), *routing, spec)))
            }
            Op::Add { left, right, scale, out } => {
                Stage::Add(self.add(*left, *right, *scale, *out))
            }
            Op::Gate { input, gate, kind: GateKind::Sigmoid, out } => Stage::Gate {
                input: self.rows(*input),
                gate: self.rows(*gate),
                out: self.rows(*out),
            },
            _ => self.moved(op).ok_or_else(|| {
                BackendError::Device(format!("no stage was made of {}", op.kind()))
            })?,
        })
    }

    /// The stage of an op that moves rows and computes nothing of its own.
    fn moved(&self, op: &Op) -> Option<Stage> {
        Some(match op {
            Op::AllReduce { input, out } => {
                Stage::AllReduce { input: self.rows(*input), out: self.rows(*out) }
            }
            Op::AllGather { input, out } => {
                Stage::AllGather { input: self.rows(*input), out: self.rows(*out) }
            }
            Op::Slice { input, start, out } => {
                Stage::Copy { input: self.rows(*input), start: *start, out: self.rows(*out) }
            }
            Op::Capture { input, tap } => {
                Stage::Capture { input: self.rows(*input), tap: *tap as usize }
            }
            _ => return None,
        })
    }

    fn rows(&self, value: Value) -> Rows {
        self.buffers.rows(value)
    }

    fn floats(&self, weight: Option<Weight>) -> Option<Vec<f32>> {
        weight.map(|w| self.weights.floats(w))
    }

    fn norm(
        &self,
        (input, out): (Value, Value),
        (weight, bias): (Option<Weight>, Option<Weight>),
        kind: NormKind,
        epsilon: f32,
        groups: usize,
    ) -> NormStage {
        NormStage {
            input: self.rows(input),
            weight: self.floats(weight),
            bias: self.floats(bias),
            kind,
            epsilon,
            groups,
            out: self.rows(out),
        }
    }

    fn add(&self, left: Value, right: Value, scale: f32, out: Value) -> AddStage {
        AddStage { left: self.rows(left), right: self.rows(right), scale, out: self.rows(out) }
    }

    fn activate(
        &self,
        gate: Value,
        up: Option<Value>,
        kind: Activation,
        out: Value,
    ) -> ActivateStage {
        let (gate, up) = (self.rows(gate), up.map(|u| self.rows(u)));
        ActivateStage { gate, up, kind, out: self.rows(out) }
    }

    fn attend(
        &self,
        (query, out): (Value, Value),
        layer: KvLayer,
        spec: &AttendSpec,
    ) -> Result<AttendStage, BackendError> {
        let shape = attend_shape(spec);
        check_layer(&self.program.kv, layer.0, &shape)?;
        let sinks = self.floats(spec.sinks);
        Ok(AttendStage {
            shape,
            layer: layer.0 as usize,
            sinks,
            query: self.rows(query),
            out: self.rows(out),
        })
    }

    fn attend_latent(
        &self,
        (query, out): (Value, Value),
        layer: KvLayer,
        spec: &LatentSpec,
    ) -> Result<LatentStage, BackendError> {
        check_layer(&self.program.kv, layer.0, &LatentStage::shapes(spec)[0])?;
        let (key_up, value_up) =
            (self.weights.floats(spec.key_up), self.weights.floats(spec.value_up));
        let rows = (self.rows(query), self.rows(out));
        let rotated = self.kv_format == KvFormat::Int4;
        let up = (key_up, value_up);
        Ok(LatentStage::new(spec, layer.0 as usize, rows, up, (self.exact, rotated)))
    }

    fn route(&self, input: Value, spec: &RouterSpec, out: Routing) -> RouteStage {
        let matrix = self.weights.matrix(spec.weight);
        RouteStage {
            input: self.rows(input),
            operands: Operands::of([&matrix]),
            matrix,
            bias: self.floats(spec.bias),
            correction: self.floats(spec.correction),
            spec: spec.clone(),
            routing: out.0 as usize,
        }
    }

    fn experts(
        &self,
        (input, out): (Value, Value),
        routing: Routing,
        spec: &ExpertsSpec,
    ) -> ExpertsStage {
        let (gate, up) = (self.weights.experts(spec.gate), self.weights.experts(spec.up));
        let down = self.weights.experts(spec.down);
        ExpertsStage {
            input: self.rows(input),
            routing: routing.0 as usize,
            operands: Operands::of(gate.iter().chain(&up)),
            down_operands: Operands::of(&down),
            gate,
            up,
            down,
            gate_bias: self.floats(spec.gate_bias),
            up_bias: self.floats(spec.up_bias),
            down_bias: self.floats(spec.down_bias),
            hidden_transform: Transform::new(&spec.hidden_transform),
            spec: spec.clone(),
            out: self.rows(out),
        }
    }
}

/// The shape of an attention over heads.
pub(crate) fn attend_shape(spec: &AttendSpec) -> AttendShape {
    AttendShape {
        kv_heads: spec.kv_heads,
        group: spec.heads / spec.kv_heads,
        key_dim: spec.head_dim,
        value_dim: spec.value_dim,
        scale: spec.scale,
        window: spec.window,
        softcap: spec.softcap,
        expanded_rank: None,
    }
}

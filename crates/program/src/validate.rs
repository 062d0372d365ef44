//! Checks that a program is well formed: single assignment, no use before definition, consistent
//! widths and weight shapes, and cache layers that hold what is written and read.

use crate::kv::KvLayerShape;
use crate::op::*;
use crate::program::Program;

/// A malformed program: a bug of the lowering.
#[derive(Debug, thiserror::Error, PartialEq)]
#[error("invalid program: op {index} ({kind}): {reason}")]
pub struct ProgramError {
    /// The op's index.
    pub index: usize,
    /// The op's kind.
    pub kind: &'static str,
    /// What was found and what was expected.
    pub reason: String,
}

type Checked = Result<(), String>;

/// The values and routings that the ops so far have made.
#[derive(Debug, Clone, Default)]
pub(crate) struct Defined {
    values: Vec<bool>,
    routings: Vec<Option<(usize, usize)>>,
    logits: bool,
    taps: Vec<u32>,
    inputs: Vec<u32>,
}

impl Program {
    /// Checks the whole program.
    ///
    /// # Errors
    /// [`ProgramError`] names the first op that is wrong.
    pub fn validate(&self) -> Result<(), ProgramError> {
        let mut defined = Defined::default();
        for (index, op) in self.ops.iter().enumerate() {
            let at = |reason| ProgramError { index, kind: op.kind(), reason };
            check_op(self, op, &mut defined).map_err(at)?;
        }
        let last = self.ops.len().saturating_sub(1);
        let kind = self.ops.last().map_or("none", Op::kind);
        let at = |reason| ProgramError { index: last, kind, reason };
        count_from_0("taps", &defined.taps).map_err(at)?;
        count_from_0("inputs", &defined.inputs).map_err(at)?;
        match (0..self.values.len()).find(|i| !defined.has(Value(*i as u32))) {
            Some(i) => Err(at(format!("value {} is never made", self.values[i].name))),
            None => Ok(()),
        }
    }
}

impl Defined {
    fn has(&self, value: Value) -> bool {
        self.values.get(value.0 as usize).copied().unwrap_or(false)
    }

    fn make(&mut self, value: Value) -> Checked {
        let index = value.0 as usize;
        ensure(!self.has(value), || format!("value {index} is made twice"))?;
        if self.values.len() <= index {
            self.values.resize(index + 1, false);
        }
        self.values[index] = true;
        Ok(())
    }
}

/// Checks `op` against the program's declarations and the definitions so far, and adds its outputs.
pub(crate) fn check_op(program: &Program, op: &Op, defined: &mut Defined) -> Checked {
    for value in op.inputs() {
        ensure(defined.has(value), || format!("value {} is read before it is made", value.0))?;
    }
    for value in op.outputs() {
        ensure((value.0 as usize) < program.values.len(), || format!("no value {}", value.0))?;
        defined.make(value)?;
    }
    for weight in op.weights() {
        ensure((weight.0 as usize) < program.weights.len(), || format!("no weight {}", weight.0))?;
    }
    if let Some(layer) = op.kv_layer() {
        ensure((layer.0 as usize) < program.kv.layers.len(), || format!("no layer {}", layer.0))?;
    }
    let shapes = Shapes { program };
    match op {
        Op::Attend { query, layer, spec, out } => shapes.attend(*query, *layer, spec, *out),
        Op::AttendLatent { query, layer, spec, out } => {
            shapes.attend_latent(*query, *layer, spec, *out)
        }
        Op::WriteKv { key, value, layer } => {
            let widths = [shapes.width(*key), shapes.width(*value)];
            shapes.written(*layer, widths, false)
        }
        Op::WriteLatent { latent, rope_key, layer } => {
            let widths = [shapes.width(*latent), shapes.width(*rope_key)];
            shapes.written(*layer, widths, true)
        }
        Op::Route { input, spec, out } => {
            shapes.route(*input, spec)?;
            define_routing(defined, *out, spec, program.routings)
        }
        Op::Experts { input, routing, spec, out } => {
            let made = defined.routings.get(routing.0 as usize).copied().flatten();
            let (experts, _) = made.ok_or(format!("routing {} is not made yet", routing.0))?;
            shapes.experts(*input, spec, experts, *out)
        }
        Op::Logits { input, head, gather, .. } => {
            ensure(!std::mem::replace(&mut defined.logits, true), || "a second one".to_owned())?;
            shapes.logits(*input, *head, *gather)
        }
        Op::Input { input, .. } => {
            ensure(!defined.inputs.contains(input), || format!("input {input} is used twice"))?;
            defined.inputs.push(*input);
            Ok(())
        }
        Op::Capture { tap, .. } => {
            ensure(!defined.taps.contains(tap), || format!("tap {tap} is used twice"))?;
            defined.taps.push(*tap);
            Ok(())
        }
        _ => shapes.elementwise(op),
    }
}

fn count_from_0(what: &str, numbers: &[u32]) -> Checked {
    let mut numbers = numbers.to_vec();
    numbers.sort_unstable();
    ensure(numbers.iter().enumerate().all(|(i, number)| i == *number as usize), || {
        format!("{what} {numbers:?} do not count from 0")
    })
}

fn define_routing(defined: &mut Defined, out: Routing, spec: &RouterSpec, max: usize) -> Checked {
    let index = out.0 as usize;
    ensure(index < max, || format!("routing {index} of {max}"))?;
    if defined.routings.len() <= index {
        defined.routings.resize(index + 1, None);
    }
    ensure(defined.routings[index].is_none(), || format!("routing {index} is made twice"))?;
    defined.routings[index] = Some((spec.experts, spec.experts_per_token));
    Ok(())
}

struct Shapes<'a> {
    program: &'a Program,
}

impl Shapes<'_> {
    fn width(&self, value: Value) -> usize {
        self.program.value_width(value)
    }

    fn value(&self, what: &str, value: Value, expected: usize) -> Checked {
        let found = self.width(value);
        let name = &self.program.values[value.0 as usize].name;
        ensure(found == expected, || format!("{what} {name} is {found} wide, expected {expected}"))
    }

    fn weight(&self, weight: Weight, expected: &[usize]) -> Checked {
        let decl = self.program.weight(weight);
        ensure(decl.shape == expected, || {
            format!("weight {} is {:?}, expected {expected:?}", decl.name, decl.shape)
        })
    }

    fn optional(&self, weight: Option<Weight>, expected: &[usize]) -> Checked {
        weight.map_or(Ok(()), |weight| self.weight(weight, expected))
    }

    /// The ops whose shapes follow from one input.
    fn elementwise(&self, op: &Op) -> Checked {
        match op {
            Op::Embed { table, out, .. } => {
                let shape = &self.program.weight(*table).shape;
                ensure(shape.len() == 2, || format!("table is {shape:?}, expected a matrix"))?;
                self.value("out", *out, shape[1])
            }
            Op::Norm { input, weight, bias, kind, groups, out, .. } => {
                self.norm(*input, [*weight, *bias], *kind, *groups, *out)
            }
            Op::Linear { input, parts } => parts.iter().try_for_each(|part| {
                let shape = [self.width(part.out), self.width(*input)];
                self.weight(part.weight, &shape)?;
                self.optional(part.bias, &shape[..1])
            }),
            Op::Transform { input, transform, out } => {
                transform.check(self.width(*input))?;
                self.value("out", *out, self.width(*input))
            }
            Op::Rope { input, heads, offset, rope, out } => {
                self.rope(*input, *heads, *offset, *rope, *out)
            }
            Op::Activate { gate, up, kind, out } => {
                ensure(up.is_some() == kind.is_gated(), || {
                    format!("{kind:?} with up {up:?}: gated kinds have one, others not")
                })?;
                up.map_or(Ok(()), |up| self.value("up", up, self.width(*gate)))?;
                self.value("out", *out, self.width(*gate))
            }
            Op::Add { left, right, out, .. } => {
                self.value("right", *right, self.width(*left))?;
                self.value("out", *out, self.width(*left))
            }
            Op::Gate { input, gate, out, .. } => {
                divides("gate", self.width(*gate), self.width(*input))?;
                self.value("out", *out, self.width(*input))
            }
            Op::AllReduce { input, out } => self.value("out", *out, self.width(*input)),
            Op::AllGather { input, out } => divides("input", self.width(*input), self.width(*out)),
            Op::Slice { input, start, out } => {
                let (found, end) = (self.width(*input), start + self.width(*out));
                ensure(end <= found, || format!("columns to {end} of {found}"))
            }
            _ => Ok(()),
        }
    }

    fn norm(
        &self,
        input: Value,
        [weight, bias]: [Option<Weight>; 2],
        kind: NormKind,
        groups: usize,
        out: Value,
    ) -> Checked {
        let width = self.width(input);
        divides("groups", groups, width)?;
        ensure(bias.is_none() || kind == NormKind::Layer, || "an RMS norm with a bias".to_owned())?;
        for vector in weight.iter().chain(&bias) {
            let shape = &self.program.weight(*vector).shape;
            let fits = shape == &[width / groups] || shape == &[width];
            ensure(fits, || {
                format!("weight {shape:?}, expected [{}] or [{width}]", width / groups)
            })?;
        }
        self.value("out", out, width)
    }

    fn rope(
        &self,
        input: Value,
        heads: usize,
        offset: usize,
        rope: crate::op::Rope,
        out: Value,
    ) -> Checked {
        let width = self.width(input);
        divides("heads", heads, width)?;
        let table = self.program.ropes.get(rope.0 as usize);
        let table = table.ok_or(format!("no rotary table {}", rope.0))?;
        let (end, head) = (offset + 2 * table.inverse_frequencies.len(), width / heads);
        ensure(end <= head, || format!("turns elements to {end} of a head of {head}"))?;
        if let Some(long) = &table.long {
            let [found, pairs] = [&long.inverse_frequencies, &table.inverse_frequencies]
                .map(|frequencies| frequencies.len());
            ensure(found == pairs, || format!("{found} frequencies for long texts of {pairs}"))?;
            let (own, first) = (long.original, self.program.long_rope_after());
            ensure(first == Some(own), || format!("texts are long after {own} and {first:?}"))?;
        }
        self.value("out", out, width)
    }

    fn attend(&self, query: Value, layer: KvLayer, spec: &AttendSpec, out: Value) -> Checked {
        divides("kv_heads", spec.kv_heads, spec.heads)?;
        self.value("query", query, spec.heads * spec.head_dim)?;
        self.value("out", out, spec.heads * spec.value_dim)?;
        self.optional(spec.sinks, &[spec.heads])?;
        let AttendSpec { kv_heads, head_dim: key_dim, value_dim, window, .. } = *spec;
        self.layer(layer, KvLayerShape::Heads { kv_heads, key_dim, value_dim })?;
        self.window(layer, window)
    }

    fn attend_latent(
        &self,
        query: Value,
        layer: KvLayer,
        spec: &LatentSpec,
        out: Value,
    ) -> Checked {
        let LatentSpec { heads, rank, rope_dim, nope_dim, value_dim, window, .. } = *spec;
        self.value("query", query, heads * (nope_dim + rope_dim))?;
        self.value("out", out, heads * value_dim)?;
        self.weight(spec.key_up, &[heads * nope_dim, rank])?;
        self.weight(spec.value_up, &[heads * value_dim, rank])?;
        self.layer(layer, KvLayerShape::Latent { rank, rope_dim })?;
        self.window(layer, window)
    }

    fn layer(&self, layer: KvLayer, expected: KvLayerShape) -> Checked {
        let found = self.program.kv.layer(layer).shape;
        ensure(found == expected, || format!("layer {} is {found:?}, not {expected:?}", layer.0))
    }

    /// An attention's window may be smaller than that of its layer, but not larger.
    fn window(&self, layer: KvLayer, window: Option<usize>) -> Checked {
        let kept = self.program.kv.group_of(layer).window;
        let enough = kept.is_none_or(|kept| window.is_some_and(|window| window <= kept));
        ensure(enough, || format!("window {window:?}, but layer {} keeps {kept:?}", layer.0))
    }

    fn written(&self, layer: KvLayer, found: [usize; 2], latent: bool) -> Checked {
        let shape = self.program.kv.layer(layer).shape;
        let is_latent = matches!(shape, KvLayerShape::Latent { .. });
        let expected = shape.vectors().map(|(count, elements)| count * elements);
        ensure(found == expected && latent == is_latent, || {
            format!("writes {found:?} elements into layer {} of {shape:?}", layer.0)
        })
    }

    fn route(&self, input: Value, spec: &RouterSpec) -> Checked {
        let RouterSpec { experts, experts_per_token, .. } = *spec;
        self.weight(spec.weight, &[experts, self.width(input)])?;
        self.optional(spec.bias, &[experts])?;
        self.optional(spec.correction, &[experts])?;
        let mut available = experts;
        if let Some(limit) = spec.groups {
            divides("groups", limit.groups, experts)?;
            ensure((1..=limit.groups).contains(&limit.groups_per_token), || {
                format!("{} of {} groups", limit.groups_per_token, limit.groups)
            })?;
            available = experts / limit.groups * limit.groups_per_token;
        }
        ensure((1..=available).contains(&experts_per_token), || {
            format!("{experts_per_token} experts a token of {available}")
        })
    }

    fn experts(&self, input: Value, spec: &ExpertsSpec, routed: usize, out: Value) -> Checked {
        let ExpertsSpec { experts, first_expert, hidden, .. } = *spec;
        ensure(experts > 0 && first_expert + experts <= routed, || {
            format!("experts {first_expert}..{} of {routed}", first_expert + experts)
        })?;
        let (input, out) = (self.width(input), self.width(out));
        ensure(spec.activation.is_gated(), || format!("{:?} is not gated", spec.activation))?;
        spec.hidden_transform.check(hidden)?;
        self.weight(spec.gate, &[experts, hidden, input])?;
        self.weight(spec.up, &[experts, hidden, input])?;
        self.weight(spec.down, &[experts, out, hidden])?;
        self.optional(spec.gate_bias, &[experts, hidden])?;
        self.optional(spec.up_bias, &[experts, hidden])?;
        self.optional(spec.down_bias, &[experts, out])
    }

    fn logits(&self, input: Value, head: Weight, gather: bool) -> Checked {
        let shape = &self.program.weight(head).shape;
        let (vocabulary, width) = (self.program.vocabulary, self.width(input));
        let rows_fit = |rows: usize| {
            if gather { (1..=vocabulary).contains(&rows) } else { rows == vocabulary }
        };
        ensure(shape.len() == 2 && rows_fit(shape[0]) && shape[1] == width, || {
            format!("head is {shape:?}, expected [{vocabulary}, {width}]")
        })
    }
}

fn divides(what: &str, divisor: usize, number: usize) -> Checked {
    let divides = divisor > 0 && number.is_multiple_of(divisor);
    ensure(divides, || format!("{what} {divisor} does not divide {number}"))
}

fn ensure(holds: bool, reason: impl FnOnce() -> String) -> Checked {
    if holds { Ok(()) } else { Err(reason()) }
}

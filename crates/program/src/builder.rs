//! `ProgramBuilder`: writes a program op by op. Every op is checked when it is pushed. A shape that
//! does not fit is a bug of the lowering, and panics with the op's name.

use std::collections::HashMap;

use crate::kv::{KvLayerShape, KvLayout};
use crate::op::*;
use crate::program::Program;
use crate::transform::InputTransform;
use crate::validate::{Defined, check_op};

/// Writes a [`Program`] op by op.
#[derive(Debug)]
pub struct ProgramBuilder {
    program: Program,
    kv_layers: Vec<(KvLayerShape, Option<usize>)>,
    block_tokens: usize,
    weights_by_name: HashMap<String, Weight>,
    defined: Defined,
}

/// One matrix of [`ProgramBuilder::linear`]. The output's width is the number of the matrix's rows.
#[derive(Debug, Clone)]
pub struct LinearSpec {
    /// `[out, in]`.
    pub weight: Weight,
    /// `[out]`.
    pub bias: Option<Weight>,
    /// Name of the output.
    pub name: String,
}

impl LinearSpec {
    /// A matrix without a bias.
    pub fn new(weight: Weight, name: impl Into<String>) -> Self {
        Self { weight, bias: None, name: name.into() }
    }

    /// The same with a bias.
    pub fn bias(self, bias: Option<Weight>) -> Self {
        Self { bias, ..self }
    }
}

impl ProgramBuilder {
    /// An empty program for `vocabulary` tokens and up to `context_max` positions, with cache
    /// blocks of `block_tokens` positions.
    pub fn new(vocabulary: usize, context_max: usize, block_tokens: usize) -> Self {
        let program = Program {
            ops: Vec::new(),
            values: Vec::new(),
            weights: Vec::new(),
            ropes: Vec::new(),
            kv: KvLayout::new(&[], block_tokens),
            routings: 0,
            vocabulary,
            context_max,
        };
        Self {
            program,
            kv_layers: Vec::new(),
            block_tokens,
            weights_by_name: HashMap::new(),
            defined: Defined::default(),
        }
    }

    /// An empty program with a given cache layout. A rewritten program uses it, so that its layers
    /// keep their groups.
    pub fn with_layout(vocabulary: usize, context_max: usize, kv: KvLayout) -> Self {
        let mut builder = Self::new(vocabulary, context_max, kv.block_tokens);
        builder.program.kv = kv;
        builder
    }

    /// Declares a weight, or finds it if it was declared with the same shape and role.
    ///
    /// # Panics
    /// If `name` was declared with another shape or role.
    pub fn weight(
        &mut self,
        name: impl Into<String>,
        shape: &[usize],
        role: WeightRole,
        layer: Option<u32>,
    ) -> Weight {
        let decl = WeightDecl { name: name.into(), shape: shape.to_vec(), role, layer };
        if let Some(weight) = self.weights_by_name.get(&decl.name) {
            let declared = self.program.weight(*weight);
            assert_eq!(declared, &decl, "weight {} is declared twice, differently", decl.name);
            return *weight;
        }
        let weight = Weight(self.program.weights.len() as u32);
        self.weights_by_name.insert(decl.name.clone(), weight);
        self.program.weights.push(decl);
        weight
    }

    /// Declares a value for [`Self::push`]. The other methods declare their own values.
    pub fn value(&mut self, name: impl Into<String>, width: usize) -> Value {
        self.program.values.push(ValueDecl { name: name.into(), width });
        Value(self.program.values.len() as u32 - 1)
    }

    /// Declares a rotary table, or finds an equal one.
    pub fn rope_table(&mut self, table: RopeTable) -> Rope {
        let known = self.program.ropes.iter().position(|other| *other == table);
        let index = known.unwrap_or_else(|| {
            self.program.ropes.push(table);
            self.program.ropes.len() - 1
        });
        Rope(index as u32)
    }

    /// Declares a layer of the cache that keeps `window` positions (`None` means all).
    pub fn kv_layer(&mut self, shape: KvLayerShape, window: Option<usize>) -> KvLayer {
        self.kv_layers.push((shape, window));
        self.program.kv = KvLayout::new(&self.kv_layers, self.block_tokens);
        KvLayer(self.kv_layers.len() as u32 - 1)
    }

    /// The vocabulary: logits of a row.
    pub fn vocabulary(&self) -> usize {
        self.program.vocabulary
    }

    /// Elements in a row of `value`.
    pub fn width(&self, value: Value) -> usize {
        self.program.value_width(value)
    }

    /// Appends an op whose outputs were declared by [`Self::value`].
    ///
    /// # Panics
    /// If the op does not fit its inputs, weights and cache layer.
    pub fn push(&mut self, op: Op) {
        if let Err(reason) = check_op(&self.program, &op, &mut self.defined) {
            panic!("op {} ({}): {reason}", self.program.ops.len(), op.kind());
        }
        self.program.ops.push(op);
    }

    /// [`Op::Embed`].
    pub fn embed(&mut self, table: Weight, multiplier: f32, name: impl Into<String>) -> Value {
        let width = self.program.weight(table).shape[1];
        let out = self.value(name, width);
        self.push(Op::Embed { table, first_token: 0, multiplier, out });
        out
    }

    /// [`Op::Input`]: the next input of the step.
    pub fn input(&mut self, width: usize, name: impl Into<String>) -> Value {
        let input = self.program.inputs() as u32;
        let out = self.value(name, width);
        self.push(Op::Input { input, out });
        out
    }

    /// [`Op::Norm`] of the whole row by the root mean square.
    pub fn rms_norm(
        &mut self,
        input: Value,
        weight: Weight,
        epsilon: f32,
        name: impl Into<String>,
    ) -> Value {
        self.norm(input, Some(weight), None, NormKind::Rms { offset: 0.0 }, epsilon, 1, name)
    }

    /// [`Op::Norm`].
    pub fn norm(
        &mut self,
        input: Value,
        weight: Option<Weight>,
        bias: Option<Weight>,
        kind: NormKind,
        epsilon: f32,
        groups: usize,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, self.width(input));
        self.push(Op::Norm { input, weight, bias, kind, epsilon, groups, out });
        out
    }

    /// [`Op::Linear`] with one output for each of `parts`.
    pub fn linear(&mut self, input: Value, parts: Vec<LinearSpec>) -> Vec<Value> {
        let parts: Vec<LinearPart> = parts
            .into_iter()
            .map(|part| {
                let width = self.program.weight(part.weight).shape[0];
                let out = self.value(part.name, width);
                LinearPart { weight: part.weight, bias: part.bias, out }
            })
            .collect();
        let outs = parts.iter().map(|part| part.out).collect();
        self.push(Op::Linear { input, parts });
        outs
    }

    /// [`Op::Linear`] with one part.
    pub fn linear_one(&mut self, input: Value, part: LinearSpec) -> Value {
        self.linear(input, vec![part])[0]
    }

    /// [`Op::Transform`]. Returns `input` itself if the transform does nothing.
    pub fn transform(
        &mut self,
        input: Value,
        transform: InputTransform,
        name: impl Into<String>,
    ) -> Value {
        if transform.is_nothing() {
            return input;
        }
        let out = self.value(name, self.width(input));
        self.push(Op::Transform { input, transform, out });
        out
    }

    /// [`Op::Rope`].
    pub fn rope(
        &mut self,
        input: Value,
        heads: usize,
        offset: usize,
        rope: Rope,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, self.width(input));
        self.push(Op::Rope { input, heads, offset, rope, out });
        out
    }

    /// [`Op::WriteKv`].
    pub fn write_kv(&mut self, key: Value, value: Value, layer: KvLayer) {
        self.push(Op::WriteKv { key, value, layer });
    }

    /// [`Op::Attend`].
    pub fn attend(
        &mut self,
        query: Value,
        layer: KvLayer,
        spec: AttendSpec,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, spec.heads * spec.value_dim);
        self.push(Op::Attend { query, layer, spec, out });
        out
    }

    /// [`Op::WriteLatent`].
    pub fn write_latent(&mut self, latent: Value, rope_key: Value, layer: KvLayer) {
        self.push(Op::WriteLatent { latent, rope_key, layer });
    }

    /// [`Op::AttendLatent`].
    pub fn attend_latent(
        &mut self,
        query: Value,
        layer: KvLayer,
        spec: LatentSpec,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, spec.heads * spec.value_dim);
        self.push(Op::AttendLatent { query, layer, spec, out });
        out
    }

    /// [`Op::Activate`].
    pub fn activate(
        &mut self,
        gate: Value,
        up: Option<Value>,
        kind: Activation,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, self.width(gate));
        self.push(Op::Activate { gate, up, kind, out });
        out
    }

    /// [`Op::Route`].
    pub fn route(&mut self, input: Value, spec: RouterSpec) -> Routing {
        let out = Routing(self.program.routings as u32);
        self.program.routings += 1;
        self.push(Op::Route { input, spec, out });
        out
    }

    /// [`Op::Experts`]. `spec.down` gives the output's width.
    pub fn experts(
        &mut self,
        input: Value,
        routing: Routing,
        spec: ExpertsSpec,
        name: impl Into<String>,
    ) -> Value {
        let width = self.program.weight(spec.down).shape[1];
        let out = self.value(name, width);
        self.push(Op::Experts { input, routing, spec, out });
        out
    }

    /// [`Op::Add`].
    pub fn add(&mut self, left: Value, right: Value, scale: f32, name: impl Into<String>) -> Value {
        let out = self.value(name, self.width(left));
        self.push(Op::Add { left, right, scale, out });
        out
    }

    /// [`Op::Gate`].
    pub fn gate(
        &mut self,
        input: Value,
        gate: Value,
        kind: GateKind,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, self.width(input));
        self.push(Op::Gate { input, gate, kind, out });
        out
    }

    /// [`Op::Slice`] of columns `start .. start + width`.
    pub fn slice(
        &mut self,
        input: Value,
        start: usize,
        width: usize,
        name: impl Into<String>,
    ) -> Value {
        let out = self.value(name, width);
        self.push(Op::Slice { input, start, out });
        out
    }

    /// [`Op::AllReduce`].
    pub fn all_reduce(&mut self, input: Value, name: impl Into<String>) -> Value {
        let out = self.value(name, self.width(input));
        self.push(Op::AllReduce { input, out });
        out
    }

    /// [`Op::Logits`] of a whole head.
    pub fn logits(&mut self, input: Value, head: Weight, scale: f32, softcap: Option<f32>) {
        self.push(Op::Logits { input, head, gather: false, scale, softcap });
    }

    /// [`Op::Capture`].
    pub fn capture(&mut self, input: Value, tap: u32) {
        self.push(Op::Capture { input, tap });
    }

    /// Returns the program.
    ///
    /// # Panics
    /// If no op makes a declared value, or taps or inputs are not numbered from 0.
    pub fn finish(self) -> Program {
        if let Err(error) = self.program.validate() {
            panic!("{error}");
        }
        self.program
    }
}

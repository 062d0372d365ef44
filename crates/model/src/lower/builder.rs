//! A [`ProgramBuilder`] that knows which layer it is in, and so what things are called.

use std::collections::BTreeMap;

use lathe_program::{
    InputTransform, KvLayer, KvLayerShape, LinearSpec, ProgramBuilder, Rope, Value, Weight,
    WeightRole,
};

use crate::spec::{DecoderSpec, NormSpec, RopeSpec};

/// A matrix to declare: its name, its output width, whether it has a bias.
pub(super) struct Matrix<'a> {
    pub name: &'a str,
    pub out: usize,
    pub bias: bool,
}

pub(super) struct Builder {
    pub program: ProgramBuilder,
    /// Elements of the residual stream.
    pub width: usize,
    context_max: usize,
    layer: Option<usize>,
    /// By matrix.
    inputs: BTreeMap<String, InputTransform>,
}

impl Builder {
    pub fn new(spec: &DecoderSpec, context_max: usize, block_tokens: usize) -> Self {
        let program = ProgramBuilder::new(spec.vocabulary, context_max, block_tokens);
        let (width, inputs) = (spec.width, spec.inputs.clone());
        Builder { program, width, context_max, layer: None, inputs }
    }

    /// Names from here on are those of layer `index`.
    pub fn enter_layer(&mut self, index: usize) {
        self.layer = Some(index);
    }

    pub fn leave_layer(&mut self) {
        self.layer = None;
    }

    /// The full name of a weight or value of this layer.
    pub fn name(&self, name: &str) -> String {
        match self.layer {
            Some(layer) => format!("layers.{layer}.{name}"),
            None => name.to_owned(),
        }
    }

    pub fn weight(&mut self, name: &str, shape: &[usize], role: WeightRole) -> Weight {
        let layer = self.layer.map(|layer| layer as u32);
        self.program.weight(self.name(name), shape, role, layer)
    }

    pub fn vector(&mut self, name: &str, length: usize) -> Weight {
        self.weight(name, &[length], WeightRole::Vector)
    }

    /// The table of `spec`, shared with every layer that has the same.
    pub fn rope_table(&mut self, spec: &RopeSpec) -> Rope {
        self.program.rope_table(spec.table(self.context_max))
    }

    pub fn rope(&mut self, name: &str, input: Value, heads: usize, at: usize, rope: Rope) -> Value {
        let name = self.name(name);
        self.program.rope(input, heads, at, rope, name)
    }

    pub fn kv_layer(&mut self, shape: KvLayerShape, window: Option<usize>) -> KvLayer {
        self.program.kv_layer(shape, window)
    }

    /// `window`, unless the context cannot outgrow it: such a layer sees everything.
    pub fn window(&self, window: Option<usize>) -> Option<usize> {
        window.filter(|window| *window < self.context_max)
    }

    /// Normalises each of `groups` equal parts of `input` with one weight for all parts.
    pub fn norm(&mut self, name: &str, spec: &NormSpec, input: Value, groups: usize) -> Value {
        let length = self.program.width(input) / groups;
        let weight = spec.weight.then(|| self.vector(name, length));
        let bias = spec.bias.then(|| self.vector(&format!("{name}_bias"), length));
        let name = self.name(name);
        self.program.norm(input, weight, bias, spec.kind, spec.epsilon, groups, name)
    }

    /// What is done to the input of the matrix called `name` in this layer.
    pub fn input_of(&self, name: &str) -> InputTransform {
        self.inputs.get(&self.name(name)).copied().unwrap_or_default()
    }

    /// `input` as the matrix called `name` reads it.
    pub fn transformed(&mut self, input: Value, name: &str) -> Value {
        let transform = self.input_of(name);
        let name = self.name(&format!("{name}_input"));
        self.program.transform(input, transform, name)
    }

    /// The products of `input` with several matrices. Neighbours that read it in the same form
    /// share an op.
    pub fn linear<const N: usize>(&mut self, input: Value, matrices: [Matrix; N]) -> [Value; N] {
        let columns = self.program.width(input);
        let names = matrices.each_ref().map(|matrix| matrix.name.to_owned());
        let parts = matrices.map(|Matrix { name, out, bias }| {
            let weight = self.weight(name, &[out, columns], WeightRole::Linear);
            let bias = bias.then(|| self.vector(&format!("{name}_bias"), out));
            LinearSpec::new(weight, self.name(name)).bias(bias)
        });
        let mut outs = Vec::with_capacity(N);
        let same = |a: &String, b: &String| self.input_of(a) == self.input_of(b);
        let runs: Vec<&[String]> = names.chunk_by(same).collect();
        let mut parts = parts.into_iter();
        for run in runs {
            let input = self.transformed(input, &run[0]);
            outs.extend(self.program.linear(input, parts.by_ref().take(run.len()).collect()));
        }
        outs.try_into().expect("one output for each matrix")
    }

    pub fn add(&mut self, name: &str, left: Value, right: Value, scale: f32) -> Value {
        let name = self.name(name);
        self.program.add(left, right, scale, name)
    }
}

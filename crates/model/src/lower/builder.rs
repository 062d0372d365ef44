//! A [`ProgramBuilder`] that knows which layer it is in, and so what things are called.

use std::collections::BTreeMap;

use lathe_program::{
    InputTransform, KvLayer, KvLayerShape, LinearSpec, ProgramBuilder, Rope, Value, Weight,
    WeightRole,
};

use crate::spec::{DecoderSpec, LowRank, NormSpec, RopeSpec};

/// A matrix to declare: its name, its output width, whether it has a bias.
pub(super) struct Matrix<'a> {
    pub name: &'a str,
    pub out: usize,
    pub bias: bool,
}

/// A product to make: of the input in some form.
struct Product {
    transform: InputTransform,
    /// What to call the input in that form, in the layer.
    input_name: String,
    part: LinearSpec,
}

pub(super) struct Builder {
    pub program: ProgramBuilder,
    /// Elements of the residual stream.
    pub width: usize,
    context_max: usize,
    layer: Option<usize>,
    /// By matrix.
    inputs: BTreeMap<String, InputTransform>,
    /// By matrix.
    adapters: BTreeMap<String, LowRank>,
}

impl Builder {
    pub(super) fn new(spec: &DecoderSpec, context_max: usize, block_tokens: usize) -> Self {
        let program = ProgramBuilder::new(spec.vocabulary, context_max, block_tokens);
        let (inputs, adapters) = (spec.inputs.clone(), spec.adapters.clone());
        Builder { program, width: spec.width, context_max, layer: None, inputs, adapters }
    }

    /// Names from here on are those of layer `index`.
    pub(super) fn enter_layer(&mut self, index: usize) {
        self.layer = Some(index);
    }

    pub(super) fn leave_layer(&mut self) {
        self.layer = None;
    }

    /// The full name of a weight or value of this layer.
    pub(super) fn name(&self, name: &str) -> String {
        match self.layer {
            Some(layer) => format!("layers.{layer}.{name}"),
            None => name.to_owned(),
        }
    }

    pub(super) fn weight(&mut self, name: &str, shape: &[usize], role: WeightRole) -> Weight {
        let layer = self.layer.map(|layer| layer as u32);
        self.program.weight(self.name(name), shape, role, layer)
    }

    pub(super) fn vector(&mut self, name: &str, length: usize) -> Weight {
        self.weight(name, &[length], WeightRole::Vector)
    }

    /// The table of `spec`, shared with every layer that has the same.
    pub(super) fn rope_table(&mut self, spec: &RopeSpec) -> Rope {
        self.program.rope_table(spec.table(self.context_max))
    }

    pub(super) fn rope(
        &mut self,
        name: &str,
        input: Value,
        heads: usize,
        at: usize,
        rope: Rope,
    ) -> Value {
        let name = self.name(name);
        self.program.rope(input, heads, at, rope, name)
    }

    pub(super) fn kv_layer(&mut self, shape: KvLayerShape, window: Option<usize>) -> KvLayer {
        self.program.kv_layer(shape, window)
    }

    /// `window`, unless the context cannot outgrow it: such a layer sees everything.
    pub(super) fn window(&self, window: Option<usize>) -> Option<usize> {
        window.filter(|window| *window < self.context_max)
    }

    /// Normalises each of `groups` equal parts of `input` with one weight for all parts.
    pub(super) fn norm(
        &mut self,
        name: &str,
        spec: &NormSpec,
        input: Value,
        groups: usize,
    ) -> Value {
        let length = self.program.width(input) / groups;
        let weight = spec.weight.then(|| self.vector(name, length));
        let bias = spec.bias.then(|| self.vector(&format!("{name}_bias"), length));
        let name = self.name(name);
        self.program.norm(input, weight, bias, spec.kind, spec.epsilon, groups, name)
    }

    /// What is done to the input of the matrix called `name` in this layer.
    pub(super) fn input_of(&self, name: &str) -> InputTransform {
        self.inputs.get(&self.name(name)).copied().unwrap_or_default()
    }

    /// `input` as the matrix called `name` reads it.
    pub(super) fn transformed(&mut self, input: Value, name: &str) -> Value {
        let transform = self.input_of(name);
        let name = self.name(&format!("{name}_input"));
        self.program.transform(input, transform, name)
    }

    /// The products of `input` with several matrices, and what adapters add to them. Neighbours
    /// that read it in the same form share an op. The `A`s of adapters follow the matrices: they
    /// read the input as it is, and so share the op of matrices that do.
    pub(super) fn linear<const N: usize>(
        &mut self,
        input: Value,
        matrices: [Matrix; N],
    ) -> [Value; N] {
        let columns = self.program.width(input);
        let names = matrices.each_ref().map(|matrix| self.name(matrix.name));
        let low_ranks = names.each_ref().map(|name| self.adapters.get(name).cloned());
        let mut products: Vec<Product> = Vec::with_capacity(N);
        for (Matrix { name, out, bias }, low_rank) in matrices.into_iter().zip(&low_ranks) {
            let weight = self.weight(name, &[out, columns], WeightRole::Linear);
            let bias = bias.then(|| self.vector(&format!("{name}_bias"), out));
            let made = if low_rank.is_some() { format!("{name}.base") } else { name.to_owned() };
            let part = LinearSpec::new(weight, self.name(&made)).bias(bias);
            let transform = self.input_of(name);
            products.push(Product { transform, input_name: format!("{name}_input"), part });
        }
        for LowRank { rank, down, .. } in low_ranks.iter().flatten() {
            if products.iter().all(|product| product.part.name != *down) {
                let weight = self.low_rank_weight(down, [*rank, columns]);
                let part = LinearSpec::new(weight, down);
                let transform = InputTransform::default();
                products.push(Product { transform, input_name: String::new(), part });
            }
        }
        let mut outs = BTreeMap::new();
        for run in products.chunk_by(|a, b| a.transform == b.transform) {
            let name = self.name(&run[0].input_name);
            let input = self.program.transform(input, run[0].transform, name);
            let parts: Vec<LinearSpec> = run.iter().map(|product| product.part.clone()).collect();
            let made = self.program.linear(input, parts);
            outs.extend(run.iter().map(|product| product.part.name.clone()).zip(made));
        }
        let mut low_ranks = low_ranks.into_iter();
        names.map(|name| match low_ranks.next().flatten() {
            None => outs[&name],
            Some(low_rank) => {
                let base = outs[&format!("{name}.base")];
                self.low_rank(&name, &low_rank, base, outs[&low_rank.down])
            }
        })
    }

    /// `base + scale * B down`: the scale stands in the sum, so that `A` and `B` keep their bits.
    fn low_rank(&mut self, name: &str, low_rank: &LowRank, base: Value, down: Value) -> Value {
        let up = LowRank::up_of(name);
        let weight = self.low_rank_weight(&up, [self.program.width(base), low_rank.rank]);
        let product = self.program.linear_one(down, LinearSpec::new(weight, up));
        self.program.add(base, product, low_rank.scale, name)
    }

    /// Declares a matrix under its full name.
    fn low_rank_weight(&mut self, name: &str, shape: [usize; 2]) -> Weight {
        let layer = self.layer.map(|layer| layer as u32);
        self.program.weight(name, &shape, WeightRole::Linear, layer)
    }

    pub(super) fn add(&mut self, name: &str, left: Value, right: Value, scale: f32) -> Value {
        let name = self.name(name);
        self.program.add(left, right, scale, name)
    }
}

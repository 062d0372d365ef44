//! A section: a range of a program's ops as a program of its own, for example one layer.
//!
//! A layer reads one value of the layers before it, the residual stream. In the section this value
//! is an input ([`Op::Input`]). So any backend can run a layer alone, with the executor and kernels
//! that serve. The logits of every row are one more tap.

use std::collections::BTreeMap;
use std::ops::Range;

use lathe_model::lower::{LowerOptions, lower};
use lathe_model::spec::DecoderSpec;
use lathe_program::{
    KvLayer, KvLayout, LinearPart, Op, OperandMut, Program, Routing, Value, ValueDecl, Weight,
    WeightDecl,
};

use crate::error::QuantError;

/// Some ops of a program, with ids of their own.
#[derive(Debug, Clone)]
pub(crate) struct Section {
    /// The ops, followed by a capture for each tap, in the order of the taps.
    pub program: Program,
    /// For each weight of the section, the weight of the whole program.
    pub weights: Vec<Weight>,
}

impl Section {
    /// The ops `range` of `program`. The section captures `taps`. If the head is among the ops, its
    /// output follows as a last tap: logits before their scale and softcap.
    ///
    /// # Errors
    /// If the ops read more than one value from outside.
    pub(crate) fn new(
        program: &Program,
        range: Range<usize>,
        taps: &[Value],
    ) -> Result<Self, QuantError> {
        let ops = &program.ops[range];
        let made: Vec<Value> = ops.iter().flat_map(|op| op.outputs().collect::<Vec<_>>()).collect();
        let read = ops.iter().flat_map(Op::inputs).chain(taps.iter().copied());
        let mut outside: Vec<Value> = read.filter(|value| !made.contains(value)).collect();
        outside.sort_unstable();
        outside.dedup();
        if let [first, second, ..] = outside[..] {
            let name = |value: Value| program.values[value.0 as usize].name.clone();
            return Err(QuantError::Section { first: name(first), second: name(second) });
        }
        let input = outside.first().copied();
        let mut numbers = Numbers::new(program);
        let mut section = Vec::new();
        if let Some(input) = input {
            section.push(Op::Input { input: 0, out: numbers.value(input) });
        }
        let mut logits = None;
        for op in ops {
            let mut op = op.clone();
            numbers.renumber(&mut op);
            if let Op::Logits { input, head, .. } = op {
                let width = numbers.weights[head.0 as usize].shape[0];
                let out = numbers.made("logits", width);
                logits = Some(out);
                let parts = vec![LinearPart { weight: head, bias: None, out }];
                op = Op::Linear { input, parts };
            }
            section.push(op);
        }
        for (tap, value) in taps.iter().enumerate() {
            section.push(Op::Capture { input: numbers.value(*value), tap: tap as u32 });
        }
        if let Some(input) = logits {
            section.push(Op::Capture { input, tap: taps.len() as u32 });
        }
        Ok(Section {
            program: Program {
                ops: section,
                values: numbers.values,
                weights: numbers.weights,
                ropes: program.ropes.clone(),
                kv: KvLayout::new(&numbers.kv_layers, program.kv.block_tokens),
                routings: numbers.routing_of.len(),
                vocabulary: program.vocabulary,
                context_max: program.context_max,
            },
            weights: numbers.origins,
        })
    }
}

/// Maps the ids of the whole program to ids of the section. Ids are given in order of first use.
struct Numbers<'a> {
    whole: &'a Program,
    values: Vec<ValueDecl>,
    weights: Vec<WeightDecl>,
    origins: Vec<Weight>,
    kv_layers: Vec<(lathe_program::KvLayerShape, Option<usize>)>,
    value_of: BTreeMap<Value, Value>,
    weight_of: BTreeMap<Weight, Weight>,
    layer_of: BTreeMap<KvLayer, KvLayer>,
    routing_of: BTreeMap<Routing, Routing>,
}

impl<'a> Numbers<'a> {
    fn new(whole: &'a Program) -> Self {
        Numbers {
            whole,
            values: Vec::new(),
            weights: Vec::new(),
            origins: Vec::new(),
            kv_layers: Vec::new(),
            value_of: BTreeMap::new(),
            weight_of: BTreeMap::new(),
            layer_of: BTreeMap::new(),
            routing_of: BTreeMap::new(),
        }
    }

    fn value(&mut self, old: Value) -> Value {
        let Self { whole, values, value_of, .. } = self;
        *value_of.entry(old).or_insert_with(|| {
            values.push(whole.values[old.0 as usize].clone());
            Value(values.len() as u32 - 1)
        })
    }

    /// A value that the whole program does not have.
    fn made(&mut self, name: &str, width: usize) -> Value {
        self.values.push(ValueDecl { name: name.to_owned(), width });
        Value(self.values.len() as u32 - 1)
    }

    fn weight(&mut self, old: Weight) -> Weight {
        let Self { whole, weights, origins, weight_of, .. } = self;
        *weight_of.entry(old).or_insert_with(|| {
            weights.push(whole.weight(old).clone());
            origins.push(old);
            Weight(weights.len() as u32 - 1)
        })
    }

    fn layer(&mut self, old: KvLayer) -> KvLayer {
        let Self { whole, kv_layers, layer_of, .. } = self;
        *layer_of.entry(old).or_insert_with(|| {
            kv_layers.push((whole.kv.layer(old).shape, whole.kv.group_of(old).window));
            KvLayer(kv_layers.len() as u32 - 1)
        })
    }

    fn routing(&mut self, old: Routing) -> Routing {
        let next = Routing(self.routing_of.len() as u32);
        *self.routing_of.entry(old).or_insert(next)
    }

    fn renumber(&mut self, op: &mut Op) {
        op.visit_mut(&mut |operand| match operand {
            OperandMut::Input(value) | OperandMut::Output(value) => *value = self.value(*value),
            OperandMut::Weight(weight) => *weight = self.weight(*weight),
            OperandMut::Layer(layer) => *layer = self.layer(*layer),
            OperandMut::Routing(routing) => *routing = self.routing(*routing),
            // A section keeps all tables of the program, so their ids stay.
            OperandMut::Rope(_) => {}
        });
    }
}

/// The ops of each layer and its output stream, and the ops before the first layer.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layers {
    /// The ops before the first layer.
    pub before: Range<usize>,
    /// The stream that they make.
    pub stream: Value,
    /// The ops of each layer, with the output stream.
    pub layers: Vec<(Range<usize>, Value)>,
}

impl Layers {
    /// Finds the layers of `program`, which was lowered from `spec`.
    ///
    /// # Errors
    /// If `spec` cannot be lowered.
    pub(crate) fn of(program: &Program, spec: &DecoderSpec) -> Result<Self, QuantError> {
        let options = LowerOptions {
            block_tokens: program.kv.block_tokens,
            context_max: program.context_max,
            captures: (0..=spec.layers.len()).collect(),
            capture_head_input: false,
        };
        Ok(Layers::new(program, &lower(spec, &options)?))
    }

    /// Finds the layers of `program` with the help of `tapped`: the same program, lowered with a
    /// tap of the stream before the first layer and after each layer.
    ///
    /// # Panics
    /// If the two programs differ in more than the taps.
    pub(crate) fn new(program: &Program, tapped: &Program) -> Self {
        let mut boundaries = Vec::new();
        let mut index = 0;
        for op in &tapped.ops {
            match op {
                Op::Capture { input, .. } => boundaries.push((index, *input)),
                op => {
                    assert_eq!(*op, program.ops[index], "the same program but for its taps");
                    index += 1;
                }
            }
        }
        assert!(!boundaries.is_empty(), "a tap before the first layer");
        let (first, stream) = boundaries[0];
        let layer = |pair: &[(usize, Value)]| (pair[0].0..pair[1].0, pair[1].1);
        Layers { before: 0..first, stream, layers: boundaries.windows(2).map(layer).collect() }
    }
}

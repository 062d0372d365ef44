//! Where the scales of a linear group's input channels can be folded: into the norm that makes the
//! input, or into the rows of the matrix behind a gated activation or an attention. Every op
//! between must commute with a scale of a channel.

use lathe_program::{Activation, AttendSpec, KvLayer, NormKind, Op, Program, Value, Weight};

/// The weights that take the scales of a linear op's input channels.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Fold {
    /// A norm: `offset + weight` and `bias` are divided by the scales.
    Norm { weight: Weight, bias: Option<Weight>, offset: f32 },
    /// The rows of a matrix and its bias are divided by the scales.
    Rows { weight: Weight, bias: Option<Weight> },
    /// As `Rows`, for the matrix that makes the values of an attention. Several query heads share a
    /// value head.
    Values { weight: Weight, bias: Option<Weight>, heads: Heads },
}

/// Heads of an attention whose output is scaled.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    /// Query heads.
    pub queries: usize,
    /// Value heads; divides `queries`.
    pub values: usize,
    /// Elements of a head.
    pub width: usize,
}

impl Heads {
    /// For each channel of the output, the value channel that it is made of. Output channels with
    /// the same source need the same scale.
    pub(crate) fn sources(self) -> Vec<usize> {
        let Heads { queries, values, width } = self;
        let source =
            |channel: usize| channel / width / (queries / values) * width + channel % width;
        (0..queries * width).map(source).collect()
    }
}

/// The weights that can take the scales of the input of linear op `index`, or the reason why none
/// can.
pub(crate) fn fold_of(program: &Program, index: usize) -> Result<Fold, String> {
    let Op::Linear { input, parts } = &program.ops[index] else {
        return Err("it is no linear layer".to_owned());
    };
    let once = |weight: &Weight| {
        let users = program.ops.iter().filter(|op| op.weights().contains(weight)).count();
        users == 1
    };
    if !parts.iter().all(|part| once(&part.weight)) {
        return Err("another op reads its matrix".to_owned());
    }
    only_reader(program, *input, index)?;
    let mut input = *input;
    // Rounding comes after the scales, so they do not disturb it. A rotation mixes channels, so no
    // scale passes it.
    if let Some((at, Op::Transform { input: before, transform, .. })) = maker(program, input) {
        if transform.hadamard.is_some() {
            return Err("its input is rotated while the model runs".to_owned());
        }
        only_reader(program, *before, at)?;
        input = *before;
    }
    match maker(program, input) {
        Some((_, Op::Norm { weight: Some(weight), bias, kind, groups: 1, .. })) => {
            let offset = match kind {
                NormKind::Rms { offset } => *offset,
                NormKind::Layer => 0.0,
            };
            if !once(weight) || !bias.iter().all(once) {
                return Err("another op reads the weight of the norm before it".to_owned());
            }
            Ok(Fold::Norm { weight: *weight, bias: *bias, offset })
        }
        Some((at, Op::Activate { up: Some(up), kind, .. })) => {
            // For these kinds, the gated activation is linear in `up`.
            let linear =
                matches!(kind, Activation::SwiGlu | Activation::GeGluTanh | Activation::GeGluErf);
            if !linear {
                return Err("the activation before it is not linear in its second input".to_owned());
            }
            only_reader(program, *up, at)?;
            let Some((_, Op::Linear { parts, .. })) = maker(program, *up) else {
                return Err("no linear layer makes the second input of its activation".to_owned());
            };
            let part = parts.iter().find(|part| part.out == *up).expect("the maker's part");
            if !once(&part.weight) || !part.bias.iter().all(once) {
                return Err("another op reads the matrix before its activation".to_owned());
            }
            Ok(Fold::Rows { weight: part.weight, bias: part.bias })
        }
        Some((_, Op::Attend { layer, spec, .. })) => values_of(program, *layer, spec),
        Some((_, op)) => Err(format!("its input comes from {}, which takes no scales", op.kind())),
        None => Err("nothing makes its input".to_owned()),
    }
}

/// The matrix that makes the values that one attention reads from the cache. The attention's output
/// is linear in them.
fn values_of(program: &Program, layer: KvLayer, spec: &AttendSpec) -> Result<Fold, String> {
    let of_layer = |op: &&Op| match op {
        Op::Attend { layer: read, .. } | Op::WriteKv { layer: read, .. } => *read == layer,
        _ => false,
    };
    let mut users = program.ops.iter().enumerate().filter(|(_, op)| of_layer(op));
    let (Some((at, Op::WriteKv { key, value, .. })), Some(_), None) =
        (users.next(), users.next(), users.next())
    else {
        return Err("other attentions read the same cache".to_owned());
    };
    only_reader(program, *value, at)?;
    let Some((_, Op::Linear { parts, .. })) = maker(program, *value) else {
        return Err("no linear layer makes the values of its attention".to_owned());
    };
    let part = parts.iter().find(|part| part.out == *value).expect("the maker's part");
    let once = |weight: &Weight| {
        program.ops.iter().filter(|op| op.weights().contains(weight)).count() == 1
    };
    if key == value || !once(&part.weight) || !part.bias.iter().all(once) {
        return Err("another op reads the matrix of its attention's values".to_owned());
    }
    let heads = Heads { queries: spec.heads, values: spec.kv_heads, width: spec.value_dim };
    Ok(Fold::Values { weight: part.weight, bias: part.bias, heads })
}

fn maker(program: &Program, value: Value) -> Option<(usize, &Op)> {
    program.ops.iter().enumerate().find(|(_, op)| op.outputs().any(|out| out == value))
}

fn only_reader(program: &Program, value: Value, reader: usize) -> Result<(), String> {
    let reads = |op: &Op| op.inputs().any(|input| input == value);
    let other = program.ops.iter().enumerate().find(|(at, op)| *at != reader && reads(op));
    other.map_or(Ok(()), |(_, op)| Err(format!("{} reads the same input", op.kind())))
}

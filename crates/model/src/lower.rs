//! From a [`DecoderSpec`] to the [`Program`] of one step that serves it.
//!
//! The only place where a decoder's ops are strung together; it knows no family and no file.
//! Weights are declared by their canonical names, which [`crate::weights`] finds in a checkpoint.

mod attention;
mod builder;
pub(crate) mod eagle;
mod ffn;

use lathe_program::{Op, Program, Value, Weight, WeightRole};

use crate::spec::low_rank::DOWN;
use crate::spec::{BranchNorms, DecoderSpec, LayerSpec, NormSpec, Residual, SpecError};
use builder::Builder;

/// What the caller chooses about a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LowerOptions {
    /// Positions in a block of the KV cache.
    pub block_tokens: usize,
    /// Positions that a sequence may reach.
    pub context_max: usize,
    /// Taps of the residual stream: tap `i` is the stream after the first `captures[i]` layers
    /// (0: the embedding). Drafters and distillation read them.
    pub captures: Vec<usize>,
    /// One more tap, after those of `captures`: the normalised stream that the head reads.
    pub capture_head_input: bool,
}

impl LowerOptions {
    /// Blocks of 16 positions, no taps.
    pub fn new(context_max: usize) -> Self {
        LowerOptions {
            block_tokens: 16,
            context_max,
            captures: Vec::new(),
            capture_head_input: false,
        }
    }
}

/// The program of one serving step of `spec`.
///
/// # Errors
/// If the spec breaks its limits, or the options ask for no positions or for a tap that does not
/// exist.
pub fn lower(spec: &DecoderSpec, options: &LowerOptions) -> Result<Program, SpecError> {
    spec.validate()?;
    if options.block_tokens == 0 {
        return Err(SpecError::value("block size", 0, "at least 1 token"));
    }
    if options.context_max == 0 {
        return Err(SpecError::value("context length", 0, "at least 1 token"));
    }
    if let Some(tap) = options.captures.iter().find(|tap| **tap > spec.layers.len()) {
        let expected = format!("0 to {} layers", spec.layers.len());
        return Err(SpecError::value("capture", tap, expected));
    }
    if !spec.inputs.is_empty() {
        check_inputs(spec, options)?;
    }
    if !spec.adapters.is_empty() {
        check_adapters(spec, options)?;
    }
    Ok(lower_valid(spec, options))
}

/// Whether what is to be done to inputs can be: the names are matrices of ops that read values,
/// and those of experts that read the same input agree.
fn check_inputs(spec: &DecoderSpec, options: &LowerOptions) -> Result<(), SpecError> {
    let program = lower_valid(&plain(spec), options);
    let linear = |weight: Weight| {
        let reads = |op: &Op| match op {
            Op::Linear { parts, .. } => parts.iter().any(|part| part.weight == weight),
            Op::Experts { .. } => op.weights().contains(&weight),
            _ => false,
        };
        program.ops.iter().any(reads)
    };
    for (name, transform) in &spec.inputs {
        let weight = program.weight_named(name).filter(|weight| linear(*weight));
        let Some(weight) = weight else {
            return Err(SpecError::feature(format!("{transform} of what {name} reads")));
        };
        let columns = program.weight(weight).shape.last().copied().unwrap_or(0);
        let at = |reason| SpecError::feature(format!("what {name} reads ({reason})"));
        transform.check(columns).map_err(at)?;
    }
    for op in &program.ops {
        let Op::Experts { spec: experts, .. } = op else { continue };
        let [gate, up] = [experts.gate, experts.up].map(|it| &program.weight(it).name);
        if spec.inputs.get(gate) != spec.inputs.get(up) {
            return Err(SpecError::feature(format!("{gate} and {up} with different inputs")));
        }
    }
    Ok(())
}

/// Whether what adapters add can be added: their matrices are of linear groups, and those that
/// share an `A` read one input.
fn check_adapters(spec: &DecoderSpec, options: &LowerOptions) -> Result<(), SpecError> {
    let program = lower_valid(&plain(spec), options);
    let input_of = |name: &str| {
        let weight = program.weight_named(name)?;
        program.ops.iter().find_map(|op| match op {
            Op::Linear { input, parts } => {
                parts.iter().any(|part| part.weight == weight).then_some(*input)
            }
            _ => None,
        })
    };
    for (name, low_rank) in &spec.adapters {
        let field = |what: &str| format!("{what} of the adapter of {name}");
        let Some(input) = input_of(name) else {
            return Err(SpecError::feature(format!("an adapter of {name}")));
        };
        if low_rank.rank == 0 {
            return Err(SpecError::value(field("rank"), 0, "at least 1"));
        }
        if !low_rank.scale.is_finite() {
            return Err(SpecError::value(field("scale"), low_rank.scale, "a finite number"));
        }
        let maker = low_rank.down.strip_suffix(DOWN).unwrap_or_default();
        let shared = spec.adapters.get(maker).filter(|_| input_of(maker) == Some(input));
        if shared.is_none_or(|it| (it.rank, &it.down) != (low_rank.rank, &low_rank.down)) {
            let expected = "that of a matrix of the same rank and input";
            return Err(SpecError::value(field("A"), &low_rank.down, expected));
        }
    }
    Ok(())
}

/// `spec` with nothing done to inputs and nothing added to products.
fn plain(spec: &DecoderSpec) -> DecoderSpec {
    DecoderSpec { inputs: Default::default(), adapters: Default::default(), ..spec.clone() }
}

fn lower_valid(spec: &DecoderSpec, options: &LowerOptions) -> Program {
    let mut b = Builder::new(spec, options.context_max, options.block_tokens);
    let shape = [spec.vocabulary, spec.width];
    let table = b.weight("embedding", &shape, WeightRole::Embedding);
    let mut stream = b.program.embed(table, spec.embedding_multiplier, "embedding");
    capture(&mut b, options, 0, stream);
    for (index, layer) in spec.layers.iter().enumerate() {
        b.enter_layer(index);
        stream = lower_layer(&mut b, layer, stream);
        b.leave_layer();
        capture(&mut b, options, index + 1, stream);
    }
    let input = b.norm("final_norm", &spec.final_norm, stream, 1);
    if options.capture_head_input {
        b.program.capture(input, options.captures.len() as u32);
    }
    let head = b.weight("head", &shape, WeightRole::Head);
    b.program.logits(input, head, spec.logits_scale, spec.logits_softcap);
    b.program.finish()
}

fn capture(b: &mut Builder, options: &LowerOptions, layers: usize, stream: Value) {
    for (tap, after) in options.captures.iter().enumerate() {
        if *after == layers {
            b.program.capture(stream, tap as u32);
        }
    }
}

fn lower_layer(b: &mut Builder, layer: &LayerSpec, stream: Value) -> Value {
    let scale = layer.residual_multiplier;
    let BranchNorms { before, after } = &layer.attention_norms;
    let attention_input = optional_norm(b, "attention_norm", before.as_ref(), stream);
    let attended = attention::lower(b, &layer.attention, attention_input);
    let attended = optional_norm(b, "attention_post_norm", after.as_ref(), attended);
    let joined = b.add("attention.residual", stream, attended, scale);

    let BranchNorms { before, after } = &layer.ffn_norms;
    let ffn_input = match (layer.residual, before) {
        (Residual::Sequential, before) => optional_norm(b, "ffn_norm", before.as_ref(), joined),
        (Residual::Parallel, Some(norm)) => optional_norm(b, "ffn_norm", Some(norm), stream),
        (Residual::Parallel, None) => attention_input,
    };
    let fed = ffn::lower(b, &layer.ffn, ffn_input);
    let fed = optional_norm(b, "ffn_post_norm", after.as_ref(), fed);
    b.add("ffn.residual", joined, fed, scale)
}

fn optional_norm(b: &mut Builder, name: &str, spec: Option<&NormSpec>, input: Value) -> Value {
    spec.map_or(input, |spec| b.norm(name, spec, input, 1))
}

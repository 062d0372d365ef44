//! From an [`EagleSpec`] to the program of one drafting step.
//!
//! A row stands for a token of the text and what the model knew before it: the token's embedding
//! comes as input 0, the model's features as input 1. EAGLE-3 fuses the features of several layers.
//! A row that follows a drafted token has none. Its input 1 is zero, and input 2 is what the row
//! before it handed out at tap 0. Input 2 of all other rows is zero. So one program serves both.
//!
//! A matrix that reads two values side by side is two matrices here, whose products are added.

use lathe_program::{LinearSpec, NormKind, Program, Value, WeightRole};

use super::builder::{Builder, Matrix};
use super::{LowerOptions, attention, ffn, lower_layer, optional_norm};
use crate::spec::{AttentionSpec, EagleSpec, FeatureNorm, Fusion, GqaSpec, SpecError};

/// The program of one drafting step of `spec`, which was read from a checkpoint.
///
/// # Errors
/// If the spec breaks its limits, or a layer has no heads of keys and values.
pub(crate) fn lower(spec: &EagleSpec, options: &LowerOptions) -> Result<Program, SpecError> {
    spec.decoder.validate()?;
    let mut b = Builder::new(&spec.decoder, options.context_max, options.block_tokens);
    let embedding = b.program.input(spec.decoder.width, "embedding");
    let (stream, first) = match &spec.fusion {
        Fusion::Hidden { bias } => (fuse_hidden(&mut b, *bias, embedding), 0),
        Fusion::Features { taps, feature_norm, norm_before_residual } => {
            let features = b.program.input(taps * spec.feature_width, "features");
            let hidden = fuse_features(&mut b, spec, *feature_norm, *taps, features);
            (first_layer(&mut b, spec, *norm_before_residual, embedding, hidden)?, 1)
        }
    };
    let stream = spec.decoder.layers.iter().enumerate().skip(first).fold(stream, |stream, it| {
        b.enter_layer(it.0);
        let stream = lower_layer(&mut b, it.1, stream);
        b.leave_layer();
        stream
    });
    let final_norm = spec.final_norm.then_some(&spec.decoder.final_norm);
    let normalised = optional_norm(&mut b, "final_norm", final_norm, stream);
    b.program.capture(if spec.norm_output { normalised } else { stream }, 0);
    let shape = [spec.decoder.vocabulary, spec.decoder.width];
    let head = b.weight("head", &shape, WeightRole::Head);
    b.program.logits(normalised, head, 1.0, None);
    Ok(b.program.finish())
}

/// EAGLE-1's fusion: of the embedding and the hidden row of the place before it.
fn fuse_hidden(b: &mut Builder, bias: bool, embedding: Value) -> Value {
    let hidden = b.program.input(b.width, "hidden");
    let out = b.width;
    let [left] = b.linear(embedding, [Matrix { name: "fc_of_embedding", out, bias: false }]);
    let [right] = b.linear(hidden, [Matrix { name: "fc_of_hidden", out, bias }]);
    b.add("fused", left, right, 1.0)
}

/// EAGLE-3's fusion of the features of several layers.
fn fuse_features(
    b: &mut Builder,
    spec: &EagleSpec,
    feature_norm: FeatureNorm,
    taps: usize,
    features: Value,
) -> Value {
    let groups = match feature_norm {
        FeatureNorm::None => None,
        FeatureNorm::Whole => Some(1),
        FeatureNorm::Each => Some(taps),
    };
    let columns = taps * spec.feature_width;
    let features = groups.map_or(features, |groups| {
        let weight = b.vector("feature_norm", columns);
        let kind = NormKind::Rms { offset: 0.0 };
        let epsilon = spec.decoder.final_norm.epsilon;
        b.program.norm(features, Some(weight), None, kind, epsilon, groups, "features_normalised")
    });
    let fc = b.weight("fc", &[b.width, columns], WeightRole::Linear);
    let fused = b.program.linear_one(features, LinearSpec::new(fc, "fused"));
    let own = b.program.input(b.width, "own_hidden");
    b.add("hidden", fused, own, 1.0)
}

/// EAGLE-3's first layer, whose queries, keys and values read the embedding and the hidden row.
fn first_layer(
    b: &mut Builder,
    spec: &EagleSpec,
    norm_before_residual: bool,
    embedding: Value,
    hidden: Value,
) -> Result<Value, SpecError> {
    let layer = &spec.decoder.layers[0];
    let AttentionSpec::Gqa(gqa) = &layer.attention else {
        return Err(SpecError::feature("latent attention of an EAGLE-3 drafter"));
    };
    b.enter_layer(0);
    let before = layer.attention_norms.before.as_ref();
    let embedding = optional_norm(b, "attention_norm", before, embedding);
    let normalised = optional_norm(b, "hidden_norm", before, hidden);
    let residual = if norm_before_residual { normalised } else { hidden };
    let ofs = [
        [
            "attention.query_of_embedding",
            "attention.key_of_embedding",
            "attention.value_of_embedding",
        ],
        ["attention.query_of_hidden", "attention.key_of_hidden", "attention.value_of_hidden"],
    ];
    let left = project(b, gqa, ofs[0], false, embedding);
    let right = project(b, gqa, ofs[1], gqa.qkv_bias, normalised);
    let names = ["attention.query", "attention.key", "attention.value"];
    let sum = |b: &mut Builder, at: usize| b.add(names[at], left[at], right[at], 1.0);
    let placed = [sum(b, 0), sum(b, 1), sum(b, 2)];
    let attended = attention::heads(b, gqa, placed);
    let attended = attention::output(b, gqa.output_bias, attended);
    let joined = b.add("attention.residual", residual, attended, 1.0);
    let ffn_input = optional_norm(b, "ffn_norm", layer.ffn_norms.before.as_ref(), joined);
    let fed = ffn::lower(b, &layer.ffn, ffn_input);
    let stream = b.add("ffn.residual", joined, fed, 1.0);
    b.leave_layer();
    Ok(stream)
}

fn project(
    b: &mut Builder,
    gqa: &GqaSpec,
    [query, key, value]: [&'static str; 3],
    bias: bool,
    input: Value,
) -> [Value; 3] {
    let (wide, narrow) = (gqa.heads * gqa.head_dim, gqa.kv_heads * gqa.head_dim);
    b.linear(
        input,
        [
            Matrix { name: query, out: wide, bias },
            Matrix { name: key, out: narrow, bias },
            Matrix { name: value, out: narrow, bias },
        ],
    )
}

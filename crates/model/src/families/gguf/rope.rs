//! Rotary embeddings from GGUF metadata and from the tensors of divisors that some files have.

use super::base::Meta;
use crate::spec::{RopeScaling, RopeSpec, SpecError, yarn_magnitude};

/// The rotary embedding of heads of `head_dim` elements.
pub(super) fn read(m: &Meta, head_dim: usize) -> Result<RopeSpec, SpecError> {
    let theta = m.number("rope.freq_base")?.unwrap_or(10_000.0);
    let mut rope = RopeSpec::plain(theta, m.size("rope.dimension_count")?.unwrap_or(head_dim));
    if m.get("rope.dimension_sections").is_some() {
        return Err(SpecError::feature("rope.dimension_sections"));
    }
    let long = m.numbers("rope_factors_long.weight")?;
    let short = m.numbers("rope_factors_short.weight")?;
    rope.scaling = match (long, short, m.numbers("rope_freqs.weight")?) {
        (Some(long), Some(short), _) => longrope(m, long, short)?,
        (_, _, Some(divisors)) => divided(divisors, scaling(m)?)?,
        _ => scaling(m)?,
    };
    Ok(rope)
}

fn original(m: &Meta) -> Result<usize, SpecError> {
    match m.size("rope.scaling.original_context_length")? {
        Some(original) => Ok(original),
        None => m.need("context_length"),
    }
}

/// Divisors of each pair, on top of a factor for all.
fn divided(divisors: Vec<f32>, scaling: RopeScaling) -> Result<RopeScaling, SpecError> {
    match scaling {
        RopeScaling::None => Ok(RopeScaling::Divisors { divisors }),
        RopeScaling::Linear { factor } => {
            let divisors = divisors.into_iter().map(|d| d * factor as f32).collect();
            Ok(RopeScaling::Divisors { divisors })
        }
        _ => Err(SpecError::feature("rope_freqs.weight beside rope.scaling.type `yarn`")),
    }
}

/// As llama.cpp's loader reads it: a missing type is linear, the older key `scale_linear` counts
/// where `scaling.factor` is missing, and a factor of 0 is none.
fn scaling(m: &Meta) -> Result<RopeScaling, SpecError> {
    let factor = m.number("rope.scaling.factor")?.or(m.number("rope.scale_linear")?);
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    match m.text("rope.scaling.type")?.unwrap_or("linear") {
        "none" => Ok(RopeScaling::None),
        "linear" if factor == 1.0 => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor }),
        "yarn" => {
            let attention = m.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
            Ok(RopeScaling::Yarn {
                factor,
                original: original(m)?,
                beta_fast: m.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
                beta_slow: m.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
                truncate: true,
                magnitude: yarn_magnitude(factor, 1.0) * attention,
            })
        }
        other => Err(SpecError::feature(format!("rope type `{other}`"))),
    }
}

fn longrope(m: &Meta, long: Vec<f32>, short: Vec<f32>) -> Result<RopeScaling, SpecError> {
    let original = original(m)?;
    let magnitude = m.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
    Ok(RopeScaling::LongRope { short, long, original, magnitude })
}

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
        (_, _, Some(divisors)) => RopeScaling::Divisors { divisors },
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

fn scaling(m: &Meta) -> Result<RopeScaling, SpecError> {
    let factor = m.number("rope.scaling.factor")?;
    match m.text("rope.scaling.type")?.unwrap_or("none") {
        "none" => match m.number("rope.scale_linear")? {
            Some(factor) if factor != 1.0 => Ok(RopeScaling::Linear { factor }),
            _ => Ok(RopeScaling::None),
        },
        "linear" => Ok(RopeScaling::Linear { factor: factor.unwrap_or(1.0) }),
        "yarn" => {
            let factor = factor.unwrap_or(1.0);
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

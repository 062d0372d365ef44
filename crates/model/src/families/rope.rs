//! Rotary embeddings from a `config.json`, in both styles: `rope_theta` with `rope_scaling`, and
//! `rope_parameters` (one for all layers, or one a kind of layer).
//!
//! Precedence and defaults are those of transformers' `RotaryEmbeddingConfigMixin` (5.17).

use super::base::{self, Defaults};
use crate::config::Config;
use crate::spec::{DecoderSpec, RopeScaling, RopeSpec, SpecError, yarn_magnitude};

/// Parameters that some kind here knows; another one would change the rotation.
const KNOWN: [&str; 18] = [
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    "factor",
    "original_max_position_embeddings",
    "max_position_embeddings",
    "attention_factor",
    "low_freq_factor",
    "high_freq_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "short_factor",
    "long_factor",
    // Says how a checkpoint came about.
    "finetuned",
];

/// How the parts of a picture's positions share the pairs of a head.
const SECTIONS: [&str; 2] = ["mrope_section", "mrope_interleaved"];
/// How fast queries grow with the position.
const QUERY_SCALING: &str = "llama_4_scaling_beta";

/// Positions up to which queries are not scaled by their position, if they are at all
/// (`1 + beta * ln(1 + floor(position / original))`, Llama 4).
pub(super) fn query_scaling_starts(
    c: &Config,
    defaults: &Defaults,
) -> Result<Option<usize>, SpecError> {
    let Some(parameters) = parameters(c, defaults, "full_attention")? else { return Ok(None) };
    match parameters.own.number(QUERY_SCALING)?.filter(|beta| *beta != 0.0) {
        Some(_) => parameters.own.need("original_max_position_embeddings").map(Some),
        None => Ok(None),
    }
}

/// The rotary embedding of heads of `head_dim` elements.
pub(super) fn read(
    c: &Config,
    defaults: &Defaults,
    head_dim: usize,
) -> Result<RopeSpec, SpecError> {
    let parameters = parameters(c, defaults, "full_attention")?;
    read_from(c, parameters, ("rope_theta", defaults.theta), defaults, head_dim)
}

/// The rotary embedding that `parameters` describe; `theta` is the field beside them that holds
/// the base where they do not, and its default.
fn read_from(
    c: &Config,
    parameters: Option<Parameters>,
    theta: (&str, f64),
    defaults: &Defaults,
    head_dim: usize,
) -> Result<RopeSpec, SpecError> {
    // What stands inside the object wins over what stands beside it, which then is not read.
    c.idle(&["rope_theta", "partial_rotary_factor", "original_max_position_embeddings"]);
    let number = |key: &str| parameters.map_or(Ok(None), |it| it.own.number(key));
    let base = match number("rope_theta")? {
        Some(base) => base,
        None => c.number(theta.0)?.unwrap_or(theta.1),
    };
    let partial = match number("partial_rotary_factor")? {
        Some(partial) => Some(partial),
        None => c.number("partial_rotary_factor")?,
    };
    let rotary = rotary(head_dim, partial, defaults)?;
    let mut rope = RopeSpec::plain(base, rotary);
    if let Some(parameters) = parameters {
        if let Some(alpha) = ntk_alpha(defaults, &parameters.own)? {
            let dim = rotary as f64;
            rope.theta *= alpha.powf(dim / (dim - 2.0));
            return Ok(rope);
        }
        let known = |key: &str| {
            KNOWN.contains(&key)
                || (defaults.rope_sections && SECTIONS.contains(&key))
                || (defaults.query_scaling && key == QUERY_SCALING)
        };
        if let Some(key) = parameters.own.given().find(|key| !known(key)) {
            return Err(SpecError::feature(format!("rope parameter `{key}`")));
        }
        rope.scaling = read_scaling(c, defaults, &parameters)?;
    }
    Ok(rope)
}

/// The `alpha` by which a base is stretched whatever the context's length, and which makes the
/// other parameters idle.
fn ntk_alpha(defaults: &Defaults, p: &Config) -> Result<Option<f64>, SpecError> {
    let kind = p.text("rope_type")?.or(p.text("type")?);
    let applies = defaults.ntk_alpha && kind == Some("dynamic");
    // Zero is no alpha to the class.
    Ok(p.number("alpha")?.filter(|alpha| applies && *alpha != 0.0))
}

/// Elements of a head that turn.
fn rotary(head_dim: usize, partial: Option<f64>, defaults: &Defaults) -> Result<usize, SpecError> {
    match (partial, defaults.partial) {
        (None, None) => Ok(head_dim),
        (None, Some(part)) => Ok((head_dim as f64 * part) as usize),
        (Some(part), None) if part != 1.0 => {
            Err(SpecError::feature(format!("partial_rotary_factor `{part}` of this architecture")))
        }
        (Some(part), _) if part > 0.0 && part <= 1.0 => Ok((head_dim as f64 * part) as usize),
        (Some(part), _) => {
            Err(SpecError::value("partial_rotary_factor", part, "above 0, at most 1"))
        }
    }
}

/// What a file says about rotation.
#[derive(Clone, Copy)]
struct Parameters<'a> {
    /// The parameters of one kind of layer, or of all.
    own: Config<'a>,
    /// The object in which `own` lies, if there is one object for each kind of layer.
    around: Option<Config<'a>>,
}

impl Parameters<'_> {
    /// YaRN's `truncate`. The reference looks for it beside the kinds of layers and never within
    /// one of them.
    fn truncate(&self) -> Result<bool, SpecError> {
        let Some(around) = self.around else {
            return Ok(self.own.flag("truncate")?.unwrap_or(true));
        };
        if let Some(ignored) = self.own.flag("truncate")? {
            self.own.note(format!(
                "`truncate: {ignored}` within one kind of layer is ignored, as the reference does"
            ));
        }
        Ok(around.flag("truncate")?.unwrap_or(true))
    }
}

/// The object that holds the scaling: `rope_scaling` if there is one with a field, else
/// `rope_parameters`. Families whose layers turn in different ways have one for each `kind`.
fn parameters<'a>(
    c: &Config<'a>,
    defaults: &Defaults,
    kind: &str,
) -> Result<Option<Parameters<'a>>, SpecError> {
    let old = c.object("rope_scaling")?.filter(|old| old.given().next().is_some());
    let Some(all) = old.or(c.object("rope_parameters")?) else { return Ok(None) };
    if !by_kind(&all) {
        return Ok(Some(Parameters { own: all, around: None }));
    }
    if !defaults.rope_by_kind {
        return Err(SpecError::feature(
            "`rope_parameters` for each kind of layer in this architecture",
        ));
    }
    let missing = || SpecError::Missing(format!("rope_parameters.{kind}"));
    let own = all.object(kind)?.ok_or_else(missing)?;
    Ok(Some(Parameters { own, around: Some(all) }))
}

/// Whether `parameters` are one object for each kind of layer.
fn by_kind(parameters: &Config) -> bool {
    ["full_attention", "sliding_attention"].iter().any(|kind| parameters.has(kind))
}

fn read_scaling(
    c: &Config,
    defaults: &Defaults,
    parameters: &Parameters,
) -> Result<RopeScaling, SpecError> {
    let p = &parameters.own;
    let kind = match p.text("rope_type")? {
        Some(kind) => kind,
        None => p.text("type")?.unwrap_or("default"),
    };
    let context = base::context(c, defaults)?;
    let need = |key: &str| -> Result<f64, SpecError> {
        p.number(key)?.ok_or_else(|| SpecError::Missing(format!("rope_parameters.{key}")))
    };
    // A field beside the object wins over one inside, as for Phi-3.
    let original = match c.size("original_max_position_embeddings")?.or(defaults.original) {
        Some(original) => original,
        None => p.size("original_max_position_embeddings")?.unwrap_or(context),
    };
    let kind = if defaults.longrope.contains(&kind) { "longrope" } else { kind };
    match kind {
        "default" => Ok(RopeScaling::None),
        "mrope" if defaults.rope_sections => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: need("factor")? }),
        "dynamic" => Ok(RopeScaling::Dynamic { factor: need("factor")?, original: context }),
        "yarn" => yarn(parameters, context, original),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: need("factor")?,
            original,
            low_factor: need("low_freq_factor")?,
            high_factor: need("high_freq_factor")?,
        }),
        "longrope" => longrope(p, context, original),
        other => Err(SpecError::feature(format!("rope type `{other}`"))),
    }
}

/// The factor, or what the two context lengths imply.
fn factor(p: &Config, context: usize, original: usize) -> Result<f64, SpecError> {
    Ok(p.number("factor")?.unwrap_or(context as f64 / original.max(1) as f64))
}

fn yarn(
    parameters: &Parameters,
    context: usize,
    original: usize,
) -> Result<RopeScaling, SpecError> {
    let p = &parameters.own;
    let factor = factor(p, context, original)?;
    let nonzero =
        |key: &str| -> Result<Option<f64>, SpecError> { Ok(p.number(key)?.filter(|x| *x != 0.0)) };
    let magnitude =
        match (p.number("attention_factor")?, nonzero("mscale")?, nonzero("mscale_all_dim")?) {
            (Some(magnitude), _, _) => magnitude,
            (None, Some(m), Some(all)) => yarn_magnitude(factor, m) / yarn_magnitude(factor, all),
            (None, _, _) => yarn_magnitude(factor, 1.0),
        };
    Ok(RopeScaling::Yarn {
        factor,
        original,
        beta_fast: nonzero("beta_fast")?.unwrap_or(32.0),
        beta_slow: nonzero("beta_slow")?.unwrap_or(1.0),
        truncate: parameters.truncate()?,
        magnitude,
    })
}

fn longrope(p: &Config, context: usize, original: usize) -> Result<RopeScaling, SpecError> {
    let factor = factor(p, context, original)?;
    let list = |key: &str| -> Result<Vec<f32>, SpecError> {
        let list = p.numbers(key)?;
        let list = list.ok_or_else(|| SpecError::Missing(format!("rope_parameters.{key}")))?;
        Ok(list.into_iter().map(|x| x as f32).collect())
    };
    let magnitude = match p.number("attention_factor")? {
        Some(magnitude) => magnitude,
        None if factor <= 1.0 => 1.0,
        None => (1.0 + factor.ln() / (original as f64).ln()).sqrt(),
    };
    Ok(RopeScaling::LongRope {
        short: list("short_factor")?,
        long: list("long_factor")?,
        original,
        magnitude,
    })
}

/// Gives the sliding layers their own rotary embedding, which `rope_scaling` does not concern;
/// `theta` is the field that holds its base, and its default.
pub(super) fn set_local(
    c: &Config,
    spec: &mut DecoderSpec,
    sliding: &[bool],
    theta: (&str, f64),
    defaults: &Defaults,
) -> Result<(), SpecError> {
    c.idle(&[theta.0]);
    let parameters = match c.object("rope_parameters")? {
        Some(new) if by_kind(&new) => {
            let own = new.object("sliding_attention")?;
            own.map(|own| Parameters { own, around: Some(new) })
        }
        Some(_) => return Err(SpecError::feature("rope_parameters without kinds of layers")),
        None => None,
    };
    let mut result = Ok(());
    base::each_gqa(spec, |layer, gqa| {
        if sliding[layer] {
            match read_from(c, parameters, theta, defaults, gqa.head_dim) {
                Ok(rope) => gqa.rope = Some(rope),
                Err(error) => result = Err(error),
            }
        }
    });
    result
}

/// What YaRN's `mscale_all_dim` multiplies latent attention's scores by (DeepSeek).
pub(super) fn yarn_score_scale(c: &Config, defaults: &Defaults) -> Result<f64, SpecError> {
    let Some(parameters) = parameters(c, defaults, "full_attention")? else { return Ok(1.0) };
    let p = parameters.own;
    let kind = p.text("rope_type")?.or(p.text("type")?).unwrap_or("default");
    let all = p.number("mscale_all_dim")?.unwrap_or(0.0);
    if kind == "default" || all == 0.0 {
        return Ok(1.0);
    }
    let factor = p.number("factor")?;
    let factor = factor.ok_or_else(|| SpecError::Missing("rope_parameters.factor".to_owned()))?;
    Ok(yarn_magnitude(factor, all).powi(2))
}

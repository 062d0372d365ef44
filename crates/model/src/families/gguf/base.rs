//! Typed access to GGUF metadata, and the plain decoder that rows start from.

use lathe_program::Activation;
use lathe_tensor::gguf::{GgufFile, MetaValue};

use super::rope;
use crate::spec::{
    AttentionSpec, BranchNorms, DecoderSpec, DenseSpec, FfnSpec, GqaSpec, LayerSpec, NormSpec,
    QkNorm, QkOrder, QkScope, Residual, SpecError,
};

/// A file, read under the keys of its architecture.
#[derive(Clone, Copy)]
pub(super) struct Meta<'a> {
    pub file: &'a GgufFile,
    pub architecture: &'a str,
}

impl<'a> Meta<'a> {
    fn full(&self, key: &str) -> String {
        format!("{}.{key}", self.architecture)
    }

    pub(super) fn get(&self, key: &str) -> Option<&'a MetaValue> {
        self.file.metadata.get(&self.full(key))
    }

    fn wrong(&self, key: &str, expected: &str) -> SpecError {
        let found = self.get(key).map_or("absent".to_owned(), |value| value.kind().to_string());
        SpecError::value(self.full(key), found, expected)
    }

    /// A size; a list of equal ones counts as one.
    pub(super) fn size(&self, key: &str) -> Result<Option<usize>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let wrong = || self.wrong(key, "an integer that is not negative");
        let number = match value.as_array() {
            None => value.as_integer().ok_or_else(wrong)?,
            Some(list) => {
                let list = list.integers().ok_or_else(wrong)?;
                let first = *list.first().ok_or_else(wrong)?;
                if list.iter().any(|other| *other != first) {
                    let key = self.full(key);
                    return Err(SpecError::feature(format!("`{key}` that differs by layer")));
                }
                i128::from(first)
            }
        };
        usize::try_from(number).map(Some).map_err(|_| wrong())
    }

    pub(super) fn need(&self, key: &str) -> Result<usize, SpecError> {
        self.size(key)?.ok_or_else(|| SpecError::Missing(self.full(key)))
    }

    pub(super) fn number(&self, key: &str) -> Result<Option<f64>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_float().or(value.as_integer().map(|n| n as f64));
        match number.filter(|n| n.is_finite()) {
            Some(number) => Ok(Some(number)),
            None => Err(self.wrong(key, "a number")),
        }
    }

    pub(super) fn flag(&self, key: &str) -> Result<Option<bool>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_bool().map(Some).ok_or_else(|| self.wrong(key, "a boolean"))
    }

    pub(super) fn text(&self, key: &str) -> Result<Option<&'a str>, SpecError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.wrong(key, "a string"))
    }

    /// The shape of a tensor, if it is there; `blk.N.` goes before names of layer `N`.
    pub(super) fn shape(&self, layer: Option<usize>, name: &str) -> Option<&'a [usize]> {
        let name = layer.map_or(name.to_owned(), |layer| format!("blk.{layer}.{name}"));
        self.file.info(&name).map(|tensor| tensor.shape.as_slice())
    }

    pub(super) fn has(&self, layer: usize, name: &str) -> bool {
        self.shape(Some(layer), name).is_some()
    }

    /// The numbers of a small tensor, if it is there.
    pub(super) fn numbers(&self, name: &str) -> Result<Option<Vec<f32>>, SpecError> {
        if self
            .file
            .info(name)
            .is_none_or(|tensor| tensor.shape.iter().product::<usize>() > 1 << 16)
        {
            return Ok(None);
        }
        let tensor = self.file.tensor(name);
        let bad = |error| SpecError::value(name, error, "a list of numbers");
        tensor.map(|tensor| Some(tensor.to_f32())).map_err(bad)
    }
}

/// A decoder of dense layers with what the file shows: GQA over plain positions, RMS norms,
/// biases and post-norms where their tensors are, `activation` inside.
pub(super) fn decoder(m: &Meta, activation: Activation) -> Result<DecoderSpec, SpecError> {
    let gqa = gqa(m)?;
    let hidden = m.size("feed_forward_length")?.unwrap_or(0);
    with_attention(m, AttentionSpec::Gqa(gqa), hidden, activation)
}

/// As [`decoder`], with another attention and dense feed-forward layers of `hidden`.
pub(super) fn with_attention(
    m: &Meta,
    attention: AttentionSpec,
    hidden: usize,
    activation: Activation,
) -> Result<DecoderSpec, SpecError> {
    let epsilon = m.number("attention.layer_norm_rms_epsilon")?;
    let missing = || SpecError::Missing("attention.layer_norm_rms_epsilon".to_owned());
    let norm = NormSpec::rms(epsilon.ok_or_else(missing)?);
    let later = m.size("nextn_predict_layers")?.unwrap_or(0);
    let layers = m.need("block_count")?.saturating_sub(later);
    if layers > 2048 {
        return Err(SpecError::value("block_count", layers, "at most 2048"));
    }
    let there = |name: &str| m.has(0, name).then_some(norm);
    let layer = LayerSpec {
        attention,
        attention_norms: BranchNorms {
            before: there("attn_norm.weight"),
            after: there("post_attention_norm.weight"),
        },
        ffn: FfnSpec::Dense(DenseSpec { hidden, activation, bias: m.has(0, "ffn_up.bias") }),
        ffn_norms: BranchNorms {
            before: there("ffn_norm.weight"),
            after: there("post_ffw_norm.weight"),
        },
        residual: Residual::Sequential,
        residual_multiplier: 1.0,
    };
    let embedding = m.shape(None, "token_embd.weight");
    let missing = || SpecError::Missing("token_embd.weight".to_owned());
    Ok(DecoderSpec {
        vocabulary: embedding.and_then(|shape| shape.first().copied()).ok_or_else(missing)?,
        width: m.need("embedding_length")?,
        context_max: m.need("context_length")?,
        context_limit: None,
        embedding_multiplier: 1.0,
        layers: vec![layer; layers],
        final_norm: norm,
        logits_scale: 1.0,
        logits_softcap: None,
        tied_head: m.shape(None, "output.weight").is_none(),
        prediction_layers: later,
        inputs: Default::default(),
        adapters: Default::default(),
    })
}

fn gqa(m: &Meta) -> Result<GqaSpec, SpecError> {
    let heads = m.need("attention.head_count")?;
    let head_dim = match m.size("attention.key_length")? {
        Some(head_dim) => head_dim,
        None => m.need("embedding_length")?.checked_div(heads).unwrap_or(0),
    };
    let value_dim = m.size("attention.value_length")?.unwrap_or(head_dim);
    if value_dim != head_dim {
        let text = format!("value heads of {value_dim} elements beside key heads of {head_dim}");
        return Err(SpecError::feature(text));
    }
    Ok(GqaSpec {
        heads,
        kv_heads: m.size("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        scale: (head_dim as f64).powf(-0.5) as f32,
        window: None,
        softcap: None,
        sinks: m.has(0, "attn_sinks.weight"),
        rope: Some(rope::read(m, head_dim)?),
        qk_norm: qk_norm(m, head_dim)?,
        qkv_bias: m.has(0, "attn_q.bias") || m.has(0, "attn_qkv.bias"),
        output_bias: m.has(0, "attn_output.bias"),
        output_gate: None,
    })
}

fn qk_norm(m: &Meta, head_dim: usize) -> Result<Option<QkNorm>, SpecError> {
    let Some(shape) = m.shape(Some(0), "attn_q_norm.weight") else { return Ok(None) };
    let scope = match shape {
        [length] if *length == head_dim => QkScope::PerHead,
        _ => QkScope::WholeRow,
    };
    let epsilon = m.number("attention.layer_norm_rms_epsilon")?.unwrap_or(1e-6);
    Ok(Some(QkNorm { scope, order: QkOrder::BeforeRope, norm: NormSpec::rms(epsilon) }))
}

/// The norm that the file calls the one after attention is the one before the feed-forward part.
pub(super) fn early_norms(m: &Meta, spec: &mut DecoderSpec) {
    let norm = spec.final_norm;
    for layer in &mut spec.layers {
        if m.has(0, "post_attention_norm.weight") {
            layer.attention_norms.after = None;
            layer.ffn_norms.before = Some(norm);
        }
    }
}

/// The first layer; a file may say that there are none.
pub(super) fn first_layer(spec: &DecoderSpec) -> Result<&LayerSpec, SpecError> {
    spec.layers.first().ok_or_else(|| SpecError::value("block_count", 0, "at least 1"))
}

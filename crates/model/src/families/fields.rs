//! What a `config.json` says beyond what its row read.
//!
//! A row reads the fields that its class reads. A further field whose name speaks of the
//! computation asks for something that the row does not do (or that the class ignores and other
//! code honours): it is refused by name unless its value says "not used". Fields of training,
//! tokens, files and programs are left alone, and so are names that speak of nothing known here,
//! which no class reads either.

use serde_json::{Map, Value};

use crate::config::Seen;
use crate::spec::SpecError;

/// Parts of names that speak of the computation.
const WORDS: &[&str] = &[
    "activation",
    "alibi",
    "attention",
    "attn",
    "bias",
    "bidirectional",
    "causal",
    "clip",
    "cla_",
    "conv",
    "embedding",
    "expert",
    "ffn",
    "gate",
    "hidden_act",
    "indexer",
    "index_",
    "kv_shared",
    "latent",
    "layer_type",
    "layers_block",
    "linear_",
    "lora",
    "mamba",
    "mlp",
    "moe",
    "mrope",
    "multiplier",
    "norm",
    "parallel",
    "recurr",
    "residual",
    "rope",
    "rotary",
    "router",
    "scal",
    "sliding",
    "softcap",
    "sparse",
    "ssm",
    "window",
];

/// Names with such a part that do not change what a trained model computes, by their ends.
const HARMLESS_ENDS: &[&str] = &[
    "dropout",
    "pdrop",
    "_loss_coef",
    "_loss_alpha",
    "_jitter_noise",
    "_implementation",
    "_noise",
    "_loss",
];

/// Names with such a part that do not change what a trained model computes.
const HARMLESS: &[&str] = &[
    "attn_implementation",
    "aux_loss_free",
    "chunk_size_feed_forward",
    "flash_attention",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "layernorm_epsilon",
    "max_position_embeddings",
    "norm_epsilon",
    "norm_eps",
    "num_logits_to_keep",
    "output_attentions",
    "output_router_logits",
    "quantization_config",
    "rms_norm_eps",
    "tie_word_embeddings",
    "use_flash_attention",
];

/// Refuses what the row did not read and that asks for a computation.
pub(super) fn refuse_unread(config: &Value, seen: &Seen) -> Result<(), SpecError> {
    let Value::Object(fields) = config else { return Ok(()) };
    // Of a model that also sees, the text's part counts.
    if seen.contains(fields, "text_config")
        && let Some(Value::Object(text)) = fields.get("text_config")
    {
        return refuse_unread_of(text, seen);
    }
    refuse_unread_of(fields, seen)
}

fn refuse_unread_of(fields: &Map<String, Value>, seen: &Seen) -> Result<(), SpecError> {
    let asks = |(key, value): &(&String, &Value)| {
        speaks_of_computation(key) && !seen.contains(fields, key) && !says_not_used(key, value)
    };
    match fields.iter().find(asks) {
        None => Ok(()),
        Some((key, value)) => {
            let mut text = value.to_string();
            if let Some((end, _)) = text.char_indices().nth(40) {
                text.replace_range(end.., "...");
            }
            Err(SpecError::feature(format!("the field `{key}`: {text} of this architecture")))
        }
    }
}

fn speaks_of_computation(key: &str) -> bool {
    let name = key.to_ascii_lowercase();
    // An underscore marks what a library keeps for itself.
    !name.starts_with('_')
        && WORDS.iter().any(|word| name.contains(word))
        && !HARMLESS.contains(&name.as_str())
        && !HARMLESS_ENDS.iter().any(|end| name.ends_with(end))
}

/// Whether a value leaves the plain computation as it is.
fn says_not_used(key: &str, value: &Value) -> bool {
    if key == "is_causal" {
        return value.as_bool() != Some(false);
    }
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        // A factor of 1 is none.
        Value::Number(number) => {
            let factor = ["multiplier", "scal", "factor"].iter().any(|word| key.contains(word));
            let number = number.as_f64();
            number == Some(0.0) || (factor && number == Some(1.0))
        }
        Value::String(text) => {
            ["", "none", "default", "full_attention", "rope"].contains(&text.as_str())
        }
        Value::Array(items) => items.iter().all(|item| says_not_used(key, item)),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::DecoderSpec;

    fn refusal(changes: serde_json::Value) -> Option<String> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        DecoderSpec::from_hf_config(&config).err().map(|error| error.to_string())
    }

    #[test]
    fn fields_that_ask_for_a_computation_are_refused_by_name() {
        for (changes, name) in [
            (json!({"attn_logit_softcapping": 30.0}), "attn_logit_softcapping"),
            (json!({"final_logit_softcapping": 30.0}), "final_logit_softcapping"),
            (json!({"sliding_window": 128}), "sliding_window"),
            (json!({"layer_types": ["full_attention", "linear_attention"]}), "layer_types"),
            (json!({"use_qk_norm": true}), "use_qk_norm"),
            (json!({"clip_qkv": 8.0}), "clip_qkv"),
            (json!({"alibi": true}), "alibi"),
            (json!({"embedding_multiplier": 12.0}), "embedding_multiplier"),
            (json!({"num_experts": 8}), "num_experts"),
            (json!({"attn_output_gate": true}), "attn_output_gate"),
            (json!({"rope_interleaved": true}), "rope_interleaved"),
            (json!({"is_causal": false}), "is_causal"),
            (json!({"position_embedding_type": "alibi"}), "position_embedding_type"),
        ] {
            let message = refusal(changes).unwrap_or_else(|| panic!("{name} was not refused"));
            assert!(message.contains(name) && message.ends_with("is not supported"), "{message}");
        }
    }

    #[test]
    fn fields_that_ask_for_nothing_pass() {
        for changes in [
            json!({"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": true}),
            json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention"]}),
            json!({"rope_interleaved": false, "is_llama_config": true, "pretraining_tp": 2}),
            json!({"residual_multiplier": 1.0, "num_experts": 0, "embd_pdrop": 0.1}),
            json!({"_name_or_path": "attention/moe", "unsloth_version": "2025.1"}),
            json!({"output_router_logits": true, "router_aux_loss_coef": 0.001}),
        ] {
            assert_eq!(refusal(changes.clone()), None, "{changes}");
        }
    }
}

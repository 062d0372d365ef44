//! What a `config.json` says beyond what its row read.
//!
//! A row reads the fields that it understands. Of the others, those that the reference's class
//! reads (`reference_fields.json`, made by `tests/peers/config_fields.py`) change what is computed:
//! they are refused by name unless they have the value that leaves the class as the row knows it.
//! Those that the class does not read change nothing: they are told in one line and ignored.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use serde::Deserialize;
use serde_json::{Map, Value};

use crate::config::{Seen, shorten};
use crate::spec::SpecError;

/// The fields that classes of transformers read.
#[derive(Deserialize)]
struct Reference {
    /// By class, each field's default.
    classes: BTreeMap<String, BTreeMap<String, Value>>,
}

static REFERENCE: LazyLock<Reference> = LazyLock::new(|| {
    let text = include_str!("reference_fields.json");
    serde_json::from_str(text).expect("the table is in the program")
});

/// Fields of training, tokens, files, programs and outputs, which no model computes with. They are
/// ignored without a word.
const QUIET: &[&str] = &[
    "architectures",
    "attn_implementation",
    "auto_map",
    "aux_loss_free",
    "chunk_size_feed_forward",
    "compression_config",
    "dtype",
    "flash_attention",
    "id2label",
    "initializer_range",
    "is_decoder",
    "is_encoder_decoder",
    "is_llama_config",
    "label2id",
    "max_length",
    "model_type",
    "name_or_path",
    "num_labels",
    "num_logits_to_keep",
    "num_nextn_predict_layers",
    "pretraining_tp",
    "problem_type",
    "pruned_heads",
    "quantization_config",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "tokenizer_class",
    "torch_dtype",
    "torchscript",
    "transformers_version",
    "unsloth_fixed",
    "unsloth_version",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention",
];

/// Ends of names of such fields.
const QUIET_ENDS: &[&str] = &[
    "_coef",
    "_implementation",
    "_loss",
    "_loss_alpha",
    "_loss_coef",
    "_noise",
    "_token_id",
    "_token_index",
    "dropout",
    "pdrop",
];

/// Beginnings of names of such fields; an underscore marks what a library keeps for itself.
const QUIET_BEGINNINGS: &[&str] = &["_", "output_", "router_aux"];

/// Refuses or tells what the row of `class` did not read. Fields in `allowed` are ignored whatever
/// they are.
pub(super) fn check_unread(
    class: &str,
    config: &Value,
    seen: &Seen,
    allowed: &[String],
) -> Result<(), SpecError> {
    let Value::Object(fields) = config else { return Ok(()) };
    // Of a model that also sees, the text's part counts.
    let text = fields.get("text_config").filter(|_| seen.contains(fields, "text_config"));
    let fields = text.and_then(Value::as_object).unwrap_or(fields);
    let reads = REFERENCE.classes.get(class);
    let mut ignored = Vec::new();
    for (key, value) in unread(fields, seen) {
        let default = reads.and_then(|reads| reads.get(key));
        if allowed.contains(key) {
            seen.note(format!("the field `{key}` is ignored, as --allow-unknown says"));
        } else if let Some(default) = default {
            if !leaves_unchanged(key, value, default) {
                let value = shorten(value);
                let field = format!("the field `{key}`: {value} of this architecture");
                return Err(SpecError::feature(field));
            }
        } else if !is_quiet(key) && !says_not_used(value) {
            ignored.push(key.as_str());
        }
    }
    if !ignored.is_empty() {
        let names = ignored.join(", ");
        seen.note(format!("config.json: {class} does not read {names}; ignored"));
    }
    Ok(())
}

fn unread<'a>(
    fields: &'a Map<String, Value>,
    seen: &'a Seen,
) -> impl Iterator<Item = (&'a String, &'a Value)> {
    fields.iter().filter(|(key, _)| !seen.contains(fields, key))
}

fn is_quiet(key: &str) -> bool {
    QUIET.contains(&key)
        || QUIET_ENDS.iter().any(|end| key.ends_with(end))
        || QUIET_BEGINNINGS.iter().any(|beginning| key.starts_with(beginning))
}

/// Whether a field that the class reads and the row does not has the value that the row was
/// written for: the class's default, or one that says "not used" where the default does.
fn leaves_unchanged(key: &str, value: &Value, default: &Value) -> bool {
    if key == "is_causal" {
        return *value != Value::Bool(false);
    }
    let same_number = value.as_f64().is_some() && value.as_f64() == default.as_f64();
    value == default || same_number || (says_not_used(default) && says_not_used(value))
}

/// Whether a value asks for nothing.
fn says_not_used(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => ["", "none", "default", "full_attention"].contains(&text.as_str()),
        Value::Array(items) => items.iter().all(says_not_used),
        Value::Object(fields) => fields.is_empty(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::super::{Family, rows};
    use super::REFERENCE;

    fn notes(changes: &Value, allowed: &[String]) -> Result<Vec<String>, String> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 2, "num_attention_heads": 2,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let read = Family::of_config(&config).unwrap().spec_with_notes(&config, allowed);
        read.map(|(_, notes)| notes).map_err(|error| error.to_string())
    }

    #[test]
    fn every_class_is_in_the_table() {
        for row in rows::TABLE {
            assert!(REFERENCE.classes.contains_key(row.architecture), "{}", row.architecture);
        }
    }

    #[test]
    fn fields_that_the_class_reads_and_the_row_does_not_are_refused_by_name() {
        for (changes, name) in [
            (json!({"sliding_window": 128}), "sliding_window"),
            (json!({"layer_types": ["full_attention", "linear_attention"]}), "layer_types"),
            (json!({"is_causal": false}), "is_causal"),
            (json!({"attention_chunk_size": 64}), "attention_chunk_size"),
        ] {
            let message = notes(&changes, &[]).expect_err(name);
            assert!(message.contains(name) && message.ends_with("is not supported"), "{message}");
            let told = notes(&changes, &[name.to_owned()]).expect("allowed");
            assert!(told.len() == 1 && told[0].contains(name), "{told:?}");
        }
    }

    #[test]
    fn fields_that_the_class_does_not_read_are_told_in_one_line() {
        let leftovers = json!({
            "attn_logit_softcapping": 30.0, "use_qk_norm": true, "clip_qkv": 8.0, "alibi": true,
            "num_experts": 8, "position_embedding_type": "alibi", "full_attn_mod": 1,
        });
        let told = notes(&leftovers, &[]).expect("opens");
        assert_eq!(told.len(), 1);
        for name in leftovers.as_object().unwrap().keys() {
            assert!(told[0].contains(name), "{name}: {told:?}");
        }
    }

    #[test]
    fn fields_that_ask_for_nothing_pass_without_a_word() {
        for changes in [
            json!({"attention_dropout": 0.1, "initializer_range": 0.02, "use_cache": true}),
            json!({"sliding_window": null, "layer_types": ["full_attention", "full_attention"]}),
            json!({"rope_interleaved": false, "is_llama_config": true, "pretraining_tp": 2}),
            json!({"num_experts": 0, "embd_pdrop": 0.1, "is_causal": true}),
            json!({"_name_or_path": "attention/moe", "unsloth_version": "2025.1"}),
            json!({"output_router_logits": true, "router_aux_loss_coef": 0.001}),
        ] {
            assert_eq!(notes(&changes, &[]), Ok(vec![]), "{changes}");
        }
    }
}

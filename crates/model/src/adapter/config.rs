//! `adapter_config.json` of PEFT: what scales a pair of matrices, and what is refused.
//!
//! Fields that choose where a *new* adapter goes (`target_modules`, `layers_to_transform`) or how
//! it is trained say nothing that the tensors of a finished one do not; fields that change what is
//! computed, and fields that nobody here knows, must stand at their defaults.

use fancy_regex::Regex;
use serde_json::{Map, Value};

use crate::config::Config;
use crate::spec::SpecError;

/// Fields that change nothing once an adapter is trained, or that are read below.
const KNOWN: [&str; 28] = [
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
    "use_rslora",
    "velora_config",
];

/// Starts of training that leave the base's weights as they are; all others subtract from them
/// what the pair starts with, so that the base is another model.
const STARTS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Rank and scale of every pair of matrices.
#[derive(Debug)]
pub(super) struct AdapterConfig {
    rank: usize,
    alpha: f64,
    ranks: Vec<Pattern>,
    alphas: Vec<Pattern>,
    /// Whether the scale is `alpha / sqrt(rank)` (Kalajdzievski 2023) and not `alpha / rank`.
    stabilised: bool,
}

/// What modules whose name ends in something have.
#[derive(Debug)]
struct Pattern {
    text: String,
    regex: Regex,
    value: f64,
}

impl AdapterConfig {
    /// # Errors
    /// If it describes no LoRA, or one that computes more than `W x + s B (A x)`.
    pub(super) fn new(value: &Value) -> Result<Self, SpecError> {
        let config = Config::new(value, "")?;
        let kind = config.text("peft_type")?;
        if kind != Some("LORA") {
            return Err(SpecError::value("peft_type", kind.unwrap_or("absent"), "LORA"));
        }
        match config.text("bias")? {
            None | Some("none") => {}
            Some(other) => return Err(SpecError::value("bias", other, "none")),
        }
        check_start(value.get("init_lora_weights").unwrap_or(&Value::Null))?;
        let fields = value.as_object().into_iter().flatten();
        for (field, value) in fields.filter(|(field, _)| !KNOWN.contains(&field.as_str())) {
            if !is_empty(value) {
                return Err(SpecError::value(
                    field,
                    shortened(value),
                    "no such field, null or false",
                ));
            }
        }
        // Absent, rank and alpha are PEFT's defaults.
        let rank = config.size("r")?.unwrap_or(8);
        if rank == 0 {
            return Err(SpecError::value("r", rank, "at least 1"));
        }
        Ok(AdapterConfig {
            rank,
            alpha: config.number("lora_alpha")?.unwrap_or(8.0),
            ranks: patterns(value, "rank_pattern")?,
            alphas: patterns(value, "alpha_pattern")?,
            stabilised: config.flag("use_rslora")?.unwrap_or(false),
        })
    }

    /// Rank and scale of the pair for `module`, a path from the base model's root.
    ///
    /// # Errors
    /// If two patterns that match say different things, or the rank is no count.
    pub(super) fn of_module(&self, module: &str) -> Result<(usize, f32), SpecError> {
        let rank = match matching(&self.ranks, "rank_pattern", module)? {
            None => self.rank,
            Some(rank) if rank >= 1.0 && rank.fract() == 0.0 && rank < 1e9 => rank as usize,
            Some(rank) => return Err(SpecError::value("rank_pattern", rank, "a rank from 1 on")),
        };
        let alpha = matching(&self.alphas, "alpha_pattern", module)?.unwrap_or(self.alpha);
        let divisor = if self.stabilised { (rank as f64).sqrt() } else { rank as f64 };
        let scale = (alpha / divisor) as f32;
        if !scale.is_finite() {
            return Err(SpecError::value("lora_alpha", alpha, "a number within the range of f32"));
        }
        Ok((rank, scale))
    }
}

fn check_start(start: &Value) -> Result<(), SpecError> {
    let fits = match start {
        Value::Null | Value::Bool(_) => true,
        Value::String(name) => STARTS.contains(&name.as_str()),
        _ => false,
    };
    match fits {
        true => Ok(()),
        false => {
            let expected = format!("true, false, {}", STARTS.join(", "));
            Err(SpecError::value("init_lora_weights", shortened(start), expected))
        }
    }
}

/// Whether a field's value asks for nothing.
fn is_empty(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Number(_) => false,
    }
}

/// A value for a message.
fn shortened(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

fn patterns(config: &Value, field: &str) -> Result<Vec<Pattern>, SpecError> {
    let none = Map::new();
    let entries = match config.get(field) {
        None | Some(Value::Null) => &none,
        Some(Value::Object(entries)) => entries,
        Some(other) => {
            let expected = "an object from names to numbers";
            return Err(SpecError::value(field, shortened(other), expected));
        }
    };
    let pattern = |(text, value): (&String, &Value)| {
        let number = value.as_f64().filter(|number| number.is_finite());
        let number = number.ok_or_else(|| {
            SpecError::value(format!("{field}.{text}"), shortened(value), "a number")
        })?;
        // PEFT's `get_pattern_key`.
        let regex = Regex::new(&format!(r"^(?:(?:.*\.)?(?:{text}))$")).map_err(|error| {
            SpecError::value(format!("{field}.{text}"), error, "a regular expression")
        })?;
        Ok(Pattern { text: text.clone(), regex, value: number })
    };
    entries.iter().map(pattern).collect()
}

/// What `patterns` say of `module`. PEFT takes the first that matches in an order that files need
/// not keep, so those that match must agree.
fn matching(patterns: &[Pattern], field: &str, module: &str) -> Result<Option<f64>, SpecError> {
    let mut found: Option<&Pattern> = None;
    for pattern in patterns {
        let matches = pattern.regex.is_match(module).map_err(|error| {
            SpecError::value(format!("{field}.{}", pattern.text), error, "a regular expression")
        })?;
        if !matches {
            continue;
        }
        if let Some(other) = found.filter(|other| other.value != pattern.value) {
            let both = format!("{} and {} for {module}", other.value, pattern.value);
            return Err(SpecError::value(field, both, "patterns that agree"));
        }
        found = Some(pattern);
    }
    Ok(found.map(|pattern| pattern.value))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(change: impl FnOnce(&mut Map<String, Value>)) -> Result<AdapterConfig, SpecError> {
        let mut value = json!({
            "peft_type": "LORA", "r": 16, "lora_alpha": 32, "bias": "none", "use_dora": false,
            "modules_to_save": null, "target_modules": ["q_proj"], "loftq_config": {},
            "megatron_core": "megatron.core", "qalora_group_size": 16,
        });
        change(value.as_object_mut().unwrap());
        AdapterConfig::new(&value)
    }

    fn set(field: &str, value: Value) -> Result<AdapterConfig, SpecError> {
        config(|fields| drop(fields.insert(field.to_owned(), value)))
    }

    #[test]
    fn ranks_and_scales() {
        let module = "model.layers.3.self_attn.q_proj";
        assert_eq!(config(|_| ()).unwrap().of_module(module), Ok((16, 2.0)));
        let stabilised = set("use_rslora", json!(true)).unwrap();
        assert_eq!(stabilised.of_module(module), Ok((16, 8.0)));
        let both = config(|fields| {
            fields.insert("rank_pattern".into(), json!({"self_attn.q_proj": 4, "up_proj": 2}));
            fields.insert("alpha_pattern".into(), json!({r"layers\.3\..*": 1}));
        });
        let both = both.unwrap();
        assert_eq!(both.of_module(module), Ok((4, 0.25)));
        assert_eq!(both.of_module("model.layers.4.mlp.up_proj"), Ok((2, 16.0)));
        // The end of a name, from a dot on.
        assert_eq!(both.of_module("model.layers.4.mlp.xup_proj"), Ok((16, 2.0)));
    }

    #[test]
    fn what_changes_the_result_is_refused_by_name() {
        for (field, value) in [
            ("peft_type", json!("IA3")),
            ("bias", json!("all")),
            ("use_dora", json!(true)),
            ("fan_in_fan_out", json!(true)),
            ("modules_to_save", json!(["lm_head"])),
            ("lora_bias", json!(true)),
            ("layer_replication", json!([[0, 2], [1, 3]])),
            ("trainable_token_indices", json!([1])),
            ("target_parameters", json!(["mlp.experts.down_proj"])),
            ("use_qalora", json!(true)),
            ("init_lora_weights", json!("pissa_niter_4")),
            ("a_field_of_the_future", json!(7)),
            ("r", json!(0)),
            ("r", json!(-4)),
            ("r", json!("many")),
            ("lora_alpha", json!("much")),
            ("rank_pattern", json!([1])),
            ("rank_pattern", json!({"q_proj": null})),
            ("alpha_pattern", json!({"(": 1})),
            ("use_rslora", json!("yes")),
        ] {
            let error = set(field, value.clone()).expect_err(field).to_string();
            assert!(error.contains(field), "{field} {value}: {error}");
        }
    }

    #[test]
    fn what_cannot_be_of_a_module() {
        let ranks = |patterns| set("rank_pattern", patterns).unwrap();
        for patterns in
            [json!({"q_proj": 0}), json!({"q_proj": 1.5}), json!({"q_proj": 1, ".*": 2})]
        {
            assert!(ranks(patterns.clone()).of_module("a.q_proj").is_err(), "{patterns}");
        }
        assert!(set("lora_alpha", json!(1e60)).unwrap().of_module("a").is_err());
    }
}

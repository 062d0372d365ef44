//! What each `config.json` under `fixtures/configs` means, as snapshots, and what is refused.

use lathe_model::lower::{LowerOptions, lower};
use lathe_model::spec::ParameterCount;
use lathe_model::{DecoderSpec, SpecError};
use serde_json::{Value, json};

fn fixture(name: &str) -> Value {
    let path = format!("{}/tests/fixtures/configs/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn specs_are_as_they_were() {
    let folder = format!("{}/tests/fixtures/configs", env!("CARGO_MANIFEST_DIR"));
    let mut names: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    names.sort();
    for name in names {
        let spec = DecoderSpec::from_hf_config(&fixture(&name)).expect(&name);
        let program = lower(&spec, &LowerOptions::new(4096)).expect(&name);
        let summary = json!({
            "spec": spec,
            "parameters": ParameterCount::of(&spec, &program),
            "kv_groups": program.kv.groups.len(),
        });
        let summary = serde_json::to_string_pretty(&summary).unwrap();
        insta::assert_snapshot!(name.as_str(), summary);
    }
}

/// The error for the fixture `name` with `changes`.
fn refusal(name: &str, changes: Value) -> SpecError {
    let mut config = fixture(name);
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    DecoderSpec::from_hf_config(&config).expect_err(name)
}

fn check_refusals(cases: &[(&str, Value, &str)]) {
    for (name, changes, message) in cases {
        assert_eq!(refusal(name, changes.clone()).to_string(), *message);
    }
}

#[test]
fn what_is_not_supported_is_named() {
    let foo = json!({"model_type": "foo", "architectures": ["FooForCausalLM"]});
    let classifier = json!({"architectures": ["LlamaForSequenceClassification"]});
    let sections = json!({"rope_scaling": {"rope_type": "default", "mrope_section": [1]}});
    let linear = json!({"layer_types": vec!["linear_attention"; 8]});
    let cases = [
        ("llama-3.2-1b", foo, "architecture FooForCausalLM is not supported"),
        (
            "llama-3.2-1b",
            classifier,
            "architecture LlamaForSequenceClassification is not supported",
        ),
        ("llama-3.2-1b", json!({"hidden_act": "relu"}), "hidden_act `relu` is not supported"),
        (
            "llama-3.2-1b",
            json!({"rope_scaling": {"rope_type": "foo"}}),
            "rope type `foo` is not supported",
        ),
        ("llama-3.2-1b", sections, "rope parameter `mrope_section` is not supported"),
        (
            "llama-3.2-1b",
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor `0.5` of this architecture is not supported",
        ),
        ("swa-sink-moe", linear, "layer type `linear_attention` is not supported"),
        ("swa-sink-moe", json!({"swiglu_limit": 5.0}), "swiglu_limit `5.0` is not supported"),
        ("mla-moe", json!({"scoring_func": "softmax"}), "scoring_func `softmax` is not supported"),
        ("deepseek-v2-lite", json!({"moe_layer_freq": 2}), "moe_layer_freq `2` is not supported"),
    ];
    check_refusals(&cases);
}

#[test]
fn what_is_out_of_range_is_named() {
    let cases = [
        (
            "llama-3.2-1b",
            json!({"num_key_value_heads": 5}),
            "`number of key-value heads` is 5, expected a divisor of the 32 attention heads",
        ),
        (
            "llama-3.2-1b",
            json!({"hidden_size": "big"}),
            "`hidden_size` is \"big\", expected a whole number, not negative",
        ),
        (
            "llama-3.2-1b",
            json!({"hidden_size": null}),
            "the model's configuration lacks `hidden_size`",
        ),
        (
            "llama-3.2-1b",
            json!({"num_hidden_layers": 1_000_000_000}),
            "`num_hidden_layers` is 1000000000, expected at most 2048",
        ),
        (
            "llama-3.2-1b",
            json!({"vocab_size": 1u64 << 60}),
            "`vocabulary size` is 1152921504606846976, expected 1 to 4194304",
        ),
        (
            "mla-moe",
            json!({"num_experts_per_tok": 17}),
            "`experts per token` is 17, expected 1 to 16",
        ),
    ];
    check_refusals(&cases);
}

#[test]
fn any_value_of_any_field_is_survived() {
    let odd = [json!(null), json!(-1), json!(0), json!(1e300), json!("x"), json!([]), json!({})];
    let tiny = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny");
    for folder in std::fs::read_dir(tiny).unwrap() {
        let path = folder.unwrap().path().join("config.json");
        let config: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        for key in config.as_object().unwrap().keys() {
            for value in &odd {
                let mut config = config.clone();
                config[key] = value.clone();
                if let Ok(spec) = DecoderSpec::from_hf_config(&config) {
                    lower(&spec, &LowerOptions::new(256)).unwrap();
                }
            }
        }
    }
}

#[test]
fn the_page_on_models_lists_every_family() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/models.md");
    let page = std::fs::read_to_string(page).expect("the page");
    let runs: Vec<&str> = page.split("## What is missing").next().unwrap_or("").lines().collect();
    for (model_type, class) in lathe_model::families::names() {
        let row = format!("| {model_type} | {class} |");
        assert!(runs.iter().any(|line| line.starts_with(&row)), "no row {row}");
    }
}

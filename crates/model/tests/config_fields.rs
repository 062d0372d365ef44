//! Fields of a `config.json` that were once misread, each with the value that transformers gives.

use std::path::Path;

use lathe_model::spec::{AttentionSpec, RopeScaling, RopeSpec};
use lathe_model::{DecoderSpec, SpecError};
use serde_json::{Value, json};

/// The spec of a tiny checkpoint's configuration with `changes`.
fn changed(name: &str, changes: Value) -> Result<DecoderSpec, SpecError> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny");
    let text = std::fs::read_to_string(folder.join(name).join("config.json")).expect(name);
    let mut config: Value = serde_json::from_str(&text).expect(name);
    for (key, value) in changes.as_object().expect("an object") {
        config[key] = value.clone();
    }
    DecoderSpec::from_hf_config(&config)
}

fn ropes(spec: &DecoderSpec) -> Vec<RopeSpec> {
    let rope = |attention: &AttentionSpec| match attention {
        AttentionSpec::Gqa(gqa) => gqa.rope.clone(),
        AttentionSpec::Mla(mla) => Some(mla.rope.clone()),
    };
    spec.layers.iter().filter_map(|layer| rope(&layer.attention)).collect()
}

fn refusal(name: &str, changes: Value) -> String {
    changed(name, changes).expect_err(name).to_string()
}

#[test]
fn an_empty_rope_scaling_hides_nothing() {
    let linear = json!({"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0});
    for empty in [json!({}), json!({"factor": null})] {
        let changes = json!({"rope_scaling": empty, "rope_parameters": linear});
        let spec = changed("llama", changes).unwrap();
        assert!(ropes(&spec).iter().all(|it| it.scaling == RopeScaling::Linear { factor: 4.0 }));
    }
}

#[test]
fn yarns_truncate_counts_beside_the_kinds_of_layers() {
    let yarn = |inside: bool| {
        json!({"rope_type": "yarn", "factor": 16.0, "rope_theta": 10000.0,
               "original_max_position_embeddings": 64, "truncate": inside})
    };
    let plain = json!({"rope_type": "default", "rope_theta": 10000.0});
    let truncates = |parameters: Value| {
        let spec = changed("olmo3", json!({"rope_parameters": parameters, "rope_scaling": null}));
        ropes(&spec.unwrap()).into_iter().find_map(|rope| match rope.scaling {
            RopeScaling::Yarn { truncate, .. } => Some(truncate),
            _ => None,
        })
    };
    let inside = json!({"full_attention": yarn(false), "sliding_attention": plain});
    assert_eq!(truncates(inside.clone()), Some(true));
    let mut beside = inside;
    beside["truncate"] = json!(false);
    assert_eq!(truncates(beside), Some(false));
}

#[test]
fn parameters_by_kind_need_kinds() {
    let by_kind = json!({"full_attention": {"rope_type": "linear", "factor": 4.0}});
    let message = refusal("llama", json!({"rope_scaling": null, "rope_parameters": by_kind}));
    assert!(message.contains("rope_parameters"), "{message}");
}

#[test]
fn frequencies_are_finite() {
    let tiny = json!({"rope_type": "linear", "factor": 1e-39, "rope_theta": 10000.0});
    let message = refusal("llama", json!({"rope_scaling": tiny}));
    assert!(message.contains("rotary frequency"), "{message}");
}

#[test]
fn the_least_sum_of_ernies_router_is_the_default_or_refused() {
    assert!(changed("ernie4-5-moe", json!({"moe_norm_min": 1e-12})).is_ok());
    let message = refusal("ernie4-5-moe", json!({"moe_norm_min": 0.9}));
    assert!(message.contains("moe_norm_min"), "{message}");
}

#[test]
fn numbers_of_gpt_oss_on_which_versions_of_the_reference_disagree_are_refused() {
    assert!(changed("gpt-oss", json!({"swiglu_alpha": 1.702, "swiglu_limit": 7.0})).is_ok());
    for (key, value) in [("swiglu_alpha", 1.0), ("swiglu_limit", 5.0)] {
        let message = refusal("gpt-oss", json!({key: value}));
        assert!(message.contains(key), "{message}");
    }
}

#[test]
fn a_gemma_that_also_sees_has_no_softcap() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny/gemma3");
    let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
    let mut text: Value = serde_json::from_str(&text).unwrap();
    text["final_logit_softcapping"] = json!(3.0);
    assert_eq!(DecoderSpec::from_hf_config(&text).unwrap().logits_softcap, Some(3.0));
    let both = json!({"model_type": "gemma3",
                      "architectures": ["Gemma3ForConditionalGeneration"], "text_config": text});
    assert_eq!(DecoderSpec::from_hf_config(&both).unwrap().logits_softcap, None);
}

#[test]
fn contexts_are_what_scaling_makes_of_them() {
    let context = |scaling: Value| {
        let changes = json!({"rope_scaling": scaling, "max_position_embeddings": 64});
        changed("llama", changes).map(|spec| spec.context_max)
    };
    let linear = json!({"rope_type": "linear", "factor": 4.0});
    assert_eq!(context(linear), Ok(256));
    let yarn = |factor: f64| {
        let original = 32;
        json!({
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original
        })
    };
    assert_eq!(context(yarn(4.0)), Ok(128));
    assert_eq!(context(yarn(2.0)), Ok(64));
    assert_eq!(context(json!({"rope_type": "yarn", "factor": 4.0})), Ok(256));
    assert_eq!(context(json!({"rope_type": "dynamic", "factor": 4.0})), Ok(64));
    let llama3 = json!({"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0, "original_max_position_embeddings": 16});
    assert_eq!(context(llama3), Ok(64));
}

#[test]
fn a_context_may_be_asked_for() {
    let mut spec = changed("llama", json!({})).unwrap();
    assert_eq!(spec.set_context(64), Ok(None));
    for context in [16, 1000] {
        assert!(spec.set_context(context).unwrap().is_some());
        assert_eq!(spec.context_max, context);
    }
    assert!(spec.set_context(0).is_err());
    let dynamic = json!({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}});
    let mut spec = changed("llama", dynamic).unwrap();
    assert!(spec.set_context(65).unwrap_err().to_string().contains("at most 64"));
    assert!(spec.set_context(64).is_ok());
}

#[test]
fn minimax_m2_may_say_how_many_elements_turn() {
    let rotary = |changes: Value| ropes(&changed("minimax-m2", changes).unwrap())[0].rotary;
    let plain = json!({"rope_type": "default", "rope_theta": 10000.0});
    assert_eq!(rotary(json!({"rope_parameters": plain})), 12);
    assert_eq!(rotary(json!({"rope_parameters": plain, "rotary_dim": 8})), 8);
    assert_eq!(rotary(json!({"rotary_dim": 8})), 6);
}

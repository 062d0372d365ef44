//! Quantized layouts of other projects (`tests/peers/quantized_fixtures.py`): every matrix is what
//! the layout's own code dequantizes, bit for bit, and what cannot be read is refused by name.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::checkpoint::{InputScheme, Quantization};
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::{InputTransform, StaticScale};
use lathe_tensor::ActivationFormat;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use support::{prepare, run};

fn fixtures() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/quantized"))
}

/// SHA-256 of the numbers of each matrix, by folder and name.
fn expected() -> BTreeMap<String, BTreeMap<String, String>> {
    let text = std::fs::read_to_string(fixtures().join("expected.json")).expect("expected.json");
    serde_json::from_str(&text).expect("names and digests")
}

fn open(name: &str) -> Model {
    Model::open(&fixtures().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

#[test]
fn matrices_are_what_their_own_code_makes_of_them() {
    let expected = expected();
    assert!(expected.len() >= 20, "{} folders", expected.len());
    for (name, matrices) in expected {
        let model = open(&name);
        assert_eq!(matrices.len(), 7, "{name}");
        for (matrix, digest) in matrices {
            let tensor = model.checkpoint.tensor(&matrix);
            let tensor = tensor.unwrap_or_else(|error| panic!("{name}: {matrix}: {error}"));
            let shape = model.checkpoint.shape(&matrix).expect("a tensor has a shape");
            assert_eq!(tensor.shape, shape, "{name}: {matrix}");
            // Zeros of both signs are one: fp4 has two, and tables disagree about the second.
            let bytes = tensor.to_f32().into_iter().flat_map(|value| (value + 0.0).to_le_bytes());
            let bytes: Vec<u8> = bytes.collect();
            let found = Sha256::digest(&bytes);
            let found: String = found.iter().map(|byte| format!("{byte:02x}")).collect();
            assert_eq!(found, digest, "{name}: {matrix} in {}", tensor.format);
        }
    }
}

#[test]
fn codes_stay_codes() {
    let format = |name: &str, matrix: &str| {
        let matrix = format!("model.layers.0.{matrix}.weight");
        open(name).checkpoint.tensor(&matrix).expect(name).format.to_string()
    };
    for (name, expected) in [
        ("ct-fp8-tensor", "f8e4m3-tensor-bf16"),
        ("ct-fp8-block", "f8e4m3-tile128x128-bf16"),
        ("ct-int8-asym", "int8-channel-bf16-asym"),
        ("ct-mxfp8", "f8e4m3-g32-e8m0"),
        ("ct-nvfp4", "f4e2m1-g16-e4m3global"),
        // Scales of columns in the order of their activations are those of no format.
        ("ct-actorder", "f32"),
        ("gptq-desc-act", "f32"),
        ("gptq-4bit", "int4-g32-f16"),
        ("gptq-3bit", "int4-g32-f16-asym"),
        ("gptq-8bit", "int8-g32-f16-asym"),
        ("awq", "int4-g32-f16-asym"),
        ("modelopt-nvfp4", "f4e2m1-g16-e4m3global"),
        ("modelopt-fp8", "f8e4m3-tensor-f32"),
        ("bnb-nf4", "bf16"),
        ("bnb-fp4", "f16"),
    ] {
        assert_eq!(format(name, "mlp.down_proj"), expected, "{name}");
    }
    for (matrix, expected) in [
        ("self_attn.q_proj", "int4-g32-bf16"),
        ("self_attn.o_proj", "f4e2m1-g16-e4m3global"),
        ("mlp.up_proj", "f8e4m3-channel-bf16"),
    ] {
        assert_eq!(format("ct-mixed", matrix), expected, "{matrix}");
    }
}

#[test]
fn every_layout_runs() {
    let tokens = [3u32, 60, 17, 5, 5, 42, 9, 33, 21];
    for name in expected().keys() {
        let model = open(name);
        // Nothing is left over, scales of inputs included.
        let logits = run(&mut *prepare(&model, 64), 0, &tokens, 0..tokens.len());
        assert!(logits.iter().all(|logit| logit.is_finite()), "{name}");
        let program = lower(&model.spec, &LowerOptions::new(64)).expect(name);
        let weights = model.weights(&program).expect(name);
        assert_eq!(weights.unused(), &[] as &[String], "{name}");
        let whole = model.checkpoint.whole_names();
        assert_eq!(whole.len(), 7 + 4, "{name}: {whole:?}");
        assert!(whole.iter().all(|name| name.ends_with(".weight")), "{name}: {whole:?}");
    }
}

/// A copy of fixture `name` whose configuration `change` changed.
fn changed(name: &str, change: &dyn Fn(&mut Value)) -> (tempfile::TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::create_dir(&path).expect("a folder");
    for entry in std::fs::read_dir(fixtures().join(name)).expect(name) {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), path.join(entry.file_name())).expect("copies");
    }
    let config = path.join("config.json");
    let mut value = read(&config);
    change(&mut value["quantization_config"]);
    std::fs::write(&config, value.to_string()).expect("writes");
    (folder, path)
}

fn read(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).expect("a file");
    serde_json::from_str(&text).expect("JSON")
}

#[test]
fn configurations_that_cannot_be_read_are_refused() {
    let refusal = |name: &str, change: &dyn Fn(&mut Value)| -> String {
        let mut config = read(&fixtures().join(name).join("config.json"));
        change(&mut config["quantization_config"]);
        let weights = Quantization::from_hf_config(&config).err();
        let error = weights.or_else(|| InputScheme::from_hf_config(&config).err());
        error.expect(name).to_string()
    };
    type Change<'a> = &'a dyn Fn(&mut Value);
    let group = |q: &mut Value, key: &str, value: Value| q["config_groups"]["group_0"][key] = value;
    let cases: [(&str, Change<'_>, &str); 17] = [
        ("gptq-4bit", &|q| q["bits"] = 5.into(), "GPTQ weights of 5 bits"),
        ("gptq-4bit", &|q| q["checkpoint_format"] = "marlin".into(), "`marlin`"),
        ("gptq-3bit", &|q| q["checkpoint_format"] = "gptq".into(), "`gptq` of 3 bits"),
        ("gptq-4bit", &|q| q["group_size"] = 0.into(), "group_size"),
        ("gptq-4bit", &|q| q["dynamic"] = json!({"+:.*q_proj": {"bits": 8}}), "`dynamic`"),
        ("awq", &|q| q["version"] = "gemv".into(), "AWQ version `gemv`"),
        ("awq", &|q| q["bits"] = 8.into(), "AWQ weights of 8 bits"),
        ("modelopt-fp8", &|q| q["quant_algo"] = "NVFP4_AWQ".into(), "`NVFP4_AWQ`"),
        (
            "modelopt-fp8",
            &|q| q["quantized_layers"] = json!({"a": {"quant_algo": "W4A8_AWQ"}}),
            "`W4A8_AWQ`",
        ),
        ("bnb-nf4", &|q| q["load_in_4bit"] = false.into(), "without load_in_4bit"),
        ("ct-mixed", &|q| group(q, "format", Value::Null), "without a format"),
        ("ct-mixed", &|q| group(q, "targets", json!(["re:(("])), "target `re:((`"),
        ("ct-mxfp4", &|q| q["format"] = "sparse-24-bitmask".into(), "`sparse-24-bitmask`"),
        ("ct-mxfp4", &|q| q["sparsity_config"] = json!({"format": "marlin"}), "sparsity_config"),
        ("ct-mxfp4", &|q| group(q, "output_activations", json!({})), "output_activations"),
        (
            "ct-nvfp4",
            &|q| q["config_groups"]["group_0"]["weights"]["group_size"] = 32.into(),
            "strategy `tensor_group`",
        ),
        (
            "ct-mxfp4",
            &|q| {
                let apply = json!([{"targets": ["Linear"], "location": "input"}]);
                q["transform_config"] = json!({"config_groups": {"u": {"apply": apply}}});
            },
            "transform of type `(none given)` while the model runs",
        ),
    ];
    for (name, change, expected) in cases {
        let error = refusal(name, change);
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn transforms_of_weights_are_in_the_weights() {
    let (_folder, path) = changed("ct-mxfp4", &|q| {
        let apply = json!([{"targets": ["Linear"], "location": "weight_input"}]);
        let group = json!({"type": "hadamard", "apply": apply});
        q["transform_config"] = json!({"config_groups": {"u": group}});
    });
    assert!(Model::open(&path).is_ok());
}

#[test]
fn files_that_are_not_what_they_say_are_refused() {
    let load = |name: &str, change: &dyn Fn(&mut Value)| -> String {
        let (_folder, path) = changed(name, change);
        let matrix = "model.layers.0.mlp.down_proj.weight";
        let model = Model::open(&path).expect(name);
        model.checkpoint.tensor(matrix).expect_err(name).to_string()
    };
    type Change<'a> = &'a dyn Fn(&mut Value);
    let weights = |q: &mut Value, key: &str, value: Value| {
        q["config_groups"]["group_0"]["weights"][key] = value;
    };
    let cases: [(&str, Change<'_>, &str); 9] = [
        // An order that is not there.
        ("ct-int4-asym", &|q| weights(q, "actorder", "group".into()), "weight_g_idx"),
        ("ct-actorder", &|q| weights(q, "group_size", 16.into()), "down_proj"),
        // A group of another size.
        (
            "gptq-4bit",
            &|q| q["group_size"] = 16.into(),
            "scales is F16 [5, 64], expected F16 [10, 64]",
        ),
        ("gptq-8bit", &|q| q["bits"] = 4.into(), "scales is F16 [5, 64], expected F16 [10, 64]"),
        ("awq", &|q| q["group_size"] = (-1).into(), "expected F16 [1, 64]"),
        (
            "ct-fp8-channel",
            &|q| weights(q, "strategy", "tensor".into()),
            "expected scales of shape",
        ),
        (
            "ct-int8-asym",
            &|q| {
                weights(q, "type", "float".into());
                weights(q, "symmetric", true.into());
            },
            "weight is I8 [64, 160], expected F8_E4M3",
        ),
        (
            "ct-int8-asym",
            &|q| weights(q, "symmetric", true.into()),
            "expected zeros, for the scheme is symmetric",
        ),
        // No group is for the module.
        (
            "ct-mxfp8",
            &|q| q["config_groups"]["group_0"]["targets"] = json!(["re:.*q_proj"]),
            "without a group for module model.layers.0.mlp.down_proj",
        ),
    ];
    for (name, change, expected) in cases {
        let error = load(name, change);
        assert!(error.contains(expected), "{name}: {error}");
    }
}

#[test]
fn gptq_is_known_by_its_other_files() {
    let matrix = "model.layers.0.mlp.down_proj.weight";
    let expected = open("gptq-4bit").checkpoint.tensor(matrix).unwrap().to_f32();
    let check = |path: &Path| {
        let found = Model::open(path).unwrap().checkpoint.tensor(matrix).unwrap().to_f32();
        assert_eq!(found, expected);
    };
    // AutoGPTQ writes a file of its own.
    let (_folder, path) = changed("gptq-4bit", &|_| {});
    let config = path.join("config.json");
    let mut value = read(&config);
    let section = value["quantization_config"].take();
    std::fs::write(path.join("quantize_config.json"), section.to_string()).expect("writes");
    std::fs::write(&config, value.to_string()).expect("writes");
    check(&path);
    // AutoRound packs as GPTQ does.
    let (_folder, path) = changed("gptq-4bit", &|q| {
        q["quant_method"] = "auto-round".into();
        q["packing_format"] = "auto_round:auto_gptq".into();
        q["extra_config"] = json!({"lm_head": {"bits": 16}});
    });
    check(&path);
}

/// A method that no tensor is stored by: the numbers would be read as something that they are not.
#[test]
fn a_method_that_contradicts_the_tensors_is_refused() {
    for (name, method, ending) in [
        ("gptq-4bit", json!({"quant_method": "fp8"}), "weight_scale"),
        ("ct-fp8-block", json!({"quant_method": "gptq", "bits": 4, "group_size": 32}), "qweight"),
        ("gptq-4bit", json!({"quant_method": "fp8", "weight_block_size": [16, 16]}), "_scale_inv"),
        ("awq", json!({"quant_method": "mxfp4"}), "_scales"),
        ("gptq-4bit", json!({"quant_method": "bitsandbytes", "load_in_8bit": true}), "SCB"),
    ] {
        let change = |config: &mut Value| *config = method.clone();
        let (_folder, path) = changed(name, &change);
        let error = Model::open(&path).expect_err(name).to_string();
        assert!(error.contains("no tensor of the files is quantized so"), "{name}: {error}");
        assert!(error.contains(ending), "{name}: {error}");
    }
}

/// How a cache is to be rounded is told, whatever the weights are stored in.
#[test]
fn a_cache_scheme_beside_dense_weights_is_told() {
    let tiny = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny/llama"));
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(tiny.join("model.safetensors"), folder.path().join("model.safetensors")).unwrap();
    let mut config = read(&tiny.join("config.json"));
    config["quantization_config"] = json!({
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
        "kv_cache_scheme":
            {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": false}});
    std::fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
    let model = Model::open(folder.path()).unwrap();
    assert!(model.notes.iter().any(|note| note.contains("kv_cache_scheme")), "{:?}", model.notes);
}

/// ModelOpt stores of inputs what fp8's codes are multiplied by, and of NVFP4 the largest number
/// over 6 * 448.
#[test]
fn scales_that_modelopt_found_are_followed() {
    for (name, format, scale) in [
        ("modelopt-fp8", ActivationFormat::Fp8Token, 0.02),
        ("modelopt-nvfp4", ActivationFormat::Nvfp4, 1.0 / 0.02),
    ] {
        let inputs = open(name).spec.inputs;
        assert_eq!(inputs.len(), 7, "{name}");
        for (matrix, found) in inputs {
            let scale = StaticScale::new(scale);
            let expected = InputTransform { hadamard: None, format: Some(format), scale };
            assert_eq!(found, expected, "{name}: {matrix}");
        }
    }
}

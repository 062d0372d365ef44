//! Which tensors of a checkpoint count: a head beside a tied embedding, and tensors that no weight
//! uses.

mod support;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::{InputTransform, StaticScale};
use lathe_tensor::ActivationFormat;
use lathe_tensor::safetensors::SafetensorsFile;
use serde_json::{Value, json};

/// A folder with the configuration and the tensors of a tiny checkpoint, both changed.
struct Folder {
    config: Value,
    tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Tensors of other types, with the name of the type.
    raw: BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>,
    directory: tempfile::TempDir,
}

impl Folder {
    fn of(name: &str) -> Self {
        let source: PathBuf =
            Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/tiny").join(name);
        let config = std::fs::read_to_string(source.join("config.json")).expect(name);
        let file = SafetensorsFile::open(&source.join("model.safetensors")).expect(name);
        let tensor = |name: &str| {
            let tensor = file.tensor(name).expect("a tensor");
            (name.to_owned(), (tensor.shape.clone(), tensor.to_f32()))
        };
        Folder {
            config: serde_json::from_str(&config).expect(name),
            tensors: file.names().map(tensor).collect(),
            raw: BTreeMap::new(),
            directory: tempfile::tempdir().expect("a folder"),
        }
    }

    fn zeros(&mut self, name: &str, shape: &[usize], value: f32) {
        let count = shape.iter().product();
        self.tensors.insert(name.to_owned(), (shape.to_vec(), vec![value; count]));
    }

    fn open(&self) -> Model {
        let at = self.directory.path();
        std::fs::write(at.join("config.json"), self.config.to_string()).expect("written");
        write(&at.join("model.safetensors"), &self.tensors, &self.raw);
        Model::open(at).expect("opens")
    }

    /// Why the weights cannot be used, if they cannot.
    fn refusal(&self) -> Option<String> {
        let model = self.open();
        let program = lower(&model.spec, &LowerOptions::new(16)).expect("lowers");
        model.weights(&program).err().map(|error| error.to_string())
    }
}

/// A safetensors file of f32 tensors, and of raw ones.
fn write(
    path: &Path,
    tensors: &BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    raw: &BTreeMap<String, (&'static str, Vec<usize>, Vec<u8>)>,
) {
    let (mut header, mut bytes) = (serde_json::Map::new(), Vec::new());
    for (name, (dtype, shape, data)) in raw {
        let start = bytes.len();
        bytes.extend(data);
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": [start, bytes.len()]});
        header.insert(name.clone(), entry);
    }
    for (name, (shape, values)) in tensors {
        let start = bytes.len();
        bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        let entry = json!({"dtype": "F32", "shape": shape, "data_offsets": [start, bytes.len()]});
        header.insert(name.clone(), entry);
    }
    let header = Value::Object(header).to_string();
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.as_bytes());
    file.extend(bytes);
    std::fs::write(path, file).expect("written");
}

/// Logits of the last of three tokens.
fn logits(model: &Model) -> Vec<f32> {
    support::run(&mut *support::prepare(model, 16), 0, &[3, 5, 7], 2..3)
}

#[test]
fn a_head_that_differs_from_a_tied_embedding_is_used() {
    let mut folder = Folder::of("llama-tied");
    // The file is mapped and will be written again, so it is read before that.
    let expected: Vec<f32> = logits(&folder.open()).iter().map(|logit| 2.0 * logit).collect();
    let (shape, values) = folder.tensors["model.embed_tokens.weight"].clone();
    folder.tensors.insert("lm_head.weight".into(), (shape.clone(), values.clone()));
    let same = folder.open();
    assert!(same.spec.tied_head && same.notes.is_empty());
    let doubled = values.iter().map(|value| 2.0 * value).collect();
    folder.tensors.insert("lm_head.weight".into(), (shape, doubled));
    let other = folder.open();
    assert!(!other.spec.tied_head && other.notes.len() == 1, "{:?}", other.notes);
    assert_eq!(logits(&other), expected);
}

#[test]
fn a_tied_model_may_hold_the_head_alone() {
    let mut folder = Folder::of("llama-tied");
    let expected = logits(&folder.open());
    let embedding = folder.tensors.remove("model.embed_tokens.weight").expect("there");
    folder.tensors.insert("lm_head.weight".into(), embedding);
    assert_eq!(logits(&folder.open()), expected);
}

#[test]
fn tensors_that_nothing_uses_are_refused_wherever_they_are() {
    for name in [
        "lm_head.bias",
        "model.embed_layer_norm.weight",
        "model.layers.4.input_layernorm.weight",
        "model.layers.1.self_attn.surplus.weight",
        "v_head.weight",
    ] {
        let mut folder = Folder::of("llama");
        folder.zeros(name, &[8], 1.0);
        let message = folder.refusal().unwrap_or_else(|| panic!("{name} was not refused"));
        assert!(message.contains(name), "{message}");
    }
}

#[test]
fn tensors_that_change_nothing_pass() {
    let mut folder = Folder::of("mistral");
    folder.zeros("model.layers.1.self_attn.q_proj.bias", &[48], 0.0);
    folder.zeros("model.layers.1.self_attn.rotary_emb.inv_freq", &[6], 1.0);
    assert_eq!(folder.refusal(), None);
    folder.zeros("model.layers.1.self_attn.q_proj.bias", &[48], 0.5);
    assert!(folder.refusal().is_some());
}

#[test]
fn layers_that_predict_further_tokens_pass_where_the_file_says_that_there_are_some() {
    let mut folder = Folder::of("glm4-moe");
    folder.zeros("model.layers.4.eh_proj.weight", &[8, 8], 1.0);
    folder.config["num_nextn_predict_layers"] = json!(0);
    assert!(folder.refusal().is_some());
    folder.config["num_nextn_predict_layers"] = json!(1);
    assert_eq!(folder.refusal(), None);
}

/// `llama` with the matrix `down_proj` of layer 1 as codes of one byte: `codes` gives each number's
/// code and what the code stands for after the row's scale. Its logits, and those of the same
/// numbers stored as floats, whose inputs `input` is done to.
fn with_codes(
    quantization: Value,
    input: InputTransform,
    dtype: &'static str,
    code: impl Fn(f32) -> (u8, f32),
    beside: impl Fn(&mut Folder, &str, usize),
) -> (Vec<f32>, Vec<f32>) {
    let stem = "model.layers.1.mlp.down_proj";
    let mut folder = Folder::of("llama");
    let (shape, values) = folder.tensors[&format!("{stem}.weight")].clone();
    let (codes, numbers): (Vec<u8>, Vec<f32>) = values.iter().map(|x| code(*x)).unzip();
    folder.tensors.insert(format!("{stem}.weight"), (shape.clone(), numbers));
    let mut plain = folder.open();
    if !input.is_nothing() {
        plain.spec.inputs.insert("layers.1.ffn.down".to_owned(), input);
    }
    let expected = logits(&plain);
    folder.tensors.remove(&format!("{stem}.weight"));
    folder.raw.insert(format!("{stem}.weight"), (dtype, shape.clone(), codes));
    beside(&mut folder, stem, shape[0]);
    folder.config["quantization_config"] = quantization;
    (logits(&folder.open()), expected)
}

fn assert_close(found: &[f32], expected: &[f32]) {
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(off < 1e-5, "off by {off}");
}

#[test]
fn fp8_with_one_scale_a_matrix_is_read() {
    // 0x38 is 1, 0xb8 is -1.
    let sign = |x: f32| if x < 0.0 { (0xb8, -0.25) } else { (0x38, 0.25) };
    for (scheme, scale, input) in [
        ("dynamic", "weight_scale", None),
        ("static", "weight_scale", Some("input_scale")),
        ("static", "weight_scale_inv", Some("activation_scale")),
    ] {
        let config = json!({"quant_method": "fp8", "activation_scheme": scheme,
                            "weight_block_size": null});
        // A static scale is followed.
        let rounding = InputTransform {
            hadamard: None,
            format: Some(ActivationFormat::Fp8Token),
            scale: StaticScale::new(0.125),
        };
        let rounding = input.map_or(InputTransform::default(), |_| rounding);
        let (found, expected) = with_codes(config, rounding, "F8_E4M3", sign, |folder, stem, _| {
            folder.zeros(&format!("{stem}.{scale}"), &[1], 0.25);
            if let Some(input) = input {
                folder.zeros(&format!("{stem}.{input}"), &[], 0.125);
            }
        });
        assert_close(&found, &expected);
    }
}

#[test]
fn bitsandbytes_integers_of_eight_bits_are_read() {
    let sign = |x: f32| if x < 0.0 { (-127_i8 as u8, -0.25) } else { (127, 0.25) };
    let config = json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
    let (found, expected) =
        with_codes(config, InputTransform::default(), "I8", sign, |folder, stem, rows| {
            folder.zeros(&format!("{stem}.SCB"), &[rows], 0.25);
            folder.raw.insert(format!("{stem}.weight_format"), ("U8", vec![], vec![0]));
        });
    assert_close(&found, &expected);
}

#[test]
fn old_keys_and_scales_of_a_cache_do_not_stand_in_the_way() {
    let sign = |x: f32| if x < 0.0 { (0xb8, -0.25) } else { (0x38, 0.25) };
    let config = json!({
        "quant_method": "compressed-tensors", "format": "float-quantized",
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor"},
        "config_groups": {"g": {"targets": ["Linear"], "weights": {
            "num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": true}}},
    });
    let beside = |folder: &mut Folder, stem: &str, _| {
        folder.zeros(&format!("{stem}.weight_scale"), &[1], 0.25);
        folder.zeros("model.layers.1.self_attn.k_scale", &[1], 0.25);
        folder.zeros("model.layers.1.self_attn.v_scale", &[1], 0.25);
    };
    let (found, expected) =
        with_codes(config.clone(), InputTransform::default(), "F8_E4M3", sign, beside);
    assert_close(&found, &expected);
    let mut folder = Folder::of("llama");
    // Its tensors are plain floats.
    folder.config["compression_config"] = config;
    folder.config["compression_config"]["format"] = "dense".into();
    assert!(folder.open().notes.iter().any(|note| note.contains("kv_cache_scheme")));
}

/// Scales of inputs that calibration found are followed, whatever the weights are stored in.
#[test]
fn stored_scales_of_inputs_are_followed() {
    let modules = ["q_proj", "k_proj", "v_proj"].map(|it| format!("model.layers.1.self_attn.{it}"));
    let inputs = |kind: &str| match kind {
        "fp8" => json!({"num_bits": 8, "type": "float", "symmetric": true, "strategy": "tensor",
                        "dynamic": false}),
        _ => json!({"num_bits": 4, "type": "float", "symmetric": true, "group_size": 16,
                    "strategy": "tensor_group", "dynamic": "local",
                    "scale_dtype": "torch.float8_e4m3fn"}),
    };
    for (kind, ending, format, scales) in [
        ("fp8", "input_scale", ActivationFormat::Fp8Token, [0.03, 0.03, 0.05]),
        ("nvfp4", "input_global_scale", ActivationFormat::Nvfp4, [700.0, 700.0, 500.0]),
    ] {
        let mut folder = Folder::of("llama");
        folder.config["quantization_config"] = json!({
            "quant_method": "compressed-tensors", "format": "dense",
            "config_groups": {"g": {"targets": modules, "input_activations": inputs(kind)}}});
        let message = |folder: &Folder| {
            let at = folder.directory.path();
            std::fs::write(at.join("config.json"), folder.config.to_string()).expect("written");
            write(&at.join("model.safetensors"), &folder.tensors, &folder.raw);
            Model::open(at).expect_err("refused").to_string()
        };
        let error = message(&folder);
        assert!(error.contains(&format!("q_proj.{ending}")), "{error}");
        for (module, scale) in modules.iter().zip(scales) {
            folder.zeros(&format!("{module}.{ending}"), &[1], scale);
        }
        let model = folder.open();
        let found = logits(&model);
        // The same, said by the spec.
        let mut plain = Folder::of("llama").open();
        for (name, scale) in ["query", "key", "value"].into_iter().zip(scales) {
            let scale = StaticScale::new(scale);
            let transform = InputTransform { hadamard: None, format: Some(format), scale };
            plain.spec.inputs.insert(format!("layers.1.attention.{name}"), transform);
        }
        assert_eq!(model.spec.inputs, plain.spec.inputs);
        assert_eq!(found, logits(&plain));
        // Not the row's own scales, and not plain inputs.
        plain.spec.inputs.values_mut().for_each(|it| it.scale = None);
        assert!(found != logits(&plain) && found != logits(&Folder::of("llama").open()));
        folder.zeros(&format!("{}.{ending}", modules[0]), &[1], -1.0);
        assert!(message(&folder).contains("one positive number"));
    }
}

#[test]
fn experts_stored_transposed_are_the_same() {
    let mut folder = Folder::of("qwen3-vl-moe");
    let expected = logits(&folder.open());
    let stacked = |name: &String| name.contains(".mlp.experts.");
    let names: Vec<String> = folder.tensors.keys().filter(|name| stacked(name)).cloned().collect();
    for name in names {
        let (shape, values) = folder.tensors[&name].clone();
        let [experts, rows, columns] = shape[..] else { panic!("{name}: {shape:?}") };
        let at = |expert: usize, row: usize, column: usize| {
            values[(expert * rows + row) * columns + column]
        };
        let places = (0..experts).flat_map(|e| {
            (0..columns).flat_map(move |column| (0..rows).map(move |row| (e, row, column)))
        });
        let transposed = places.map(|(e, row, column)| at(e, row, column)).collect();
        folder.tensors.insert(name, (vec![experts, columns, rows], transposed));
    }
    assert_eq!(logits(&folder.open()), expected);
}

//! Models written to another layout are the same models.

mod support;

use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::checkpoint::Quantization;
use lathe_model::export::{
    GgufOptions, HuggingFaceOptions, Integers, PackedLayout, Replacement, ReplacementError,
    to_gguf, to_hugging_face, to_packed,
};
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::weights::ModelWeights;
use lathe_program::{InputTransform, Weight, WeightDecl, WeightRole};
use lathe_tensor::codec::scaled::{self, E8m0Rounding};
use lathe_tensor::{ActivationFormat, Format, GgmlType, ScaledFormat, Tensor};
use lathe_test_support::shared;
use support::{prepare, run};

const TOKENS: [u32; 9] = [3, 60, 17, 5, 5, 42, 9, 33, 21];

fn tiny(name: &str) -> Model {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    Model::open(&root.join(name)).expect(name)
}

fn logits(model: &Model) -> Vec<f32> {
    run(&mut *prepare(model, 64), 0, &TOKENS, 0..TOKENS.len())
}

fn plain(format: Format) -> GgufOptions {
    GgufOptions { format, embedding: None }
}

#[test]
fn to_gguf_and_back_is_the_same_model() {
    let folder = tempfile::tempdir().unwrap();
    let original = tiny("llama-tied");
    let file: PathBuf = folder.path().join("tiny.gguf");
    to_gguf(&original, &file, &plain(Format::BF16)).expect("writes GGUF");
    let gguf = Model::open(&file).expect("opens GGUF");
    assert_eq!(gguf.spec, original.spec);
    let expected = logits(&original);
    assert!(logits(&gguf) == expected, "GGUF changes the logits");

    let directory = folder.path().join("back");
    to_hugging_face(&gguf, &directory, &HuggingFaceOptions::default()).expect("writes HF");
    let back = Model::open(&directory).expect("opens HF");
    assert_eq!(back.spec, original.spec);
    assert!(logits(&back) == expected, "the way back changes the logits");
}

#[test]
fn biases_and_scaled_frequencies_reach_gguf() {
    let folder = tempfile::tempdir().unwrap();
    let original = tiny("llama");
    let file = folder.path().join("tiny.gguf");
    to_gguf(&original, &file, &plain(Format::F32)).expect("writes GGUF");
    let gguf = Model::open(&file).expect("opens GGUF");
    let worst = logits(&gguf).into_iter().zip(logits(&original)).map(|(a, b)| (a - b).abs());
    assert!(worst.fold(0.0, f32::max) < 1e-4);
}

#[test]
fn fp8_tiles_become_plain_numbers() {
    let folder = tempfile::tempdir().unwrap();
    let original = tiny("deepseek-v3-fp8");
    let options =
        HuggingFaceOptions { float: Some(lathe_tensor::FloatType::F32), shard_bytes_max: 50_000 };
    to_hugging_face(&original, folder.path(), &options).expect("writes HF");
    assert!(folder.path().join("model.safetensors.index.json").is_file(), "several files");
    let copy = Model::open(folder.path()).expect("opens");
    assert_eq!(copy.spec, original.spec);
    assert!(logits(&copy) == logits(&original));
}

#[test]
fn what_the_target_cannot_say_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tiny.gguf");
    let refusals = [
        ("deepseek-v3", "latent attention cannot be written to GGUF"),
        ("mixtral", "a mixture of experts cannot be written to GGUF"),
        ("mistral", "windowed attention cannot be written to GGUF"),
        ("olmo2", "norms of this kind cannot be written to GGUF"),
        ("granite", "a residual multiplier cannot be written to GGUF"),
    ];
    for (name, message) in refusals {
        let error = to_gguf(&tiny(name), &file, &plain(Format::BF16)).expect_err(name);
        assert_eq!(error.to_string(), message);
        assert!(!file.exists());
    }
}

#[test]
fn a_trained_model_keeps_its_text() {
    let Some(path) = shared("a_trained_model_keeps_its_text", "models/draft-llama") else { return };
    let folder = tempfile::tempdir().unwrap();
    let original = Model::open(&path).expect("opens");
    let file = folder.path().join("draft.gguf");
    to_gguf(&original, &file, &plain(Format::Ggml(GgmlType::Q4_0))).expect("writes GGUF");
    let gguf = Model::open(&file).expect("opens GGUF");
    assert_eq!(gguf.text_problem, None);
    let stops = |token: &u32| gguf.generation.stop_tokens.contains(token);
    assert!(original.generation.stop_tokens.iter().all(stops));
    let directory = folder.path().join("back");
    to_hugging_face(&gguf, &directory, &HuggingFaceOptions::default()).expect("writes HF");
    let back = Model::open(&directory).expect("opens HF");

    let text =
        "Why is the sky blue?\n\n  def f(x): return x**2 + 10000 <|im_end|> caf\u{e9} \u{1f600}";
    let tokenizer = original.tokenizer.as_ref().expect("a tokenizer");
    for other in [&gguf, &back] {
        let other = other.tokenizer.as_ref().expect("a tokenizer");
        for special in [false, true] {
            let expected = tokenizer.encode(text, special).unwrap();
            assert_eq!(other.encode(text, special).unwrap(), expected);
            assert_eq!(
                other.decode(&expected, false).unwrap(),
                tokenizer.decode(&expected, false).unwrap()
            );
        }
    }
    let messages = [lathe_model::chat::Message::new("user", "Hello")];
    let render = |model: &Model| {
        let template = model.chat_template.as_ref().expect("a template");
        template.render(&messages, true, serde_json::json!({})).unwrap()
    };
    assert_eq!(render(&gguf), render(&original));
    assert_eq!(render(&back), render(&original));
}

/// Rounds weights to nearest: each in the format that a function of its name, role and shape gives.
struct Rounded<'a> {
    weights: &'a ModelWeights<'a>,
    format: &'a dyn Fn(&WeightDecl) -> Option<ScaledFormat>,
}

impl Replacement for Rounded<'_> {
    fn format(&self, weight: Weight) -> Option<Format> {
        (self.format)(self.weights.program().weight(weight)).map(Format::Scaled)
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        let tensor = self.weights.load(weight)?;
        let format = (self.format)(self.weights.program().weight(weight)).expect("replaced");
        Ok(scaled::quantize(&tensor.shape, &format, &tensor.to_f32(), E8m0Rounding::Floor)?)
    }
}

fn scaled(name: &str) -> ScaledFormat {
    let Ok(Format::Scaled(format)) = Format::parse(name) else { panic!("{name}") };
    format
}

/// Writes `original` with the weights of `format` to a folder, reads it back and compares every
/// weight; the folder's configuration.
fn written_and_read(
    original: &Model,
    integers: Integers,
    format: &dyn Fn(&WeightDecl) -> Option<ScaledFormat>,
) -> serde_json::Value {
    let folder = tempfile::tempdir().unwrap();
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    let mut rounded = Rounded { weights: &weights, format };
    let layout = PackedLayout::new(original, &weights).unwrap().with_integers(integers);
    to_packed(&layout, folder.path(), &mut rounded).expect("writes");
    let packed = Model::open(folder.path()).expect("opens");
    assert_eq!(packed.spec, original.spec);
    let back = packed.weights(&program).expect("has all weights");
    assert_eq!(back.unused(), &[] as &[String]);
    for index in 0..program.weights.len() {
        let (weight, name) = (Weight(index as u32), &program.weights[index].name);
        let expected = match rounded.format(weight) {
            Some(_) => rounded.tensor(weight).unwrap(),
            None => weights.load(weight).unwrap(),
        };
        let found = back.load(weight).unwrap();
        assert_eq!(found.format, expected.format, "{name}");
        assert_eq!(found.to_f32(), expected.to_f32(), "{name} in {}", found.format);
    }
    let text = std::fs::read_to_string(folder.path().join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    // Plain floats have no place for what is done to inputs.
    if config["quantization_config"]["quant_method"] != "mxfp4" && original.spec.inputs.is_empty() {
        // Floats again: codes and scales become one tensor.
        let plain = folder.path().join("plain");
        to_hugging_face(&packed, &plain, &HuggingFaceOptions::default()).unwrap();
        assert_eq!(Model::open(&plain).unwrap().spec, original.spec);
    }
    config["quantization_config"].clone()
}

/// Linear layers whose rows are whole blocks of `format`.
fn linear(format: ScaledFormat) -> impl Fn(&WeightDecl) -> Option<ScaledFormat> {
    move |decl| {
        let fits = Format::Scaled(format).bytes_for(&decl.shape).is_ok();
        (decl.role == WeightRole::Linear && fits).then_some(format)
    }
}

#[test]
fn every_format_comes_back_bit_for_bit() {
    let original = tiny("llama");
    let words = Integers::Words;
    for (name, integers, encoding) in [
        ("int4-g16-bf16", words, "pack-quantized"),
        ("int4-channel-f32-asym", words, "pack-quantized"),
        ("int8-g16-f16-asym", words, "pack-quantized"),
        ("int8-channel-bf16", words, "pack-quantized"),
        ("int8-channel-bf16", Integers::Bytes, "int-quantized"),
        ("int8-g16-f32-asym", Integers::Bytes, "int-quantized"),
        ("int8-tensor-f32", words, "int-quantized"),
        ("f8e4m3-tensor-bf16", words, "float-quantized"),
        ("f8e4m3-channel-f16", words, "float-quantized"),
        ("f8e4m3-g16-f32", words, "float-quantized"),
        ("f8e4m3-tile16x32-bf16", words, "float-quantized"),
        ("mxfp8", words, "mxfp8-quantized"),
        ("mxfp6", words, "mxfp6-pack-quantized"),
        ("mxfp4", words, "mxfp4-pack-quantized"),
        ("nvfp4", words, "nvfp4-pack-quantized"),
    ] {
        let config = written_and_read(&original, integers, &linear(scaled(name)));
        assert_eq!(config["format"], encoding, "{name}");
        // What is done to inputs is the model's own, not the format's.
        let group = &config["config_groups"]["group_0"];
        assert!(group["input_activations"].is_null(), "{name}");
        assert_eq!(group["format"], encoding, "{name}");
    }
}

/// Without a format of its own, readers take `int-quantized` for integers that meet rounded inputs.
#[test]
fn a_group_whose_inputs_are_rounded_names_its_format() {
    for (name, inputs, encoding) in [
        ("int4-g16-bf16", ActivationFormat::Int8Token, "pack-quantized"),
        ("int4-g16-bf16", ActivationFormat::Int4Token, "pack-quantized"),
        ("f8e4m3-channel-bf16", ActivationFormat::Fp8Token, "float-quantized"),
    ] {
        let mut original = tiny("llama");
        let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
        let linear_weights = program.weights.iter().filter(|it| it.role == WeightRole::Linear);
        let transform = InputTransform { format: Some(inputs), ..InputTransform::default() };
        original.spec.inputs = linear_weights.map(|it| (it.name.clone(), transform)).collect();
        let config = written_and_read(&original, Integers::Words, &linear(scaled(name)));
        let group = &config["config_groups"]["group_0"];
        assert_eq!((&config["format"], &group["format"]), (&encoding.into(), &encoding.into()));
        assert!(group["input_activations"].is_object(), "{group}");
    }
}

#[test]
fn each_weight_has_a_format_of_its_own() {
    let mixed = |decl: &WeightDecl| match decl.role {
        WeightRole::Linear if decl.name.ends_with("attention.value") => Some(scaled("nvfp4")),
        WeightRole::Linear if decl.name.ends_with("attention.output") => None,
        WeightRole::Linear if decl.name.contains("attention") => Some(scaled("int4-g16-bf16")),
        WeightRole::Linear => Some(scaled("f8e4m3-channel-bf16")),
        _ => None,
    };
    let config = written_and_read(&tiny("llama"), Integers::Words, &mixed);
    assert_eq!(config["format"], "mixed-precision");
    let groups = config["config_groups"].as_object().unwrap();
    assert_eq!(groups.len(), 3);
    for group in groups.values() {
        let name = group["format"].as_str().unwrap();
        let targets = group["targets"].as_array().unwrap();
        // Three matrices of each layer's FFN, two and one of its attention.
        assert_eq!(targets[0] == "Linear", name == "float-quantized", "{targets:?}");
        assert_eq!(
            targets.len(),
            match name {
                "float-quantized" => 1,
                "pack-quantized" => 8,
                _ => 4,
            }
        );
    }
    let ignored = config["ignore"].as_array().unwrap();
    assert!(ignored.contains(&"model.layers.2.self_attn.o_proj".into()), "{ignored:?}");
}

#[test]
fn experts_of_their_own_tensors_come_back() {
    for name in ["nvfp4", "f8e4m3-tile16x16-f32", "int4-g16-bf16-asym"] {
        let experts = |decl: &WeightDecl| {
            matches!(decl.role, WeightRole::Experts | WeightRole::Linear).then(|| scaled(name))
        };
        written_and_read(&tiny("mixtral"), Integers::Words, &experts);
    }
}

#[test]
fn experts_of_one_tensor_become_blocks() {
    let original = tiny("gpt-oss");
    let experts = |decl: &WeightDecl| (decl.role == WeightRole::Experts).then(|| scaled("mxfp4"));
    let config = written_and_read(&original, Integers::Words, &experts);
    assert_eq!(config["quant_method"], "mxfp4");

    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    let layout = PackedLayout::new(&original, &weights).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let refusal = |format: &dyn Fn(&WeightDecl) -> Option<ScaledFormat>| {
        let mut rounded = Rounded { weights: &weights, format };
        to_packed(&layout, folder.path(), &mut rounded).expect_err("refuses").to_string()
    };
    let error = refusal(&|decl| (decl.role == WeightRole::Experts).then(|| scaled("nvfp4")));
    assert!(error.contains("only mxfp4"), "{error}");
    let error = refusal(&|decl| decl.name.ends_with("experts.gate").then(|| scaled("mxfp4")));
    assert!(error.contains("without those of the same tensor"), "{error}");
    let error = refusal(&|decl| match decl.role {
        WeightRole::Experts => Some(scaled("mxfp4")),
        WeightRole::Linear => Some(scaled("f8e4m3-channel-bf16")),
        _ => None,
    });
    assert!(error.contains("and other quantized matrices"), "{error}");
}

#[test]
fn experts_of_one_tensor_without_blocks_are_refused() {
    let original = tiny("granitemoe");
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    let layout = PackedLayout::new(&original, &weights).unwrap();
    let format = Format::Scaled(scaled("f8e4m3-channel-bf16"));
    for name in ["layers.0.ffn.experts.gate", "layers.0.ffn.experts.down"] {
        let weight = program.weight_named(name).expect(name);
        let error = layout.check(&program, weight, format).expect_err(name).to_string();
        assert!(error.contains(name) && error.contains("a larger tensor"), "{error}");
    }
}

#[test]
fn formats_that_a_folder_cannot_hold_are_refused() {
    let original = tiny("llama");
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    let layout = PackedLayout::new(&original, &weights).unwrap();
    let folder = tempfile::tempdir().unwrap();
    for name in ["f8e5m2-channel-bf16", "mxfp6_e3m2", "int3-g16-bf16", "f4e2m1-g16-bf16"] {
        let format = linear(scaled(name));
        let mut rounded = Rounded { weights: &weights, format: &format };
        let error = to_packed(&layout, folder.path(), &mut rounded).expect_err(name).to_string();
        assert!(error.contains("cannot be written to a quantized folder"), "{name}: {error}");
    }
}

#[test]
fn what_packed_files_cannot_be_is_refused() {
    let config = |change: &dyn Fn(&mut serde_json::Value)| {
        let path =
            concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/configs/llama-3.1-8b-w4a16.json");
        let text = std::fs::read_to_string(path).unwrap();
        let mut config: serde_json::Value = serde_json::from_str(&text).unwrap();
        change(&mut config["quantization_config"]);
        Quantization::from_hf_config(&config).map_err(|error| error.to_string())
    };
    assert!(matches!(config(&|_| ()), Ok(Quantization::CompressedTensors(_))));
    let group = |q: &mut serde_json::Value, key: &str, value: serde_json::Value| {
        q["config_groups"]["group_0"]["weights"][key] = value;
    };
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let refused: [(Change<'_>, &str); 4] = [
        (&|q| q["format"] = "float-quantized".into(), "float-quantized weights of type `int`"),
        (&|q| group(q, "num_bits", 3.into()), "3 bits"),
        (&|q| group(q, "strategy", "block".into()), "block"),
        (
            &|q| q["config_groups"]["group_0"]["output_activations"] = serde_json::json!({}),
            "output_activations",
        ),
    ];
    for (change, expected) in refused {
        let error = config(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

/// A fused projection, and the two matrices of a latent's down projection, are one tensor each.
#[test]
fn matrices_that_divide_a_tensor_come_back() {
    for (model, name) in [
        ("deepseek-v3", "int4-g8-bf16-asym"),
        ("deepseek-v3", "int8-channel-f32"),
        ("deepseek-v3", "mxfp4"),
        ("phi3", "f8e4m3-channel-bf16"),
        ("phi3", "f8e4m3-tile16x16-f32"),
    ] {
        let format = scaled(name);
        let config = written_and_read(&tiny(model), Integers::Words, &linear(format));
        let ignored = config["ignore"].as_array().unwrap();
        let fused =
            |name: &str| ignored.contains(&format!("model.layers.0.self_attn.{name}").into());
        assert!(!fused("qkv_proj") && !fused("kv_a_proj_with_mqa"), "{name}: {ignored:?}");
    }
}

#[test]
fn matrices_that_divide_a_tensor_are_quantized_alike() {
    let original = tiny("deepseek-v3");
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    let layout = PackedLayout::new(&original, &weights).unwrap();
    let refusal = |format: &dyn Fn(&WeightDecl) -> Option<ScaledFormat>| {
        let mut rounded = Rounded { weights: &weights, format };
        let folder = tempfile::tempdir().unwrap();
        to_packed(&layout, folder.path(), &mut rounded).expect_err("refuses").to_string()
    };
    let error = refusal(&|decl| decl.name.ends_with("kv_down").then(|| scaled("mxfp4")));
    assert!(
        error.contains("kv_down in") && error.contains("rope_key in its own floats"),
        "{error}"
    );
    // Each has a global scale of its own here.
    let both = |decl: &WeightDecl| {
        let part = decl.name.ends_with("kv_down") || decl.name.ends_with("rope_key");
        part.then(|| scaled("nvfp4"))
    };
    let error = refusal(&both);
    assert!(error.contains("global scales of their own"), "{error}");
    let weight = program.weight_named("layers.0.attention.kv_down").unwrap();
    for name in ["fp8_tensor", "f8e4m3-tile64x16-f32"] {
        let format = Format::parse(&name.replace("fp8_tensor", "f8e4m3-tensor-bf16")).unwrap();
        let error = layout.check(&program, weight, format).expect_err(name).to_string();
        assert!(error.contains("kv_down") && error.contains("other rows"), "{error}");
    }
}

/// transformers reads all experts by the first group, whatever else is in the folder.
#[test]
fn a_group_with_experts_comes_first() {
    for (experts, others, bits) in [
        ("int4-channel-bf16", "int8-channel-bf16", 4),
        ("int8-channel-bf16", "int4-channel-bf16", 8),
    ] {
        let mixed = |decl: &WeightDecl| match decl.role {
            WeightRole::Experts => Some(scaled(experts)),
            WeightRole::Linear => Some(scaled(others)),
            _ => None,
        };
        let config = written_and_read(&tiny("qwen3-moe"), Integers::Words, &mixed);
        assert_eq!(config["config_groups"]["group_0"]["weights"]["num_bits"], bits);
    }
}

/// Floats that replace some rows of a tensor stay beside the floats that are left.
#[test]
fn floats_of_some_rows_of_a_tensor_are_replaced() {
    let original = tiny("deepseek-v3");
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    struct Doubled<'a>(&'a ModelWeights<'a>, ScaledFormat);
    impl Replacement for Doubled<'_> {
        fn format(&self, weight: Weight) -> Option<Format> {
            let name = &self.0.program().weight(weight).name;
            let scaled = name.ends_with("ffn.down").then_some(Format::Scaled(self.1));
            scaled.or(name.ends_with("value_up").then_some(Format::F32))
        }

        fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
            let tensor = self.0.load(weight)?;
            let values: Vec<f32> = tensor.to_f32().iter().map(|x| 2.0 * x).collect();
            if let Some(Format::F32) = self.format(weight) {
                return Ok(Tensor::from_f32(&tensor.shape, &values));
            }
            Ok(scaled::quantize(&tensor.shape, &self.1, &values, E8m0Rounding::Floor)?)
        }
    }
    let folder = tempfile::tempdir().unwrap();
    let layout = PackedLayout::new(&original, &weights).unwrap();
    let mut doubled = Doubled(&weights, scaled("int8-channel-f32"));
    to_packed(&layout, folder.path(), &mut doubled).expect("writes");
    let packed = Model::open(folder.path()).expect("opens");
    let back = packed.weights(&program).expect("has all weights");
    for (name, factor) in [("value_up", 2.0), ("key_up", 1.0)] {
        let weight = program.weight_named(&format!("layers.1.attention.{name}")).unwrap();
        let expected: Vec<f32> =
            weights.load(weight).unwrap().to_f32().iter().map(|x| factor * x).collect();
        assert_eq!(back.load(weight).unwrap().to_f32(), expected, "{name}");
    }
}

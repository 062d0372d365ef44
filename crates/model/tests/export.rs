//! Models written to another layout are the same models.

mod support;

use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::checkpoint::Quantization;
use lathe_model::export::{
    GgufOptions, HuggingFaceOptions, PackedLayout, Replacement, ReplacementError, to_gguf,
    to_hugging_face, to_packed,
};
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::weights::ModelWeights;
use lathe_program::{Weight, WeightRole};
use lathe_tensor::codec::scaled::{self, E8m0Rounding};
use lathe_tensor::{Format, GgmlType, ScaledFormat, Tensor};
use support::{prepare, run, shared};

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

/// Rounds every linear layer to nearest.
struct RoundAll<'a> {
    weights: &'a ModelWeights<'a>,
    format: ScaledFormat,
}

impl Replacement for RoundAll<'_> {
    fn format(&self, weight: Weight) -> Option<Format> {
        let role = self.weights.program().weight(weight).role;
        (role == WeightRole::Linear).then_some(Format::Scaled(self.format))
    }

    fn tensor(&mut self, weight: Weight) -> Result<Tensor, ReplacementError> {
        let tensor = self.weights.load(weight)?;
        let values = tensor.to_f32();
        Ok(scaled::quantize(&tensor.shape, &self.format, &values, E8m0Rounding::Floor)?)
    }
}

#[test]
fn packed_integers_come_back_bit_for_bit() {
    let original = tiny("llama");
    let program = lower(&original.spec, &LowerOptions::new(64)).unwrap();
    let weights = original.weights(&program).unwrap();
    for name in ["int4-g16-bf16", "int4-channel-f32-asym", "int8-g16-f16-asym", "int8-channel-bf16"]
    {
        let folder = tempfile::tempdir().unwrap();
        let Ok(Format::Scaled(format)) = Format::parse(name) else { panic!("{name}") };
        let mut rounded = RoundAll { weights: &weights, format };
        let layout = PackedLayout::new(&original, &weights).unwrap();
        to_packed(&layout, folder.path(), &mut rounded).expect(name);
        let packed = Model::open(folder.path()).expect(name);
        assert_eq!(packed.spec, original.spec);
        let back = packed.weights(&program).expect(name);
        for index in 0..program.weights.len() {
            let weight = Weight(index as u32);
            let expected = match rounded.format(weight) {
                Some(_) => rounded.tensor(weight).unwrap(),
                None => weights.load(weight).unwrap(),
            };
            let found = back.load(weight).unwrap();
            assert_eq!(found.format, expected.format, "{name}: {}", program.weights[index].name);
            assert_eq!(found.to_f32(), expected.to_f32(), "{name}");
        }
        // Floats again: codes and scales become one tensor.
        let plain = folder.path().join("plain");
        to_hugging_face(&packed, &plain, &HuggingFaceOptions::default()).expect(name);
        assert_eq!(Model::open(&plain).expect(name).spec, original.spec);
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
    assert!(matches!(config(&|_| ()), Ok(Quantization::Packed(_))));
    let group = |q: &mut serde_json::Value, key: &str, value: serde_json::Value| {
        q["config_groups"]["group_0"]["weights"][key] = value;
    };
    type Change<'a> = &'a dyn Fn(&mut serde_json::Value);
    let refused: [(Change<'_>, &str); 6] = [
        (&|q| q["format"] = "float-quantized".into(), "format `float-quantized`"),
        (&|q| q["kv_cache_scheme"] = serde_json::json!({"num_bits": 8}), "kv_cache_scheme"),
        (&|q| group(q, "num_bits", 3.into()), "3 bits"),
        (&|q| group(q, "actorder", "group".into()), "actorder"),
        (&|q| group(q, "strategy", "block".into()), "block"),
        (
            &|q| q["config_groups"]["group_0"]["input_activations"] = serde_json::json!({}),
            "input_activations",
        ),
    ];
    for (change, expected) in refused {
        let error = config(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

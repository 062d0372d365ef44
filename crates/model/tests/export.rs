//! Models written to another layout are the same models.

mod support;

use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::export::{GgufOptions, HuggingFaceOptions, to_gguf, to_hugging_face};
use lathe_tensor::{Format, GgmlType};
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

//! Adapters that are not what they should be: refused by name, whatever they are.

use std::path::Path;

use lathe_model::Model;
use lathe_model::adapter::AdapterChoice;
use lathe_program::conformance::Random;
use lathe_tensor::safetensors::Dtype;
use serde_json::json;
use tempfile::TempDir;

use crate::fixtures;
use crate::made::{Peft, make};

const QUERY: &str = "base_model.model.model.layers.0.self_attn.q_proj";

fn open(base: &Path, adapter: &Path) -> Result<Model, String> {
    let choice = AdapterChoice::Folder(adapter.to_owned());
    Model::open_with(base, &choice.into()).map_err(|error| error.to_string())
}

/// Why `peft` is refused.
fn refusal(base: &Path, peft: &Peft) -> String {
    let folder = TempDir::new().unwrap();
    peft.write(folder.path());
    open(base, folder.path()).expect_err("refused")
}

fn zeros(dtype: Dtype, shape: &[usize]) -> (Dtype, Vec<usize>, Vec<u8>) {
    let bytes = shape.iter().product::<usize>() * dtype.bytes();
    (dtype, shape.to_vec(), vec![0; bytes])
}

#[test]
fn tensors_without_a_place_are_refused_by_name() {
    let base = fixtures().join("llama");
    let good = make(&base, 1, 1.0).peft;
    let (a, b) = (format!("{QUERY}.lora_A.weight"), format!("{QUERY}.lora_B.weight"));
    let (rank, columns) = (good.tensors[&a].1[0], good.tensors[&a].1[1]);
    let rows = good.tensors[&b].1[0];
    let without = |name: &str| {
        let mut peft = good.clone();
        peft.tensors.remove(name).expect("it was there");
        refusal(&base, &peft)
    };
    assert!(without(&a).contains(&format!("tensor {a} is absent")), "{}", without(&a));
    assert!(without(&b).contains(&format!("tensor {b} is absent")), "{}", without(&b));
    let replaced = |name: &str, dtype, shape: &[usize], expected: &str| {
        let mut peft = good.clone();
        peft.tensors.insert(name.to_owned(), zeros(dtype, shape));
        let error = refusal(&base, &peft);
        for part in [name, &format!("{dtype} {shape:?}"), expected] {
            assert!(error.contains(part), "{error}: {part}");
        }
    };
    let (down, up) = (format!("{:?}", [rank, columns]), format!("{:?}", [rows, rank]));
    replaced(&a, Dtype::F32, &[rank + 1, columns], &down);
    replaced(&a, Dtype::F32, &[rank, columns + 1], &down);
    replaced(&a, Dtype::F32, &[columns, rank], &down);
    replaced(&a, Dtype::F32, &[rank * columns], &down);
    replaced(&a, Dtype::I8, &[rank, columns], "F32, F16 or BF16");
    replaced(&a, Dtype::F64, &[rank, columns], "F32, F16 or BF16");
    replaced(&b, Dtype::F32, &[rows - 1, rank], &up);
    replaced(&b, Dtype::F32, &[0, rank], &up);
    for extra in [
        format!("{QUERY}.lora_magnitude_vector.weight"),
        format!("{QUERY}.lora_B.bias"),
        "base_model.model.model.embed_tokens.lora_embedding_A".to_owned(),
        "base_model.model.lm_head.weight".to_owned(),
        "model.layers.0.self_attn.q_proj.lora_A.weight".to_owned(),
        String::new(),
    ] {
        let mut peft = good.clone();
        peft.tensors.insert(extra.clone(), zeros(Dtype::F32, &[4]));
        let error = refusal(&base, &peft);
        assert!(error.contains(&format!("tensor {extra} is")), "{error}");
    }
}

#[test]
fn modules_that_are_no_linear_layer_are_refused_with_the_reason() {
    let cases = [
        ("llama", "lm_head", "the matrix that makes logits"),
        ("llama", "model.embed_tokens", "the embedding"),
        ("llama", "model.layers.99.self_attn.q_proj", "no module of this model"),
        ("llama", "model.layers.0.self_attn.qkvo_proj", "no module of this model"),
        ("llama", "model.layers.0.input_layernorm", "no module of this model"),
        ("qwen2-moe", "model.layers.0.mlp.experts.1.up_proj", "routed experts"),
        ("qwen2-moe", "model.layers.0.mlp.experts.base_layer", "routed experts"),
        ("qwen2-moe", "model.layers.0.mlp.gate", "a router"),
        ("deepseek-v3", "model.layers.0.self_attn.kv_b_proj", "attention absorbs"),
    ];
    for (name, module, reason) in cases {
        let base = fixtures().join(name);
        let mut peft = make(&base, 1, 1.0).peft;
        for half in ["A", "B"] {
            let tensor = format!("base_model.model.{module}.lora_{half}.weight");
            peft.tensors.insert(tensor, zeros(Dtype::F32, &[64, 64]));
        }
        let error = refusal(&base, &peft);
        assert!(error.contains(module) && error.contains(reason), "{error}");
    }
}

#[test]
fn one_matrix_has_one_pair() {
    let base = fixtures().join("phi3");
    let mut peft = make(&base, 1, 1.0).peft;
    let module = "model.layers.0.self_attn.q_proj";
    let fused = "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight";
    let width = peft.tensors[fused].1[1];
    let heads = Model::open(&base).unwrap();
    let program =
        lathe_model::lower::lower(&heads.spec, &lathe_model::lower::LowerOptions::new(8)).unwrap();
    let query = program.weight_named("layers.0.attention.query").unwrap();
    let rows = program.weight(query).shape[0];
    peft.config["rank_pattern"][module] = json!(2);
    let tensor = |half: &str| format!("base_model.model.{module}.lora_{half}.weight");
    peft.tensors.insert(tensor("A"), zeros(Dtype::F32, &[2, width]));
    peft.tensors.insert(tensor("B"), zeros(Dtype::F32, &[rows, 2]));
    let error = refusal(&base, &peft);
    assert!(error.contains("a second pair for layers.0.attention.query"), "{error}");
}

#[test]
fn folders_without_an_adapter_are_refused() {
    let base = fixtures().join("llama");
    let folder = TempDir::new().unwrap();
    let path = folder.path();
    let why = || open(&base, path).expect_err("refused");
    assert!(open(&base, &path.join("nowhere")).unwrap_err().contains("no adapter_config.json"));
    assert!(why().contains("no adapter_config.json"), "{}", why());
    let peft = make(&base, 1, 1.0).peft;
    peft.write(path);
    open(&base, path).expect("a good one");
    let weights = path.join("adapter_model.safetensors");
    std::fs::remove_file(&weights).unwrap();
    assert!(why().contains("no adapter_model.safetensors"), "{}", why());
    std::fs::write(path.join("adapter_model.bin"), "pickle").unwrap();
    assert!(why().contains("pickled"), "{}", why());
    crate::made::write(&weights, &Default::default());
    assert!(why().contains("no tensors"), "{}", why());
    for config in ["", "{", "[]", "null", "7", "{}"] {
        peft.write(path);
        std::fs::write(path.join("adapter_config.json"), config).unwrap();
        assert!(why().contains("adapter_config.json"), "{config}: {}", why());
    }
}

/// A file that ends early, or with a byte changed, is an error or another adapter; never a panic.
#[test]
fn damaged_files_never_panic() {
    let base = fixtures().join("llama");
    let folder = TempDir::new().unwrap();
    make(&base, 1, 0.3).peft.write(folder.path());
    let path = folder.path().join("adapter_model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let mut random = Random::new(3);
    for _ in 0..40 {
        std::fs::write(&path, &whole[..random.below(whole.len())]).unwrap();
        let error = open(&base, folder.path()).expect_err("too short");
        assert!(error.contains("adapter_model.safetensors"), "{error}");
    }
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    for _ in 0..200 {
        let mut damaged = whole.clone();
        damaged[random.below(header)] ^= 1 << random.below(8);
        std::fs::write(&path, &damaged).unwrap();
        drop(open(&base, folder.path()));
    }
}

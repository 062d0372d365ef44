//! GGUF files of every architecture, written from the tiny Hugging Face checkpoints under the names
//! and with the changes of llama.cpp's converter, give the same logits.

mod support;

use std::path::Path;

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_model::spec::{AttentionSpec, GqaSpec};
use lathe_program::Weight;
use lathe_tensor::gguf::{MetaValue, Metadata, TensorDeclaration, Writer};
use lathe_tensor::{Format, Tensor, safetensors};
use support::{prepare, run};

/// A tensor's numbers on their way into the file.
struct Values {
    name: String,
    shape: Vec<usize>,
    numbers: Vec<f32>,
}

/// What the converter does besides renaming.
#[derive(Clone, Copy, PartialEq)]
enum Change {
    Nothing,
    PermuteQueriesAndKeys,
    FuseQueryKeyValueAndGateUp,
    AddOneToNorms,
    SplitLatents,
    EarlyNorms,
}

fn tiny(name: &str) -> Model {
    let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
    Model::open(&root.join(name)).expect(name)
}

/// As [`tiny`], without the biases of its attention, for which GGUF has no place.
fn without_biases(name: &str, folder: &Path) -> Model {
    let from =
        Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny")).join(name);
    let config = std::fs::read_to_string(from.join("config.json")).unwrap();
    let plain = config.replace("\"attention_bias\": true", "\"attention_bias\": false");
    assert_ne!(config, plain, "it has biases");
    std::fs::write(folder.join("config.json"), plain).unwrap();
    let file = safetensors::SafetensorsFile::open(&from.join("model.safetensors")).unwrap();
    let kept: Vec<&str> = file
        .names()
        .filter(|name| !name.ends_with("_proj.bias") && !name.ends_with("_mqa.bias"))
        .collect();
    let declare = |name: &&str| {
        let raw = file.raw(name).unwrap();
        safetensors::TensorDeclaration {
            name: (*name).to_owned(),
            dtype: raw.dtype,
            shape: raw.shape.clone(),
        }
    };
    let all: Vec<_> = kept.iter().map(declare).collect();
    let path = folder.join("model.safetensors");
    let mut writer = safetensors::Writer::create(&path, &all, &Default::default()).unwrap();
    for name in kept {
        writer.write(name, &file.raw(name).unwrap().bytes).unwrap();
    }
    writer.finish().unwrap();
    Model::open(folder).unwrap()
}

/// The converter's name of a weight.
fn renamed(weight: &str, change: Change) -> String {
    let (prefix, rest) = match weight.strip_prefix("layers.").and_then(|rest| rest.split_once('.'))
    {
        Some((layer, rest)) => (format!("blk.{layer}."), rest),
        None => (String::new(), weight),
    };
    let (stem, kind) = match rest.strip_suffix("_bias") {
        Some(stem) => (stem, "bias"),
        None => (rest, "weight"),
    };
    let name = match stem {
        "embedding" => "token_embd",
        "head" => "output",
        "final_norm" => "output_norm",
        "attention_norm" => "attn_norm",
        "attention_post_norm" => "post_attention_norm",
        "ffn_norm" if change == Change::EarlyNorms => "post_attention_norm",
        "ffn_norm" => "ffn_norm",
        "ffn_post_norm" => "post_ffw_norm",
        "attention.query" => "attn_q",
        "attention.key" => "attn_k",
        "attention.value" => "attn_v",
        "attention.output" => "attn_output",
        "attention.query_norm" => "attn_q_norm",
        "attention.key_norm" => "attn_k_norm",
        "attention.sinks" => "attn_sinks",
        "attention.query_down" => "attn_q_a",
        "attention.query_down_norm" => "attn_q_a_norm",
        "attention.query_up" => "attn_q_b",
        // The rotary key lies below the latent.
        "attention.kv_down" | "attention.rope_key" => "attn_kv_a_mqa",
        "attention.kv_norm" => "attn_kv_a_norm",
        "attention.key_up" => "attn_k_b",
        "attention.value_up" => "attn_v_b",
        "ffn.gate" => "ffn_gate",
        "ffn.up" => "ffn_up",
        "ffn.down" => "ffn_down",
        "ffn.router" => "ffn_gate_inp",
        "ffn.router_correction" => return format!("{prefix}exp_probs_b.bias"),
        "ffn.experts.gate" => "ffn_gate_exps",
        "ffn.experts.up" => "ffn_up_exps",
        "ffn.experts.down" => "ffn_down_exps",
        "ffn.shared.gate" => "ffn_gate_shexp",
        "ffn.shared.up" => "ffn_up_shexp",
        "ffn.shared.down" => "ffn_down_shexp",
        "ffn.shared.router" => "ffn_gate_inp_shexp",
        other => panic!("no name for {other}"),
    };
    format!("{prefix}{name}.{kind}")
}

/// `LlamaModel.permute`: `[heads, 2, half, in]` to `[heads, half, 2, in]`.
fn permute(tensor: &Tensor, head: usize) -> Vec<f32> {
    let rows = tensor.shape[0];
    let columns = tensor.elements() / rows;
    let numbers = tensor.to_f32();
    let from = |row: usize| row / head * head + row % 2 * (head / 2) + row % head / 2;
    (0..rows).flat_map(|row| numbers[from(row) * columns..][..columns].to_vec()).collect()
}

/// `[heads * out, rank]` to `[heads, rank, out]`.
fn transpose_heads(tensor: &Tensor, heads: usize) -> Vec<f32> {
    let (out, rank) = (tensor.shape[0] / heads, tensor.shape[1]);
    let numbers = tensor.to_f32();
    let at = |head: usize, r: usize, o: usize| numbers[(head * out + o) * rank + r];
    let places =
        (0..heads).flat_map(|h| (0..rank).flat_map(move |r| (0..out).map(move |o| (h, r, o))));
    places.map(|(h, r, o)| at(h, r, o)).collect()
}

/// Every tensor of the file that the converter would write.
fn tensors(model: &Model, change: Change) -> Vec<Values> {
    let program = lower(&model.spec, &LowerOptions::new(64)).unwrap();
    let weights = model.weights(&program).unwrap();
    let mut out: Vec<Values> = Vec::new();
    for (index, decl) in program.weights.iter().enumerate() {
        if decl.name == "head" && model.spec.tied_head {
            continue;
        }
        let tensor = weights.load(Weight(index as u32)).unwrap();
        let attention = decl.layer.map(|layer| &model.spec.layers[layer as usize].attention);
        let suffix = decl.name.splitn(3, '.').last().unwrap_or_default().to_owned();
        let in_layer = |name: &str| decl.layer.is_some() && suffix == name;
        let turned =
            ["attention.query", "attention.key", "attention.query_bias", "attention.key_bias"];
        let mut values = Values {
            name: renamed(&decl.name, change),
            shape: decl.shape.clone(),
            numbers: tensor.to_f32(),
        };
        match (change, attention) {
            (Change::PermuteQueriesAndKeys, Some(AttentionSpec::Gqa(gqa)))
                if turned.iter().any(|name| in_layer(name)) =>
            {
                values.numbers = permute(&tensor, gqa.head_dim);
            }
            (Change::SplitLatents, Some(AttentionSpec::Mla(mla)))
                if in_layer("attention.key_up") =>
            {
                values.numbers = transpose_heads(&tensor, mla.heads);
                values.shape = vec![mla.heads, mla.rank, mla.nope_dim];
            }
            (Change::SplitLatents, Some(AttentionSpec::Mla(mla)))
                if in_layer("attention.value_up") =>
            {
                values.shape = vec![mla.heads, mla.value_dim, mla.rank];
            }
            (Change::AddOneToNorms, _) if decl.name.ends_with("norm") => {
                values.numbers.iter_mut().for_each(|x| *x += 1.0);
            }
            _ => {}
        }
        let below = |out: &mut Vec<Values>, first: &str, name: Option<&str>| {
            let layer = decl.layer.unwrap();
            let whole = out.iter_mut().find(|v| v.name == format!("blk.{layer}.{first}")).unwrap();
            whole.numbers.extend(&values.numbers);
            whole.shape[0] += values.shape[0];
            name.into_iter().for_each(|name| whole.name = format!("blk.{layer}.{name}"));
        };
        let fuse = change == Change::FuseQueryKeyValueAndGateUp;
        match suffix.as_str() {
            "attention.rope_key" => below(&mut out, "attn_kv_a_mqa.weight", None),
            "attention.key" if fuse => below(&mut out, "attn_q.weight", None),
            "attention.value" if fuse => below(&mut out, "attn_q.weight", Some("attn_qkv.weight")),
            "ffn.up" if fuse => below(&mut out, "ffn_gate.weight", Some("ffn_up.weight")),
            _ => out.push(values),
        }
    }
    out
}

/// Keys that all architectures have, from the spec, and `more`.
fn metadata(model: &Model, architecture: &str, more: &[(&str, MetaValue)]) -> Metadata {
    let spec = &model.spec;
    let mut metadata = Metadata::new();
    metadata.insert("general.architecture", MetaValue::String(architecture.to_owned()));
    let mut put =
        |key: &str, value: MetaValue| drop(metadata.insert(format!("{architecture}.{key}"), value));
    let size = |n: usize| MetaValue::U32(n as u32);
    put("block_count", size(spec.layers.len()));
    put("context_length", size(spec.context_max));
    put("embedding_length", size(spec.width));
    put("feed_forward_length", size(48));
    put("attention.layer_norm_rms_epsilon", MetaValue::F32(spec.final_norm.epsilon));
    match &spec.layers[0].attention {
        AttentionSpec::Gqa(gqa) => {
            let rope = gqa.rope.as_ref().unwrap();
            put("attention.head_count", size(gqa.heads));
            put("attention.head_count_kv", size(gqa.kv_heads));
            put("attention.key_length", size(gqa.head_dim));
            put("attention.value_length", size(gqa.head_dim));
            put("rope.dimension_count", size(rope.rotary));
            put("rope.freq_base", MetaValue::F32(rope.theta as f32));
        }
        AttentionSpec::Mla(mla) => {
            put("attention.head_count", size(mla.heads));
            put("attention.head_count_kv", size(1));
            put("attention.key_length", size(mla.rank + mla.rope_dim));
            put("attention.value_length", size(mla.rank));
            put("attention.key_length_mla", size(mla.nope_dim + mla.rope_dim));
            put("attention.value_length_mla", size(mla.value_dim));
            put("attention.kv_lora_rank", size(mla.rank));
            mla.query_rank.into_iter().for_each(|rank| put("attention.q_lora_rank", size(rank)));
            put("rope.dimension_count", size(mla.rope_dim));
            put("rope.freq_base", MetaValue::F32(mla.rope.theta as f32));
        }
    }
    more.iter().for_each(|(key, value)| put(key, value.clone()));
    metadata
}

/// Writes `model` as a file of `architecture`, opens it, and compares logits.
fn check(
    model: &Model,
    architecture: &str,
    change: Change,
    more: &[(&str, MetaValue)],
    lists: &[(&str, &[f32])],
) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    let mut values = tensors(model, change);
    values.extend(lists.iter().map(|(name, list)| Values {
        name: (*name).to_owned(),
        shape: vec![list.len()],
        numbers: list.to_vec(),
    }));
    let declare = |values: &Values| TensorDeclaration {
        name: values.name.clone(),
        format: Format::F32,
        shape: values.shape.clone(),
    };
    let declarations: Vec<_> = values.iter().map(declare).collect();
    let metadata = metadata(model, architecture, more);
    let mut writer = Writer::create(&path, &metadata, &declarations).unwrap();
    for values in &values {
        let bytes: Vec<u8> = values.numbers.iter().flat_map(|x| x.to_le_bytes()).collect();
        writer.write(&values.name, &bytes).unwrap();
    }
    writer.finish().unwrap();
    let file = Model::open(&path).unwrap_or_else(|error| panic!("{architecture}: {error}"));
    let tokens: Vec<u32> = (0..40).map(|i| 3 + i * 7 % 61).collect();
    let logits = |model: &Model| run(&mut *prepare(model, 64), 0, &tokens, 0..tokens.len());
    let differences = logits(model).into_iter().zip(logits(&file)).map(|(a, b)| (a - b).abs());
    let worst = differences.fold(0.0, f32::max);
    assert!(worst < 5e-5, "{architecture}: logits differ by {worst}");
}

fn size(n: usize) -> MetaValue {
    MetaValue::U32(n as u32)
}

fn number(x: f64) -> MetaValue {
    MetaValue::F32(x as f32)
}

fn each_gqa(model: &mut Model, mut change: impl FnMut(usize, &mut GqaSpec)) {
    for (index, layer) in model.spec.layers.iter_mut().enumerate() {
        if let AttentionSpec::Gqa(gqa) = &mut layer.attention {
            change(index, gqa);
        }
    }
}

/// YaRN over 16 positions, four times.
fn yarn() -> Vec<(&'static str, MetaValue)> {
    vec![
        ("rope.scaling.type", MetaValue::String("yarn".to_owned())),
        ("rope.scaling.factor", number(4.0)),
        ("rope.scaling.original_context_length", size(16)),
    ]
}

#[test]
fn llama_mistral_and_mixtral() {
    use Change::PermuteQueriesAndKeys;
    let linear = [
        ("rope.scaling.type", MetaValue::String("linear".to_owned())),
        ("rope.scaling.factor", number(2.0)),
    ];
    check(&tiny("llama-tied"), "llama", PermuteQueriesAndKeys, &linear, &[]);
    let window = [("attention.sliding_window", size(12))];
    check(&tiny("mistral"), "llama", PermuteQueriesAndKeys, &window, &[]);
    let experts = [
        ("attention.sliding_window", size(20)),
        ("expert_count", size(8)),
        ("expert_used_count", size(2)),
    ];
    check(&tiny("mixtral"), "llama", PermuteQueriesAndKeys, &experts, &[]);
}

#[test]
fn granite_and_smollm3() {
    let scales = [
        ("attention.scale", number(0.2)),
        ("embedding_scale", number(6.0)),
        ("residual_scale", number(0.4)),
        ("logit_scale", number(4.0)),
    ];
    check(&tiny("granite"), "granite", Change::PermuteQueriesAndKeys, &scales, &[]);
    // Files say neither windows nor which layers have no positions: it is every fourth.
    let mut smollm3 = tiny("smollm3");
    let AttentionSpec::Gqa(first) = smollm3.spec.layers[0].attention.clone() else { panic!() };
    each_gqa(&mut smollm3, |layer, gqa| {
        gqa.window = None;
        gqa.rope = first.rope.clone().filter(|_| layer != 3);
    });
    check(&smollm3, "smollm3", Change::PermuteQueriesAndKeys, &[], &[]);
}

#[test]
fn qwen() {
    let mut qwen2 = tiny("qwen2");
    each_gqa(&mut qwen2, |_, gqa| gqa.window = None);
    check(&qwen2, "qwen2", Change::Nothing, &[], &[]);
    check(&tiny("qwen3"), "qwen3", Change::Nothing, &[], &[]);
    let experts = [
        ("expert_count", size(8)),
        ("expert_used_count", size(3)),
        ("expert_feed_forward_length", size(24)),
    ];
    check(&tiny("qwen2-moe"), "qwen2moe", Change::Nothing, &experts, &[]);
    check(&tiny("qwen3-moe"), "qwen3moe", Change::Nothing, &experts, &[]);
}

#[test]
fn gemma() {
    // The scale of attention follows from the heads there.
    let scaled = |name: &str| {
        let mut model = tiny(name);
        each_gqa(&mut model, |_, gqa| gqa.scale = (gqa.head_dim as f32).powf(-0.5));
        model
    };
    let gemma2 = [
        ("attention.sliding_window", size(12)),
        ("attn_logit_softcapping", number(3.0)),
        ("final_logit_softcapping", number(5.0)),
    ];
    check(&scaled("gemma2"), "gemma2", Change::AddOneToNorms, &gemma2, &[]);
    let gemma3 = [
        ("attention.sliding_window", size(12)),
        ("attention.sliding_window_pattern", size(4)),
        ("rope.freq_base", number(1e6)),
        ("rope.scaling.type", MetaValue::String("linear".to_owned())),
        ("rope.scaling.factor", number(8.0)),
    ];
    check(&scaled("gemma3"), "gemma3", Change::AddOneToNorms, &gemma3, &[]);
}

#[test]
fn phi3_and_olmo2() {
    let long = [
        ("attention.sliding_window", size(24)),
        ("rope.scaling.original_context_length", size(16)),
        ("rope.scaling.attn_factor", number((1.0 + 4f64.ln() / 16f64.ln()).sqrt())),
    ];
    let factors: [(&str, &[f32]); 2] = [
        ("rope_factors_long.weight", &[1.0, 2.0, 4.0]),
        ("rope_factors_short.weight", &[1.0, 1.1, 1.2]),
    ];
    check(&tiny("phi3"), "phi3", Change::FuseQueryKeyValueAndGateUp, &long, &factors);
    check(&tiny("olmo2"), "olmo2", Change::Nothing, &[], &[]);
}

#[test]
fn gpt_oss() {
    let mut more = yarn();
    more.extend([
        ("attention.sliding_window", size(12)),
        ("expert_count", size(8)),
        ("expert_used_count", size(3)),
        ("expert_feed_forward_length", size(32)),
    ]);
    check(&tiny("gpt-oss"), "gpt-oss", Change::EarlyNorms, &more, &[]);
}

fn routed(gating: usize, normalise: bool, scale: f64) -> Vec<(&'static str, MetaValue)> {
    vec![
        ("expert_count", size(8)),
        ("expert_used_count", size(3)),
        ("expert_shared_count", size(1)),
        ("expert_feed_forward_length", size(24)),
        ("expert_gating_func", size(gating)),
        ("expert_weights_norm", MetaValue::Bool(normalise)),
        ("expert_weights_scale", number(scale)),
    ]
}

fn grouped(groups: usize, used: usize) -> Vec<(&'static str, MetaValue)> {
    vec![("expert_group_count", size(groups)), ("expert_group_used_count", size(used))]
}

#[test]
fn deepseek() {
    let lite = routed(1, false, 1.0);
    check(&tiny("deepseek-v2-lite"), "deepseek2", Change::SplitLatents, &lite, &[]);
    let home = tempfile::tempdir().unwrap();
    let v2 = without_biases("deepseek-v2", home.path());
    let magnitude = (0.07 * 4f64.ln() + 1.0) / (0.05 * 4f64.ln() + 1.0);
    let mut more = [yarn(), routed(1, false, 1.5), grouped(4, 2)].concat();
    more.push(("rope.scaling.yarn_log_multiplier", number(0.05)));
    more.push(("rope.scaling.attn_factor", number(magnitude)));
    check(&v2, "deepseek2", Change::SplitLatents, &more, &[]);
    let mut v3 = [yarn(), routed(2, true, 2.5), grouped(4, 2)].concat();
    v3.push(("rope.scaling.yarn_log_multiplier", number(0.1)));
    check(&tiny("deepseek-v3"), "deepseek2", Change::SplitLatents, &v3, &[]);
    let mut kimi = [yarn(), routed(2, true, 2.8)].concat();
    kimi.extend([
        ("rope.scaling.yarn_log_multiplier", number(0.1)),
        ("rope.scaling.yarn_beta_fast", number(1.0)),
        ("rope.scaling.yarn_beta_slow", number(1.0)),
    ]);
    check(&tiny("kimi-k2"), "deepseek2", Change::SplitLatents, &kimi, &[]);
}

#[test]
fn glm4_moe_and_minicpm3() {
    let glm = [routed(2, true, 1.0), grouped(2, 1)].concat();
    check(&tiny("glm4-moe"), "glm4moe", Change::EarlyNorms, &glm, &[]);
    let mut minicpm3 = tiny("minicpm3");
    minicpm3.spec.embedding_multiplier = 12.0;
    minicpm3.spec.logits_scale = 8.0;
    let long = [
        ("rope.scaling.original_context_length", size(16)),
        ("rope.scaling.attn_factor", number((1.0 + 4f64.ln() / 16f64.ln()).sqrt())),
    ];
    let factors: [(&str, &[f32]); 2] = [
        ("rope_factors_long.weight", &[1.0, 1.5, 2.0, 3.0]),
        ("rope_factors_short.weight", &[1.0; 4]),
    ];
    check(&minicpm3, "minicpm3", Change::SplitLatents, &long, &factors);
}

#[test]
fn a_factor_without_a_type_is_linear() {
    let model = tiny("llama-tied");
    let change = Change::PermuteQueriesAndKeys;
    for key in ["rope.scaling.factor", "rope.scale_linear"] {
        check(&model, "llama", change, &[(key, number(2.0))], &[]);
    }
    // The divisors of each pair come on top.
    let ones = ("rope_freqs.weight", [1.0; 4].as_slice());
    check(&model, "llama", change, &[("rope.scaling.factor", number(2.0))], &[ones]);
}

//! A Hugging Face directory: `config.json`, safetensors under canonical names, tokenizer files.

use std::collections::BTreeMap;
use std::path::Path;

use lathe_program::WeightRole;
use lathe_tensor::safetensors::{Dtype, TensorDeclaration, Writer};
use lathe_tensor::{FloatType, Format};
use serde_json::{Map, Value, json};

use super::plain_llama::PlainLlama;
use super::{ExportError, as_written, bytes_in, float_of, io, tokenizer};
use crate::checkpoint::{Checkpoint, Quantization};
use crate::generation::read_json;
use crate::lower::{LowerOptions, lower};
use crate::model::Model;
use crate::spec::{RopeScaling, RopeSpec};

const TARGET: &str = "a Hugging Face directory";

/// How to write a Hugging Face directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HuggingFaceOptions {
    /// Of all tensors; `None` keeps plain floats as they are and makes bf16 of quantized ones.
    pub float: Option<FloatType>,
    /// Bytes of a file's tensors at most, before another file is begun.
    pub shard_bytes_max: u64,
}

impl Default for HuggingFaceOptions {
    fn default() -> Self {
        HuggingFaceOptions { float: None, shard_bytes_max: 5_000_000_000 }
    }
}

/// Writes `model` to `directory`, which is made if it is not there.
///
/// # Errors
/// If the model comes from a GGUF file and has what a Llama's `config.json` cannot say (the error
/// names it), or a file fails.
pub fn to_hugging_face(
    model: &Model,
    directory: &Path,
    options: &HuggingFaceOptions,
) -> Result<(), ExportError> {
    std::fs::create_dir_all(directory).map_err(io(directory))?;
    match &model.checkpoint {
        Checkpoint::Safetensors { files, quantization } => {
            rewrite(model, quantization, directory, options)?;
            copy_texts(files.path(), directory)
        }
        Checkpoint::Gguf(file) => {
            let float = write_llama(model, directory, options)?;
            write_json(directory, "config.json", &llama_config(model, float)?)?;
            let ends = json!({"eos_token_id": model.generation.stop_tokens});
            write_json(directory, "generation_config.json", &ends)?;
            tokenizer::write_hugging_face(file, directory)
        }
    }
}

/// Files beside the weights that a rewritten checkpoint keeps.
const TEXTS: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

pub(super) fn copy_texts(from: &Path, to: &Path) -> Result<(), ExportError> {
    for name in TEXTS {
        let (from, to) = (from.join(name), to.join(name));
        if from.is_file() {
            std::fs::copy(&from, &to).map_err(io(&to))?;
        }
    }
    Ok(())
}

pub(super) fn write_json(directory: &Path, name: &str, value: &Value) -> Result<(), ExportError> {
    let path = directory.join(name);
    let text = serde_json::to_string_pretty(value).unwrap_or_default() + "\n";
    std::fs::write(&path, text).map_err(io(&path))
}

/// A Hugging Face checkpoint with the same names and other number formats.
fn rewrite(
    model: &Model,
    quantization: &Quantization,
    directory: &Path,
    options: &HuggingFaceOptions,
) -> Result<(), ExportError> {
    let checkpoint = &model.checkpoint;
    if matches!(quantization, Quantization::Mxfp4Experts) {
        let feature = "MXFP4 experts".to_owned();
        return Err(ExportError::Feature { feature, target: TARGET });
    }
    // Plain floats have no place for a rotation of inputs, and the matrices are rotated with them.
    if model.spec.inputs.values().any(|input| input.hadamard.is_some()) {
        let feature = "a model whose inputs are rotated while it runs".to_owned();
        return Err(ExportError::Feature { feature, target: TARGET });
    }
    let names = checkpoint.whole_names();
    let mut declarations = Vec::with_capacity(names.len());
    for name in &names {
        let tensor = checkpoint.tensor(name)?;
        let float = options.float.unwrap_or(float_of(tensor.format));
        let (name, dtype, shape) = (name.clone(), Dtype::from(float), tensor.shape);
        declarations.push((float, TensorDeclaration { name, dtype, shape }));
    }
    let list: Vec<_> = declarations.iter().map(|(_, declaration)| declaration.clone()).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create_sharded(directory, &list, &metadata, options.shard_bytes_max)?;
    for (float, declaration) in &declarations {
        let tensor = checkpoint.tensor(&declaration.name)?;
        writer.write(&declaration.name, &bytes_in(&tensor, Format::Float(*float)))?;
    }
    writer.finish()?;
    let path = checkpoint.path().join("config.json");
    let mut config = read_json(&path).map_err(io(&path))?.unwrap_or_else(|| json!({}));
    if let Some(config) = config.as_object_mut() {
        config.remove("quantization_config");
        if let Some(float) = options.float {
            let key = if config.contains_key("dtype") { "dtype" } else { "torch_dtype" };
            config.insert(key.to_owned(), json!(torch_name(float)));
        }
    }
    write_json(directory, "config.json", &config)
}

pub(super) fn torch_name(float: FloatType) -> &'static str {
    match float {
        FloatType::F32 => "float32",
        FloatType::F16 => "float16",
        FloatType::BF16 => "bfloat16",
    }
}

/// Writes a Llama's weights; returns the type that they are in.
fn write_llama(
    model: &Model,
    directory: &Path,
    options: &HuggingFaceOptions,
) -> Result<FloatType, ExportError> {
    PlainLlama::of(&model.spec, TARGET)?;
    let program = lower(&model.spec, &LowerOptions::new(model.spec.context_max))?;
    let weights = model.weights(&program)?;
    let mut plan = Vec::new();
    let mut float = options.float;
    for (index, decl) in program.weights.iter().enumerate() {
        if decl.role == WeightRole::Head && model.spec.tied_head {
            continue;
        }
        let weight = lathe_program::Weight(index as u32);
        if decl.role == WeightRole::Linear && float.is_none() {
            float = Some(float_of(weights.load(weight)?.format));
        }
        let feature = || ExportError::Feature { feature: decl.name.clone(), target: TARGET };
        plan.push((weight, llama_name(&decl.name, decl.layer).ok_or_else(feature)?));
    }
    let float = float.unwrap_or(FloatType::BF16);
    let declare = |(weight, name): &(lathe_program::Weight, String)| TensorDeclaration {
        name: name.clone(),
        dtype: Dtype::from(float),
        shape: program.weight(*weight).shape.clone(),
    };
    let declarations: Vec<TensorDeclaration> = plan.iter().map(declare).collect();
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer =
        Writer::create_sharded(directory, &declarations, &metadata, options.shard_bytes_max)?;
    for (weight, name) in &plan {
        writer.write(name, &bytes_in(&weights.load(*weight)?, Format::Float(float)))?;
    }
    writer.finish()?;
    Ok(float)
}

fn llama_name(weight: &str, layer: Option<u32>) -> Option<String> {
    let Some(layer) = layer else {
        let name = match weight {
            "embedding" => "model.embed_tokens.weight",
            "head" => "lm_head.weight",
            "final_norm" => "model.norm.weight",
            _ => return None,
        };
        return Some(name.to_owned());
    };
    let name = match weight.strip_prefix(&format!("layers.{layer}."))? {
        "attention_norm" => "input_layernorm.weight",
        "attention.query" => "self_attn.q_proj.weight",
        "attention.key" => "self_attn.k_proj.weight",
        "attention.value" => "self_attn.v_proj.weight",
        "attention.output" => "self_attn.o_proj.weight",
        "attention.query_bias" => "self_attn.q_proj.bias",
        "attention.key_bias" => "self_attn.k_proj.bias",
        "attention.value_bias" => "self_attn.v_proj.bias",
        "attention.output_bias" => "self_attn.o_proj.bias",
        "ffn_norm" => "post_attention_layernorm.weight",
        "ffn.gate" => "mlp.gate_proj.weight",
        "ffn.up" => "mlp.up_proj.weight",
        "ffn.down" => "mlp.down_proj.weight",
        "ffn.gate_bias" => "mlp.gate_proj.bias",
        "ffn.up_bias" => "mlp.up_proj.bias",
        "ffn.down_bias" => "mlp.down_proj.bias",
        _ => return None,
    };
    Some(format!("model.layers.{layer}.{name}"))
}

/// The `config.json` of a Llama.
fn llama_config(model: &Model, float: FloatType) -> Result<Value, ExportError> {
    let llama = PlainLlama::of(&model.spec, TARGET)?;
    let (spec, attention) = (llama.spec, llama.attention);
    let mut config = json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": spec.width,
        "intermediate_size": llama.ffn.hidden,
        "num_hidden_layers": spec.layers.len(),
        "num_attention_heads": attention.heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": as_written(llama.epsilon),
        "rope_theta": as_written(llama.rope.theta as f32),
        "vocab_size": spec.vocabulary,
        "max_position_embeddings": unstretched(spec.context_max, llama.rope),
        "tie_word_embeddings": spec.tied_head,
        "attention_bias": attention.qkv_bias,
        "mlp_bias": llama.ffn.bias,
        "torch_dtype": torch_name(float),
    });
    let frame = model.tokenizer.as_ref().map(|tokenizer| tokenizer.frame().clone());
    let frame = frame.unwrap_or_default();
    let ids = [
        ("bos_token_id", frame.beginning),
        ("eos_token_id", frame.end),
        ("pad_token_id", frame.padding),
    ];
    let object = config.as_object_mut().expect("an object");
    object.extend(ids.into_iter().filter_map(|(key, id)| Some((key.to_owned(), json!(id?)))));
    if let Some(scaling) = scaling_config(llama.rope)? {
        object.insert("rope_scaling".to_owned(), Value::Object(scaling));
    }
    Ok(config)
}

/// The positions that a file says where readers stretch them by a linear factor.
fn unstretched(context: usize, rope: &RopeSpec) -> usize {
    match rope.scaling {
        RopeScaling::Linear { factor } => (context as f64 / factor.max(1.0)).ceil() as usize,
        _ => context,
    }
}

fn scaling_config(rope: &RopeSpec) -> Result<Option<Map<String, Value>>, ExportError> {
    let (factor, original, low, high) = match &rope.scaling {
        RopeScaling::None => return Ok(None),
        RopeScaling::Linear { factor } => {
            let linear = json!({"rope_type": "linear", "factor": factor});
            return Ok(linear.as_object().cloned());
        }
        RopeScaling::Llama3 { factor, original, low_factor, high_factor } => {
            (*factor, *original, *low_factor, *high_factor)
        }
        RopeScaling::Divisors { .. } => llama3_of_divisors(rope).ok_or_else(|| {
            let feature = "these divisors of rotary frequencies".to_owned();
            ExportError::Feature { feature, target: TARGET }
        })?,
        _ => {
            let feature = "this kind of rope scaling".to_owned();
            return Err(ExportError::Feature { feature, target: TARGET });
        }
    };
    let llama3 = json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    });
    Ok(llama3.as_object().cloned())
}

/// The published parameters of Llama 3.1 or 3.2 whose divisors these are.
fn llama3_of_divisors(rope: &RopeSpec) -> Option<(f64, usize, f64, f64)> {
    let wanted = rope.table(1).inverse_frequencies;
    [8.0, 32.0].into_iter().find_map(|factor| {
        let scaling =
            RopeScaling::Llama3 { factor, original: 8192, low_factor: 1.0, high_factor: 4.0 };
        let made = RopeSpec { scaling, ..rope.clone() }.table(1).inverse_frequencies;
        let near = made.iter().zip(&wanted).all(|(a, b)| (a - b).abs() <= 1e-5 * b.abs());
        near.then_some((factor, 8192, 1.0, 4.0))
    })
}

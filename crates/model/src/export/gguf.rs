//! A GGUF file of a Llama: metadata, tokenizer, permuted query and key rows, any block format.

use std::path::Path;

use lathe_program::{Program, Weight, WeightRole};
use lathe_tensor::gguf::{MetaValue, Metadata, TensorDeclaration, Writer};
use lathe_tensor::{Format, GgmlType, Tensor};

use super::plain_llama::PlainLlama;
use super::{ExportError, Nothing, Replacement, bytes_in, tokenizer};
use crate::checkpoint::Checkpoint;
use crate::lower::{LowerOptions, lower};
use crate::model::Model;
use crate::spec::{RopeScaling, RopeSpec};

const TARGET: &str = "GGUF";

/// How to write a GGUF file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GgufOptions {
    /// Of matrices; those whose rows are no whole number of its blocks become q8_0 or f16.
    pub format: Format,
    /// Of the embedding, if not the same.
    pub embedding: Option<Format>,
}

/// Writes `model` to the file `path`.
///
/// # Errors
/// If the model has what a GGUF Llama cannot say (the error names it), or a file fails.
pub fn to_gguf(model: &Model, path: &Path, options: &GgufOptions) -> Result<(), ExportError> {
    to_gguf_replacing(model, path, options, &mut Nothing)
}

/// As [`to_gguf`], with some weights taken from `replacement`.
///
/// # Errors
/// As [`to_gguf`]; also if a replacement cannot be made.
pub fn to_gguf_replacing(
    model: &Model,
    path: &Path,
    options: &GgufOptions,
    replacement: &mut dyn Replacement,
) -> Result<(), ExportError> {
    let llama = PlainLlama::of(&model.spec, TARGET)?;
    let program = lower(&model.spec, &LowerOptions::new(model.spec.context_max))?;
    let weights = model.weights(&program)?;
    let mut metadata = model_metadata(model, &llama, options)?;
    match &model.checkpoint {
        Checkpoint::Gguf(file) => {
            let texts = file.metadata.iter().filter(|(key, _)| key.starts_with("tokenizer."));
            texts.for_each(|(key, value)| drop(metadata.insert(key, value.clone())));
        }
        Checkpoint::Safetensors { files, .. } => {
            tokenizer::add_to_gguf(files.path(), model.spec.vocabulary, &mut metadata)?;
        }
    }
    let divisors = frequency_divisors(llama.rope)?;
    let plan = plan(&program, &model.spec.tied_head, options, replacement)?;
    let mut declarations: Vec<TensorDeclaration> =
        plan.iter().map(|(_, declaration)| declaration.clone()).collect();
    if let Some(divisors) = &divisors {
        declarations.push(TensorDeclaration {
            name: "rope_freqs.weight".to_owned(),
            format: Format::F32,
            shape: vec![divisors.len()],
        });
    }
    let mut writer = Writer::create(path, &metadata, &declarations)?;
    for (weight, declaration) in &plan {
        let tensor = match replacement.format(*weight) {
            None => weights.load(*weight)?,
            Some(_) => replacement.tensor(*weight).map_err(|source| ExportError::Replacement {
                name: program.weight(*weight).name.clone(),
                source,
            })?,
        };
        let tensor = permuted(tensor, &declaration.name, llama.attention.head_dim)?;
        writer.write(&declaration.name, &bytes_in(&tensor, declaration.format))?;
    }
    if let Some(divisors) = &divisors {
        let bytes: Vec<u8> = divisors.iter().flat_map(|d| d.to_le_bytes()).collect();
        writer.write("rope_freqs.weight", &bytes)?;
    }
    Ok(writer.finish()?)
}

/// Each weight that is written, with its name, shape and format in the file.
fn plan(
    program: &Program,
    tied_head: &bool,
    options: &GgufOptions,
    replacement: &dyn Replacement,
) -> Result<Vec<(Weight, TensorDeclaration)>, ExportError> {
    let mut plan = Vec::new();
    for (index, decl) in program.weights.iter().enumerate() {
        if decl.role == WeightRole::Head && *tied_head {
            continue;
        }
        let name = file_name(&decl.name, decl.layer);
        let feature = || ExportError::Feature { feature: decl.name.clone(), target: TARGET };
        let name = name.ok_or_else(feature)?;
        let replaced = replacement.format(Weight(index as u32));
        let wanted = match decl.role {
            WeightRole::Vector => Format::F32,
            _ if replaced.is_some() => replaced.unwrap_or(options.format),
            WeightRole::Embedding => options.embedding.unwrap_or(options.format),
            _ => options.format,
        };
        let format = fitting(wanted, decl.shape.last().copied().unwrap_or(1));
        let declaration = TensorDeclaration { name, format, shape: decl.shape.clone() };
        plan.push((Weight(index as u32), declaration));
    }
    Ok(plan)
}

/// `wanted`, or the nearest format that has room for rows of `columns`.
fn fitting(wanted: Format, columns: usize) -> Format {
    let fits = |format: Format| columns.is_multiple_of(format.block_len());
    let q8 = Format::Ggml(GgmlType::Q8_0);
    [wanted, q8].into_iter().find(|format| fits(*format)).unwrap_or(Format::F16)
}

fn file_name(weight: &str, layer: Option<u32>) -> Option<String> {
    let Some(layer) = layer else {
        let name = match weight {
            "embedding" => "token_embd.weight",
            "head" => "output.weight",
            "final_norm" => "output_norm.weight",
            _ => return None,
        };
        return Some(name.to_owned());
    };
    let name = match weight.strip_prefix(&format!("layers.{layer}."))? {
        "attention_norm" => "attn_norm.weight",
        "attention.query" => "attn_q.weight",
        "attention.key" => "attn_k.weight",
        "attention.value" => "attn_v.weight",
        "attention.output" => "attn_output.weight",
        "attention.query_bias" => "attn_q.bias",
        "attention.key_bias" => "attn_k.bias",
        "attention.value_bias" => "attn_v.bias",
        "attention.output_bias" => "attn_output.bias",
        "ffn_norm" => "ffn_norm.weight",
        "ffn.gate" => "ffn_gate.weight",
        "ffn.up" => "ffn_up.weight",
        "ffn.down" => "ffn_down.weight",
        "ffn.gate_bias" => "ffn_gate.bias",
        "ffn.up_bias" => "ffn_up.bias",
        "ffn.down_bias" => "ffn_down.bias",
        _ => return None,
    };
    Some(format!("blk.{layer}.{name}"))
}

/// Query and key rows in the order of GGUF's Llama: the halves of a head take turns.
fn permuted(tensor: Tensor, name: &str, head: usize) -> Result<Tensor, ExportError> {
    if !["attn_q.", "attn_k."].iter().any(|part| name.contains(part)) {
        return Ok(tensor);
    }
    let at = |source| ExportError::Tensor { name: name.to_owned(), source };
    let shape = tensor.shape.clone();
    let rows = shape[0];
    let matrix = tensor.reshape(vec![rows, tensor.elements() / rows]).map_err(at)?;
    let half = head / 2;
    let from = |row: usize| row / head * head + row % 2 * half + row % head / 2;
    let order: Vec<usize> = (0..rows).map(from).collect();
    matrix.gather_rows(&order).and_then(|tensor| tensor.reshape(shape)).map_err(at)
}

/// Llama 3's scaling as one divisor a pair, which is how GGUF has it.
fn frequency_divisors(rope: &RopeSpec) -> Result<Option<Vec<f32>>, ExportError> {
    match &rope.scaling {
        RopeScaling::None | RopeScaling::Linear { .. } => Ok(None),
        RopeScaling::Divisors { divisors } => Ok(Some(divisors.clone())),
        RopeScaling::Llama3 { .. } => {
            let plain = RopeSpec { scaling: RopeScaling::None, ..rope.clone() }.table(1);
            let scaled = rope.table(1);
            let pairs = plain.inverse_frequencies.iter().zip(&scaled.inverse_frequencies);
            Ok(Some(pairs.map(|(plain, scaled)| plain / scaled).collect()))
        }
        RopeScaling::Dynamic { .. } | RopeScaling::Yarn { .. } | RopeScaling::LongRope { .. } => {
            let feature = "this kind of rope scaling".to_owned();
            Err(ExportError::Feature { feature, target: TARGET })
        }
    }
}

/// `general.*` and `llama.*`.
fn model_metadata(
    model: &Model,
    llama: &PlainLlama,
    options: &GgufOptions,
) -> Result<Metadata, ExportError> {
    let mut metadata = Metadata::new();
    let mut text = |key: &str, value: &str| {
        metadata.insert(key, MetaValue::String(value.to_owned()));
    };
    text("general.architecture", "llama");
    text("general.type", "model");
    text("general.name", &model.name);
    let (spec, attention) = (llama.spec, llama.attention);
    let sizes = [
        ("llama.block_count", spec.layers.len()),
        ("llama.context_length", spec.context_max),
        ("llama.embedding_length", spec.width),
        ("llama.feed_forward_length", llama.ffn.hidden),
        ("llama.attention.head_count", attention.heads),
        ("llama.attention.head_count_kv", attention.kv_heads),
        ("llama.attention.key_length", attention.head_dim),
        ("llama.attention.value_length", attention.head_dim),
        ("llama.rope.dimension_count", llama.rope.rotary),
        ("llama.vocab_size", spec.vocabulary),
    ];
    for (key, size) in sizes {
        metadata.insert(key, MetaValue::U32(size as u32));
    }
    metadata.insert("llama.rope.freq_base", MetaValue::F32(llama.rope.theta as f32));
    metadata.insert("llama.attention.layer_norm_rms_epsilon", MetaValue::F32(llama.epsilon));
    if let RopeScaling::Linear { factor } = llama.rope.scaling {
        metadata.insert("llama.rope.scaling.type", MetaValue::String("linear".to_owned()));
        metadata.insert("llama.rope.scaling.factor", MetaValue::F32(factor as f32));
    }
    metadata.insert("general.quantization_version", MetaValue::U32(2));
    if let Some(kind) = file_type(options.format) {
        metadata.insert("general.file_type", MetaValue::U32(kind));
    }
    Ok(metadata)
}

/// llama.cpp's number for "mostly this format" (`llama_ftype`).
fn file_type(format: Format) -> Option<u32> {
    match format {
        Format::F32 => Some(0),
        Format::F16 => Some(1),
        Format::BF16 => Some(32),
        Format::Ggml(GgmlType::Q4_0) => Some(2),
        Format::Ggml(GgmlType::Q4_1) => Some(3),
        Format::Ggml(GgmlType::Q8_0) => Some(7),
        Format::Ggml(GgmlType::Q5_0) => Some(8),
        Format::Ggml(GgmlType::Q5_1) => Some(9),
        Format::Ggml(GgmlType::Q4_K) => Some(14),
        Format::Ggml(GgmlType::Q5_K) => Some(16),
        Format::Ggml(GgmlType::Q6_K) => Some(18),
        _ => None,
    }
}

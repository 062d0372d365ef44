//! What a checkpoint's configuration says of how its numbers are stored.

use lathe_tensor::Tensor;
use lathe_tensor::safetensors::Checkpoint as SafetensorsFiles;
use serde_json::Value;

use super::awq::AwqScheme;
use super::compressed::CompressedTensors;
use super::gptq::GptqScheme;
use super::naming::Naming;
use super::{CheckpointError, awq, fp8, gptq, int8, modelopt, mxfp4, nf4, scheme};
use crate::config::Config;
use crate::spec::SpecError;

/// How a Hugging Face checkpoint's `quantization_config` says that numbers are stored.
///
/// What it says of activations is the business of [`super::InputScheme`], and of the scales that
/// fp8's and ModelOpt's files store for inputs.
#[derive(Debug, Clone)]
pub enum Quantization {
    /// Plain floats.
    None,
    /// fp8 e4m3 with one `f32` a tile, in `*_scale_inv` (DeepSeek-V3).
    Fp8Tiles {
        /// Rows and columns of a tile.
        tile: (u32, u32),
    },
    /// fp8 e4m3 with one scale a matrix or a row, in `weight_scale` (AutoFP8) or `weight_scale_inv`
    /// (transformers).
    Fp8Tensors,
    /// Experts in MXFP4, in `*_blocks` and `*_scales` (gpt-oss).
    Mxfp4Experts,
    /// compressed-tensors.
    CompressedTensors(CompressedTensors),
    /// Integers packed along inputs, in `qweight`, `qzeros`, `scales` and `g_idx` (GPTQ).
    Gptq(GptqScheme),
    /// 4-bit integers packed along outputs, in `qweight`, `qzeros` and `scales` (AutoAWQ's gemm).
    Awq(AwqScheme),
    /// NVFP4 or fp8 with scales beside `weight` (NVIDIA ModelOpt): the types in the files say
    /// which.
    ModelOpt,
    /// Codes of a table with scales a block, in `weight` and `weight.*` (bitsandbytes NF4 and FP4).
    BitsAndBytes4,
    /// Integers of eight bits with a scale a row (bitsandbytes LLM.int8()).
    BitsAndBytes8,
}

/// The part of a `config.json` that says how numbers are stored, under its name or its old one.
pub(super) fn section<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, SpecError> {
    Ok(config.object("quantization_config")?.or(config.object("compression_config")?))
}

impl Quantization {
    /// What a `config.json` says.
    ///
    /// # Errors
    /// If it names a method, or something of one, that is not supported.
    pub fn from_hf_config(config: &Value) -> Result<Quantization, SpecError> {
        match section(&Config::new(config, "")?)? {
            Some(section) => Self::of_method(&section),
            None => Ok(Quantization::None),
        }
    }

    /// What a folder says: its `config.json`, or where that says nothing the `hf_quant_config.json`
    /// that ModelOpt writes beside it, or the `quantize_config.json` of AutoGPTQ.
    ///
    /// # Errors
    /// As [`Self::from_hf_config`].
    pub fn of_folder(
        config: &Value,
        modelopt: Option<&Value>,
        gptq: Option<&Value>,
    ) -> Result<Quantization, SpecError> {
        match (Self::from_hf_config(config)?, modelopt, gptq) {
            (Quantization::None, None, Some(beside)) => {
                let c = Config::new(beside, "quantize_config.json: ")?;
                Ok(Quantization::Gptq(GptqScheme::from_hf_config(&c)?))
            }
            (Quantization::None, Some(beside), _) => {
                let beside = Config::new(beside, "hf_quant_config.json: ")?;
                let Some(c) = beside.object("quantization")? else {
                    let key = "hf_quant_config.json: quantization".to_owned();
                    return Err(SpecError::Missing(key));
                };
                modelopt::check(&c)?;
                Ok(Quantization::ModelOpt)
            }
            (found, ..) => Ok(found),
        }
    }

    /// Whether a `config.json` says how keys and values of a cache are to be rounded.
    pub fn scales_a_cache(config: &Value) -> bool {
        let sections = ["quantization_config", "compression_config"].iter();
        sections.filter_map(|key| config.get(key)?.get("kv_cache_scheme")).any(|scheme| {
            !scheme.is_null() && scheme.as_object().is_none_or(|fields| !fields.is_empty())
        })
    }

    fn of_method(c: &Config<'_>) -> Result<Quantization, SpecError> {
        let method = match c.text("quant_method")? {
            Some(method) => method,
            // Files from before the key was there.
            None if c.has("config_groups") => "compressed-tensors",
            None => "(none given)",
        };
        match method {
            // Weights are floats; what is done to inputs is the business of `InputScheme`.
            "compressed-tensors" if c.text("format")? == Some("dense") => Ok(Quantization::None),
            "compressed-tensors" => {
                Ok(Quantization::CompressedTensors(CompressedTensors::from_hf_config(c)?))
            }
            "mxfp4" => Ok(Quantization::Mxfp4Experts),
            "fp8" if c.get("weight_block_size").is_none() => {
                fp8::check(c)?;
                Ok(Quantization::Fp8Tensors)
            }
            "fp8" => Ok(Quantization::Fp8Tiles { tile: fp8::tile(c)? }),
            "gptq" => Ok(Quantization::Gptq(GptqScheme::from_hf_config(c)?)),
            "auto-round" => Ok(Quantization::Gptq(GptqScheme::from_auto_round(c)?)),
            "awq" => Ok(Quantization::Awq(AwqScheme::from_hf_config(c)?)),
            "modelopt" => {
                modelopt::check(c)?;
                Ok(Quantization::ModelOpt)
            }
            "bitsandbytes" if nf4::is_of_eight_bits(c)? => Ok(Quantization::BitsAndBytes8),
            "bitsandbytes" => {
                nf4::check(c)?;
                Ok(Quantization::BitsAndBytes4)
            }
            other => Err(SpecError::feature(format!("quantization method `{other}`"))),
        }
    }

    /// How the tensors of a weight are named.
    pub(super) fn naming(&self) -> &'static Naming {
        match self {
            Quantization::None => &Naming::NONE,
            Quantization::Fp8Tiles { .. } => &fp8::NAMING,
            Quantization::Fp8Tensors => &fp8::OF_TENSORS,
            Quantization::Mxfp4Experts => &mxfp4::NAMING,
            Quantization::CompressedTensors(_) => &scheme::NAMING,
            Quantization::Gptq(_) => &gptq::NAMING,
            Quantization::Awq(_) => &awq::NAMING,
            Quantization::ModelOpt => &modelopt::NAMING,
            Quantization::BitsAndBytes4 => &nf4::NAMING,
            Quantization::BitsAndBytes8 => &int8::NAMING,
        }
    }

    /// The shape of `name` where it can be had without its codes.
    pub(super) fn shape(
        &self,
        files: &SafetensorsFiles,
        name: &str,
    ) -> Result<Vec<usize>, CheckpointError> {
        match self {
            Quantization::CompressedTensors(groups) => groups.shape(files, name),
            Quantization::Gptq(scheme) => gptq::shape(files, name, scheme),
            Quantization::Awq(_) => awq::shape(files, name),
            Quantization::ModelOpt => modelopt::shape(files, name),
            Quantization::BitsAndBytes4 => nf4::shape(files, name),
            Quantization::None
            | Quantization::Fp8Tiles { .. }
            | Quantization::Fp8Tensors
            | Quantization::BitsAndBytes8 => Ok(files.raw(name)?.shape.clone()),
            Quantization::Mxfp4Experts => Ok(mxfp4::tensor(files, name)?.shape),
        }
    }

    /// A tensor with its codes and scales together.
    pub(super) fn tensor(
        &self,
        files: &SafetensorsFiles,
        name: &str,
    ) -> Result<Tensor, CheckpointError> {
        match self {
            Quantization::None => Ok(files.tensor(name)?),
            Quantization::Fp8Tiles { tile } => fp8::tensor(files, name, *tile),
            Quantization::Fp8Tensors => fp8::with_one_scale(files, name),
            Quantization::Mxfp4Experts => mxfp4::tensor(files, name),
            Quantization::CompressedTensors(groups) => groups.tensor(files, name),
            Quantization::Gptq(scheme) => gptq::tensor(files, name, scheme),
            Quantization::Awq(scheme) => awq::tensor(files, name, scheme),
            Quantization::ModelOpt => modelopt::tensor(files, name),
            Quantization::BitsAndBytes4 => nf4::tensor(files, name),
            Quantization::BitsAndBytes8 => int8::tensor(files, name),
        }
    }
}

//! A checkpoint: tensors by the names that its files give them, whatever the container.
//!
//! Numbers that a file keeps in several tensors (codes and scales) come as one [`Tensor`] here;
//! what the tensors are for is the business of [`crate::weights`].

pub(crate) mod inputs;
mod packed;

use std::path::{Path, PathBuf};

use lathe_tensor::gguf::{GgufError, GgufFile};
use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype, SafetensorsError};
use lathe_tensor::{
    Block, Bytes, Element, Format, GlobalScale, ScaleType, ScaledFormat, Tensor, TensorError,
    ZeroPoint,
};
use serde_json::Value;

pub use self::inputs::InputScheme;
pub use self::packed::PackedScheme;
use crate::config::Config;
use crate::spec::SpecError;

/// Why a tensor of a checkpoint could not be had.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// A safetensors file is malformed or lacks something.
    #[error(transparent)]
    Safetensors(#[from] SafetensorsError),
    /// A GGUF file is malformed or lacks something.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The tensor and its scales do not fit together.
    #[error("tensor {name}: {source}")]
    Tensor {
        /// Its name in the file.
        name: String,
        /// What does not fit.
        source: TensorError,
    },
    /// A tensor has a type or shape that its encoding cannot have.
    #[error("tensor {name} is {found}, expected {expected}")]
    Encoding {
        /// Its name in the file.
        name: String,
        /// Type and shape.
        found: String,
        /// What its encoding asks for.
        expected: String,
    },
    /// The description of the checkpoint asks for something that is not supported.
    #[error(transparent)]
    Spec(#[from] SpecError),
}

/// How a Hugging Face checkpoint's `quantization_config` says that numbers are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantization {
    /// Plain floats.
    None,
    /// fp8 e4m3 with one `f32` a tile, in `*_scale_inv` (DeepSeek-V3).
    Fp8Tiles {
        /// Rows and columns of a tile.
        tile: (u32, u32),
    },
    /// Experts in MXFP4, in `*_blocks` and `*_scales` (gpt-oss).
    Mxfp4Experts,
    /// Integers in words, in `*_packed`, `*_scale` and `*_shape` (compressed-tensors).
    Packed(PackedScheme),
}

impl Quantization {
    /// What a `config.json` says.
    ///
    /// # Errors
    /// If it names a method that is not supported.
    pub fn from_hf_config(config: &Value) -> Result<Quantization, SpecError> {
        let Some(c) = Config::new(config, "")?.object("quantization_config")? else {
            return Ok(Quantization::None);
        };
        let method = c.text("quant_method")?.unwrap_or("(none given)");
        match method {
            // Weights are floats; what is done to inputs is the business of `InputScheme`.
            "compressed-tensors" if c.text("format")? == Some("dense") => Ok(Quantization::None),
            "compressed-tensors" => Ok(Quantization::Packed(PackedScheme::from_hf_config(&c)?)),
            "mxfp4" => Ok(Quantization::Mxfp4Experts),
            "fp8" => {
                if let Some(element) = c.text("fmt")?.filter(|element| *element != "e4m3") {
                    return Err(SpecError::feature(format!("fp8 format `{element}`")));
                }
                match c.sizes("weight_block_size")?.as_deref() {
                    Some(&[rows, columns])
                        if (1..=4096).contains(&rows) && (1..=4096).contains(&columns) =>
                    {
                        Ok(Quantization::Fp8Tiles { tile: (rows as u32, columns as u32) })
                    }
                    found => Err(SpecError::feature(format!("fp8 weight_block_size {found:?}"))),
                }
            }
            other => Err(SpecError::feature(format!("quantization method `{other}`"))),
        }
    }
}

/// The tensors of a model, mapped from one or many files.
#[derive(Debug)]
pub enum Checkpoint {
    /// A Hugging Face directory's safetensors.
    Safetensors {
        /// The files.
        files: SafetensorsFiles,
        /// How some tensors are stored.
        quantization: Quantization,
    },
    /// A GGUF file.
    Gguf(GgufFile),
}

impl Checkpoint {
    /// Where the checkpoint lies.
    pub fn path(&self) -> PathBuf {
        match self {
            Checkpoint::Safetensors { files, .. } => files.path().to_owned(),
            Checkpoint::Gguf(file) => file.path().to_owned(),
        }
    }

    /// The safetensors of a directory.
    ///
    /// # Errors
    /// If there are none, or a file is malformed.
    pub fn open_safetensors(
        path: &Path,
        quantization: Quantization,
    ) -> Result<Self, CheckpointError> {
        Ok(Checkpoint::Safetensors { files: SafetensorsFiles::open(path)?, quantization })
    }

    /// Names of all tensors as they lie in the files.
    pub fn names(&self) -> Vec<&str> {
        match self {
            Checkpoint::Safetensors { files, .. } => files.names().collect(),
            Checkpoint::Gguf(file) => file.tensors.iter().map(|t| t.name.as_str()).collect(),
        }
    }

    /// Whether there is a tensor of this name.
    pub fn contains(&self, name: &str) -> bool {
        match self {
            Checkpoint::Safetensors { files, quantization: Quantization::Packed(_) } => {
                files.contains(name) || packed::is_packed(files, name)
            }
            Checkpoint::Safetensors { files, .. } => files.contains(name),
            Checkpoint::Gguf(file) => file.info(name).is_some(),
        }
    }

    /// The shape in which [`Self::tensor`] gives a tensor.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn shape(&self, name: &str) -> Result<Vec<usize>, CheckpointError> {
        match self {
            // Codes are only unpacked when they are asked for.
            Checkpoint::Safetensors { files, quantization: Quantization::Packed(_) }
                if packed::is_packed(files, name) =>
            {
                Ok(packed::shape_of(files, name)?.to_vec())
            }
            _ => Ok(self.tensor(name)?.shape),
        }
    }

    /// Names of the tensors that [`Self::tensor`] reads for `name`: itself, and its scales.
    pub fn parts_of(&self, name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        if let Checkpoint::Safetensors { files, quantization: Quantization::Packed(_) } = self {
            names.extend(packed::parts_of(files, name));
        } else if let Checkpoint::Safetensors { files, .. } = self {
            names.extend(scales_of(name).into_iter().filter(|scales| files.contains(scales)));
        }
        names
    }

    /// A tensor; its codes and scales together where the file keeps them apart.
    ///
    /// # Errors
    /// If there is no such tensor, or it has a type that cannot be read.
    pub fn tensor(&self, name: &str) -> Result<Tensor, CheckpointError> {
        let (files, quantization) = match self {
            Checkpoint::Gguf(file) => return Ok(file.tensor(name)?),
            Checkpoint::Safetensors { files, quantization } => (files, *quantization),
        };
        match quantization {
            Quantization::Mxfp4Experts if name.ends_with(BLOCKS) => mxfp4(files, name),
            Quantization::Fp8Tiles { tile } if files.raw(name)?.dtype == Dtype::F8_E4M3 => {
                fp8_tiles(files, name, tile)
            }
            Quantization::Packed(scheme) if packed::is_packed(files, name) => {
                packed::read(files, name, scheme)
            }
            _ => Ok(files.tensor(name)?),
        }
    }

    /// Names under which [`Self::tensor`] gives every tensor: those of the files, but one for the
    /// codes and scales of what is quantized.
    pub fn whole_names(&self) -> Vec<String> {
        let Checkpoint::Safetensors { files, quantization } = self else {
            return self.names().into_iter().map(str::to_owned).collect();
        };
        let whole = |name: &str| match quantization {
            Quantization::Packed(_) => packed::whole_name(files, name),
            _ => {
                let scales = name.strip_suffix("_scale_inv").is_some_and(|it| files.contains(it));
                (!scales).then(|| name.to_owned())
            }
        };
        files.names().filter_map(whole).collect()
    }
}

const BLOCKS: &str = "_blocks";

fn scales_of(name: &str) -> Vec<String> {
    let mut scales = vec![format!("{name}_scale_inv")];
    scales.extend(name.strip_suffix(BLOCKS).map(|stem| format!("{stem}_scales")));
    scales
}

fn found(dtype: Dtype, shape: &[usize]) -> String {
    format!("{dtype} {shape:?}")
}

/// `[.., groups, 16]` bytes of two codes each, with one power of two a group.
fn mxfp4(files: &SafetensorsFiles, name: &str) -> Result<Tensor, CheckpointError> {
    let blocks = files.raw(name)?;
    let scales_name = scales_of(name).pop().unwrap_or_default();
    let scales = files.raw(&scales_name)?;
    let encoding = |name: &str, raw: &lathe_tensor::safetensors::RawTensor, expected: String| {
        CheckpointError::Encoding {
            name: name.to_owned(),
            found: found(raw.dtype, &raw.shape),
            expected,
        }
    };
    let (Dtype::U8, [leading @ .., groups, 16]) = (blocks.dtype, blocks.shape.as_slice()) else {
        return Err(encoding(name, blocks, "U8 [.., groups, 16]".to_owned()));
    };
    let mut shape = leading.to_vec();
    shape.push(*groups);
    if scales.dtype != Dtype::U8 || scales.shape != shape {
        return Err(encoding(&scales_name, scales, found(Dtype::U8, &shape)));
    }
    // 32 codes a group: no overflow, for the file has a byte for every two.
    *shape.last_mut().expect("groups") = groups * 32;
    let format = Format::Scaled(ScaledFormat::MXFP4);
    let none = Bytes::new(Vec::new());
    Tensor::new_scaled(
        shape,
        format,
        blocks.bytes.clone(),
        scales.bytes.clone(),
        none,
        GlobalScale::One,
    )
    .map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
}

/// fp8 codes with one multiplier a tile.
fn fp8_tiles(
    files: &SafetensorsFiles,
    name: &str,
    (rows, columns): (u32, u32),
) -> Result<Tensor, CheckpointError> {
    let codes = files.raw(name)?;
    // Scales may be stored in fewer bits than f32.
    let scales = files.tensor(&format!("{name}_scale_inv"))?;
    let scales: Vec<u8> = scales.to_f32().iter().flat_map(|scale| scale.to_le_bytes()).collect();
    let format = Format::Scaled(ScaledFormat {
        element: Element::F8E4M3,
        block: Block::Tile(rows, columns),
        scale: ScaleType::F32,
        zero: ZeroPoint::None,
    });
    let (shape, none) = (codes.shape.clone(), Bytes::new(Vec::new()));
    Tensor::new_scaled(
        shape,
        format,
        codes.bytes.clone(),
        Bytes::new(scales),
        none,
        GlobalScale::One,
    )
    .map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
}

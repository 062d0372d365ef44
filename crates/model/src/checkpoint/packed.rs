//! compressed-tensors' `pack-quantized`: integers in words, with a scale a group or a row.

use lathe_tensor::packed::{PackedPlanes, unpack};
use lathe_tensor::safetensors::{Checkpoint as SafetensorsFiles, Dtype};
use lathe_tensor::{
    Block, Bytes, Element, FloatType, Format, ScaleType, ScaledFormat, Tensor, ZeroPoint,
};

use super::{CheckpointError, found};
use crate::config::Config;
use crate::spec::SpecError;

const CODES: &str = "_packed";
const SCALE: &str = "_scale";
const SHAPE: &str = "_shape";
const ZERO: &str = "_zero_point";

/// What a `quantization_config` of format `pack-quantized` says of weights. The scales' own type
/// is the file's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedScheme {
    /// Bits of a code: 4 or 8.
    pub bits: u8,
    /// What shares a scale: a group or a row.
    pub block: Block,
    /// Whether codes are shifted.
    pub zero: ZeroPoint,
}

impl PackedScheme {
    /// The scheme of a `quantization_config` whose method is `compressed-tensors`.
    ///
    /// # Errors
    /// If it asks for something that is not supported, which the error names.
    pub(super) fn from_hf_config(c: &Config<'_>) -> Result<Self, SpecError> {
        let refuse = |what: String| Err(SpecError::feature(format!("compressed-tensors {what}")));
        match c.text("format")? {
            Some("pack-quantized") => {}
            found => return refuse(format!("format `{}`", found.unwrap_or("(none given)"))),
        }
        for key in ["kv_cache_scheme", "sparsity_config"] {
            let asks = c.get(key).is_some_and(|it| it.as_object().is_none_or(|o| !o.is_empty()));
            if asks {
                return refuse(key.to_owned());
            }
        }
        let Some(groups) = c.object("config_groups")? else {
            return Err(SpecError::Missing("quantization_config.config_groups".to_owned()));
        };
        let mut schemes = Vec::new();
        for name in groups.given() {
            if let Some(group) = groups.object(name)? {
                schemes.push(Self::of_group(&group)?);
            }
        }
        match schemes.as_slice() {
            [first, rest @ ..] if rest.iter().all(|other| other == first) => Ok(*first),
            [] => refuse("config without groups".to_owned()),
            _ => refuse("groups of several kinds".to_owned()),
        }
    }

    fn of_group(group: &Config<'_>) -> Result<Self, SpecError> {
        let refuse = |what: String| Err(SpecError::feature(format!("compressed-tensors {what}")));
        if group.get("output_activations").is_some() {
            return refuse("output_activations".to_owned());
        }
        let Some(weights) = group.object("weights")? else {
            return refuse("group without weights".to_owned());
        };
        if let Some(kind) = weights.text("type")?.filter(|kind| *kind != "int") {
            return refuse(format!("pack-quantized weights of type `{kind}`"));
        }
        let bits = match weights.need("num_bits")? {
            bits @ (4 | 8) => bits as u8,
            bits => return refuse(format!("pack-quantized weights of {bits} bits")),
        };
        if weights
            .get("actorder")
            .is_some_and(|order| !matches!(order.as_str(), Some("weight" | "static")))
        {
            return refuse("weights in an order of activations (actorder)".to_owned());
        }
        let group_size = weights.get("group_size").and_then(serde_json::Value::as_i64);
        let block = match (weights.text("strategy")?, group_size) {
            (Some("group") | None, Some(size @ 1..=65536)) => Block::Group(size as u32),
            (Some("channel"), _) | (None, Some(-1)) => Block::Channel,
            (strategy, size) => {
                return refuse(format!("strategy {strategy:?} with group size {size:?}"));
            }
        };
        let symmetric = weights.flag("symmetric")?.unwrap_or(true);
        let zero = if symmetric { ZeroPoint::None } else { ZeroPoint::Int };
        Ok(PackedScheme { bits, block, zero })
    }
}

/// Whether `name` is there as codes and scales.
pub(super) fn is_packed(files: &SafetensorsFiles, name: &str) -> bool {
    files.contains(&format!("{name}{CODES}"))
}

/// The names in the files of all that makes tensor `name`.
pub(super) fn parts_of(files: &SafetensorsFiles, name: &str) -> Vec<String> {
    let parts = [CODES, SCALE, SHAPE, ZERO].map(|part| format!("{name}{part}"));
    if !is_packed(files, name) {
        return Vec::new();
    }
    parts.into_iter().filter(|part| files.contains(part)).collect()
}

/// The tensor that `part` is the codes of; `None` for scales, shapes and zero points, and the
/// name itself for what is not quantized.
pub(super) fn whole_name(files: &SafetensorsFiles, part: &str) -> Option<String> {
    if let Some(name) = part.strip_suffix(CODES) {
        return Some(name.to_owned());
    }
    let beside = [SCALE, SHAPE, ZERO].iter().filter_map(|suffix| part.strip_suffix(suffix));
    let beside = beside.into_iter().any(|name| is_packed(files, name));
    (!beside).then(|| part.to_owned())
}

/// Codes, scales and zero points as one tensor.
pub(super) fn read(
    files: &SafetensorsFiles,
    name: &str,
    scheme: PackedScheme,
) -> Result<Tensor, CheckpointError> {
    let encoding = |part: &str, found: String, expected: &str| CheckpointError::Encoding {
        name: format!("{name}{part}"),
        found,
        expected: expected.to_owned(),
    };
    let codes = files.raw(&format!("{name}{CODES}"))?;
    if codes.dtype != Dtype::I32 {
        return Err(encoding(CODES, found(codes.dtype, &codes.shape), "I32"));
    }
    let shape = shape_of(files, name)?;
    let scales = files.tensor(&format!("{name}{SCALE}"))?;
    let scale = match scales.format {
        Format::Float(FloatType::F32) => ScaleType::F32,
        Format::Float(FloatType::F16) => ScaleType::F16,
        Format::Float(FloatType::BF16) => ScaleType::BF16,
        other => return Err(encoding(SCALE, other.to_string(), "F32, F16 or BF16")),
    };
    let zeros = match scheme.zero {
        ZeroPoint::None => Bytes::new(Vec::new()),
        ZeroPoint::Int => {
            let zeros = files.raw(&format!("{name}{ZERO}"))?;
            if zeros.dtype != Dtype::I32 {
                return Err(encoding(ZERO, found(zeros.dtype, &zeros.shape), "I32"));
            }
            zeros.bytes.clone()
        }
    };
    let PackedScheme { bits, block, zero } = scheme;
    let format = ScaledFormat { element: Element::Int(bits), block, scale, zero };
    let planes = PackedPlanes { codes: codes.bytes.clone(), scales: scales.codes.clone(), zeros };
    unpack(shape, &format, &planes)
        .map_err(|source| CheckpointError::Tensor { name: name.to_owned(), source })
}

/// `[rows, columns]` of the weight, which its packed codes alone do not tell.
pub(super) fn shape_of(
    files: &SafetensorsFiles,
    name: &str,
) -> Result<[usize; 2], CheckpointError> {
    let part = format!("{name}{SHAPE}");
    let raw = files.raw(&part)?;
    let number = |bytes: &[u8]| match raw.dtype {
        Dtype::I64 => i64::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
        _ => i32::from_le_bytes(bytes.try_into().ok()?).try_into().ok(),
    };
    let (true, 2) =
        (matches!(raw.dtype, Dtype::I64 | Dtype::I32), raw.bytes.len() / raw.dtype.bytes())
    else {
        let (found, expected) = (found(raw.dtype, &raw.shape), "I64 [2]".to_owned());
        return Err(CheckpointError::Encoding { name: part, found, expected });
    };
    let (rows, columns) = raw.bytes.split_at(raw.dtype.bytes());
    match (number(rows), number(columns)) {
        (Some(rows), Some(columns)) => Ok([rows, columns]),
        _ => Err(CheckpointError::Encoding {
            name: part,
            found: format!("{:?}", &raw.bytes[..]),
            expected: "two sizes, not negative".to_owned(),
        }),
    }
}

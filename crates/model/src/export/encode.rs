//! How a weight lies in a quantized folder: which tensors it becomes, and their bytes.

use lathe_tensor::packed::{can_pack, pack, words};
use lathe_tensor::safetensors::{Dtype, TensorDeclaration, Writer};
use lathe_tensor::{
    ActivationFormat, Block, Bytes, Element, Format, GlobalScale, ScaleType, ScaledFormat, Tensor,
    ZeroPoint,
};

use super::{ExportError, float_of};
use crate::checkpoint::{Encoding, part_of};

/// What errors call the folder.
pub(super) const TARGET: &str = "a quantized folder";

/// The module that owns a tensor, as `ignore` lists name it.
pub(super) fn module_of(tensor: &str) -> String {
    tensor.strip_suffix(".weight").unwrap_or(tensor).to_owned()
}

/// How integers of eight bits lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Integers {
    /// In words (`pack-quantized`), as engines read weights that meet plain activations.
    #[default]
    Words,
    /// One a byte (`int-quantized`), as engines read weights that meet activations of eight bits
    /// (W8A8), which the model's own inputs ask for.
    Bytes,
}

impl Integers {
    /// How they lie in a folder whose inputs are rounded to `inputs`: products of integers of eight
    /// bits are what engines read bytes for.
    pub fn beside(inputs: Option<ActivationFormat>) -> Self {
        match inputs {
            Some(ActivationFormat::Int8Token) => Integers::Bytes,
            _ => Integers::Words,
        }
    }
}

/// What becomes of one tensor of the model's files.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part {
    /// It stays, or is replaced by floats.
    Float(Format),
    /// It becomes codes and scales in compressed-tensors' way.
    Coded(ScaledFormat, Encoding),
    /// Experts become gpt-oss's blocks and scales.
    Blocks,
}

impl Part {
    /// The format of the numbers.
    pub(super) fn format(&self) -> Format {
        match self {
            Part::Float(format) => *format,
            Part::Coded(format, _) => Format::Scaled(*format),
            Part::Blocks => Format::Scaled(ScaledFormat::MXFP4),
        }
    }
}

/// How compressed-tensors holds `format`; `None` if it cannot.
pub(super) fn encoding_of(format: &ScaledFormat, integers: Integers) -> Option<Encoding> {
    let float_scale = matches!(format.scale, ScaleType::F32 | ScaleType::F16 | ScaleType::BF16);
    match (format.element, *format) {
        (_, ScaledFormat::MXFP4) => Some(Encoding::Mxfp4),
        (_, ScaledFormat::MXFP6_E2M3) => Some(Encoding::Mxfp6),
        (_, ScaledFormat::MXFP8_E4M3) => Some(Encoding::Mxfp8),
        (_, ScaledFormat::NVFP4) => Some(Encoding::Nvfp4),
        (Element::Int(4), _) if can_pack(format) => Some(Encoding::PackQuantized),
        (Element::Int(8), _) if can_pack(format) && integers == Integers::Words => {
            Some(Encoding::PackQuantized)
        }
        (Element::Int(8), _) if float_scale => Some(Encoding::IntQuantized),
        (Element::F8E4M3, _) if float_scale && format.zero == ZeroPoint::None => {
            Some(Encoding::FloatQuantized)
        }
        _ => None,
    }
}

/// One tensor of a weight in a file.
struct Piece {
    name: String,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// The tensors of weight `name` of `shape`, in the order in which [`bytes`] gives theirs.
fn pieces(name: &str, shape: &[usize], part: &Part) -> Vec<Piece> {
    let piece = |name: String, dtype, shape| Piece { name, dtype, shape };
    match part {
        Part::Float(format) => {
            vec![piece(name.to_owned(), Dtype::from(float_of(*format)), shape.to_vec())]
        }
        Part::Blocks => {
            let [experts, rows, columns] = [shape[0], shape[1], shape[2]];
            let groups = vec![experts, rows, columns / 32];
            vec![
                piece(format!("{name}_blocks"), Dtype::U8, [&groups[..], &[16]].concat()),
                piece(format!("{name}_scales"), Dtype::U8, groups),
            ]
        }
        Part::Coded(format, encoding) => {
            let (rows, columns, bits) = (shape[0], shape[1], format.element.bits());
            let named = |ending, dtype, shape| piece(part_of(name, ending), dtype, shape);
            let grid = format.grid(shape).map_or([0, 0], |grid| [grid.rows, grid.columns]);
            let scales = match format.block {
                Block::Tensor => vec![1],
                _ => grid.to_vec(),
            };
            let scale = match format.scale {
                ScaleType::F32 => Dtype::F32,
                ScaleType::F16 => Dtype::F16,
                ScaleType::BF16 => Dtype::BF16,
                ScaleType::E8M0 => Dtype::U8,
                ScaleType::E4M3Global => Dtype::F8_E4M3,
            };
            let packed = *encoding == Encoding::PackQuantized;
            let codes = match format.element {
                _ if packed => named("weight_packed", Dtype::I32, vec![rows, words(columns, bits)]),
                _ if bits < 8 => named("weight_packed", Dtype::U8, vec![rows, columns * bits / 8]),
                Element::Int(_) => named("weight", Dtype::I8, shape.to_vec()),
                _ => named("weight", Dtype::F8_E4M3, shape.to_vec()),
            };
            let mut all = vec![codes, named("weight_scale", scale, scales.clone())];
            if packed {
                all.push(named("weight_shape", Dtype::I64, vec![2]));
            }
            if format.zero == ZeroPoint::Int {
                all.push(match packed {
                    true => {
                        named("weight_zero_point", Dtype::I32, vec![words(rows, bits), grid[1]])
                    }
                    false => named("weight_zero_point", Dtype::I8, scales),
                });
            }
            if format.scale == ScaleType::E4M3Global {
                all.push(named("weight_global_scale", Dtype::F32, vec![1]));
            }
            all
        }
    }
}

/// Declares the tensors of weight `name`.
pub(super) fn declare(
    name: &str,
    shape: &[usize],
    part: &Part,
    declarations: &mut Vec<TensorDeclaration>,
) {
    let declaration = |Piece { name, dtype, shape }| TensorDeclaration { name, dtype, shape };
    declarations.extend(pieces(name, shape, part).into_iter().map(declaration));
}

/// Writes weight `name`, which `tensor` is.
pub(super) fn write(
    writer: &mut Writer,
    name: &str,
    part: &Part,
    tensor: &Tensor,
) -> Result<(), ExportError> {
    let bytes = bytes(name, part, tensor)?;
    for (piece, bytes) in pieces(name, &tensor.shape, part).into_iter().zip(bytes) {
        writer.write(&piece.name, &bytes)?;
    }
    Ok(())
}

fn bytes(name: &str, part: &Part, tensor: &Tensor) -> Result<Vec<Bytes>, ExportError> {
    let (codes, scales) = (tensor.codes.clone(), tensor.scales.clone());
    let encoding = match part {
        Part::Float(format) => return Ok(vec![super::bytes_in(tensor, *format)]),
        Part::Blocks => return Ok(vec![codes, scales]),
        Part::Coded(_, encoding) => encoding,
    };
    let (mut all, zeros) = if *encoding == Encoding::PackQuantized {
        let at = |source| ExportError::Tensor { name: name.to_owned(), source };
        let planes = pack(tensor).map_err(at)?;
        let sizes = tensor.shape.iter().flat_map(|size| (*size as i64).to_le_bytes());
        let sizes = Bytes::new(sizes.collect::<Vec<u8>>());
        (vec![planes.codes, planes.scales, sizes], planes.zeros)
    } else {
        (vec![codes, scales], tensor.zeros.clone())
    };
    if !zeros.is_empty() {
        all.push(zeros);
    }
    match &tensor.global {
        GlobalScale::One => {}
        GlobalScale::Divide(divisors) => {
            let divisors = divisors.iter().flat_map(|divisor| divisor.to_le_bytes());
            all.push(Bytes::new(divisors.collect::<Vec<u8>>()));
        }
        // Its reciprocal would round.
        GlobalScale::Multiply(_) => {
            let feature = format!("a global scale that multiplies ({name})");
            return Err(ExportError::Feature { feature, target: TARGET });
        }
    }
    Ok(all)
}

/// Matrices of one format and width as one: row `i` of all of them, one below another, becomes the
/// row of tensor `name` that `rows` gives at `i`.
///
/// # Errors
/// If their global scales differ, for the tensor has one.
pub(super) fn join(
    name: &str,
    parts: &[Tensor],
    rows: impl Iterator<Item = usize>,
) -> Result<Tensor, ExportError> {
    let first = &parts[0];
    if parts.iter().any(|part| part.global != first.global) {
        let feature = format!("matrices with global scales of their own in tensor {name}");
        return Err(ExportError::Feature { feature, target: TARGET });
    }
    let plane = |of: fn(&Tensor) -> &Bytes| {
        let mut bytes = Vec::with_capacity(parts.iter().map(|part| of(part).len()).sum());
        parts.iter().for_each(|part| bytes.extend_from_slice(of(part)));
        Bytes::new(bytes)
    };
    let (codes, scales) = (plane(|it| &it.codes), plane(|it| &it.scales));
    let zeros = plane(|it| &it.zeros);
    let at = |source| ExportError::Tensor { name: name.to_owned(), source };
    let shape = vec![parts.iter().map(Tensor::rows).sum(), first.columns()];
    let all = Tensor::new_scaled(shape, first.format, codes, scales, zeros, first.global.clone());
    let all = all.map_err(at)?;
    let places: Vec<usize> = rows.collect();
    if places.iter().copied().eq(0..places.len()) {
        return Ok(all);
    }
    let mut order = vec![0; places.len()];
    places.iter().enumerate().for_each(|(row, place)| order[*place] = row);
    all.gather_rows(&order).map_err(at)
}

/// Rows of stacks of matrices of one shape that take turns: row `i` of stack `s` is row
/// `i * stacks + s` of the result. All are in MXFP4, whose scales follow their rows.
pub(super) fn interleave(stacks: &[Tensor]) -> Result<Tensor, ExportError> {
    let first = &stacks[0];
    let [experts, rows, columns] = [first.shape[0], first.shape[1], first.shape[2]];
    let plane = |of: fn(&Tensor) -> &Bytes| {
        let row_bytes = of(first).len() / (experts * rows).max(1);
        let mut out = Vec::with_capacity(of(first).len() * stacks.len());
        for row in 0..experts * rows {
            for stack in stacks {
                out.extend_from_slice(&of(stack)[row * row_bytes..][..row_bytes]);
            }
        }
        Bytes::new(out)
    };
    let shape = vec![experts, rows * stacks.len(), columns];
    let (codes, scales) = (plane(|tensor| &tensor.codes), plane(|tensor| &tensor.scales));
    let none = Bytes::new(Vec::new());
    let format = Format::Scaled(ScaledFormat::MXFP4);
    Tensor::new_scaled(shape, format, codes, scales, none, GlobalScale::One)
        .map_err(|source| ExportError::Tensor { name: "experts".to_owned(), source })
}

//! Who else can run what is written: transformers, vLLM and llama.cpp.
//!
//! The rules are those of the readers' own sources: transformers 5.17 with compressed-tensors 0.20
//! (`integrations/compressed_tensors.py`), and vLLM 0.33 (`quantization/compressed_tensors`). The
//! scripts `tests/peers/folders.py` and `tests/peers/vllm_schemes.py` compare them with the
//! readers.

use lathe_program::{Op, Program, Weight, WeightRole};
use lathe_tensor::{ActivationFormat, Block, Element, Format, ScaleType, ScaledFormat, ZeroPoint};

use super::encode::{Integers, Part, encoding_of};
use super::inputs::InputRounding;
use crate::checkpoint::Encoding;

/// A program that people run models with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Reader {
    /// Hugging Face transformers.
    Transformers,
    /// vLLM.
    Vllm,
    /// llama.cpp.
    LlamaCpp,
}

impl Reader {
    /// Every reader.
    pub const ALL: [Reader; 3] = [Reader::Transformers, Reader::Vllm, Reader::LlamaCpp];

    /// Its name, as a user writes it.
    pub const fn name(self) -> &'static str {
        match self {
            Reader::Transformers => "transformers",
            Reader::Vllm => "vllm",
            Reader::LlamaCpp => "llama.cpp",
        }
    }

    /// Why it cannot run `contents`; `None` if it can.
    pub fn refusal(self, contents: &Contents) -> Option<String> {
        match (self, contents) {
            (Reader::LlamaCpp | Reader::Transformers, Contents::Gguf) => None,
            (Reader::LlamaCpp, _) => Some("it reads GGUF files, not folders".to_owned()),
            (Reader::Vllm, Contents::Gguf) => Some("it has no loader of GGUF files".to_owned()),
            // gpt-oss is published so.
            (_, Contents::ExpertBlocks) => None,
            (Reader::Transformers, Contents::Folder(folder)) => in_transformers(folder),
            (Reader::Vllm, Contents::Folder(folder)) => in_vllm(folder),
        }
    }
}

/// What readers differ in.
#[derive(Debug, Clone, PartialEq)]
pub enum Contents {
    /// A GGUF file.
    Gguf,
    /// A folder with its experts in gpt-oss's MXFP4 blocks.
    ExpertBlocks,
    /// A folder of compressed-tensors.
    Folder(Folder),
}

/// A folder of compressed-tensors.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Folder {
    /// In the order of the folder's groups.
    pub(super) groups: Vec<Group>,
    /// How the inputs of quantized matrices are rounded.
    pub(super) inputs: Option<InputRounding>,
    /// Elements of blocks of inputs that are rotated while the model runs, of linear layers.
    pub(super) rotations: Vec<usize>,
    /// Whether a linear layer with a rotated input has a bias.
    pub(super) rotated_bias: bool,
    /// Whether inputs within experts are rotated.
    pub(super) rotated_experts: bool,
    /// Whether there are experts that stay floats.
    pub(super) float_experts: bool,
    /// Whether the matrices of some expert are in different formats.
    pub(super) mixed_experts: bool,
}

/// The matrices of one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Group {
    pub(super) format: ScaledFormat,
    pub(super) encoding: Encoding,
    /// Whether there are linear layers among them.
    pub(super) linear: bool,
    /// Whether there are experts among them.
    pub(super) experts: bool,
}

impl Contents {
    /// What it is, in a few words.
    pub fn describe(&self) -> String {
        match self {
            Contents::Gguf => "a GGUF file".to_owned(),
            Contents::ExpertBlocks => "a folder of experts in MXFP4".to_owned(),
            Contents::Folder(folder) => {
                let format = |group: &Group| Format::Scaled(group.format).to_string();
                let formats: Vec<String> = folder.groups.iter().map(format).collect();
                format!("a folder in {}", formats.join(", "))
            }
        }
    }

    /// A folder whose linear layers, and experts if there are some, are in one format, calibrated
    /// if that finds scales of inputs; `None` if a folder cannot hold it.
    pub fn of_one_format(
        format: ScaledFormat,
        inputs: Option<ActivationFormat>,
        experts: bool,
    ) -> Option<Self> {
        let encoding = encoding_of(&format, Integers::beside(inputs))?;
        let groups = vec![Group { format, encoding, linear: true, experts }];
        let stored = inputs == Some(ActivationFormat::Nvfp4);
        let inputs = inputs.map(|format| InputRounding { format, stored });
        Some(Contents::Folder(Folder { groups, inputs, ..Folder::default() }))
    }
}

impl Folder {
    /// What `program` becomes in a folder whose weights become `part_of`; nothing for those that
    /// are not quantized.
    pub(super) fn of(
        program: &Program,
        inputs: Option<InputRounding>,
        part_of: impl Fn(Weight) -> Option<Part>,
    ) -> Self {
        let mut folder = Folder { inputs, ..Folder::default() };
        for (index, decl) in program.weights.iter().enumerate() {
            let experts = decl.role == WeightRole::Experts;
            let Some(Part::Coded(format, encoding)) = part_of(Weight(index as u32)) else {
                folder.float_experts |= experts;
                continue;
            };
            let same = |group: &&mut Group| (group.format, group.encoding) == (format, encoding);
            match folder.groups.iter_mut().find(same) {
                Some(group) => {
                    group.linear |= !experts;
                    group.experts |= experts;
                }
                None => folder.groups.push(Group { format, encoding, linear: !experts, experts }),
            }
        }
        for op in &program.ops {
            folder.look_at(program, op, &|weight| part_of(weight).map(|part| part.format()));
        }
        folder.groups.sort_by_key(|group| (!group.experts, group.format, group.encoding));
        folder.rotations.sort_unstable();
        folder.rotations.dedup();
        folder
    }

    fn look_at(
        &mut self,
        program: &Program,
        op: &Op,
        format_of: &dyn Fn(Weight) -> Option<Format>,
    ) {
        let rotation_of = |value| {
            program.ops.iter().find_map(|op| match op {
                Op::Transform { transform, out, .. } if *out == value => transform.hadamard,
                _ => None,
            })
        };
        match op {
            Op::Linear { input, parts } => {
                if let Some(block) = rotation_of(*input) {
                    self.rotations.push(block);
                    self.rotated_bias |= parts.iter().any(|part| part.bias.is_some());
                }
            }
            Op::Experts { input, spec, .. } => {
                let hidden = spec.hidden_transform.hadamard;
                self.rotated_experts |= rotation_of(*input).or(hidden).is_some();
                let formats = [spec.gate, spec.up, spec.down].map(format_of);
                self.mixed_experts |= formats.iter().any(|format| *format != formats[0]);
            }
            _ => {}
        }
    }

    fn with_experts(&self) -> impl Iterator<Item = &Group> {
        self.groups.iter().filter(|group| group.experts)
    }
}

/// Why nobody else runs inputs in NVFP4 whose second scale each row makes for itself.
fn without_global_scale(folder: &Folder) -> Option<String> {
    let of_row = InputRounding { format: ActivationFormat::Nvfp4, stored: false };
    (folder.inputs == Some(of_row)).then(|| {
        "it rounds inputs to NVFP4 under stored scales alone, which calibration finds".to_owned()
    })
}

fn in_transformers(folder: &Folder) -> Option<String> {
    if !folder.rotations.is_empty() || folder.rotated_experts {
        return Some(
            "it does not read `transform_config`, so no input would be rotated".to_owned(),
        );
    }
    if let Some(reason) = without_global_scale(folder) {
        return Some(reason);
    }
    let reason = match (folder.with_experts().count(), folder.groups.first()) {
        (0, Some(first)) if folder.float_experts && first.format.element != Element::F8E4M3 => {
            "it looks for codes of the experts, which stay floats here"
        }
        (2.., _) => "it reads all experts in one format",
        _ => folder.with_experts().find_map(experts_in_transformers)?,
    };
    Some(reason.to_owned())
}

/// Why transformers does not read experts in a format: it makes floats of them while it loads, from
/// codes and scales alone (`DecompressExperts`).
fn experts_in_transformers(group: &Group) -> Option<&'static str> {
    let format = group.format;
    match group.encoding {
        Encoding::FloatQuantized | Encoding::Mxfp8 => match format.block {
            Block::Channel | Block::Tensor => None,
            _ => Some("it multiplies experts in fp8 by a scale a row or a matrix, not a block"),
        },
        Encoding::PackQuantized if format.zero == ZeroPoint::None => None,
        Encoding::PackQuantized => Some("it loads no zero points of experts"),
        Encoding::Nvfp4 => Some("it loads no global scales of experts"),
        Encoding::Mxfp4 | Encoding::Mxfp6 => None,
        Encoding::IntQuantized | Encoding::NaiveQuantized => {
            Some("it looks for experts of integers in words, not in bytes")
        }
    }
}

fn in_vllm(folder: &Folder) -> Option<String> {
    if let Some(reason) = without_global_scale(folder) {
        return Some(reason);
    }
    if folder.rotated_experts {
        return Some("it rotates no input within experts".to_owned());
    }
    if folder.rotated_bias {
        return Some("it rotates no input of a linear layer with a bias".to_owned());
    }
    let odd = folder.rotations.iter().find(|block| !block.is_power_of_two() || **block > 1 << 15);
    if let Some(block) = odd {
        return Some(format!("it rotates blocks of powers of two up to 32768, not of {block}"));
    }
    if folder.mixed_experts {
        return Some("it reads all matrices of an expert in one format".to_owned());
    }
    let inputs = folder.inputs.map(|inputs| inputs.format);
    let linear = folder.groups.iter().filter(|group| group.linear);
    let linear = linear.into_iter().find_map(|group| linear_in_vllm(group, inputs));
    linear.or_else(|| folder.with_experts().find_map(|group| experts_in_vllm(group, inputs)))
}

/// Whether inputs are rounded to integers with a scale a token.
fn to_integers(inputs: Option<ActivationFormat>) -> bool {
    matches!(inputs, Some(ActivationFormat::Int4Token | ActivationFormat::Int8Token))
}

fn no_scheme(what: &str, group: &Group, inputs: Option<ActivationFormat>) -> Option<String> {
    let inputs = inputs.map_or(String::new(), |inputs| format!(" beside {inputs} inputs"));
    Some(format!("it has no scheme for {what} in {}{inputs}", Format::Scaled(group.format)))
}

/// `CompressedTensorsConfig._get_scheme_from_parts`.
fn linear_in_vllm(group: &Group, inputs: Option<ActivationFormat>) -> Option<String> {
    let Group { format, encoding, .. } = *group;
    let rows = matches!(format.block, Block::Channel | Block::Group(_));
    let runs = match encoding {
        Encoding::Nvfp4 => matches!(inputs, None | Some(ActivationFormat::Nvfp4)),
        Encoding::Mxfp4 | Encoding::Mxfp8 => true,
        Encoding::Mxfp6 => false,
        Encoding::PackQuantized => rows && (inputs.is_none() || to_integers(inputs)),
        Encoding::FloatQuantized => {
            matches!(format.block, Block::Tensor | Block::Channel | Block::Tile(..))
        }
        Encoding::IntQuantized | Encoding::NaiveQuantized => {
            matches!(format.block, Block::Tensor | Block::Channel)
                && format.zero == ZeroPoint::None
                && inputs == Some(ActivationFormat::Int8Token)
        }
    };
    if runs { None } else { no_scheme("linear layers", group, inputs) }
}

/// `CompressedTensorsMoEMethod.get_moe_method`.
fn experts_in_vllm(group: &Group, inputs: Option<ActivationFormat>) -> Option<String> {
    let Group { format, encoding, .. } = *group;
    let runs = match encoding {
        Encoding::Nvfp4 => matches!(inputs, None | Some(ActivationFormat::Nvfp4)),
        Encoding::Mxfp4 | Encoding::Mxfp8 => true,
        Encoding::Mxfp6 => false,
        Encoding::PackQuantized => match inputs {
            None => matches!(format.block, Block::Channel | Block::Group(_)),
            Some(ActivationFormat::Int8Token) => format.zero == ZeroPoint::None,
            Some(_) => false,
        },
        // Weights alone are taken for packed integers there.
        Encoding::FloatQuantized => {
            let rounded = matches!(
                inputs,
                Some(
                    ActivationFormat::Fp8Token | ActivationFormat::Mxfp8 | ActivationFormat::Mxfp4
                )
            );
            rounded && matches!(format.block, Block::Tensor | Block::Channel | Block::Tile(..))
        }
        Encoding::IntQuantized | Encoding::NaiveQuantized => {
            format.block == Block::Channel
                && format.zero == ZeroPoint::None
                && format.scale != ScaleType::E8M0
                && inputs == Some(ActivationFormat::Int8Token)
        }
    };
    if runs { None } else { no_scheme("experts", group, inputs) }
}

//! A Hugging Face directory whose matrices are compressed-tensors' `pack-quantized`.

use std::collections::BTreeMap;
use std::path::Path;

use lathe_program::{Program, Weight, WeightRole};
use lathe_tensor::packed::{can_pack, pack, words};
use lathe_tensor::safetensors::{Dtype, TensorDeclaration, Writer};
use lathe_tensor::{Block, Format, ScaleType, ScaledFormat, Tensor, ZeroPoint};
use serde_json::{Value, json};

use super::hugging_face::{copy_texts, write_json};
use super::{ExportError, Replacement, ReplacementError, bytes_in, float_of, inputs, io};
use crate::checkpoint::Checkpoint;
use crate::generation::read_json;
use crate::lower::{LowerOptions, lower};
use crate::model::Model;
use crate::weights::ModelWeights;

pub(super) const TARGET: &str = "compressed-tensors pack-quantized";
/// Bytes of a file's tensors at most.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// Where the weights of a program lie in a Hugging Face checkpoint, as far as `pack-quantized`
/// can replace them.
#[derive(Debug)]
pub struct PackedLayout<'a> {
    model: &'a Model,
    /// By weight: the one tensor that it is, whole.
    tensors: Vec<Option<String>>,
    /// By weight: all that it is made of.
    sources: Vec<Vec<String>>,
    /// By weight: whether it is a stack whose matrices are a whole tensor each.
    stacks: Vec<bool>,
    /// Embedding and head of a model that ties them, and the one tensor that both are.
    tied: Option<(Weight, Weight, String)>,
}

/// The head's own tensor, once it is not the embedding any more.
const HEAD: &str = "lm_head.weight";

impl<'a> PackedLayout<'a> {
    /// The layout of `model`, whose weights are `weights`.
    ///
    /// # Errors
    /// If the model is no Hugging Face directory of plain floats.
    pub fn new(model: &'a Model, weights: &ModelWeights<'_>) -> Result<Self, ExportError> {
        let refuse =
            |feature: &str| ExportError::Feature { feature: feature.to_owned(), target: TARGET };
        let Checkpoint::Safetensors { quantization, .. } = &model.checkpoint else {
            return Err(refuse("a GGUF file"));
        };
        if *quantization != crate::checkpoint::Quantization::None {
            return Err(refuse("a checkpoint that is quantized already"));
        }
        let program = weights.program();
        let mut users: BTreeMap<&str, usize> = BTreeMap::new();
        for index in 0..program.weights.len() {
            for name in weights.tensors_of(Weight(index as u32)) {
                *users.entry(name).or_default() += 1;
            }
        }
        let whole = |index: usize| {
            let [name] = weights.tensors_of(Weight(index as u32)) else { return None };
            let same = model.checkpoint.shape(name).ok()? == program.weights[index].shape;
            (users[name.as_str()] == 1 && same).then(|| name.clone())
        };
        let tied = program.weight_named("embedding").zip(program.weight_named("head"));
        let tied = tied.and_then(|(embedding, head)| {
            let (one, other) = (weights.tensors_of(embedding), weights.tensors_of(head));
            let [name] = one else { return None };
            (one == other && users[name.as_str()] == 2).then(|| (embedding, head, name.clone()))
        });
        let all = 0..program.weights.len();
        let sources = all.clone().map(|index| weights.tensors_of(Weight(index as u32)).to_vec());
        let stack = |index: usize| {
            let names = weights.tensors_of(Weight(index as u32));
            let [experts, matrix @ ..] = program.weights[index].shape.as_slice() else {
                return false;
            };
            let one = |name: &String| {
                let same = model.checkpoint.shape(name).is_ok_and(|shape| shape == matrix);
                users[name.as_str()] == 1 && same
            };
            program.weights[index].role == WeightRole::Experts
                && names.len() == *experts
                && names.iter().all(one)
        };
        let stacks = all.clone().map(stack).collect();
        let tensors = all.map(whole).collect();
        Ok(PackedLayout { model, sources: sources.collect(), stacks, tensors, tied })
    }

    /// The names under which the weights are written if `replacement` has its way. An embedding and
    /// a head that were one tensor and are both replaced become two.
    fn names(&self, replacement: &dyn Replacement) -> (Vec<Option<&str>>, bool) {
        let mut names: Vec<Option<&str>> = self.tensors.iter().map(Option::as_deref).collect();
        let Some((embedding, head, name)) = &self.tied else { return (names, false) };
        let untied = [embedding, head].iter().all(|it| replacement.format(**it).is_some());
        if untied {
            names[embedding.0 as usize] = Some(name);
            names[head.0 as usize] = Some(HEAD);
        }
        (names, untied)
    }

    /// Whether `weight` is one tensor of the file that nothing else uses, or a stack of such, so that
    /// it can be replaced.
    pub fn can_replace(&self, weight: Weight) -> bool {
        self.tensors[weight.0 as usize].is_some() || self.stacks[weight.0 as usize]
    }
}

/// What takes the place of a tensor.
#[derive(Debug, Clone, Copy)]
struct Replaced {
    weight: Weight,
    /// Which matrix of the weight, if that is a stack.
    matrix: Option<usize>,
    format: Format,
}

/// Weights that come whole and are written matrix by matrix: each is kept until its last one.
#[derive(Default)]
struct Stacks(BTreeMap<Weight, (Tensor, usize)>);

impl Stacks {
    /// What replaces a tensor.
    fn tensor(
        &mut self,
        replaced: &Replaced,
        replacement: &mut dyn Replacement,
    ) -> Result<Tensor, ReplacementError> {
        let Replaced { weight, matrix, format } = *replaced;
        let mut make = || {
            let tensor = replacement.tensor(weight)?;
            let found = tensor.format;
            match found == format {
                true => Ok(tensor),
                false => Err(format!("{found} {:?} instead of {format}", tensor.shape).into()),
            }
        };
        let Some(matrix) = matrix else { return make() };
        let (stack, written) = match self.0.entry(weight) {
            std::collections::btree_map::Entry::Occupied(entry) => entry.into_mut(),
            std::collections::btree_map::Entry::Vacant(entry) => entry.insert((make()?, 0)),
        };
        let (matrices, rows) = (stack.shape[0], stack.shape[1]);
        let part = stack.slice_rows(matrix * rows..(matrix + 1) * rows)?;
        *written += 1;
        if *written == matrices {
            self.0.remove(&weight);
        }
        Ok(part)
    }
}

/// What becomes of one tensor of the model's files.
enum Part {
    /// It stays, or is replaced by floats.
    Float(Format),
    /// It becomes words and scales.
    Packed(ScaledFormat),
}

/// Writes `model` to `directory` with the weights of `replacement` in place of its own: matrices
/// packed, vectors as floats. All packed weights are of one format; if there are none, matrices
/// are written as the floats that they are given as ("dense").
///
/// # Errors
/// If a replaced weight is no tensor of its own in the model's files, a format is none that
/// `pack-quantized` has, or a file fails.
pub fn to_packed(
    layout: &PackedLayout<'_>,
    directory: &Path,
    replacement: &mut dyn Replacement,
) -> Result<(), ExportError> {
    let model = layout.model;
    let program = lower(&model.spec, &LowerOptions::new(model.spec.context_max))?;
    std::fs::create_dir_all(directory).map_err(io(directory))?;
    let (names, untied) = layout.names(replacement);
    let mut plan = Plan::new(layout, &program, &names, replacement)?;
    if model.spec.tied_head {
        // A module of its own to other readers, be its weight the embedding's or not.
        plan.ignored.retain(|name| !name.ends_with("embed_tokens"));
        plan.ignored.push(module_of(HEAD));
    }
    plan.ignored.sort_unstable();
    plan.ignored.dedup();
    write_tensors(layout, directory, &plan.replaced, replacement)?;
    let path = model.checkpoint.path().join("config.json");
    let mut config = read_json(&path).map_err(io(&path))?.unwrap_or_else(|| json!({}));
    if let Some(config) = config.as_object_mut() {
        let mut quantization = quantization_config(plan.format.as_ref(), &plan.ignored);
        inputs::declare(&mut quantization, &model.spec.inputs, &program, &plan.sources)?;
        // Floats whose inputs are floats too are no quantized model to anybody.
        if plan.format.is_some() || !model.spec.inputs.is_empty() {
            config.insert("quantization_config".to_owned(), quantization);
        }
        if untied {
            config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        }
    }
    write_json(directory, "config.json", &config)?;
    copy_texts(&model.checkpoint.path(), directory)
}

/// What becomes of a model's tensors.
struct Plan<'a> {
    /// By name in the files.
    replaced: BTreeMap<&'a str, Replaced>,
    /// Modules whose weights and inputs stay floats.
    ignored: Vec<String>,
    /// Of the packed matrices; `None` if there are none.
    format: Option<ScaledFormat>,
    /// By weight that is quantized, or whose input is: its tensors.
    sources: BTreeMap<usize, Vec<String>>,
}

impl<'a> Plan<'a> {
    /// `names` are those under which weights are written.
    fn new(
        layout: &'a PackedLayout<'_>,
        program: &Program,
        names: &[Option<&'a str>],
        replacement: &dyn Replacement,
    ) -> Result<Self, ExportError> {
        let model = layout.model;
        let (mut replaced, mut sources) = (BTreeMap::new(), BTreeMap::new());
        let (mut ignored, mut packed_format) = (Vec::new(), None);
        for (index, tensor) in names.iter().enumerate() {
            let weight = Weight(index as u32);
            let decl = program.weight(weight);
            let format = replacement.format(weight);
            // A matrix that is no tensor of codes, and whose input stays what it is.
            let plain = !matches!(format, Some(Format::Scaled(_)))
                && !model.spec.inputs.contains_key(&decl.name);
            if plain && !matches!(decl.role, WeightRole::Vector | WeightRole::Embedding) {
                ignored.extend(layout.sources[index].iter().map(|name| module_of(name)));
            }
            let Some(format) = format else { continue };
            let refuse = |feature: String| ExportError::Feature { feature, target: TARGET };
            let names: Vec<&str> = match tensor {
                Some(name) => vec![*name],
                None if layout.stacks[index] => {
                    layout.sources[index].iter().map(String::as_str).collect()
                }
                None => {
                    let what =
                        format!("weight {}, which is no tensor of its own in the file,", decl.name);
                    return Err(refuse(what));
                }
            };
            if !plain {
                sources.insert(index, names.iter().map(|name| (*name).to_owned()).collect());
            }
            if let Format::Scaled(scaled) = format {
                let one = *packed_format.get_or_insert(scaled);
                if one != scaled || !can_pack(&scaled) {
                    return Err(refuse(format!("weight {} in {format}", decl.name)));
                }
            }
            for (part, name) in names.into_iter().enumerate() {
                let matrix = layout.stacks[index].then_some(part);
                replaced.insert(name, Replaced { weight, matrix, format });
            }
        }
        Ok(Plan { replaced, ignored, format: packed_format, sources })
    }
}

/// The module that owns a tensor, as `ignore` lists name it.
pub(super) fn module_of(tensor: &str) -> String {
    tensor.strip_suffix(".weight").unwrap_or(tensor).to_owned()
}

fn write_tensors(
    layout: &PackedLayout<'_>,
    directory: &Path,
    replaced: &BTreeMap<&str, Replaced>,
    replacement: &mut dyn Replacement,
) -> Result<(), ExportError> {
    let checkpoint = &layout.model.checkpoint;
    let mut declarations = Vec::new();
    let mut parts = Vec::new();
    let mut names = checkpoint.whole_names();
    // A head that was the embedding until now has that one's shape.
    let untied = replaced.contains_key(HEAD) && !names.iter().any(|name| name == HEAD);
    let embedding = layout.tied.as_ref().filter(|_| untied).map(|(_, _, name)| name.clone());
    names.extend(embedding.is_some().then(|| HEAD.to_owned()));
    for name in names {
        let stored = embedding.as_ref().filter(|_| name == HEAD).unwrap_or(&name);
        let tensor = checkpoint.tensor(stored)?;
        let own = Format::Float(float_of(tensor.format));
        let part = match replaced.get(name.as_str()).map(|it| it.format) {
            Some(Format::Scaled(format)) => Part::Packed(format),
            Some(format) => Part::Float(format),
            None => Part::Float(own),
        };
        declare(&name, &tensor.shape, &part, &mut declarations);
        parts.push((name, part));
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create_sharded(directory, &declarations, &metadata, SHARD_BYTES_MAX)?;
    let mut stacks = Stacks::default();
    for (name, part) in &parts {
        let tensor = match replaced.get(name.as_str()) {
            None => checkpoint.tensor(name)?,
            Some(replaced) => {
                let at = |source| ExportError::Replacement { name: name.clone(), source };
                stacks.tensor(replaced, replacement).map_err(at)?
            }
        };
        match part {
            Part::Float(format) => writer.write(name, &bytes_in(&tensor, *format))?,
            Part::Packed(_) => write_packed(&mut writer, name, &tensor)?,
        }
    }
    writer.finish()?;
    Ok(())
}

fn declare(name: &str, shape: &[usize], part: &Part, declarations: &mut Vec<TensorDeclaration>) {
    let mut add = |suffix: &str, dtype: Dtype, shape: Vec<usize>| {
        declarations.push(TensorDeclaration { name: format!("{name}{suffix}"), dtype, shape });
    };
    match part {
        Part::Float(format) => {
            let float = float_of(*format);
            add("", Dtype::from(float), shape.to_vec());
        }
        Part::Packed(format) => {
            let (rows, columns, bits) = (shape[0], shape[1], format.element.bits());
            let groups = match format.block {
                Block::Group(size) => columns.div_ceil(size as usize),
                _ => 1,
            };
            let scale = match format.scale {
                ScaleType::F32 => Dtype::F32,
                ScaleType::F16 => Dtype::F16,
                _ => Dtype::BF16,
            };
            add("_packed", Dtype::I32, vec![rows, words(columns, bits)]);
            add("_scale", scale, vec![rows, groups]);
            add("_shape", Dtype::I64, vec![2]);
            if format.zero == ZeroPoint::Int {
                add("_zero_point", Dtype::I32, vec![words(rows, bits), groups]);
            }
        }
    }
}

fn write_packed(writer: &mut Writer, name: &str, tensor: &Tensor) -> Result<(), ExportError> {
    let at = |source| ExportError::Tensor { name: name.to_owned(), source };
    let planes = pack(tensor).map_err(at)?;
    writer.write(&format!("{name}_packed"), &planes.codes)?;
    writer.write(&format!("{name}_scale"), &planes.scales)?;
    let shape: Vec<u8> =
        tensor.shape.iter().flat_map(|size| (*size as i64).to_le_bytes()).collect();
    writer.write(&format!("{name}_shape"), &shape)?;
    if !planes.zeros.is_empty() {
        writer.write(&format!("{name}_zero_point"), &planes.zeros)?;
    }
    Ok(())
}

/// The object that compressed-tensors reads; it refuses keys that it does not know.
fn quantization_config(format: Option<&ScaledFormat>, ignored: &[String]) -> Value {
    let weights = format.map(|format| {
        let (strategy, group_size) = match format.block {
            Block::Group(size) => ("group", json!(size)),
            _ => ("channel", Value::Null),
        };
        json!({
            "num_bits": format.element.bits(),
            "type": "int",
            "symmetric": format.zero == ZeroPoint::None,
            "strategy": strategy,
            "group_size": group_size,
            "dynamic": false,
        })
    });
    json!({
        "quant_method": "compressed-tensors",
        "format": if weights.is_some() { "pack-quantized" } else { "dense" },
        "quantization_status": "compressed",
        "global_compression_ratio": null,
        "kv_cache_scheme": null,
        "ignore": ignored,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": null,
                "output_activations": null,
            }
        }
    })
}

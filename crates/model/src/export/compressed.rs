//! A Hugging Face directory whose matrices are quantized: compressed-tensors, with a format for
//! each weight, or gpt-oss's blocks where all experts of a layer are one tensor.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lathe_program::{Program, StaticScale, Weight, WeightRole};
use lathe_tensor::safetensors::{Dtype, TensorDeclaration, Writer};
use lathe_tensor::{Block, Format, ScaledFormat, Tensor};
use serde_json::{Value, json};

use super::encode::{
    Integers, Part, TARGET, declare, encoding_of, interleave, join, module_of, write,
};
use super::hugging_face::{copy_texts, write_json};
use super::inputs::InputRounding;
use super::quantization_config::{Groups, compressed_tensors, mxfp4_experts};
use super::readers::{Contents, Folder};
use super::{ExportError, Replacement, ReplacementError, bytes_in, float_of, inputs, io};
use crate::checkpoint::{Checkpoint, Quantization};
use crate::generation::read_json;
use crate::lower::{LowerOptions, lower};
use crate::model::Model;
use crate::weights::{Interleaved, ModelWeights};

/// Bytes of a file's tensors at most.
const SHARD_BYTES_MAX: u64 = 5_000_000_000;

/// Where the weights of a program lie in a Hugging Face checkpoint, as far as they can be replaced.
#[derive(Debug)]
pub struct PackedLayout<'a> {
    model: &'a Model,
    /// By weight: the one tensor that it is, whole.
    tensors: Vec<Option<String>>,
    /// By weight: all that it is made of.
    sources: Vec<Vec<String>>,
    /// By weight: whether it is a stack whose matrices are a whole tensor each.
    stacks: Vec<bool>,
    /// By weight: its place among the rows of gpt-oss's blocks.
    blocks: Vec<Option<Interleaved>>,
    /// Tensors whose rows are divided among matrices, as a fused projection's are.
    joined: BTreeMap<String, Vec<Rows>>,
    /// Embedding and head of a model that ties them, and the one tensor that both are.
    tied: Option<(Weight, Weight, String)>,
    integers: Integers,
}

/// A matrix whose rows lie among those of a larger tensor.
#[derive(Debug)]
struct Rows {
    weight: Weight,
    /// For each of its rows the row of the tensor.
    rows: Vec<usize>,
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
        if !matches!(quantization, Quantization::None) {
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
            let alone =
                users[name.as_str()] == 1 && weights.in_blocks(Weight(index as u32)).is_none();
            (alone && same).then(|| name.clone())
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
        let blocks = all.clone().map(|index| weights.in_blocks(Weight(index as u32))).collect();
        let tensors = all.map(whole).collect();
        let (sources, integers) = (sources.collect(), Integers::default());
        let joined = joined(weights, &users);
        Ok(PackedLayout { model, tensors, sources, stacks, blocks, joined, tied, integers })
    }

    /// The same, with integers of eight bits as `integers` says.
    pub fn with_integers(self, integers: Integers) -> Self {
        PackedLayout { integers, ..self }
    }

    /// The tensor of the file that `weight` is, whole.
    pub(super) fn tensor_of(&self, weight: Weight) -> Option<&str> {
        self.tensors[weight.0 as usize].as_deref()
    }

    /// The modules of all weights of the file.
    pub(super) fn modules(&self) -> BTreeSet<String> {
        let names = self.model.checkpoint.whole_names();
        names.iter().filter_map(|name| name.strip_suffix(".weight")).map(str::to_owned).collect()
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

    /// Whether `weight` can be replaced by a tensor in `format`.
    ///
    /// # Errors
    /// [`ExportError::Feature`], which says why not: it is a part of a larger tensor of the file,
    /// or its layout has no such format.
    pub fn check(
        &self,
        program: &Program,
        weight: Weight,
        format: Format,
    ) -> Result<(), ExportError> {
        let (index, name) = (weight.0 as usize, &program.weight(weight).name);
        let refuse = |what: String| {
            Err(ExportError::Feature { feature: format!("weight {name} {what}"), target: TARGET })
        };
        let Format::Scaled(scaled) = format else { return Ok(()) };
        if self.blocks[index].is_some() {
            return match scaled == ScaledFormat::MXFP4 {
                true => Ok(()),
                false => {
                    refuse(format!("in {format}, in one tensor with other experts: only mxfp4"))
                }
            };
        }
        let matrix = self.tensors[index].is_some() && program.weight(weight).shape.len() == 2;
        let module = self.sources[index].iter().all(|name| name.ends_with(".weight"));
        let joined = self.joined_with(weight);
        if !(matrix || self.stacks[index] || joined.is_some()) || !module {
            return refuse("as a part of a larger tensor of the file".to_owned());
        }
        if joined.is_some_and(|parts| !can_join(parts, scaled.block)) {
            return refuse(format!(
                "in {format}, whose scales reach over other rows of its tensor"
            ));
        }
        self.part(name, format).map(drop)
    }

    /// Whether `weight` lies among gpt-oss's blocks when it is quantized.
    pub fn is_in_blocks(&self, weight: Weight) -> bool {
        self.blocks[weight.0 as usize].is_some()
    }

    /// The matrices that divide a tensor among them, `weight` one of them.
    fn joined_with(&self, weight: Weight) -> Option<&[Rows]> {
        let [name] = self.sources[weight.0 as usize].as_slice() else { return None };
        self.joined.get(name).map(Vec::as_slice)
    }

    /// What the folder will be, as far as readers differ in it, if `replacement` has its way.
    ///
    /// # Errors
    /// As [`to_packed`].
    pub fn contents(
        &self,
        program: &Program,
        replacement: &dyn Replacement,
    ) -> Result<Contents, ExportError> {
        let plan = Plan::new(self, program, replacement)?;
        if !plan.blocks.is_empty() {
            return Ok(Contents::ExpertBlocks);
        }
        let inputs = plan.inputs;
        let part_of = |weight: Weight| {
            let quantized = plan.quantized.contains_key(&(weight.0 as usize));
            let format = replacement.format(weight).filter(|_| quantized)?;
            self.part(&program.weight(weight).name, format).ok()
        };
        Ok(Contents::Folder(Folder::of(program, inputs, part_of)))
    }

    /// What weight `name` becomes in `format`.
    fn part(&self, name: &str, format: Format) -> Result<Part, ExportError> {
        let Format::Scaled(scaled) = format else { return Ok(Part::Float(format)) };
        match encoding_of(&scaled, self.integers) {
            Some(encoding) => Ok(Part::Coded(scaled, encoding)),
            None => {
                let feature = format!("weight {name} in {format}");
                Err(ExportError::Feature { feature, target: TARGET })
            }
        }
    }
}

/// The tensors whose rows are divided among matrices without a rest, each with its matrices in the
/// order of their first rows. `users` says how many weights a tensor is in.
fn joined(
    weights: &ModelWeights<'_>,
    users: &BTreeMap<&str, usize>,
) -> BTreeMap<String, Vec<Rows>> {
    let mut found: BTreeMap<String, Vec<Rows>> = BTreeMap::new();
    for index in 0..weights.program().weights.len() {
        let weight = Weight(index as u32);
        let ([name], Some(rows)) = (weights.tensors_of(weight), weights.rows_in(weight)) else {
            continue;
        };
        found.entry(name.clone()).or_default().push(Rows { weight, rows });
    }
    found.retain(|name, parts| {
        parts.sort_unstable_by_key(|part| part.rows.first().copied());
        let mut rows: Vec<usize> = parts.iter().flat_map(|part| &part.rows).copied().collect();
        rows.sort_unstable();
        users[name.as_str()] == parts.len() && rows.iter().copied().eq(0..rows.len())
    });
    found
}

/// Whether matrices that are quantized one by one, in blocks of `block`, can be put together to one
/// tensor: no scale is for rows of two of them.
fn can_join(parts: &[Rows], block: Block) -> bool {
    match block {
        Block::Group(_) | Block::Channel => true,
        Block::Tensor => false,
        Block::Tile(rows, _) => {
            let in_order = parts.iter().flat_map(|part| &part.rows).copied();
            let starts = parts.iter().filter_map(|part| part.rows.first());
            in_order.eq(0..parts.iter().map(|part| part.rows.len()).sum())
                && starts.into_iter().all(|start| start.is_multiple_of(rows as usize))
        }
    }
}

/// What takes the place of a tensor.
#[derive(Debug, Clone, Copy)]
struct Replaced {
    weight: Weight,
    /// Which matrix of the weight, if that is a stack.
    matrix: Option<usize>,
    part: Part,
}

/// A weight in the format that was promised.
fn made(
    replacement: &mut dyn Replacement,
    weight: Weight,
    format: Format,
) -> Result<Tensor, ReplacementError> {
    let tensor = replacement.tensor(weight)?;
    let found = tensor.format;
    match found == format {
        true => Ok(tensor),
        false => Err(format!("{found} {:?} instead of {format}", tensor.shape).into()),
    }
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
        let Replaced { weight, matrix, part } = *replaced;
        let mut make = || made(replacement, weight, part.format());
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

/// What is to be written.
#[derive(Default)]
struct Plan<'a> {
    /// By tensor of the file.
    replaced: BTreeMap<&'a str, Replaced>,
    /// Stacks of experts that share a tensor of the file, in the order of their rows.
    blocks: BTreeMap<&'a str, Vec<Weight>>,
    /// Tensors that are put together of the rows of several matrices.
    joined: BTreeMap<&'a str, Part>,
    /// Modules by their formats.
    groups: Groups,
    /// Modules of matrices that stay floats.
    ignored: Vec<String>,
    /// The tensors of each quantized matrix, by weight.
    quantized: BTreeMap<usize, Vec<String>>,
    /// Whether embedding and head become two tensors.
    untied: bool,
    /// How inputs of quantized matrices are rounded.
    inputs: Option<InputRounding>,
}

impl<'a> Plan<'a> {
    fn new(
        layout: &'a PackedLayout<'_>,
        program: &Program,
        replacement: &dyn Replacement,
    ) -> Result<Self, ExportError> {
        let (names, untied) = layout.names(replacement);
        let mut plan = Plan { untied, ..Plan::default() };
        for (index, tensor) in names.iter().enumerate() {
            let weight = Weight(index as u32);
            let decl = program.weight(weight);
            let sources = layout.sources[index].iter().map(String::as_str);
            let format = replacement.format(weight);
            let plain = !matches!(format, Some(Format::Scaled(_)));
            if plain && !matches!(decl.role, WeightRole::Vector | WeightRole::Embedding) {
                plan.ignored.extend(sources.clone().map(module_of));
            }
            let Some(format) = format else { continue };
            let own = tensor.is_some() && layout.tensors[index].is_none();
            if !own {
                layout.check(program, weight, format)?;
            }
            if let (Some(place), Format::Scaled(_)) = (layout.blocks[index], format) {
                let parts = plan.blocks.entry(&layout.sources[index][0]).or_default();
                parts.resize(place.step, weight);
                parts[place.first] = weight;
                continue;
            }
            if let Some(parts) = layout.joined_with(weight) {
                plan.join(layout, program, replacement, parts)?;
                continue;
            }
            let names: Vec<&str> = match tensor {
                Some(name) => vec![*name],
                None if layout.stacks[index] => sources.collect(),
                None => {
                    let feature =
                        format!("weight {}, which is no tensor of its own in the file,", decl.name);
                    return Err(ExportError::Feature { feature, target: TARGET });
                }
            };
            let part = layout.part(&decl.name, format)?;
            if let Part::Coded(scaled, encoding) = part {
                let modules = plan.groups.entry((scaled, encoding)).or_default();
                modules.names.extend(names.iter().map(|name| module_of(name)));
                modules.experts |= decl.role == WeightRole::Experts;
                plan.quantized.insert(index, layout.sources[index].clone());
            }
            for (matrix, name) in names.into_iter().enumerate() {
                let matrix = layout.stacks[index].then_some(matrix);
                plan.replaced.insert(name, Replaced { weight, matrix, part });
            }
        }
        plan.check(program)?;
        let (inputs, stored) = (&layout.model.spec.inputs, replacement.stores_input_scales());
        if plan.blocks.is_empty() {
            plan.inputs = inputs::format_of_all(inputs, program, &plan.quantized, stored)?;
        }
        Ok(plan)
    }

    /// Plans the tensor that `parts` divide among them. All of them are quantized alike, or none
    /// is: floats stay beside floats.
    fn join(
        &mut self,
        layout: &'a PackedLayout<'_>,
        program: &Program,
        replacement: &dyn Replacement,
        parts: &[Rows],
    ) -> Result<(), ExportError> {
        let first = parts[0].weight;
        let spelled = |weight: Weight| {
            let format = replacement.format(weight);
            let format = format.map_or("its own floats".to_owned(), |format| format.to_string());
            format!("weight {} in {format}", program.weight(weight).name)
        };
        let formats = parts.iter().map(|part| (part.weight, replacement.format(part.weight)));
        let given = formats.clone().find_map(|(weight, format)| Some((weight, format?)));
        let Some((one, format)) = given else { return Ok(()) };
        let alike = |found: Option<Format>| {
            found == Some(format) || (found.is_none() && matches!(format, Format::Float(_)))
        };
        if let Some((other, _)) = formats.into_iter().find(|(_, found)| !alike(*found)) {
            return refuse_pair(&spelled(one), &spelled(other));
        }
        let sources = &layout.sources[first.0 as usize];
        let part = layout.part(&program.weight(first).name, format)?;
        if self.joined.insert(&sources[0], part).is_some() {
            return Ok(());
        }
        if let Part::Coded(scaled, encoding) = part {
            let modules = self.groups.entry((scaled, encoding)).or_default();
            modules.names.push(module_of(&sources[0]));
            for part in parts {
                self.quantized.insert(part.weight.0 as usize, sources.clone());
            }
        }
        Ok(())
    }

    fn check(&self, program: &Program) -> Result<(), ExportError> {
        let refuse = |feature: String| Err(ExportError::Feature { feature, target: TARGET });
        match (self.groups.is_empty(), self.blocks.is_empty()) {
            (true, true) => return refuse("a model without a quantized matrix".to_owned()),
            (false, false) => {
                let what = "a model with experts in gpt-oss's blocks and other quantized matrices";
                return refuse(what.to_owned());
            }
            _ => {}
        }
        for parts in self.blocks.values() {
            // A part that is not replaced has another one's number.
            let mut all = parts.clone();
            all.sort_unstable();
            all.dedup();
            if all.len() < parts.len() {
                let name = &program.weight(parts[0]).name;
                return refuse(format!("weight {name} without those of the same tensor"));
            }
        }
        Ok(())
    }

    /// The tensor that holds the scale of the inputs of tensor `name`, and the scale, if such
    /// scales are stored and the tensor is quantized.
    fn input_scale(
        &self,
        layout: &PackedLayout<'_>,
        name: &str,
        replacement: &dyn Replacement,
    ) -> Result<Option<(String, StaticScale)>, ExportError> {
        let Some(inputs) = self.inputs.filter(|inputs| inputs.stored) else { return Ok(None) };
        let joined = layout.joined.get(name).filter(|_| self.joined.contains_key(name));
        let weight = match (self.replaced.get(name), joined) {
            (Some(Replaced { weight, part: Part::Coded(..), .. }), _) => *weight,
            (_, Some(parts)) => parts[0].weight,
            _ => return Ok(None),
        };
        match replacement.input_scale(weight) {
            Some(scale) => Ok(Some((inputs.scale_name(&module_of(name)), scale))),
            None => Err(ExportError::Feature {
                feature: format!("tensor {name} without a scale of its inputs"),
                target: TARGET,
            }),
        }
    }

    /// What becomes of tensor `name` of `format` in the model's own files.
    fn part(&self, name: &str, format: Format) -> Part {
        match (self.replaced.get(name), self.joined.get(name)) {
            _ if self.blocks.contains_key(name) => Part::Blocks,
            (Some(Replaced { part, .. }), _) | (None, Some(part)) => *part,
            (None, None) => Part::Float(Format::Float(float_of(format))),
        }
    }
}

/// Rows of a tensor of floats, in `format`.
fn floats_of(stored: &Tensor, rows: &[usize], format: Format) -> Result<Tensor, ReplacementError> {
    let part = stored.gather_rows(rows)?;
    Ok(Tensor::new(part.shape.clone(), format, bytes_in(&part, format))?)
}

/// Two matrices that are one tensor of the file cannot be in formats of their own.
fn refuse_pair(one: &str, other: &str) -> Result<(), ExportError> {
    let feature = format!("{one} and {other}, which are one tensor of the file,");
    Err(ExportError::Feature { feature, target: TARGET })
}

/// Writes `model` to `directory` with the weights of `replacement` in place of its own: matrices
/// quantized, each in its own format, vectors as floats.
///
/// # Errors
/// If a replaced weight is no tensor of its own in the model's files, the folder cannot hold a
/// format, or a file fails.
pub fn to_packed(
    layout: &PackedLayout<'_>,
    directory: &Path,
    replacement: &mut dyn Replacement,
) -> Result<(), ExportError> {
    let model = layout.model;
    let program = lower(&model.spec, &LowerOptions::new(model.spec.context_max))?;
    std::fs::create_dir_all(directory).map_err(io(directory))?;
    let mut plan = Plan::new(layout, &program, replacement)?;
    write_tensors(layout, directory, &plan, replacement)?;
    let mut ignored = std::mem::take(&mut plan.ignored);
    if plan.untied {
        ignored.push(module_of(HEAD));
    }
    if model.spec.tied_head && !plan.untied {
        // A module of its own to other readers, although its weight is the embedding's.
        ignored.retain(|name| !name.ends_with("embed_tokens"));
        ignored.push("lm_head".to_owned());
    }
    ignored.sort_unstable();
    ignored.dedup();
    let path = model.checkpoint.path().join("config.json");
    let mut config = read_json(&path).map_err(io(&path))?.unwrap_or_else(|| json!({}));
    if let Some(config) = config.as_object_mut() {
        let quantization = match plan.blocks.is_empty() {
            true => {
                let (inputs, matrices) = (&model.spec.inputs, &plan.quantized);
                let mut config = compressed_tensors(&plan.groups, &ignored, plan.inputs);
                if let Some(transforms) = inputs::transforms(inputs, &program, matrices) {
                    config["transform_config"] = transforms;
                }
                config
            }
            false if model.spec.inputs.is_empty() => mxfp4_experts(),
            false => {
                let feature =
                    "what is done to inputs, beside experts in gpt-oss's blocks".to_owned();
                return Err(ExportError::Feature { feature, target: TARGET });
            }
        };
        config.insert("quantization_config".to_owned(), quantization);
        if plan.untied {
            config.insert("tie_word_embeddings".to_owned(), Value::Bool(false));
        }
    }
    write_json(directory, "config.json", &config)?;
    copy_texts(&model.checkpoint.path(), directory)
}

fn write_tensors(
    layout: &PackedLayout<'_>,
    directory: &Path,
    plan: &Plan<'_>,
    replacement: &mut dyn Replacement,
) -> Result<(), ExportError> {
    let checkpoint = &layout.model.checkpoint;
    let mut declarations = Vec::new();
    let mut parts = Vec::new();
    let mut names = checkpoint.whole_names();
    // A head that was the embedding until now has that one's shape.
    let untied = plan.replaced.contains_key(HEAD) && !names.iter().any(|name| name == HEAD);
    let embedding = layout.tied.as_ref().filter(|_| untied).map(|(_, _, name)| name.clone());
    names.extend(embedding.is_some().then(|| HEAD.to_owned()));
    for name in names {
        let stored = embedding.as_ref().filter(|_| name == HEAD).unwrap_or(&name);
        let tensor = checkpoint.tensor(stored)?;
        let part = plan.part(&name, tensor.format);
        let mut shape = tensor.shape;
        if matches!(part, Part::Blocks) {
            // They lie transposed.
            shape.swap(1, 2);
        }
        declare(&name, &shape, &part, &mut declarations);
        if let Some((name, _)) = plan.input_scale(layout, &name, replacement)? {
            declarations.push(TensorDeclaration { name, dtype: Dtype::F32, shape: vec![1] });
        }
        parts.push((name, part));
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let mut writer = Writer::create_sharded(directory, &declarations, &metadata, SHARD_BYTES_MAX)?;
    let mut stacks = Stacks::default();
    for (name, part) in &parts {
        let at = |source| ExportError::Replacement { name: name.clone(), source };
        let joined = plan.joined.get(name.as_str()).map(|part| part.format());
        let tensor = match (plan.replaced.get(name.as_str()), plan.blocks.get(name.as_str())) {
            (None, None) => match joined {
                Some(format) => {
                    let parts = &layout.joined[name.as_str()];
                    let stored = checkpoint.tensor(name)?;
                    let make = |part: &Rows| match replacement.format(part.weight) {
                        Some(_) => made(replacement, part.weight, format),
                        None => floats_of(&stored, &part.rows, format),
                    };
                    let list = parts.iter().map(make).collect::<Result<Vec<_>, _>>();
                    let rows = parts.iter().flat_map(|part| &part.rows).copied();
                    join(name, &list.map_err(at)?, rows)?
                }
                None => checkpoint.tensor(name)?,
            },
            (_, Some(weights)) => {
                let format = Format::Scaled(ScaledFormat::MXFP4);
                let make = |weight: &Weight| made(replacement, *weight, format);
                let list = weights.iter().map(make).collect::<Result<Vec<_>, _>>().map_err(at)?;
                interleave(&list)?
            }
            (Some(replaced), None) => stacks.tensor(replaced, replacement).map_err(at)?,
        };
        write(&mut writer, name, part, &tensor)?;
        if let Some((name, scale)) = plan.input_scale(layout, name, replacement)? {
            writer.write(&name, &scale.value().to_le_bytes())?;
        }
    }
    writer.finish()?;
    Ok(())
}

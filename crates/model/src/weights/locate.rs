//! Finding a weight's tensors by the rules of its family, and checking their shapes.

use lathe_program::{Program, Weight, WeightRole};
use lathe_tensor::Tensor;

use super::WeightsError;
use super::layout::{self, Arrangement};
use crate::checkpoint::Checkpoint;
use crate::names::{Rules, TensorSource, sources_of};
use crate::spec::{AttentionSpec, DecoderSpec};

/// Where one weight is: the tensors to read and what to do with them.
#[derive(Debug)]
pub(super) struct Located {
    /// One, or one an expert.
    pub tensors: Vec<String>,
    layout: Arrangement,
    /// Whether the same weight could lie in `*_blocks` and `*_scales` beside (gpt-oss).
    blocks: bool,
}

/// Where the rows of a stack of matrices lie among those of a larger one: row `i` at
/// `first + i * step`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interleaved {
    /// The place of the first row.
    pub first: usize,
    /// Matrices that take turns.
    pub step: usize,
}

impl Located {
    /// The place of the weight's rows in `*_blocks`, if it could lie there.
    pub(super) fn in_blocks(&self) -> Option<Interleaved> {
        match self.layout {
            Arrangement::Transposed { first, step, .. } if self.blocks => {
                Some(Interleaved { first, step })
            }
            _ => None,
        }
    }

    /// Which rows of its tensor the `rows` rows of the matrix are, if it is a choice of them.
    pub(super) fn rows(&self, rows: usize) -> Option<Vec<usize>> {
        let Arrangement::Rows { vector: false, period, start, run, step } = self.layout else {
            return None;
        };
        let row = |index: usize| index / run * period + start + index % run * step;
        Some((0..rows).map(row).collect())
    }

    /// The weight, in `shape`.
    pub(super) fn load(
        &self,
        checkpoint: &Checkpoint,
        shape: &[usize],
    ) -> Result<Tensor, WeightsError> {
        let parts = self.tensors.iter().map(|name| checkpoint.tensor(name));
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        layout::arrange(&self.layout, parts, shape)
            .map_err(|source| WeightsError::Tensor { tensor: self.tensors[0].clone(), source })
    }
}

/// Prefixes of the tensors of a decoder; a model that also sees has it under a name of its own.
const ROOTS: [&str; 4] = ["model.", "language_model.model.", "model.language_model.", ""];
/// Names of the head, which does not lie under the prefix.
const HEADS: [&str; 3] = ["lm_head.weight", "language_model.lm_head.weight", "output.weight"];

/// Prefixes of the parts that see or hear.
const OTHER_PARTS: [&str; 6] = [
    "visual.",
    "vision_tower.",
    "vision_model.",
    "multi_modal_projector.",
    "audio_tower.",
    "embed_vision.",
];

/// Tensors of rotary tables within the layers of older GGUF files.
const GGUF_TABLES: [&str; 2] = ["rope_freqs.weight", "attn_rot_embd.weight"];

/// Ends of names of scales with which an engine may round keys and values.
const CACHE_SCALES: [&str; 7] = [
    ".k_scale",
    ".v_scale",
    ".q_scale",
    ".kv_scale",
    ".k_zero_point",
    ".v_zero_point",
    ".output_scale",
];

/// Whether a checkpoint has a head whose numbers are not those of the embedding.
///
/// # Errors
/// If one of the two cannot be read.
pub(crate) fn has_own_head(checkpoint: &Checkpoint, rules: &[Rules]) -> Result<bool, WeightsError> {
    let embedding = ROOTS.iter().find_map(|root| {
        let names = sources_of(rules, "embedding").iter().filter_map(TensorSource::name);
        names.map(|name| format!("{root}{name}")).find(|name| checkpoint.contains(name))
    });
    let head = HEADS.into_iter().find(|name| checkpoint.contains(name));
    let (Some(embedding), Some(head)) = (embedding, head) else { return Ok(false) };
    let (embedding, head) = (checkpoint.tensor(&embedding)?, checkpoint.tensor(head)?);
    let parts = |it: &Tensor| [it.codes.clone(), it.scales.clone(), it.zeros.clone()];
    let same_bits = embedding.format == head.format
        && embedding.global == head.global
        && parts(&embedding).iter().zip(&parts(&head)).all(|(a, b)| a[..] == b[..]);
    let same_numbers = || embedding.to_f32() == head.to_f32();
    Ok(embedding.shape != head.shape || !(same_bits || same_numbers()))
}

/// Ends of names of scales of inputs, which are read with what is done to those.
const INPUT_SCALES: [&str; 2] = [".input_scale", ".input_global_scale"];

fn missing(weight: &str, tried: Vec<String>) -> WeightsError {
    WeightsError::Missing { weight: weight.to_owned(), tried }
}

/// Knows a checkpoint's prefixes and a family's rules.
pub(super) struct Locator<'a> {
    checkpoint: &'a Checkpoint,
    spec: &'a DecoderSpec,
    rules: &'a [Rules],
    program: &'a Program,
    /// Before the names of the model, and between that and a layer's number.
    root: &'static str,
    layer: &'static str,
}

impl<'a> Locator<'a> {
    pub(super) fn new(
        checkpoint: &'a Checkpoint,
        spec: &'a DecoderSpec,
        rules: &'a [Rules],
        program: &'a Program,
    ) -> Self {
        let (root, layer) = match checkpoint {
            Checkpoint::Gguf(_) => ("", "blk."),
            Checkpoint::Safetensors { .. } => {
                let has = |root: &&str| {
                    let names = ["embed_tokens.weight", "norm.weight"];
                    names.iter().any(|name| checkpoint.contains(&format!("{root}{name}")))
                };
                (ROOTS.into_iter().find(has).unwrap_or("model."), "layers.")
            }
        };
        Locator { checkpoint, spec, rules, program, root, layer }
    }

    /// Where `weight` is.
    pub(super) fn locate(&self, weight: Weight) -> Result<Located, WeightsError> {
        let decl = self.program.weight(weight);
        if decl.role == WeightRole::Head && !self.spec.tied_head {
            return self.locate_head(&decl.shape);
        }
        let name = match (decl.role, decl.layer) {
            // A tied head is the embedding.
            (WeightRole::Head, _) => "embedding",
            (_, Some(layer)) => {
                decl.name.strip_prefix(&format!("layers.{layer}.")).unwrap_or(&decl.name)
            }
            (_, None) => &decl.name,
        };
        let mut tried = Vec::new();
        let mut misshapen = None;
        for source in sources_of(self.rules, name) {
            let tensors = self.tensors(source, decl.layer, decl.shape[0]);
            if self.checkpoint.contains(&tensors[0]) {
                let layout = match self.layout(source, name, weight, &tensors) {
                    Ok(layout) => layout,
                    // The next source may be the same tensor in another shape.
                    Err(error @ WeightsError::Shape { .. }) => {
                        misshapen.get_or_insert(error);
                        continue;
                    }
                    Err(error) => return Err(error),
                };
                let blocks = source.name().is_some_and(|plain| {
                    let blocks = format!("{plain}_blocks");
                    let all = sources_of(self.rules, name).iter();
                    all.filter_map(TensorSource::name).any(|other| other == blocks)
                });
                return Ok(Located { tensors, layout, blocks });
            }
            tried.push(tensors[0].clone());
        }
        if let Some(error) = misshapen {
            return Err(error);
        }
        if name == "embedding" && self.spec.tied_head {
            // Some files of tied models hold the head alone.
            return self.locate_head(&decl.shape).map_err(|_| missing(&decl.name, tried));
        }
        Err(missing(&decl.name, tried))
    }

    fn locate_head(&self, shape: &[usize]) -> Result<Located, WeightsError> {
        match HEADS.into_iter().find(|name| self.checkpoint.contains(name)) {
            Some(name) => {
                self.check(name, shape)?;
                Ok(Located {
                    tensors: vec![name.to_owned()],
                    layout: Arrangement::Whole,
                    blocks: false,
                })
            }
            None => Err(missing("head", HEADS.map(str::to_owned).into())),
        }
    }

    /// Full names of the tensors of `source`.
    fn tensors(&self, source: &TensorSource, layer: Option<u32>, experts: usize) -> Vec<String> {
        let prefix = match layer {
            Some(layer) => format!("{}{}{layer}.", self.root, self.layer),
            None => self.root.to_owned(),
        };
        match source {
            TensorSource::EachExpert(name) => (0..experts)
                .map(|expert| format!("{prefix}{}", name.replace("{}", &expert.to_string())))
                .collect(),
            other => vec![format!("{prefix}{}", other.name().unwrap_or_default())],
        }
    }

    /// What to do with the tensors of `source` for `weight`, after a check of their shapes.
    fn layout(
        &self,
        source: &TensorSource,
        name: &str,
        weight: Weight,
        tensors: &[String],
    ) -> Result<Arrangement, WeightsError> {
        let tensor = tensors[0].as_str();
        let decl = self.program.weight(weight);
        let shape = decl.shape.as_slice();
        let vector = decl.role == WeightRole::Vector;
        // Rows are the dimension that parts share: the last of a vector, else the last but one.
        let rows_at = if vector { shape.len() - 1 } else { shape.len() - 2 };
        let with_rows = |rows: usize| {
            let mut shape = shape.to_vec();
            shape[rows_at] = rows;
            shape
        };
        let rows = shape[rows_at];
        match source {
            TensorSource::Whole(_) => self.check(tensor, shape).map(|()| Arrangement::Whole),
            TensorSource::EachExpert(_) => {
                tensors.iter().try_for_each(|tensor| self.check(tensor, &shape[1..]))?;
                Ok(Arrangement::Stack)
            }
            TensorSource::Part(_, parts) => {
                let (before, total) = self.rows_of(parts, name, decl.layer);
                self.check(tensor, &with_rows(total))?;
                Ok(Arrangement::Rows { vector, period: total, start: before, run: rows, step: 1 })
            }
            TensorSource::PartOfEachHead(_, parts) => {
                let (before, total) = self.rows_of(parts, name, decl.layer);
                self.check(tensor, &with_rows(total))?;
                let heads = self.heads(decl.layer);
                let (period, start, run) = (total / heads, before / heads, rows / heads);
                Ok(Arrangement::Rows { vector, period, start, run, step: 1 })
            }
            TensorSource::Alternate(_, parts) => {
                self.check(tensor, &with_rows(rows * parts.len()))?;
                let start = parts.iter().position(|part| *part == name).unwrap_or(0);
                let (period, step) = (rows * parts.len(), parts.len());
                Ok(Arrangement::Rows { vector, period, start, run: rows, step })
            }
            TensorSource::Transposed(_) => {
                self.check(tensor, &[shape[0], shape[2], shape[1]])?;
                Ok(Arrangement::Transposed { columns: shape[1], first: 0, step: 1 })
            }
            TensorSource::AlternateTransposed(_, parts) => {
                self.check(tensor, &[shape[0], shape[2], shape[1] * parts.len()])?;
                let first = parts.iter().position(|part| *part == name).unwrap_or(0);
                let (columns, step) = (shape[1] * parts.len(), parts.len());
                Ok(Arrangement::Transposed { columns, first, step })
            }
            TensorSource::PartTransposed(_, parts) => {
                let (first, total) = self.rows_of(parts, name, decl.layer);
                self.check(tensor, &[shape[0], shape[2], total])?;
                Ok(Arrangement::Transposed { columns: total, first, step: 1 })
            }
            TensorSource::Unpermuted(_) => {
                self.check(tensor, shape)?;
                Ok(Arrangement::Unpermuted { vector, head: self.head_dim(decl.layer) })
            }
            TensorSource::TransposedHeads(_) => {
                let heads = self.heads(decl.layer);
                self.check(tensor, &[heads, shape[1], shape[0] / heads])?;
                Ok(Arrangement::TransposedHeads { heads })
            }
        }
    }

    /// Rows of the parts before `name`, and of all.
    fn rows_of(&self, parts: &[&str], name: &str, layer: Option<u32>) -> (usize, usize) {
        let (mut before, mut total) = (0, 0);
        for part in parts {
            let full = layer.map_or((*part).to_owned(), |layer| format!("layers.{layer}.{part}"));
            let rows = self.program.weight_named(&full).map_or(0, |weight| {
                let decl = self.program.weight(weight);
                let back = if decl.role == WeightRole::Vector { 1 } else { 2 };
                decl.shape[decl.shape.len() - back]
            });
            if *part == name {
                before = total;
            }
            total += rows;
        }
        (before, total)
    }

    fn attention(&self, layer: Option<u32>) -> Option<&AttentionSpec> {
        layer.map(|layer| &self.spec.layers[layer as usize].attention)
    }

    fn heads(&self, layer: Option<u32>) -> usize {
        match self.attention(layer) {
            Some(AttentionSpec::Gqa(gqa)) => gqa.heads,
            Some(AttentionSpec::Mla(mla)) => mla.heads,
            None => 1,
        }
    }

    fn head_dim(&self, layer: Option<u32>) -> usize {
        match self.attention(layer) {
            Some(AttentionSpec::Gqa(gqa)) => gqa.head_dim,
            Some(AttentionSpec::Mla(mla)) => mla.rope_dim,
            None => 1,
        }
    }

    /// Refuses a tensor of another shape.
    fn check(&self, name: &str, expected: &[usize]) -> Result<(), WeightsError> {
        let found = self.checkpoint.shape(name)?;
        if layout::same_rows(&found, expected) {
            return Ok(());
        }
        let (tensor, expected) = (name.to_owned(), expected.to_vec());
        Err(WeightsError::Shape { tensor, found, expected })
    }

    /// Whether a tensor is one of the decoder's, and not of a part that sees or hears.
    pub(super) fn is_of_the_decoder(&self, name: &str) -> bool {
        if OTHER_PARTS.iter().any(|part| name.starts_with(part)) {
            return false;
        }
        let has_other_parts = !["", "model."].contains(&self.root);
        let prefixes = [self.root, "lm_head.", "language_model."];
        !has_other_parts || prefixes.iter().any(|prefix| name.starts_with(prefix))
    }

    /// Whether a tensor that nothing uses is known not to matter.
    pub(super) fn ignorable(&self, name: &str) -> bool {
        let layers = format!("{}{}", self.root, self.layer);
        let layer = name.strip_prefix(&layers).and_then(|rest| rest.split_once('.'));
        let predicts =
            layer.and_then(|(number, _)| number.parse::<usize>().ok()).is_some_and(|n| {
                let count = self.spec.layers.len();
                (count..count.saturating_add(self.spec.prediction_layers)).contains(&n)
            });
        // Repeats of what configuration and metadata say.
        let table = name.ends_with("rotary_emb.inv_freq")
            || name.starts_with("rope_f")
            || (matches!(self.checkpoint, Checkpoint::Gguf(_))
                && layer.is_some_and(|(_, rest)| GGUF_TABLES.contains(&rest)));
        let of_a_cache = CACHE_SCALES.iter().any(|ending| name.ends_with(ending));
        let of_inputs = INPUT_SCALES.iter().any(|ending| name.ends_with(ending));
        predicts
            || table
            || of_a_cache
            || of_inputs
            || (self.spec.tied_head && HEADS.contains(&name))
    }
}

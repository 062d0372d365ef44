//! A PEFT adapter folder: two thin matrices beside each of some modules.
//!
//! `y = W x + (lora_alpha / r) B A x`, with `lora_alpha` the rank, so that `B A` is added as it is
//! (LoRA, arXiv 2106.09685; the layout is that of `peft` 0.21, `adapter_config.json` beside
//! `adapter_model.safetensors`).

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use lathe_program::{Program, Weight};
use lathe_tensor::safetensors::{Dtype, TensorDeclaration, Writer};
use lathe_tensor::{Format, Tensor};
use serde_json::{Map, Value, json};

use super::compressed::PackedLayout;
use super::encode::module_of;
use super::hugging_face::write_json;
use super::{ExportError, io};
use crate::adapter::{CONFIG_NAME, DOWN, PREFIX, UP, WEIGHTS_NAME};

const TARGET: &str = "a PEFT adapter";

/// What runs beside one matrix.
#[derive(Debug, Clone, Copy)]
pub struct LowRank<'a> {
    /// The matrix, `[out, in]`.
    pub weight: Weight,
    /// `A`, `[rank, in]` in floats.
    pub a: &'a Tensor,
    /// `B`, `[out, rank]` in floats.
    pub b: &'a Tensor,
}

impl PackedLayout<'_> {
    /// The module that `weight` is the whole weight of, by the name that the file has for it.
    ///
    /// # Errors
    /// [`ExportError::Feature`] if there is none: an adapter runs beside modules.
    pub fn module(&self, program: &Program, weight: Weight) -> Result<String, ExportError> {
        let name = self.tensor_of(weight).filter(|name| name.ends_with(".weight"));
        name.map(module_of).ok_or_else(|| ExportError::Feature {
            feature: format!(
                "weight {}, which is no module of its own in the file,",
                program.weight(weight).name
            ),
            target: TARGET,
        })
    }
}

/// Writes `parts`, which run beside modules of the model that is written with `layout`, to the
/// folder `directory`; `base` is where that model will be.
///
/// # Errors
/// If a matrix is no module of its own, a part is no pair of floats of one rank, or a file fails.
pub fn to_adapter(
    layout: &PackedLayout<'_>,
    program: &Program,
    directory: &Path,
    base: &str,
    parts: &[LowRank<'_>],
) -> Result<(), ExportError> {
    std::fs::create_dir_all(directory).map_err(io(directory))?;
    let mut ranks = BTreeMap::new();
    let (mut declared, mut tensors) = (Vec::new(), Vec::new());
    for part in parts {
        let module = layout.module(program, part.weight)?;
        let rank = rank_of(program, part)?;
        for (kind, tensor) in [(DOWN, part.a), (UP, part.b)] {
            let name = format!("{PREFIX}{module}{kind}");
            let (dtype, shape) = (dtype_of(tensor)?, tensor.shape.clone());
            declared.push(TensorDeclaration { name: name.clone(), dtype, shape });
            tensors.push((name, tensor));
        }
        ranks.insert(module, rank);
    }
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    let path = directory.join(WEIGHTS_NAME);
    let mut writer = Writer::create(&path, &declared, &metadata)?;
    for (name, tensor) in tensors {
        writer.write(&name, &tensor.codes)?;
    }
    writer.finish()?;
    write_json(directory, CONFIG_NAME, &config(&ranks, &layout.modules(), base))
}

fn dtype_of(tensor: &Tensor) -> Result<Dtype, ExportError> {
    match tensor.format {
        Format::Float(float) => Ok(float.into()),
        other => Err(ExportError::Feature { feature: other.to_string(), target: TARGET }),
    }
}

fn rank_of(program: &Program, part: &LowRank<'_>) -> Result<usize, ExportError> {
    let decl = program.weight(part.weight);
    match (&part.a.shape[..], &part.b.shape[..], &decl.shape[..]) {
        ([rank, to], [from, other], [rows, columns])
            if rank == other && to == columns && from == rows =>
        {
            Ok(*rank)
        }
        (a, b, whole) => {
            let feature = format!("{a:?} and {b:?} beside weight {} of {whole:?}", decl.name);
            Err(ExportError::Feature { feature, target: TARGET })
        }
    }
}

/// `adapter_config.json` for modules of these ranks, of a model whose matrices are `all` modules.
fn config(ranks: &BTreeMap<String, usize>, all: &BTreeSet<String>, base: &str) -> Value {
    let largest = ranks.values().copied().max().unwrap_or(0);
    let lower = ranks.iter().filter(|(_, rank)| **rank != largest);
    let lower: Map<String, Value> =
        lower.map(|(module, rank)| (module.clone(), Value::from(*rank))).collect();
    json!({
        "alpha_pattern": lower,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": true,
        "lora_alpha": largest,
        "lora_dropout": 0.0,
        "modules_to_save": null,
        "peft_type": "LORA",
        "r": largest,
        "rank_pattern": lower,
        "target_modules": targets(ranks, all),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": false,
    })
}

/// The shortest list that names modules of `ranks` and none else of `all`: a module is meant by a
/// name that is the end of its path. The last words of paths, where every module that ends so is
/// one of them; whole paths elsewhere.
fn targets(ranks: &BTreeMap<String, usize>, all: &BTreeSet<String>) -> Vec<String> {
    let last = |path: &str| path.rsplit('.').next().unwrap_or(path).to_owned();
    let others: BTreeSet<String> =
        all.iter().filter(|module| !ranks.contains_key(*module)).map(|it| last(it)).collect();
    let short = |module: &String| match last(module) {
        word if others.contains(&word) => module.clone(),
        word => word,
    };
    ranks.keys().map(short).collect::<BTreeSet<String>>().into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_name_no_other_module() {
        let names =
            ["m.0.attn.q", "m.0.attn.k", "m.0.ffn.up", "m.1.attn.q", "m.1.attn.k", "m.1.ffn.up"];
        let all: BTreeSet<String> = names.iter().map(|it| (*it).to_owned()).collect();
        let some = |names: &[(&str, usize)]| -> BTreeMap<String, usize> {
            names.iter().map(|(name, rank)| ((*name).to_owned(), *rank)).collect()
        };
        let ranks = some(&[("m.0.attn.q", 8), ("m.1.attn.q", 4), ("m.1.ffn.up", 8)]);
        assert_eq!(targets(&ranks, &all), ["m.1.ffn.up", "q"]);
        let found = config(&ranks, &all, "somewhere");
        assert_eq!((&found["r"], &found["lora_alpha"]), (&8.into(), &8.into()));
        assert_eq!(found["rank_pattern"], json!({"m.1.attn.q": 4}));
        assert_eq!(found["alpha_pattern"], found["rank_pattern"]);
    }
}

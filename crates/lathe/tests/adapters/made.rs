//! A random adapter for a tiny model, and the model with the same low-rank terms folded into the
//! tensors of its file: what both compute is the same, and only the first knows of adapters.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use lathe_model::Model;
use lathe_model::lower::{LowerOptions, lower};
use lathe_program::Op;
use lathe_program::conformance::Random;
use lathe_tensor::safetensors::{Dtype, SafetensorsFile, TensorDeclaration, Writer};
use lathe_tensor::{Bytes, Format, Tensor, codec};
use serde_json::{Map, Value, json};
use tempfile::TempDir;

/// Tensors of a file to be written.
pub(crate) type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// An adapter on disk, as it is to be written.
#[derive(Clone)]
pub(crate) struct Peft {
    pub config: Value,
    pub tensors: Tensors,
}

impl Peft {
    pub(crate) fn write(&self, folder: &Path) {
        std::fs::create_dir_all(folder).unwrap();
        std::fs::write(folder.join("adapter_config.json"), self.config.to_string()).unwrap();
        write(&folder.join("adapter_model.safetensors"), &self.tensors);
    }
}

pub(crate) struct Made {
    pub peft: Peft,
    /// Tensors of the base that have a pair.
    pub modules: usize,
    folder: TempDir,
}

impl Made {
    pub(crate) fn adapter(&self) -> PathBuf {
        self.folder.path().join("adapter")
    }

    pub(crate) fn folded(&self) -> PathBuf {
        self.folder.path().join("folded")
    }
}

pub(crate) fn write(path: &Path, tensors: &Tensors) {
    let declare = |(name, (dtype, shape, _)): (&String, &(Dtype, Vec<usize>, Vec<u8>))| {
        TensorDeclaration { name: name.clone(), dtype: *dtype, shape: shape.clone() }
    };
    let declared: Vec<TensorDeclaration> = tensors.iter().map(declare).collect();
    let mut writer = Writer::create(path, &declared, &BTreeMap::new()).unwrap();
    for (name, (_, _, bytes)) in tensors {
        writer.write(name, bytes).unwrap();
    }
    writer.finish().unwrap();
}

/// Names of the file's float matrices that linear groups multiply.
fn linear_tensors(model: &Model, file: &SafetensorsFile) -> BTreeSet<String> {
    let program = lower(&model.spec, &LowerOptions::new(16)).unwrap();
    let weights = model.weights(&program).unwrap();
    let mut names = BTreeSet::new();
    for op in &program.ops {
        let Op::Linear { parts, .. } = op else { continue };
        names.extend(parts.iter().flat_map(|part| weights.tensors_of(part.weight)).cloned());
    }
    let is_float = |name: &String| {
        file.raw(name).is_ok_and(|raw| matches!(raw.dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16))
    };
    names.retain(|name| name.ends_with(".weight") && is_float(name));
    names
}

/// Pairs for the matrices of the model in `base`: ranks of 3, 5 and 16, numbers in all three types,
/// scales of all kinds. `part` of the matrices have one.
pub(crate) fn make(base: &Path, seed: u64, part: f64) -> Made {
    let model = Model::open(base).unwrap_or_else(|error| panic!("{base:?}: {error}"));
    let file = SafetensorsFile::open(&base.join("model.safetensors")).unwrap();
    let mut random = Random::new(seed);
    let raw = |name: &str| {
        let raw = file.raw(name).unwrap();
        (raw.dtype, raw.shape.clone(), raw.bytes.to_vec())
    };
    let mut folded: Tensors = file.names().map(|name| (name.to_owned(), raw(name))).collect();
    let (mut pairs, mut ranks, mut alphas) = (Tensors::new(), Map::new(), Map::new());
    let stabilised = seed.is_multiple_of(2);
    let mut modules = 0;
    for name in linear_tensors(&model, &file) {
        if random.below(1000) as f64 >= part * 1000.0 {
            continue;
        }
        modules += 1;
        let module = name.strip_suffix(".weight").unwrap();
        let rank = [3, 5, 16][random.below(3)];
        let alpha = random.between(1, 9) as f64;
        ranks.insert(module.to_owned(), json!(rank));
        alphas.insert(module.to_owned(), json!(alpha));
        let weight = file.tensor(&name).unwrap();
        let (rows, columns) = (weight.rows(), weight.columns());
        let (down, down_values) = matrix(rank, columns, &mut random);
        let (up, up_values) = matrix(rows, rank, &mut random);
        let scale = alpha / if stabilised { (rank as f64).sqrt() } else { rank as f64 };
        let mut values = weight.to_f32();
        for row in 0..rows {
            for column in 0..columns {
                let term = |k: usize| {
                    f64::from(up_values[row * rank + k])
                        * f64::from(down_values[k * columns + column])
                };
                let sum: f64 = (0..rank).map(term).sum();
                let value = &mut values[row * columns + column];
                *value = (f64::from(*value) + scale * sum) as f32;
            }
        }
        let bytes = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        folded.insert(name.clone(), (Dtype::F32, weight.shape.clone(), bytes));
        pairs.insert(format!("base_model.model.{module}.lora_A.weight"), down);
        pairs.insert(format!("base_model.model.{module}.lora_B.weight"), up);
    }
    let config = json!({
        "peft_type": "LORA", "r": 64, "lora_alpha": 1, "rank_pattern": ranks,
        "alpha_pattern": alphas, "use_rslora": stabilised, "bias": "none", "use_dora": false,
        "target_modules": "all-linear", "modules_to_save": null, "task_type": "CAUSAL_LM",
    });
    let made =
        Made { peft: Peft { config, tensors: pairs }, modules, folder: TempDir::new().unwrap() };
    made.peft.write(&made.adapter());
    std::fs::create_dir(made.folded()).unwrap();
    std::fs::copy(base.join("config.json"), made.folded().join("config.json")).unwrap();
    write(&made.folded().join("model.safetensors"), &folded);
    made
}

/// A matrix in some type of floats, and what its numbers are.
fn matrix(
    rows: usize,
    columns: usize,
    random: &mut Random,
) -> ((Dtype, Vec<usize>, Vec<u8>), Vec<f32>) {
    let largest = 0.5 / (columns as f32).sqrt();
    let values: Vec<f32> = (0..rows * columns).map(|_| random.normal() * largest).collect();
    let (dtype, format) =
        [(Dtype::F32, Format::F32), (Dtype::F16, Format::F16), (Dtype::BF16, Format::BF16)]
            [random.below(3)];
    let bytes = codec::quantize(format, &values);
    let tensor = Tensor::new(vec![rows, columns], format, Bytes::new(bytes.clone())).unwrap();
    ((dtype, vec![rows, columns], bytes), tensor.to_f32())
}

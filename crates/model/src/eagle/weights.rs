//! `EagleWeights`: where each weight of a drafter's program lies in its folder.

use std::collections::BTreeSet;
use std::ops::Range;

use lathe_program::shard::slice_tensor;
use lathe_program::{BackendError, Program, Weight, WeightDecl, WeightSource};
use lathe_tensor::Tensor;

use super::{Eagle, EagleError, FeatureNorm, Fusion, vocabulary};
use crate::Model;
use crate::checkpoint::Checkpoint;
use crate::lower::{LowerOptions, lower};
use crate::spec::DecoderSpec;
use crate::weights::WeightsError;

/// The drafter's own embedding, which it may lack.
pub(super) const EMBEDDING: &str = "embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
/// Prefixes of the first layer.
const FIRST_LAYERS: [&str; 2] = ["midlayer.", "layers.0."];
/// Repeats of what the configuration says.
const TABLE: &str = "rotary_emb.inv_freq";

/// By name in a layer: the module in the file.
const MODULES: [(&str, &str); 12] = [
    ("attention_norm", "input_layernorm"),
    ("hidden_norm", "hidden_norm"),
    ("attention.query", "self_attn.q_proj"),
    ("attention.key", "self_attn.k_proj"),
    ("attention.value", "self_attn.v_proj"),
    ("attention.output", "self_attn.o_proj"),
    ("ffn_norm", "post_attention_layernorm"),
    ("ffn.gate", "mlp.gate_proj"),
    ("ffn.up", "mlp.up_proj"),
    ("ffn.down", "mlp.down_proj"),
    ("fc", "fc"),
    ("final_norm", "norm"),
];

/// Where a weight is.
#[derive(Debug)]
pub(super) enum Place {
    /// In a tensor: some of its columns, or all.
    Tensor { name: String, columns: Option<Range<usize>> },
    /// In vectors that lie side by side.
    Joined(Vec<String>),
    /// The model's own weight of that name.
    Target,
}

/// The weights of a drafter's program.
#[derive(Debug)]
pub struct EagleWeights<'a> {
    checkpoint: &'a Checkpoint,
    program: &'a Program,
    target: &'a Model,
    places: Vec<Place>,
}

impl<'a> EagleWeights<'a> {
    pub(super) fn new(
        eagle: &'a Eagle,
        program: &'a Program,
        target: &'a Model,
    ) -> Result<Self, EagleError> {
        let places = eagle.places(program, &target.spec)?;
        Ok(EagleWeights { checkpoint: &eagle.checkpoint, program, target, places })
    }

    fn load(&self, weight: Weight) -> Result<Tensor, EagleError> {
        match &self.places[weight.0 as usize] {
            Place::Target => of_target(self.target, &self.program.weight(weight).name),
            Place::Joined(names) => {
                let mut all = Vec::new();
                for name in names {
                    all.extend(self.checkpoint.tensor(name)?.to_f32());
                }
                Ok(Tensor::from_f32_vec(vec![all.len()], all))
            }
            Place::Tensor { name, columns } => {
                let tensor = self.checkpoint.tensor(name)?;
                let Some(columns) = columns else { return Ok(tensor) };
                let ranges = [0..tensor.rows(), columns.clone()];
                slice_tensor(&tensor, &ranges)
                    .map_err(|reason| EagleError::Columns { tensor: name.clone(), reason })
            }
        }
    }
}

impl WeightSource for EagleWeights<'_> {
    fn tensor(&self, weight: Weight) -> Result<Tensor, BackendError> {
        self.load(weight).map_err(|error| BackendError::Weight {
            name: self.program.weight(weight).name.clone(),
            reason: error.to_string(),
        })
    }
}

/// The weight of the model that is called `name`.
pub(super) fn of_target(target: &Model, name: &str) -> Result<Tensor, EagleError> {
    let boxed = |error| EagleError::Model(Box::new(error));
    let program = lower(&target.spec, &LowerOptions::new(1));
    let program =
        program.map_err(|source| EagleError::Spec { path: "config.json".into(), source })?;
    let weights = target.weights(&program).map_err(boxed)?;
    let weight = program.weight_named(name).expect("every model has an embedding and a head");
    Ok(weights.load(weight)?)
}

impl Eagle {
    /// Where each weight of `program` is, after a check that every tensor is of use.
    pub(super) fn places(
        &self,
        program: &Program,
        target: &DecoderSpec,
    ) -> Result<Vec<Place>, EagleError> {
        let places = program.weights.iter().map(|decl| self.place(decl, target));
        let places = places.collect::<Result<Vec<Place>, EagleError>>()?;
        let mut used: BTreeSet<String> = BTreeSet::new();
        let mut uses = |name: &str| used.extend(self.checkpoint.parts_of(name));
        for place in &places {
            match place {
                Place::Tensor { name, .. } => uses(name),
                Place::Joined(names) => names.iter().for_each(|name| uses(name)),
                Place::Target => {}
            }
        }
        if self.checkpoint.contains(EMBEDDING) {
            uses(EMBEDDING);
            self.check(EMBEDDING, &[target.vocabulary, self.spec.decoder.width])?;
        } else if self.spec.decoder.width != target.width {
            let (weight, tried) = ("embedding".to_owned(), vec![EMBEDDING.to_owned()]);
            return Err(WeightsError::Missing { weight, tried }.into());
        }
        let spare = |name: &&str| {
            let known = [vocabulary::OFFSETS, vocabulary::KNOWN].contains(name);
            !known && !name.ends_with(TABLE) && !used.contains(*name)
        };
        match self.checkpoint.names().into_iter().find(spare) {
            Some(tensor) => Err(WeightsError::Unused { tensor: tensor.to_owned() }.into()),
            None => Ok(places),
        }
    }

    fn place(&self, decl: &WeightDecl, target: &DecoderSpec) -> Result<Place, EagleError> {
        let local = decl.name.splitn(3, '.').nth(2).filter(|_| decl.layer.is_some());
        let local = local.unwrap_or(&decl.name);
        if local == "head" {
            return self.head(decl, target);
        }
        if local == "feature_norm" {
            return self.feature_norm(decl);
        }
        let (local, kind) = match local.strip_suffix("_bias") {
            Some(matrix) => (matrix, "bias"),
            None => (local, "weight"),
        };
        let (module, half) = match (local.strip_suffix("_of_embedding"), local) {
            (Some(module), _) => (module, Some(0)),
            (None, local) => match local.strip_suffix("_of_hidden") {
                Some(module) => (module, Some(1)),
                None => (local, None),
            },
        };
        let known = MODULES.iter().find(|(name, _)| *name == module);
        let file = known.map_or(module, |(_, file)| *file);
        let tried: Vec<String> = match decl.layer {
            Some(0) => FIRST_LAYERS.iter().map(|it| format!("{it}{file}.{kind}")).collect(),
            Some(layer) => vec![format!("layers.{layer}.{file}.{kind}")],
            None => vec![format!("{file}.{kind}")],
        };
        let name = self.first(&decl.name, tried)?;
        let Some(half) = half.filter(|_| kind == "weight") else {
            self.check(&name, &decl.shape)?;
            return Ok(Place::Tensor { name, columns: None });
        };
        let columns = decl.shape[1];
        self.check(&name, &[decl.shape[0], 2 * columns])?;
        Ok(Place::Tensor { name, columns: Some(half * columns..(half + 1) * columns) })
    }

    /// A drafter without a head has the model's.
    fn head(&self, decl: &WeightDecl, target: &DecoderSpec) -> Result<Place, EagleError> {
        if self.checkpoint.contains(HEAD) {
            self.check(HEAD, &decl.shape)?;
            return Ok(Place::Tensor { name: HEAD.to_owned(), columns: None });
        }
        match decl.shape == [target.vocabulary, target.width] {
            true => Ok(Place::Target),
            false => Err(missing(&decl.name, vec![HEAD.to_owned()])),
        }
    }

    /// One vector for all features, or one for each.
    fn feature_norm(&self, decl: &WeightDecl) -> Result<Place, EagleError> {
        let names: Vec<String> = match self.spec.fusion {
            Fusion::Features { taps, feature_norm: FeatureNorm::Each, .. } => {
                (0..taps).map(|tap| format!("fc_norm.{tap}.weight")).collect()
            }
            _ => vec!["input_norm.weight".to_owned()],
        };
        let width = decl.shape[0] / names.len();
        for name in &names {
            if !self.checkpoint.contains(name) {
                return Err(missing(&decl.name, vec![name.clone()]));
            }
            self.check(name, &[width])?;
        }
        Ok(Place::Joined(names))
    }

    fn first(&self, weight: &str, tried: Vec<String>) -> Result<String, EagleError> {
        let found = tried.iter().find(|name| self.checkpoint.contains(name)).cloned();
        found.ok_or_else(|| missing(weight, tried))
    }

    fn check(&self, tensor: &str, expected: &[usize]) -> Result<(), EagleError> {
        let found = self.checkpoint.shape(tensor)?;
        if found == expected {
            return Ok(());
        }
        let (tensor, expected) = (tensor.to_owned(), expected.to_vec());
        Err(WeightsError::Shape { tensor, found, expected }.into())
    }
}

fn missing(weight: &str, tried: Vec<String>) -> EagleError {
    WeightsError::Missing { weight: weight.to_owned(), tried }.into()
}

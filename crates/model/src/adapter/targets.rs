//! Which matrices of a program the modules of an adapter are.
//!
//! Adapters name the modules of Hugging Face's classes, whatever file the base lies in, and so do
//! the rules of [`crate::names::hugging_face`].

use std::collections::{HashMap, HashSet};

use lathe_program::{Op, Program, Weight, WeightRole};

use crate::names::{Rule, Rules, TensorSource};

/// What a module is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// Matrices that read one input, their rows below one another in the module.
    Matrices(Vec<Weight>),
    /// Weights that are not multiplied as they are.
    Refused(&'static str),
}

/// Modules by their paths within the decoder: `layers.3.self_attn.q_proj`.
#[derive(Debug)]
pub(super) struct Targets(HashMap<String, Target>);

/// Where a decoder lies in classes that hold more, longest first.
const ROOTS: [&str; 3] = ["model.language_model.", "language_model.model.", "model."];

impl Targets {
    /// The modules of `program` under the names that `rules` have.
    pub(super) fn new(program: &Program, rules: &[Rules]) -> Self {
        let linear = linear_weights(program);
        let mut targets = HashMap::new();
        for (index, decl) in program.weights.iter().enumerate() {
            let Some(layer) = decl.layer else { continue };
            if decl.role == WeightRole::Vector {
                continue;
            }
            let prefix = format!("layers.{layer}.");
            let name = decl.name.strip_prefix(&prefix).unwrap_or(&decl.name);
            let rules = rules.iter().flat_map(|rules| rules.iter());
            let sources = rules.filter(|rule| rule.weight == name).flat_map(Rule::sources);
            for (source, tensor) in sources.filter_map(|source| Some((source, source.name()?))) {
                let module = tensor.strip_suffix(".weight").unwrap_or(tensor);
                let target = match source {
                    TensorSource::Whole(_) => Some(vec![Weight(index as u32)]),
                    TensorSource::Part(_, parts) => parts
                        .iter()
                        .map(|part| program.weight_named(&format!("{prefix}{part}")))
                        .collect(),
                    _ => None,
                };
                let target = match target {
                    Some(all) if all.iter().all(|weight| linear.contains(weight)) => {
                        Target::Matrices(all)
                    }
                    _ => Target::Refused(why_not(decl.role)),
                };
                targets.entry(format!("{prefix}{module}")).or_insert(target);
            }
        }
        Targets(targets)
    }

    /// What `module` is, a path from the base model's root.
    pub(super) fn find(&self, module: &str) -> Target {
        let path = ROOTS.iter().find_map(|root| module.strip_prefix(root)).unwrap_or(module);
        self.0.get(path).cloned().unwrap_or_else(|| Target::Refused(unknown(path)))
    }
}

/// What a module is for which there is no rule.
fn unknown(path: &str) -> &'static str {
    if path.ends_with("lm_head") {
        "the matrix that makes logits"
    } else if path.ends_with("embed_tokens") {
        "the embedding"
    } else if path.contains(".experts") {
        why_not(WeightRole::Experts)
    } else {
        "no module of this model"
    }
}

/// Weights that a linear group multiplies.
fn linear_weights(program: &Program) -> HashSet<Weight> {
    let mut linear = HashSet::new();
    for op in &program.ops {
        if let Op::Linear { parts, .. } = op {
            linear.extend(parts.iter().map(|part| part.weight));
        }
    }
    linear
}

fn why_not(role: WeightRole) -> &'static str {
    match role {
        WeightRole::Experts => "a matrix of routed experts",
        WeightRole::Router => "a router",
        _ => "a matrix that attention absorbs",
    }
}

//! The matrices that a recipe quantizes, and the groups of them that engines run as one.

use std::collections::BTreeMap;

use lathe_program::{Op, Program, Weight, WeightRole};

use crate::error::QuantError;
use crate::recipe::{Recipe, matches};

/// The matrices that a recipe quantizes, with the op that reads each. If the recipe names none,
/// these are all linear layers and all experts.
///
/// # Errors
/// If a pattern matches nothing, or matches only what cannot be quantized.
pub fn targets(program: &Program, recipe: &Recipe) -> Result<BTreeMap<Weight, usize>, QuantError> {
    let mut readers: BTreeMap<Weight, usize> = BTreeMap::new();
    for (index, op) in program.ops.iter().enumerate() {
        match op {
            Op::Linear { parts, .. } => {
                for part in parts {
                    readers.entry(part.weight).or_insert(index);
                }
            }
            Op::Experts { spec, .. } => {
                readers.extend([spec.gate, spec.up, spec.down].map(|weight| (weight, index)));
            }
            _ => {}
        }
    }
    let lists = [recipe.tensors.as_ref(), Some(&recipe.keep)];
    let of_steps = recipe.steps.iter().filter_map(|step| step.tensors.as_ref());
    let of_formats = recipe.formats.iter().map(|(pattern, _)| pattern);
    for pattern in lists.into_iter().flatten().chain(of_steps).flatten().chain(of_formats) {
        if !program.weights.iter().any(|decl| matches(pattern, &decl.name)) {
            return Err(QuantError::Recipe(format!("no tensor is called `{pattern}`")));
        }
    }
    let mut found = BTreeMap::new();
    for (index, decl) in program.weights.iter().enumerate() {
        let weight = Weight(index as u32);
        let named =
            recipe.tensors.as_ref().map(|list| list.iter().any(|it| matches(it, &decl.name)));
        let kept = recipe.keep.iter().any(|it| matches(it, &decl.name));
        let can = matches!(decl.role, WeightRole::Linear | WeightRole::Experts)
            && readers.contains_key(&weight);
        if kept || !named.unwrap_or(can) {
            continue;
        }
        // A pattern for a whole layer also matches vectors, which stay as they are. An exact name
        // of a vector is an error.
        let exact = recipe.tensors.iter().flatten().any(|it| *it == decl.name);
        match readers.get(&weight) {
            Some(op) if can => {
                found.insert(weight, *op);
            }
            _ if exact => {
                let role = format!("{:?}", decl.role).to_lowercase();
                return Err(QuantError::Recipe(format!(
                    "tensor {} ({role}) cannot be quantized here, expected linear layers or experts",
                    decl.name
                )));
            }
            _ => {}
        }
    }
    if found.is_empty() {
        return Err(QuantError::Recipe("it quantizes no tensor of this model".to_owned()));
    }
    Ok(found)
}

/// The groups of matrices that engines stack and run as one: query, key and value of an attention;
/// gate and up of a feed-forward layer or of an expert.
pub fn fused(program: &Program) -> Vec<Vec<Weight>> {
    let mut sets = Vec::new();
    for op in &program.ops {
        match op {
            Op::Linear { parts, .. } => {
                let mut by_block: BTreeMap<&str, Vec<Weight>> = BTreeMap::new();
                for part in parts {
                    let name = &program.weight(part.weight).name;
                    let block = name.rsplit_once('.').map_or("", |(block, _)| block);
                    by_block.entry(block).or_default().push(part.weight);
                }
                sets.extend(by_block.into_values().filter(|set| set.len() > 1));
            }
            Op::Experts { spec, .. } => sets.push(vec![spec.gate, spec.up]),
            _ => {}
        }
    }
    sets
}

/// Checks that matrices which engines run as one ([`fused`]) share a format.
///
/// # Errors
/// [`QuantError::Recipe`] names the first pair with different formats.
pub fn check_fused(program: &Program, recipe: &Recipe) -> Result<(), QuantError> {
    let quantized = targets(program, recipe)?;
    let name = |weight: Weight| program.weight(weight).name.as_str();
    let format_of =
        |weight: Weight| quantized.contains_key(&weight).then(|| recipe.format_of(name(weight)));
    let spelled = |weight: Weight| match format_of(weight) {
        Some(format) => format!("{} is stored in {format}", name(weight)),
        None => format!("{} is kept", name(weight)),
    };
    for set in fused(program) {
        let other = set.iter().find(|weight| format_of(**weight) != format_of(set[0]));
        if let Some(other) = other {
            return Err(QuantError::Recipe(format!(
                "{} and {}; engines run the two as one matrix, so they need one format",
                spelled(set[0]),
                spelled(*other)
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lathe_model::Model;
    use lathe_model::lower::{LowerOptions, lower};

    use super::*;

    fn program(name: &str) -> Program {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
        let model = Model::open(&root.join(name)).unwrap();
        lower(&model.spec, &LowerOptions::new(64)).unwrap()
    }

    fn recipe(text: &str) -> Recipe {
        let text = format!("format = \"w8a16\"\n{text}\n[[technique]]\nuse = \"rtn\"");
        Recipe::parse(&text, None).unwrap()
    }

    #[test]
    fn experts_are_quantized_unless_a_recipe_says_otherwise() {
        let program = program("mixtral");
        let names = |text: &str| -> Vec<String> {
            let found = targets(&program, &recipe(text)).unwrap();
            found.into_keys().map(|weight| program.weight(weight).name.clone()).collect()
        };
        let expert = "layers.1.ffn.experts.down".to_owned();
        let all = names("");
        assert!(all.contains(&expert) && all.contains(&"layers.0.attention.query".to_owned()));
        assert!(!all.iter().any(|name| name.contains("router") || name == "head"), "{all:?}");
        assert!(!names("keep = [\"*.experts.*\"]").contains(&expert));
        assert!(!names("tensors = [\"*.attention.*\"]").contains(&expert));
    }

    #[test]
    fn a_pair_that_engines_fuse_has_one_format() {
        let (llama, mixtral, latent) =
            (program("llama"), program("mixtral"), program("deepseek-v3"));
        for (program, text, pair) in [
            (&llama, "keep = [\"*.attention.value\"]", ["attention.query is st", "value is kept"]),
            (&llama, "tensors = [\"*.ffn.up\"]", ["ffn.gate is kept", "ffn.up is stored in int8"]),
            (
                &llama,
                "[formats]\n\"*.key\" = \"int4-channel-bf16\"",
                ["query is stored in int8-channel-bf16", "key is stored in int4-channel-bf16"],
            ),
            (
                &mixtral,
                "keep = [\"*.experts.up\"]",
                ["experts.gate is stored", "experts.up is kept"],
            ),
            (&latent, "keep = [\"*.kv_down\"]", ["query_down is stored", "kv_down is kept"]),
        ] {
            let error = check_fused(program, &recipe(text)).unwrap_err().to_string();
            assert!(pair.iter().all(|part| error.contains(part)), "{error}");
        }
        for (program, text) in [
            (&llama, ""),
            (&llama, "keep = [\"*.attention.output\", \"*.ffn.*\"]"),
            (&llama, "[formats]\n\"layers.0.*\" = \"int4-channel-bf16\""),
            (&mixtral, "tensors = [\"*.experts.*\"]"),
            (&mixtral, "keep = [\"*.experts.down\"]"),
        ] {
            check_fused(program, &recipe(text)).unwrap();
        }
    }
}

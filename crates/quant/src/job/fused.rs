//! Matrices that engines run as one: query, key and value, or gate and up, of a linear op or an
//! expert. vLLM and others require that they share NVFP4's global scale.

use lathe_program::{Op, Weight};
use lathe_tensor::{Format, ScaleType};

use super::Job;
use crate::error::QuantError;

impl Job<'_> {
    /// For each matrix of `weight` (one, or one for each expert), the largest magnitude over all
    /// matrices that engines run with it. Empty if the format has no global scale.
    pub(super) fn fused_largest(&mut self, weight: Weight) -> Result<Vec<f32>, QuantError> {
        let format_of = |weight| self.plan.recipe.format_of(&self.plan.program.weight(weight).name);
        let format = format_of(weight);
        let global = matches!(format, Format::Scaled(it) if it.scale == ScaleType::E4M3Global);
        let Some(op) = self.plan.targets.get(&weight).filter(|_| global) else {
            return Ok(Vec::new());
        };
        let mut together: Vec<Weight> = match &self.plan.program.ops[*op] {
            Op::Linear { parts, .. } => parts.iter().map(|part| part.weight).collect(),
            Op::Experts { spec, .. } if weight != spec.down => vec![spec.gate, spec.up],
            _ => vec![weight],
        };
        let same = |other: &Weight| {
            self.plan.targets.get(other) == Some(op) && format_of(*other) == format
        };
        together.retain(same);
        if let Some(found) = self.ledger.fused_largest.get(&together[0]) {
            return Ok(found.clone());
        }
        let mut largest: Vec<f32> = Vec::new();
        for weight in &together {
            let (shape, values) = self.load(*weight)?;
            let matrices = if shape.len() > 2 { shape[0] } else { 1 };
            largest.resize(matrices, 0.0);
            let parts = values.chunks((values.len() / matrices.max(1)).max(1));
            for (largest, part) in largest.iter_mut().zip(parts) {
                *largest = part.iter().fold(*largest, |most, value| most.max(value.abs()));
            }
        }
        self.ledger.fused_largest.insert(together[0], largest.clone());
        Ok(largest)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use lathe_model::Model;
    use lathe_model::export::Replacement;
    use lathe_model::lower::{LowerOptions, lower};
    use lathe_tensor::GlobalScale;

    use super::*;
    use crate::recipe::Recipe;

    #[test]
    fn matrices_that_are_run_as_one_share_a_global_scale() {
        let root = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/fixtures/tiny"));
        let model = Model::open(&root.join("mixtral")).unwrap();
        let program = lower(&model.spec, &LowerOptions::new(64)).unwrap();
        let weights = model.weights(&program).unwrap();
        let text = "format = \"nvfp4\"\ntensors = [\"layers.1.*\"]\n[[technique]]\nuse = \"rtn\"";
        let recipe = Recipe::parse(text, None).unwrap();
        let mut job = Job::new(&weights, &recipe, false, |_| ()).unwrap();
        let mut made = |name: &str| {
            let weight = program.weight_named(&format!("layers.1.{name}")).unwrap();
            let plain = weights.load(weight).unwrap().to_f32();
            let tensor = Replacement::tensor(&mut job, weight).unwrap();
            let GlobalScale::Divide(divisors) = tensor.global else { panic!("{name}") };
            let parts = plain.chunks(plain.len() / divisors.len());
            let largest = parts.map(|part| part.iter().fold(0f32, |m, v| m.max(v.abs())));
            (divisors.clone(), largest.collect::<Vec<f32>>())
        };
        for names in [
            &["attention.query", "attention.key", "attention.value"][..],
            &["attention.output"],
            &["ffn.experts.gate", "ffn.experts.up"],
            &["ffn.experts.down"],
        ] {
            let all: Vec<_> = names.iter().map(|name| made(name)).collect();
            let matrices = all[0].0.len();
            assert_eq!(matrices, if names[0].contains("experts") { 8 } else { 1 });
            for matrix in 0..matrices {
                let largest = all.iter().map(|(_, largest)| largest[matrix]).fold(0.0, f32::max);
                for (divisors, _) in &all {
                    assert_eq!(divisors[matrix], 448.0 * 6.0 / largest, "{names:?}");
                }
            }
        }
    }
}

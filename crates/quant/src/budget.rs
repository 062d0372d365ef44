//! Mixed precision: chooses a format for each layer. The mean bits of a weight stay within a
//! budget, and the model loses least.
//!
//! The loss of a layer in a format is measured with that layer alone rounded to nearest
//! ([`crate::explain`]). It is the KL to the base, or the squared error of the layer's outputs. The
//! losses of layers are assumed to add up, which is true to first order. The best choice is then
//! the solution of a multiple-choice knapsack problem, solved exactly.

use lathe_model::spec::DecoderSpec;
use lathe_model::weights::ModelWeights;
use lathe_tensor::Format;

use crate::calibrate::Calibration;
use crate::error::QuantError;
use crate::explain::{Explanation, LayerExplanation, TensorExplanation};
use crate::job::{Job, Progress, bits_of_correction};
use crate::parameters::Parameters;
use crate::recipe::{Recipe, Sensitivity, TechniqueStep};
use crate::targets::targets;
use crate::technique::{self, Stage};

/// One way to store a layer.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StorageOption {
    /// Bits of the whole layer.
    pub bits: f64,
    /// The loss in this format (KL or squared error).
    pub loss: f64,
}

/// For each layer the index of its option, so that the sum of losses is least within `bits`. `None`
/// if no choice fits.
///
/// The solution is exact. After each layer the search keeps every sum that no other sum beats in
/// both bits and loss. Layers of equal sizes have few different sums. Layers of unequal sizes may
/// have as many as there are combinations.
pub fn knapsack(layers: &[Vec<StorageOption>], bits: f64) -> Option<Vec<usize>> {
    /// A sum over the first layers: the option of the last of them, and the index of the sum before
    /// it.
    #[derive(Clone, Copy)]
    struct Sum {
        bits: f64,
        loss: f64,
        choice: usize,
        before: usize,
    }
    // The fewest bits that the remaining layers need. Sums that leave less are dropped.
    let least = |choices: &Vec<StorageOption>| {
        choices.iter().map(|it| it.bits).fold(f64::INFINITY, f64::min)
    };
    let mut rest: f64 = layers.iter().map(least).sum();
    let slack = 1e-9 * bits.abs();
    let mut fronts = vec![vec![Sum { bits: 0.0, loss: 0.0, choice: 0, before: 0 }]];
    for choices in layers {
        rest -= least(choices);
        let front = fronts.last().expect("one to begin with");
        let mut sums: Vec<Sum> = Vec::new();
        for (before, sum) in front.iter().enumerate() {
            sums.extend(choices.iter().enumerate().map(|(choice, it)| Sum {
                bits: sum.bits + it.bits,
                loss: sum.loss + it.loss,
                choice,
                before,
            }));
        }
        sums.retain(|sum| sum.bits + rest <= bits + slack);
        sums.sort_by(|a, b| a.bits.total_cmp(&b.bits).then(a.loss.total_cmp(&b.loss)));
        let mut best = f64::INFINITY;
        sums.retain(|sum| {
            let better = sum.loss < best;
            best = best.min(sum.loss);
            better
        });
        fronts.push(sums);
    }
    // Within a front, more bits mean less loss. So the last sum has the least loss.
    let last = fronts.last().expect("one to begin with");
    let mut at = last.len().checked_sub(1)?;
    let mut chosen = Vec::with_capacity(layers.len());
    for front in fronts[1..].iter().rev() {
        chosen.push(front[at].choice);
        at = front[at].before;
    }
    chosen.reverse();
    Some(chosen)
}

/// Returns `recipe` with a format for each layer in place of its budget. A recipe without a budget
/// comes back unchanged. Sensitivity is measured on `text`, once for each format.
///
/// # Errors
/// If the formats take more bits than the budget has, if one does not fit a tensor, or if the text
/// cannot be run.
pub fn planned(
    weights: &ModelWeights<'_>,
    recipe: &Recipe,
    spec: &DecoderSpec,
    text: &Calibration<'_>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Recipe, QuantError> {
    let Some(budget) = &recipe.budget else { return Ok(recipe.clone()) };
    let mut found: Vec<Explanation> = Vec::new();
    for (index, format) in budget.formats.iter().enumerate() {
        let plain = rounded_to(recipe, *format)?;
        let mut job = Job::new(weights, &plain, false, |_| ())?;
        let all = budget.formats.len();
        let mut of_all = |now: Progress| {
            progress(Progress { done: index * now.total + now.done, total: all * now.total });
        };
        found.push(job.explain(spec, text, &mut of_all)?);
    }
    let layers = found.first().map_or(0, |first| first.layers.len());
    let choice = |layer: &LayerExplanation| StorageOption {
        bits: layer.bits * layer.elements as f64,
        loss: loss_of(layer, budget.sensitivity),
    };
    let choices: Vec<Vec<StorageOption>> = (0..layers)
        .map(|layer| found.iter().map(|it| choice(&it.layers[layer])).collect())
        .collect();
    let elements: usize = found[0].layers.iter().map(|layer| layer.elements).sum();
    // Corrections have the same size in every format of the layer.
    let mut corrections = 0.0;
    for weight in targets(weights.program(), recipe)?.into_keys() {
        let decl = weights.program().weight(weight);
        corrections += bits_of_correction(recipe, &decl.name, &decl.shape)?;
    }
    let Some(chosen) = knapsack(&choices, budget.bits * elements as f64 - corrections) else {
        let of_format = |it: &Format| it.bits_per_weight();
        let least = budget.formats.iter().map(of_format).fold(f64::INFINITY, f64::min);
        let least = least + corrections / elements as f64;
        return Err(QuantError::Recipe(format!(
            "a budget of {} bits a weight, the least that its formats take is {least}",
            budget.bits
        )));
    };
    let formats = chosen
        .iter()
        .enumerate()
        .filter(|(layer, _)| found[0].layers[*layer].elements > 0)
        .map(|(layer, choice)| (format!("layers.{layer}.*"), budget.formats[*choice]));
    let formats = recipe.formats.iter().cloned().chain(formats).collect();
    Ok(Recipe { formats, budget: None, ..recipe.clone() })
}

/// The model's loss with `layer` alone rounded.
fn loss_of(layer: &LayerExplanation, sensitivity: Sensitivity) -> f64 {
    let outputs =
        |it: &TensorExplanation| it.error.outputs.unwrap_or(it.error.weights).sources.total;
    match sensitivity {
        Sensitivity::Kl => layer.kl.mean,
        Sensitivity::Hessian => layer.tensors.iter().map(outputs).sum(),
    }
}

/// A recipe with the same rotations that rounds to nearest in one format.
fn rounded_to(recipe: &Recipe, format: Format) -> Result<Recipe, QuantError> {
    let rotates = |step: &&TechniqueStep| step.technique.stage == Stage::Rotate;
    let technique = technique::find("rtn")?;
    let parameters = Parameters::defaults(technique.parameters);
    let rounds = TechniqueStep { technique, parameters, tensors: None };
    let steps = recipe.steps.iter().filter(rotates).cloned().chain([rounds]).collect();
    Ok(Recipe { format, formats: Vec::new(), budget: None, steps, ..recipe.clone() })
}

#[cfg(test)]
mod tests {
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    fn total(layers: &[Vec<StorageOption>], chosen: &[usize]) -> StorageOption {
        let all = layers.iter().zip(chosen).map(|(choices, at)| choices[*at]);
        let add = |a: StorageOption, b: StorageOption| StorageOption {
            bits: a.bits + b.bits,
            loss: a.loss + b.loss,
        };
        all.fold(StorageOption { bits: 0.0, loss: 0.0 }, add)
    }

    #[test]
    fn the_knapsack_is_the_best_of_all_choices() {
        let mut random = ChaCha8Rng::seed_from_u64(7);
        let mut refused = 0;
        for _ in 0..200 {
            let (count, formats) = (random.random_range(1..7), random.random_range(1..4));
            let layers: Vec<Vec<StorageOption>> = (0..count)
                .map(|_| {
                    let size = f64::from(random.random_range(1..4));
                    let one = |format: usize| StorageOption {
                        bits: size * (2.0 + format as f64 * 1.5),
                        loss: random.random::<f64>(),
                    };
                    (0..formats).map(one).collect()
                })
                .collect();
            let bits = f64::from(random.random_range(0..60));
            let mut best: Option<f64> = None;
            for code in 0..formats.pow(count as u32) {
                let chosen: Vec<usize> =
                    (0..count).map(|layer| code / formats.pow(layer as u32) % formats).collect();
                let sum = total(&layers, &chosen);
                if sum.bits <= bits {
                    best = Some(best.map_or(sum.loss, |best: f64| best.min(sum.loss)));
                }
            }
            let found = knapsack(&layers, bits).map(|chosen| total(&layers, &chosen));
            refused += usize::from(best.is_none());
            match (best, found) {
                (None, None) => {}
                (Some(best), Some(found)) => {
                    assert!((found.loss - best).abs() < 1e-12 && found.bits <= bits + 1e-6);
                }
                (best, found) => panic!("{best:?} {found:?}"),
            }
        }
        assert!((5..150).contains(&refused), "{refused}");
    }
}

//! Chooses the experts of a row and their weights.

use super::math::sigmoid;
use crate::op::{GroupLimit, GroupScore, RouterScore, RouterSpec};

/// The choice of one row from its logits (bias already added): experts and weights, best first;
/// of equal scores the lower expert wins.
///
/// 1. Scores are the logits' softmax or sigmoid (for `SoftmaxOfChosen` the logits themselves).
/// 2. The choice goes by score plus correction, among the experts of the best groups.
/// 3. Weights are the chosen scores without correction (for `SoftmaxOfChosen` the softmax of the
///    chosen logits), divided by their sum if `normalise`, times `scaling`.
pub(super) fn choose(
    spec: &RouterSpec,
    correction: Option<&[f32]>,
    logits: &[f32],
) -> Vec<(u32, f32)> {
    let scores: Vec<f32> = match spec.score {
        RouterScore::Softmax => softmax(logits),
        RouterScore::SoftmaxOfChosen => logits.to_vec(),
        RouterScore::Sigmoid => logits.iter().map(|x| sigmoid(*x)).collect(),
    };
    let corrected = |(i, score): (usize, &f32)| score + correction.map_or(0.0, |c| c[i]);
    let mut preference: Vec<f32> = scores.iter().enumerate().map(corrected).collect();
    if let Some(limit) = &spec.groups {
        exclude_groups(limit, &mut preference);
    }
    let chosen = best(&preference, spec.experts_per_token);
    let mut weights: Vec<f32> = chosen.iter().map(|expert| scores[*expert]).collect();
    if spec.score == RouterScore::SoftmaxOfChosen {
        weights = softmax(&weights);
    }
    if spec.normalise {
        let sum = weights.iter().sum::<f32>() + 1e-20;
        weights.iter_mut().for_each(|weight| *weight /= sum);
    }
    chosen.iter().map(|e| *e as u32).zip(weights.iter().map(|w| w * spec.scaling)).collect()
}

/// Excludes the experts of all but the best groups.
fn exclude_groups(limit: &GroupLimit, preference: &mut [f32]) {
    let size = preference.len() / limit.groups;
    let score = |group: &[f32]| {
        let order = best(group, group.len());
        match limit.score {
            GroupScore::Max => group[order[0]],
            GroupScore::TopTwoSum => order.iter().take(2).map(|i| group[*i]).sum(),
        }
    };
    let scores: Vec<f32> = preference.chunks_exact(size).map(score).collect();
    let kept = best(&scores, limit.groups_per_token);
    for (index, group) in preference.chunks_exact_mut(size).enumerate() {
        if !kept.contains(&index) {
            group.fill(f32::NEG_INFINITY);
        }
    }
}

/// The indexes of the `count` largest scores, largest first, ties by lower index.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    order.truncate(count);
    order
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let powers: Vec<f64> = logits.iter().map(|x| f64::from(x - most).exp()).collect();
    let sum: f64 = powers.iter().sum();
    powers.iter().map(|power| (power / sum) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::op::Weight;

    fn spec(score: RouterScore) -> RouterSpec {
        RouterSpec {
            experts: 4,
            experts_per_token: 2,
            score,
            normalise: false,
            scaling: 1.0,
            groups: None,
            weight: Weight(0),
            bias: None,
            correction: None,
        }
    }

    const LOGITS: [f32; 4] = [0.0, 2.0, 1.0, 2.0];

    fn close(found: &[(u32, f32)], expected: &[(u32, f32)]) {
        assert_eq!(found.len(), expected.len());
        for (a, b) in found.iter().zip(expected) {
            assert!(a.0 == b.0 && (a.1 - b.1).abs() < 1e-5, "{found:?} is not {expected:?}");
        }
    }

    #[test]
    fn softmax_before_and_after_the_choice() {
        // exp: 1, 7.389, 2.718, 7.389; the sum is 18.496.
        close(&choose(&spec(RouterScore::Softmax), None, &LOGITS), &[(1, 0.39948), (3, 0.39948)]);
        close(&choose(&spec(RouterScore::SoftmaxOfChosen), None, &LOGITS), &[(1, 0.5), (3, 0.5)]);
    }

    #[test]
    fn the_correction_chooses_but_does_not_weigh() {
        let spec = RouterSpec { normalise: true, scaling: 2.5, ..spec(RouterScore::Sigmoid) };
        let correction = [1.0, 0.0, 0.0, -1.0];
        // sigmoid: 0.5, 0.880797, 0.731059, 0.880797; chosen 0 (1.5) and 1.
        let expected = [(0, 2.5 * 0.5 / 1.380797), (1, 2.5 * 0.880797 / 1.380797)];
        close(&choose(&spec, Some(&correction), &LOGITS), &expected);
    }

    #[test]
    fn groups_limit_the_choice() {
        let limit = |score| GroupLimit { groups: 2, groups_per_token: 1, score };
        let base = spec(RouterScore::SoftmaxOfChosen);
        let max = RouterSpec { groups: Some(limit(GroupScore::Max)), ..base.clone() };
        // Both groups have the same best score, so the first group wins, with experts 1 and 0.
        close(&choose(&max, None, &LOGITS), &[(1, 0.880797), (0, 0.119203)]);
        let sum = RouterSpec { groups: Some(limit(GroupScore::TopTwoSum)), ..base };
        close(&choose(&sum, None, &LOGITS), &[(3, 0.731059), (2, 0.268941)]);
    }
}

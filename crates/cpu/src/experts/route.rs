//! [`lathe_program::Op::Route`]: the experts of each row and their weights.

use lathe_program::{GroupLimit, GroupScore, RouterScore, RouterSpec};

use crate::linear::Matrix;
use crate::linear::Operands;
use crate::rows::Rows;

/// The experts of all rows of a step.
#[derive(Debug, Default)]
pub(crate) struct ChosenExperts {
    /// Experts a row.
    pub per_row: usize,
    /// `[rows, per_row]`, best first.
    pub experts: Vec<u32>,
    /// `[rows, per_row]`.
    pub weights: Vec<f32>,
}

/// A router, ready to run.
#[derive(Debug)]
pub(crate) struct RouteStage {
    /// `[rows, in]`.
    pub input: Rows,
    /// The spec of the router.
    pub spec: RouterSpec,
    /// `[experts, in]`.
    pub matrix: Matrix,
    /// The forms of the input that the matrix needs.
    pub operands: Operands,
    /// `[experts]`.
    pub bias: Option<Vec<f32>>,
    /// `[experts]`.
    pub correction: Option<Vec<f32>>,
    /// The program's number of the routing that it makes.
    pub routing: usize,
}

impl RouteStage {
    /// Chooses the experts of one row. `logits` are the router's, bias included, and are
    /// overwritten. `ranks` is scratch memory. Both are `[experts]`.
    pub(crate) fn choose(
        &self,
        logits: &mut [f32],
        ranks: &mut [f32],
        experts: &mut [u32],
        weights: &mut [f32],
    ) {
        let spec = &self.spec;
        match spec.score {
            RouterScore::Softmax => softmax(logits),
            RouterScore::Sigmoid => logits.iter_mut().for_each(|x| *x = 1.0 / (1.0 + (-*x).exp())),
            RouterScore::SoftmaxOfChosen => {}
        }
        ranks.copy_from_slice(logits);
        if let Some(correction) = &self.correction {
            ranks.iter_mut().zip(correction).for_each(|(rank, c)| *rank += c);
        }
        if let Some(limit) = &spec.groups {
            keep_best_groups(ranks, limit);
        }
        for (expert, weight) in experts.iter_mut().zip(weights.iter_mut()) {
            let best = index_of_largest(ranks);
            ranks[best] = f32::NEG_INFINITY;
            (*expert, *weight) = (best as u32, logits[best]);
        }
        if spec.score == RouterScore::SoftmaxOfChosen {
            softmax(weights);
        }
        let sum = if spec.normalise { weights.iter().sum::<f32>() + 1e-20 } else { 1.0 };
        weights.iter_mut().for_each(|w| *w = *w / sum * spec.scaling);
    }
}

fn softmax(x: &mut [f32]) {
    let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    x.iter_mut().for_each(|x| *x = (*x - largest).exp());
    let sum: f32 = x.iter().sum();
    x.iter_mut().for_each(|x| *x /= sum);
}

/// The index of the largest number, and of the first if several are equal.
fn index_of_largest(x: &[f32]) -> usize {
    let mut best = 0;
    for i in 1..x.len() {
        if x[i] > x[best] {
            best = i;
        }
    }
    best
}

/// Sets the ranks of all experts outside the best groups to minus infinity.
fn keep_best_groups(ranks: &mut [f32], limit: &GroupLimit) {
    let size = ranks.len() / limit.groups.max(1);
    // The score of a group depends on its own ranks only. So groups that are chosen already are
    // marked by their index, without a list on the heap.
    let mut kept = [false; 256];
    for _ in 0..limit.groups_per_token {
        let mut best: Option<(usize, f32)> = None;
        for group in (0..limit.groups.min(kept.len())).filter(|g| !kept[*g]) {
            let score = group_score(&ranks[group * size..(group + 1) * size], limit.score);
            if best.is_none_or(|(_, most)| score > most) {
                best = Some((group, score));
            }
        }
        if let Some((group, _)) = best {
            kept[group] = true;
        }
    }
    for (group, part) in ranks.chunks_mut(size.max(1)).enumerate() {
        if !kept[group.min(kept.len() - 1)] {
            part.fill(f32::NEG_INFINITY);
        }
    }
}

fn group_score(ranks: &[f32], score: GroupScore) -> f32 {
    let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
    for &rank in ranks {
        if rank > first {
            (first, second) = (rank, first);
        } else if rank > second {
            second = rank;
        }
    }
    match score {
        GroupScore::Max => first,
        GroupScore::TopTwoSum if ranks.len() > 1 => first + second,
        GroupScore::TopTwoSum => first,
    }
}

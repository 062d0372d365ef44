//! The random part of sampling: temperature, top-k, top-p, min-p and the draw itself, without
//! sorting the vocabulary.

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Sampling;
use crate::logits::{best_first, exp_negative, finite, maximum, sum, top};

/// A number in `[0, 1)` that depends on its arguments alone: the first 64 bits of a ChaCha8 stream,
/// the upper 53 of them times 2^-53.
///
/// The stream number (the 64-bit nonce) is the counter, and the block counter starts at 0. The
/// eight words of the key come from PCG32 with the seed as its state, as `rand_core::SeedableRng`'s
/// `seed_from_u64` has it: the state becomes `state * 6364136223846793005 + 11634580027462260723`,
/// then the word is `((state >> 18 ^ state) >> 27) as u32`, rotated right by `state >> 59`.
pub fn uniform(seed: u64, counter: u64) -> f64 {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(counter);
    (random.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws a token by inverting the cumulative distribution at `point` in `[0, 1)`. `None` if no
/// token can be drawn.
pub(super) fn draw(
    logits: &[f32],
    sampling: &Sampling,
    point: f64,
    buffers: &mut Buffers,
) -> Option<u32> {
    let best = maximum(logits);
    if best == f32::NEG_INFINITY {
        return None;
    }
    // Relative to the best token, which has weight 1.
    let weight = |logit: f32| exp_negative((finite(logit) - best) / sampling.temperature);
    let top_p = f64::from(sampling.top_p);
    let Buffers { weights, candidates } = buffers;
    let total = if 0 < sampling.top_k && sampling.top_k < logits.len() {
        top(logits, sampling.top_k, candidates);
        candidates.iter_mut().for_each(|candidate| candidate.0 = weight(candidate.0));
        let total = weight_of(candidates);
        candidates.retain(|&(weight, _)| weight > 0.0 && weight >= sampling.min_p);
        total
    } else {
        weights.clear();
        weights.extend(logits.iter().map(|&logit| weight(logit)));
        let total = sum(weights, |weight| weight);
        // Tokens below the cutoff have less than `1 - top_p` of the mass together. So the nucleus
        // is among the others, which are few if the distribution is peaked.
        let cutoff = (0.999 * (1.0 - top_p) * total / logits.len() as f64) as f32;
        let cutoff = cutoff.max(sampling.min_p);
        let passing = weights.iter().copied().zip(0..);
        candidates.clear();
        candidates.extend(passing.filter(|&(weight, _)| weight > 0.0 && weight >= cutoff));
        total
    };
    if top_p < 1.0 {
        let kept = nucleus(candidates, top_p * total);
        candidates.truncate(kept);
    }
    Some(invert(candidates, point))
}

/// Scratch memory, so that drawing allocates nothing.
#[derive(Debug, Default)]
pub(super) struct Buffers {
    /// `[vocabulary]`, each token's probability relative to the best one's.
    weights: Vec<f32>,
    /// Tokens that may be drawn, with their weights.
    candidates: Vec<(f32, u32)>,
}

fn weight_of(candidates: &[(f32, u32)]) -> f64 {
    candidates.iter().map(|&(weight, _)| f64::from(weight)).sum()
}

/// The first candidate at which the running sum of weights exceeds `point` of the whole.
fn invert(candidates: &[(f32, u32)], point: f64) -> u32 {
    let mut left = point * weight_of(candidates);
    for &(weight, token) in candidates {
        left -= f64::from(weight);
        if left < 0.0 {
            return token;
        }
    }
    // Only rounding leads here. The best token has weight 1, so there is a candidate.
    candidates[candidates.len() - 1].1
}

/// Moves the fewest best candidates with at least `mass` together to the front, and returns their
/// number, at least 1. It is a quickselect on the running sum: linear on average for any
/// distribution.
fn nucleus(candidates: &mut [(f32, u32)], mut mass: f64) -> usize {
    let (mut low, mut high) = (0, candidates.len());
    while high - low > 32 {
        let middle = low + partition(&mut candidates[low..high]);
        let upper = weight_of(&candidates[low..middle]);
        if upper >= mass {
            high = middle;
        } else {
            mass -= upper + f64::from(candidates[middle].0);
            low = middle + 1;
            if mass <= 0.0 {
                return low;
            }
        }
    }
    candidates[low..high].sort_unstable_by(best_first);
    for at in low..high {
        mass -= f64::from(candidates[at].0);
        if mass <= 0.0 {
            return at + 1;
        }
    }
    high.max(1)
}

/// Moves a pivot to its place and better candidates before it. Returns that place.
fn partition(candidates: &mut [(f32, u32)]) -> usize {
    let last = candidates.len() - 1;
    let mut three = [0, last / 2, last];
    three.sort_unstable_by(|&a, &b| best_first(&candidates[a], &candidates[b]));
    candidates.swap(three[1], last);
    let pivot = candidates[last];
    let mut place = 0;
    for at in 0..last {
        if best_first(&candidates[at], &pivot).is_lt() {
            candidates.swap(at, place);
            place += 1;
        }
    }
    candidates.swap(place, last);
    place
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn nucleus_equals_sort() {
        let mut random = ChaCha8Rng::seed_from_u64(2);
        for round in 0..300 {
            let n = random.random_range(1..600);
            let spread = [1, 3, 1000][round % 3];
            // Sums of sixteenths are exact, so both ways have the same sums.
            let mut candidates: Vec<(f32, u32)> =
                (0..n).map(|id| (random.random_range(1..=spread) as f32 / 16.0, id)).collect();
            let total = weight_of(&candidates);
            let mass = total * f64::from(random.random_range(0..=16)) / 16.0;
            let mut sorted = candidates.clone();
            sorted.sort_by(best_first);
            let mut sum = 0.0;
            let wanted = sorted.iter().position(|c| {
                sum += f64::from(c.0);
                sum >= mass
            });
            let wanted = wanted.unwrap() + 1;
            let got = nucleus(&mut candidates, mass);
            assert_eq!(got, wanted, "round {round}");
            candidates.truncate(got);
            candidates.sort_by(best_first);
            assert_eq!(candidates, sorted[..wanted], "round {round}");
        }
    }
}

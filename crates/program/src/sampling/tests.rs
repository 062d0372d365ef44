//! Compares the sampler with a naive one that sorts everything, in numbers and in frequencies.

use std::sync::Arc;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::*;

/// The sampling of a text that continues a prompt.
#[derive(Debug, Clone, Default)]
struct Setting {
    sampling: Sampling,
    bias: Vec<(u32, f32)>,
    prompt: Vec<u32>,
    text: Vec<u32>,
    /// The number of last tokens that the counts do not include.
    uncounted: usize,
    forbidden: Vec<u32>,
}

impl Setting {
    fn choice(&self, vocabulary: usize, counter: u64) -> Choice {
        let mut counts = TokenCounts::new(&self.prompt);
        let counted = &self.text[..self.text.len() - self.uncounted];
        counted.iter().for_each(|token| counts.record(*token));
        let mut mask = TokenMask::none(vocabulary);
        let allowed = |token: &u32| !self.forbidden.contains(token);
        (0..vocabulary as u32).filter(allowed).for_each(|token| mask.allow(token));
        Choice {
            counts: Some(Arc::new(counts)),
            bias: Some(self.bias.clone().into()),
            mask: (!self.forbidden.is_empty()).then(|| Arc::new(mask)),
            ..Choice::sample(0, self.sampling, counter)
        }
    }

    fn choose(&self, sampler: &mut Sampler, logits: &[f32], counter: u64) -> Option<u32> {
        let generated = &self.text[self.text.len() - self.uncounted..];
        sampler.choose(&self.choice(logits.len(), counter), generated, logits)
    }
}

impl From<Sampling> for Setting {
    fn from(sampling: Sampling) -> Self {
        Setting { sampling, ..Setting::default() }
    }
}

/// Probabilities from the definition: full sorts, `f64`, one operation after the other.
fn naive(logits: &[f32], setting: &Setting) -> Vec<f64> {
    let Setting { sampling, prompt, text, .. } = setting;
    let mut x: Vec<f64> =
        logits.iter().map(|&l| if l.is_nan() { f64::NEG_INFINITY } else { f64::from(l) }).collect();
    for token in 0..x.len() as u32 {
        let logit = &mut x[token as usize];
        let count = text.iter().filter(|&&other| other == token).count();
        if count > 0 || prompt.contains(&token) {
            let penalty = f64::from(sampling.repetition_penalty);
            *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
        }
        if count > 0 {
            *logit -= f64::from(sampling.presence_penalty);
            *logit -= f64::from(sampling.frequency_penalty) * count as f64;
        }
        let biases = setting.bias.iter().filter(|bias| bias.0 == token);
        *logit += biases.map(|bias| f64::from(bias.1)).sum::<f64>();
        if setting.forbidden.contains(&token) {
            *logit = f64::NEG_INFINITY;
        }
    }
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let temperature = f64::from(sampling.temperature);
    let mut p: Vec<f64> = x.iter().map(|x| ((x - max) / temperature).exp()).collect();
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&a, &b| p[b].total_cmp(&p[a]).then(a.cmp(&b)));
    if sampling.top_k > 0 {
        order.iter().skip(sampling.top_k).for_each(|&token| p[token] = 0.0);
    }
    normalise(&mut p);
    if sampling.top_p < 1.0 {
        let mut before = 0.0;
        for (rank, &token) in order.iter().enumerate() {
            let probability = p[token];
            if rank > 0 && before >= f64::from(sampling.top_p) {
                p[token] = 0.0;
            }
            before += probability;
        }
    }
    normalise(&mut p);
    let floor = p.iter().copied().fold(0.0, f64::max) * f64::from(sampling.min_p);
    p.iter_mut().filter(|p| **p < floor).for_each(|p| *p = 0.0);
    normalise(&mut p);
    p
}

fn normalise(p: &mut [f64]) {
    let total: f64 = p.iter().sum();
    p.iter_mut().for_each(|p| *p /= total);
}

fn random_logits(random: &mut ChaCha8Rng, vocabulary: usize, spread: f32) -> Vec<f32> {
    (0..vocabulary).map(|_| random.random_range(-spread..spread)).collect()
}

fn random_setting(random: &mut ChaCha8Rng, vocabulary: u32) -> Setting {
    let mut sometimes = |value: f32, neutral| if random.random_bool(0.5) { value } else { neutral };
    let (top_p, min_p) = (sometimes(0.8, 1.0), sometimes(0.05, 0.0));
    let penalties = [sometimes(1.4, 1.0), sometimes(0.7, 0.0), sometimes(-0.4, 0.0)];
    let biased = random.random_range(0..vocabulary);
    let sampling = Sampling {
        temperature: random.random_range(0.3..2.0),
        top_k: [0, 1, 5, 12, 1000][random.random_range(0..5)],
        top_p,
        min_p,
        repetition_penalty: penalties[0],
        presence_penalty: penalties[1],
        frequency_penalty: penalties[2],
        seed: random.random(),
    };
    let bias = vec![(biased, 1.5), (0, f32::NEG_INFINITY), (biased, 0.5)];
    let mut tokens = || (0..6).map(|_| random.random_range(0..vocabulary)).collect();
    let (prompt, text): (Vec<u32>, Vec<u32>) = (tokens(), tokens());
    // The bias forbids token 0. At least one other token stays allowed.
    let forbidden = (0..random.random_range(0..3)).map(|_| random.random_range(2..vocabulary));
    let forbidden = forbidden.collect();
    let uncounted = random.random_range(0..3);
    Setting { sampling, bias, prompt, text, uncounted, forbidden }
}

/// Compares Pearson's statistic with its 99.99 % quantile (Wilson and Hilferty's approximation).
/// Cells that expect fewer than 5 are joined. Seeds are fixed, so the result is always the same.
fn agrees(counts: &[usize], p: &[f64]) -> bool {
    let draws: usize = counts.iter().sum();
    let (mut statistic, mut cells, mut rest) = (0.0, 0, (0.0, 0.0));
    for (&count, &p) in counts.iter().zip(p) {
        let expected = p * draws as f64;
        if p == 0.0 && count > 0 {
            return false;
        }
        if expected < 5.0 {
            rest = (rest.0 + expected, rest.1 + count as f64);
        } else {
            statistic += (count as f64 - expected).powi(2) / expected;
            cells += 1;
        }
    }
    if rest.0 >= 5.0 {
        statistic += (rest.1 - rest.0).powi(2) / rest.0;
        cells += 1;
    }
    let freedom = (cells.max(2) - 1) as f64;
    let scale = 2.0 / (9.0 * freedom);
    statistic < freedom * (1.0 - scale + 3.719 * scale.sqrt()).powi(3)
}

#[test]
fn frequencies_are_those_of_the_naive_sampler() {
    let mut random = ChaCha8Rng::seed_from_u64(11);
    let mut sampler = Sampler::default();
    for round in 0..60 {
        let vocabulary = [8, 40, 300][round % 3];
        let logits = random_logits(&mut random, vocabulary, 4.0);
        let setting = random_setting(&mut random, vocabulary as u32);
        let mut counts = vec![0; vocabulary];
        for counter in 0..4000 {
            counts[setting.choose(&mut sampler, &logits, counter).unwrap() as usize] += 1;
        }
        let p = naive(&logits, &setting);
        assert!(agrees(&counts, &p), "round {round}: {setting:?}\n{counts:?}\n{p:?}");
    }
}

#[test]
fn the_statistic_sees_a_wrong_distribution() {
    let p = naive(&[0.0, 1.0, 2.0], &Sampling { temperature: 1.0, ..Sampling::default() }.into());
    let counts: Vec<usize> = p.iter().map(|p| (p * 4000.0) as usize).collect();
    assert!(agrees(&counts, &p));
    assert!(!agrees(&[counts[0] + 150, counts[1], counts[2]], &p));
}

#[test]
fn counts_may_leave_out_tokens_that_the_executor_knows() {
    let mut random = ChaCha8Rng::seed_from_u64(12);
    let mut sampler = Sampler::default();
    for counter in 0..300 {
        let logits = random_logits(&mut random, 30, 4.0);
        let setting = random_setting(&mut random, 30);
        let whole = Setting { uncounted: 0, ..setting.clone() };
        let expected = whole.choose(&mut sampler, &logits, counter);
        assert_eq!(setting.choose(&mut sampler, &logits, counter), expected, "{setting:?}");
    }
}

/// Numbers that a kernel must reproduce.
#[test]
fn numbers_drawn_are_these() {
    let drawn = [(0, 0), (0, 1), (7, 3), (u64::MAX, 1 << 40)].map(|(s, c)| draw::uniform(s, c));
    assert_eq!(drawn, DRAWN);
}

const DRAWN: [f64; 4] =
    [0.7090754154265618, 0.755531016687046, 0.18154186395125538, 0.9613713992109447];

#[test]
fn numbers_drawn_depend_on_seed_and_counter_alone() {
    let mut random = ChaCha8Rng::seed_from_u64(5);
    let logits = random_logits(&mut random, 100, 1.0);
    let sampling = |seed| Sampling { temperature: 1.0, seed, ..Sampling::default() };
    let mut sampler = Sampler::default();
    let mut text = |seed, order: &[usize]| {
        let setting = Setting::from(sampling(seed));
        let mut text = vec![0; order.len()];
        for &at in order {
            text[at] = setting.choose(&mut sampler, &logits, at as u64).unwrap();
        }
        text
    };
    let forward: Vec<usize> = (0..50).collect();
    let backward: Vec<usize> = (0..50).rev().collect();
    assert_eq!(text(1, &forward), text(1, &backward));
    assert_ne!(text(1, &forward), text(2, &forward));
    // Neighbouring seeds and counters are unrelated: points are uniform in both directions.
    let mut counts = [[0; 10]; 2];
    for n in 0..5000 {
        counts[0][(draw::uniform(7, n) * 10.0) as usize] += 1;
        counts[1][(draw::uniform(n, 7) * 10.0) as usize] += 1;
    }
    assert!(agrees(&counts[0], &[0.1; 10]) && agrees(&counts[1], &[0.1; 10]));
}

#[test]
fn greedy_takes_the_lowest_best_token_after_penalties_bias_and_mask() {
    let mut sampler = Sampler::default();
    let mut choose = |setting: Setting, logits: &[f32]| setting.choose(&mut sampler, logits, 0);
    let greedy = Setting::default();
    assert_eq!(choose(greedy.clone(), &[1.0, 3.0, 3.0]), Some(1));
    let sampling = Sampling { repetition_penalty: 2.0, ..Sampling::default() };
    let penalty = Setting { prompt: vec![1], ..sampling.into() };
    assert_eq!(choose(penalty, &[1.0, 3.0, 2.0]), Some(2));
    let bias = Setting { bias: vec![(0, 9.0)], ..greedy.clone() };
    assert_eq!(choose(bias, &[1.0, 3.0, 2.0]), Some(0));
    let mask = Setting { forbidden: vec![1], bias: vec![(1, 9.0)], ..greedy.clone() };
    assert_eq!(choose(mask, &[1.0, 3.0, 2.0]), Some(2));
    let all = Setting { forbidden: vec![0, 1, 2], ..greedy };
    assert_eq!(choose(all, &[1.0, 3.0, 2.0]), None);
}

#[test]
fn strange_logits_are_never_chosen() {
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    let mut sampler = Sampler::default();
    let warm = Sampling { temperature: 1.0, ..Sampling::default() };
    let variants = [
        Sampling::default(),
        warm,
        Sampling { top_k: 2, ..warm },
        Sampling { top_p: 0.0, ..warm },
        Sampling { top_p: 0.5, min_p: 1.0, ..warm },
        Sampling { temperature: f32::MIN_POSITIVE, ..warm },
        Sampling { presence_penalty: f32::MAX, ..warm },
    ];
    for sampling in variants {
        let setting = Setting { prompt: vec![0], ..sampling.into() };
        let mut sample = |logits: &[f32], counter| setting.choose(&mut sampler, logits, counter);
        for counter in 0..50 {
            assert_eq!(sample(&[nan, -inf, nan], counter), None);
            assert_eq!(sample(&[], counter), None);
            assert_eq!(sample(&[nan, inf, -inf, 0.0], counter), Some(1), "{sampling:?}");
            assert_eq!(sample(&[nan, -inf, -3e38, nan], counter), Some(2), "{sampling:?}");
        }
    }
}

#[test]
fn parameters_out_of_range_are_refused() {
    let check = |change: fn(&mut Sampling)| {
        let mut sampling = Sampling::default();
        change(&mut sampling);
        sampling.validate().map_err(|error| error.to_string())
    };
    assert_eq!(check(|_| ()), Ok(()));
    assert!(check(|s| s.temperature = -1.0).is_err());
    assert!(check(|s| s.temperature = f32::INFINITY).is_err());
    assert!(check(|s| s.top_p = 1.1).is_err());
    assert!(check(|s| s.min_p = f32::NAN).is_err());
    assert!(check(|s| s.repetition_penalty = 0.0).is_err());
    assert!(check(|s| s.frequency_penalty = f32::NAN).is_err());
    assert_eq!(validate_bias(&[(9, f32::NEG_INFINITY), (0, -2.0)], 10), Ok(()));
    assert!(validate_bias(&[(1, f32::INFINITY)], 10).is_err());
    let error = validate_bias(&[(10, 1.0)], 10).unwrap_err().to_string();
    assert_eq!(error, "logit_bias names token 10, outside the vocabulary of 10");
}

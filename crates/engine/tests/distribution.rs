//! With drafts, texts have the distribution of plain decoding.
//!
//! Other tests compare texts seed by seed. This one compares counts of continuations between runs
//! with different seeds, as one would test an engine whose drafts are verified by rejection. A
//! last test shows that the statistic tells another temperature apart.
//!
//! `LATHE_DISTRIBUTION_SAMPLES` is the number of samples of each run, by default 1,500.

use std::sync::Arc;

use lathe_engine::{
    DraftText, DraftTree, Drafter, Engine, EngineConfig, Event, ModelDrafter, Request, RequestId,
    Sampling,
};
use lathe_program::conformance::SeededWeights;
use lathe_program::conformance::models::SmallDecoder;
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, BackendError, Executor, ExecutorOptions, KvFormat};
use lathe_tensor::Format;

/// Tokens of the model.
const VOCABULARY: usize = 8;
/// Tokens of a continuation. The first follows the prompt, the others may be drafted.
const LENGTH: usize = 3;

fn samples() -> usize {
    let given = std::env::var("LATHE_DISTRIBUTION_SAMPLES").ok();
    given.map_or(1500, |text| text.parse().expect("a number of samples"))
}

fn executor(seed: u64) -> Box<dyn Executor> {
    let decoder = SmallDecoder { vocabulary: VOCABULARY, ..SmallDecoder::grouped() };
    let program = Arc::new(decoder.program());
    let weights = SeededWeights { program: &program, format: Format::F32, seed };
    let options = ExecutorOptions {
        kv_blocks: 256,
        kv_format: Some(KvFormat::F32),
        rows_max: 256,
        threads: Some(1),
        exact: true,
    };
    ReferenceBackend::new().prepare(program.clone(), &weights, &options).unwrap()
}

/// Who drafts.
#[derive(Debug, Clone, Copy)]
enum Who {
    Nobody,
    /// The model itself.
    Right,
    /// Another model.
    Other,
    /// Every token after every token, as a tree of two layers.
    Everything,
}

/// Drafts whatever it costs.
struct Eager(Option<ModelDrafter>);

impl Drafter for Eager {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        let Some(model) = &mut self.0 else {
            for (text, tree) in texts.iter().zip(trees) {
                for first in 0..VOCABULARY.min(text.nodes_max) {
                    tree.push(None, first as u32);
                }
                for second in 0..VOCABULARY * usize::from(text.depth_max > 1) {
                    if tree.len() < text.nodes_max {
                        tree.push(Some(second % 3), second as u32);
                    }
                }
            }
            return Ok(());
        };
        let mut texts = texts.to_vec();
        for text in &mut texts {
            (text.probability_min, text.step_seconds) = (1e-4, 1e9);
        }
        model.propose(&texts, trees)
    }

    fn forget(&mut self, request: RequestId) {
        if let Some(model) = &mut self.0 {
            model.forget(request);
        }
    }
}

/// How often each continuation came, and how many drafted tokens were accepted.
fn counts(who: Who, sampling: Sampling, first_seed: u64) -> (Vec<f64>, u64) {
    let config = EngineConfig { sequences_max: 16, ..EngineConfig::default() };
    let mut engine = Engine::new(executor(5), config).unwrap();
    let drafter = match who {
        Who::Nobody => None,
        Who::Right => Some(Eager(Some(ModelDrafter::new(executor(5))))),
        Who::Other => Some(Eager(Some(ModelDrafter::new(executor(6))))),
        Who::Everything => Some(Eager(None)),
    };
    if let Some(drafter) = drafter {
        engine = engine.with_drafter(Box::new(drafter), 16);
    }
    let mut counts = vec![0.0; VOCABULARY.pow(LENGTH as u32)];
    let all: Vec<u64> = (0..samples() as u64).collect();
    for seeds in all.chunks(500) {
        let mut texts = std::collections::BTreeMap::<RequestId, usize>::new();
        for seed in seeds {
            let request = Request {
                prompt: vec![3, 1, 4, 1, 5],
                sampling: Sampling { seed: first_seed + seed, ..sampling },
                max_tokens: Some(LENGTH),
                ..Request::default()
            };
            engine.add(request, None).unwrap();
        }
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                if let Event::Token { request, token, .. } = event {
                    let text = texts.entry(request).or_default();
                    *text = *text * VOCABULARY + token as usize;
                }
            }
        }
        texts.into_values().for_each(|text| counts[text] += 1.0);
    }
    (counts, engine.stats().accepted_tokens)
}

/// The two-sample chi-square of counts, in standard deviations from its mean. Continuations that
/// came fewer than 10 times count as one.
fn deviation(a: &[f64], b: &[f64]) -> f64 {
    let (mut square, mut bins, mut rest) = (0.0, 0.0, (0.0, 0.0));
    let mut bin = |a: f64, b: f64| {
        if a + b > 0.0 {
            square += (a - b) * (a - b) / (a + b);
            bins += 1.0;
        }
    };
    for (a, b) in a.iter().zip(b) {
        if a + b < 10.0 {
            rest = (rest.0 + a, rest.1 + b);
        } else {
            bin(*a, *b);
        }
    }
    bin(rest.0, rest.1);
    let freedom = f64::max(bins - 1.0, 1.0);
    (square - freedom) / (2.0 * freedom).sqrt()
}

fn total_variation(a: &[f64], b: &[f64]) -> f64 {
    let all: f64 = a.iter().sum();
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / (2.0 * all)
}

#[test]
fn drafts_keep_the_distribution() {
    let plain = Sampling { temperature: 1.0, ..Sampling::default() };
    let settings = [
        plain,
        Sampling { temperature: 0.6, ..plain },
        Sampling { top_k: 3, ..plain },
        Sampling { top_p: 0.8, ..plain },
        Sampling { min_p: 0.1, ..plain },
        Sampling { repetition_penalty: 1.3, frequency_penalty: 0.4, ..plain },
    ];
    for sampling in settings {
        let (first, _) = counts(Who::Nobody, sampling, 0);
        let (second, _) = counts(Who::Nobody, sampling, 10_000_000);
        let noise = total_variation(&first, &second);
        assert!(deviation(&first, &second) < 5.0, "{sampling:?}: two plain runs");
        for who in [Who::Right, Who::Other, Who::Everything] {
            let (drafted, accepted) = counts(who, sampling, 20_000_000);
            let (off, apart) = (deviation(&first, &drafted), total_variation(&first, &drafted));
            assert!(accepted > 0, "{who:?}: nothing was accepted");
            assert!(off < 5.0, "{who:?} {sampling:?}: {off:.1} deviations");
            assert!(apart < 1.3 * noise + 0.01, "{who:?} {sampling:?}: {apart:.3}, {noise:.3}");
        }
    }
}

#[test]
fn another_temperature_is_told_apart() {
    let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
    let (first, _) = counts(Who::Nobody, sampling, 0);
    let colder = Sampling { temperature: 0.7, ..sampling };
    let (second, _) = counts(Who::Right, colder, 20_000_000);
    let off = deviation(&first, &second);
    assert!(off > 10.0, "{off:.1} deviations");
}

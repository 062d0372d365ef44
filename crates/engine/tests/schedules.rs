//! Random schedules with the reference interpreter: how requests are chunked, batched,
//! preempted, resumed, shared or cancelled never changes a token or a bit of its logits.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_engine::{
    DraftText, DraftTree, Drafter, Engine, EngineConfig, Event, FinishReason, ModelDrafter,
    Request, RequestId, Sampling, Stats, TokenLogprobs,
};
use lathe_program::conformance::SeededWeights;
use lathe_program::conformance::models::SmallDecoder;
use lathe_program::reference::ReferenceBackend;
use lathe_program::{Backend, BackendError, Executor, ExecutorOptions, KvFormat, Program};
use lathe_tensor::Format;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Text = Vec<(u32, TokenLogprobs)>;

fn engine(
    program: &Arc<Program>,
    format: KvFormat,
    (rows_max, kv_blocks): (usize, usize),
    config: &EngineConfig,
) -> Engine {
    Engine::new(executor(program, format, (rows_max, kv_blocks), 5), config.clone()).unwrap()
}

fn executor(
    program: &Arc<Program>,
    format: KvFormat,
    (rows_max, kv_blocks): (usize, usize),
    seed: u64,
) -> Box<dyn Executor> {
    let weights = SeededWeights { program, format: Format::F32, seed };
    let options = ExecutorOptions {
        kv_blocks,
        kv_format: Some(format),
        rows_max,
        threads: Some(1),
        exact: true,
    };
    ReferenceBackend::new().prepare(program.clone(), &weights, &options).unwrap()
}

/// Drafts trees whatever they cost.
struct Eager(ModelDrafter);

impl Drafter for Eager {
    fn propose(
        &mut self,
        texts: &[DraftText<'_>],
        trees: &mut [DraftTree],
    ) -> Result<(), BackendError> {
        let mut texts = texts.to_vec();
        for text in &mut texts {
            (text.probability_min, text.step_seconds) = (0.004, 1e9);
            text.depth_max = text.depth_max.min(4);
        }
        self.0.propose(&texts, trees)
    }

    fn forget(&mut self, request: RequestId) {
        self.0.forget(request);
    }
}

/// Texts with a draft model are those without, whether it is always right (`seed` 5) or hardly
/// ever.
fn drafts_agree(decoder: SmallDecoder, format: KvFormat, seed: u64) -> Stats {
    let program = Arc::new(decoder.program());
    let mut random = ChaCha8Rng::seed_from_u64(70 + seed);
    let requests = requests(&mut random);
    let config = EngineConfig { sequences_max: 3, ..EngineConfig::default() };
    let mut plain = engine(&program, format, (32, 64), &config);
    let drafter = Eager(ModelDrafter::new(executor(&program, format, (9, 80), seed)));
    let drafting = engine(&program, format, (32, 64), &config);
    let mut drafting = drafting.with_drafter(Box::new(drafter), 12);
    for request in &requests {
        plain.add(request.clone(), None).unwrap();
        drafting.add(request.clone(), None).unwrap();
    }
    assert_eq!(finish(&mut plain, None), finish(&mut drafting, None));
    drafting.stats()
}

#[test]
fn a_draft_model_changes_no_text() {
    let kinds = [
        (SmallDecoder::grouped(), KvFormat::F32),
        (SmallDecoder::latent(), KvFormat::F32),
        (SmallDecoder::grouped().long_rope_after(24), KvFormat::F32),
        (SmallDecoder::mixture(), KvFormat::BF16),
        (SmallDecoder::gated(), KvFormat::Int8),
    ];
    for (decoder, format) in kinds {
        let right = drafts_agree(decoder.clone(), format, 5);
        assert!(right.accepted_tokens > 40, "{right:?}");
        // It draws by the same random numbers, so that it is right there too.
        assert!(right.steps < right.generated_tokens, "{right:?}");
        let wrong = drafts_agree(decoder, format, 6);
        assert!(wrong.drafted_tokens > 40, "{wrong:?}");
    }
}

/// Steps until all is done; cancels a request now and then if `random` is given.
fn finish(
    engine: &mut Engine,
    mut random: Option<&mut ChaCha8Rng>,
) -> BTreeMap<RequestId, (Text, FinishReason)> {
    let mut texts = BTreeMap::<RequestId, (Text, FinishReason)>::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            let ended = (Vec::new(), FinishReason::Cancelled);
            let text = texts.entry(event.request()).or_insert(ended);
            match event {
                Event::Token { token, logprobs, .. } => text.0.push((token, logprobs.unwrap())),
                Event::Finished { reason, .. } => text.1 = reason,
            }
        }
        engine.validate();
        if let Some(random) = &mut random
            && random.random_bool(0.02)
        {
            engine.cancel(RequestId(random.random_range(0..12)));
        }
    }
    texts
}

/// Requests whose prompts often share beginnings.
fn requests(random: &mut ChaCha8Rng) -> Vec<Request> {
    let system: Vec<u32> = (0..20).map(|_| random.random_range(0..96)).collect();
    let request = |index: u64| {
        let shared = if random.random_bool(0.7) { random.random_range(1..20) } else { 0 };
        let own = random.random_range(1..14);
        let mut prompt = system[..shared].to_vec();
        prompt.extend((0..own).map(|_| random.random_range(0..96)));
        let temperature = if random.random_bool(0.7) { 0.0 } else { 1.0 };
        let sampling = Sampling { temperature, seed: index, ..Sampling::default() };
        let max_tokens = Some(random.random_range(1..20));
        Request { prompt, sampling, max_tokens, logprobs: Some(3), ..Request::default() }
    };
    (0..12).map(request).collect()
}

fn schedules_agree(decoder: SmallDecoder, format: KvFormat, seed: u64) -> Stats {
    let program = Arc::new(decoder.program());
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let roomy = EngineConfig { sequences_max: 1, prefix_cache: false, ..EngineConfig::default() };
    let requests = requests(&mut random);
    let mut one_by_one = engine(&program, format, (64, 64), &roomy);
    let alone = requests.iter().map(|request| {
        one_by_one.add(request.clone(), None).unwrap();
        finish(&mut one_by_one, None).into_values().next().unwrap()
    });
    let alone: Vec<_> = alone.collect();
    let mut last = Stats::default();
    for round in 0..6 {
        let rows_max = random.random_range(1..24);
        let config = EngineConfig {
            sequences_max: random.random_range(1..8),
            prefix_cache: round > 0,
            kv_cache: round != 1,
            ..EngineConfig::default()
        };
        // The longest request needs 14 full blocks and 3 of the window.
        let kv_blocks = random.random_range(17..40);
        let mut engine = engine(&program, format, (rows_max, kv_blocks), &config);
        // Twice, so that the second time finds what the first one left.
        for repeat in 0..2 {
            for request in &requests {
                engine.add(request.clone(), None).unwrap();
            }
            let texts = finish(&mut engine, (repeat == 0).then_some(&mut random));
            for ((request, (text, reason)), (expected, _)) in texts.into_iter().zip(&alone) {
                let length = text.len();
                assert_eq!(text, expected[..length], "{request:?} in {config:?}");
                assert!(length == expected.len() || reason == FinishReason::Cancelled);
            }
        }
        last.preemptions += engine.stats().preemptions;
        last.prefix_hit_tokens += engine.stats().prefix_hit_tokens;
    }
    last
}

#[test]
fn grouped_attention_with_windows() {
    let stats = schedules_agree(SmallDecoder::grouped(), KvFormat::F32, 1);
    assert!(stats.preemptions > 0 && stats.prefix_hit_tokens > 0, "{stats:?}");
}

#[test]
fn grouped_attention_with_a_quantized_cache() {
    for (seed, format) in [(2, KvFormat::Int8), (3, KvFormat::Int4), (4, KvFormat::F8E4M3)] {
        let stats = schedules_agree(SmallDecoder::grouped(), format, seed);
        assert!(stats.prefix_hit_tokens > 0, "{stats:?}");
    }
}

#[test]
fn latent_attention() {
    for (seed, format) in [(5, KvFormat::F32), (7, KvFormat::Int4)] {
        let stats = schedules_agree(SmallDecoder::latent(), format, seed);
        assert!(stats.prefix_hit_tokens > 0, "{stats:?}");
    }
}

#[test]
fn texts_that_outgrow_the_short_rotary_tables() {
    for (seed, decoder) in [(8, SmallDecoder::grouped()), (9, SmallDecoder::latent())] {
        let stats = schedules_agree(decoder.long_rope_after(24), KvFormat::F32, seed);
        assert!(stats.preemptions > 0 && stats.prefix_hit_tokens > 0, "{stats:?}");
    }
}

#[test]
fn mixture_of_experts() {
    let stats = schedules_agree(SmallDecoder::mixture(), KvFormat::BF16, 6);
    assert!(stats.prefix_hit_tokens > 0, "{stats:?}");
}

//! Random schedules: how requests are chunked, batched, preempted, resumed, shared or cancelled
//! never changes a token of a greedy text, nor a bit of its log-probabilities.

use std::collections::BTreeMap;
use std::sync::Arc;

use lathe_engine::kv::KvCache;
use lathe_engine::{
    Engine, EngineConfig, Event, FinishReason, Request, RequestId, Stats, TokenLogprobs,
};
use lathe_model::Model;
use lathe_program::Program;
use lathe_program::conformance::Random;

use crate::{executor, models, options, program};

type Text = Vec<(u32, TokenLogprobs)>;

/// Tokens of a prompt and of an answer at most.
const PROMPT: usize = 34;
const ANSWER: usize = 16;

fn engine(
    model: &Model,
    program: &Arc<Program>,
    (rows_max, kv_blocks): (usize, usize),
    config: &EngineConfig,
) -> Engine {
    let executor = executor(model, program, &options(kv_blocks, rows_max, false));
    Engine::new(executor, config.clone()).expect("an engine")
}

/// Steps until all is done; cancels a request now and then if `random` is given.
fn finish(
    engine: &mut Engine,
    mut random: Option<&mut Random>,
) -> BTreeMap<RequestId, (Text, FinishReason)> {
    let mut texts = BTreeMap::<RequestId, (Text, FinishReason)>::new();
    while !engine.is_idle() {
        for event in engine.step().expect("a step") {
            let ended = (Vec::new(), FinishReason::Cancelled);
            let text = texts.entry(event.request()).or_insert(ended);
            match event {
                Event::Token { token, logprobs, .. } => {
                    text.0.push((token, logprobs.expect("asked")))
                }
                Event::Finished { reason, .. } => text.1 = reason,
            }
        }
        engine.validate();
        if let Some(random) = &mut random
            && random.below(40) == 0
        {
            engine.cancel(RequestId(random.below(6) as u64));
        }
    }
    texts
}

/// Requests whose prompts often share beginnings.
fn requests(vocabulary: usize, random: &mut Random) -> Vec<Request> {
    let token = |random: &mut Random| random.below(vocabulary) as u32;
    let system: Vec<u32> = (0..22).map(|_| token(random)).collect();
    let mut request = || {
        let shared = if random.below(10) < 7 { random.between(1, 22) } else { 0 };
        let own = random.between(1, PROMPT - 22);
        let mut prompt = system[..shared].to_vec();
        prompt.extend((0..own).map(|_| token(random)));
        let max_tokens = Some(random.between(1, ANSWER));
        Request { prompt, max_tokens, logprobs: Some(2), ..Request::default() }
    };
    (0..6).map(|_| request()).collect()
}

/// Runs the requests alone, then in random schedules; what those met.
fn schedules_agree(model: &Model, random: &mut Random) -> Stats {
    let program = program(model, 4);
    let least = KvCache::new(&program.kv, 1 << 20, 1, None).pages_for(PROMPT + ANSWER);
    let requests = requests(program.vocabulary, random);
    let roomy = EngineConfig { sequences_max: 1, prefix_cache: false, ..EngineConfig::default() };
    let mut one_by_one = engine(model, &program, (64, 4 * least), &roomy);
    let alone = requests.iter().map(|request| {
        one_by_one.add(request.clone(), None).expect("fits");
        finish(&mut one_by_one, None).into_values().next().expect("a text").0
    });
    let alone: Vec<Text> = alone.collect();
    let mut met = Stats::default();
    for round in 0..3 {
        let rows_max = random.between(1, 24);
        let config = EngineConfig {
            sequences_max: random.between(1, 6),
            prefix_cache: round > 0,
            kv_cache: round != 1,
            ..EngineConfig::default()
        };
        let kv_blocks = least + random.between(1, least);
        let mut engine = engine(model, &program, (rows_max, kv_blocks), &config);
        // Twice, so that the second time finds what the first one left.
        for repeat in 0..2 {
            for request in &requests {
                engine.add(request.clone(), None).expect("fits");
            }
            let texts = finish(&mut engine, (repeat == 0).then_some(&mut *random));
            for ((text, reason), expected) in texts.into_values().zip(&alone) {
                let length = text.len();
                assert_eq!(text, expected[..length], "{} in {config:?}", model.name);
                assert!(length == expected.len() || reason == FinishReason::Cancelled);
            }
        }
        met.preemptions += engine.stats().preemptions;
        met.prefix_hit_tokens += engine.stats().prefix_hit_tokens;
    }
    met
}

#[test]
fn no_schedule_changes_a_text() {
    let mut random = Random::named(11, "schedules of tiny models");
    let mut met = Stats::default();
    for model in models() {
        let stats = schedules_agree(&model, &mut random);
        met.preemptions += stats.preemptions;
        met.prefix_hit_tokens += stats.prefix_hit_tokens;
    }
    // The schedules are worth something only if they met what could go wrong.
    assert!(met.preemptions > 20 && met.prefix_hit_tokens > 500, "{met:?}");
}

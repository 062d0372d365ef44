//! One request, or a few: the simple cases.

use super::fake::{FakeExecutor, VOCABULARY, layout};
use crate::*;

fn engine(config: EngineConfig) -> Engine {
    engine_with(64, config)
}

fn engine_with(kv_blocks: usize, config: EngineConfig) -> Engine {
    let executor = FakeExecutor::new(layout(4, &[None, Some(6)]), 100, 8, kv_blocks);
    Engine::new(Box::new(executor), config).unwrap()
}

fn config() -> EngineConfig {
    EngineConfig { sequences_max: 4, waiting_max: 8, ..EngineConfig::default() }
}

fn request(prompt: &[u32], max_tokens: usize) -> Request {
    Request { prompt: prompt.to_vec(), max_tokens: Some(max_tokens), ..Request::default() }
}

/// Runs to the end; tokens and reason by request.
fn finish(engine: &mut Engine) -> Vec<(Vec<u32>, FinishReason)> {
    let mut texts =
        std::collections::BTreeMap::<RequestId, (Vec<u32>, Option<FinishReason>)>::new();
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            let text = texts.entry(event.request()).or_default();
            assert_eq!(text.1, None, "an event after the end");
            match event {
                Event::Token { token, .. } => text.0.push(token),
                Event::Finished { reason, .. } => text.1 = Some(reason),
            }
        }
        engine.validate();
    }
    assert_eq!(engine.stats().blocks_used, 0);
    texts.into_values().map(|(tokens, reason)| (tokens, reason.unwrap())).collect()
}

#[test]
fn batched_text_is_the_text_alone() {
    let requests: Vec<Request> =
        (1..9).map(|n| request(&(0..n * 3).collect::<Vec<u32>>(), 5 + n as usize)).collect();
    let mut together = engine(config());
    for request in &requests {
        together.add(request.clone(), None).unwrap();
    }
    let together = finish(&mut together);
    for (request, together) in requests.into_iter().zip(together) {
        let mut alone = engine(config());
        alone.add(request, None).unwrap();
        assert_eq!(finish(&mut alone), [together]);
    }
}

#[test]
fn stop_tokens_and_limits_end_a_text() {
    let mut engine = engine(config());
    engine.add(request(&[1, 2, 3], 20), None).unwrap();
    let (tokens, reason) = finish(&mut engine).remove(0);
    assert_eq!((tokens.len(), reason), (20, FinishReason::Length));
    let stop_tokens = vec![tokens[7]];
    let first = tokens.iter().position(|token| *token == tokens[7]).unwrap();
    engine
        .add(Request { stop_tokens: stop_tokens.clone(), ..request(&[1, 2, 3], 20) }, None)
        .unwrap();
    assert_eq!(finish(&mut engine), [(tokens[..=first].to_vec(), FinishReason::Stop)]);
    engine
        .add(Request { stop_tokens, ignore_stop: true, ..request(&[1, 2, 3], 20) }, None)
        .unwrap();
    assert_eq!(finish(&mut engine), [(tokens, FinishReason::Length)]);
    engine.add(Request { max_tokens: None, ..request(&[1; 90], 1) }, None).unwrap();
    assert_eq!(finish(&mut engine)[0].0.len(), 10, "the context is full");
}

#[test]
fn without_cache_the_text_is_the_same_and_the_rows_grow() {
    let mut cached = engine(EngineConfig { prefix_cache: false, ..config() });
    let mut uncached = engine(EngineConfig { kv_cache: false, ..config() });
    for engine in [&mut cached, &mut uncached] {
        engine.add(request(&[1, 2, 3], 20), None).unwrap();
        engine.add(request(&[4; 30], 20), None).unwrap();
    }
    assert_eq!(finish(&mut cached), finish(&mut uncached));
    assert_eq!(cached.stats().rows, 3 + 19 + 30 + 19);
    let all: u64 = (0..20).map(|n| (3 + n) + (30 + n)).sum();
    assert_eq!(uncached.stats().rows, all);
}

#[test]
fn bad_requests_are_refused() {
    let mut engine = engine_with(20, EngineConfig { waiting_max: 1, ..config() });
    let mut add = |request| engine.add(request, None).map(drop);
    assert_eq!(add(request(&[], 1)), Err(AddError::EmptyPrompt));
    assert_eq!(add(request(&[1], 0)), Err(AddError::NothingToGenerate));
    let error = AddError::TokenOutOfRange { token: 61, position: 1, vocabulary: VOCABULARY };
    assert_eq!(add(request(&[1, 61], 1)), Err(error));
    assert_eq!(
        add(request(&[1; 100], 1)),
        Err(AddError::PromptTooLong { tokens: 100, context_max: 100 })
    );
    // 80 + 10 - 1 positions: 23 full blocks, and 3 for the window.
    assert_eq!(
        add(request(&[1; 80], 10)),
        Err(AddError::TooFewBlocks { needed: 26, available: 20 })
    );
    let stop_strings = vec!["a".to_string(), String::new()];
    assert_eq!(
        add(Request { stop_strings, ..request(&[1], 1) }),
        Err(AddError::EmptyStopString { index: 1 })
    );
    let stop_strings = vec!["a".to_string()];
    let error = AddError::StopStringsNeedText { stop_strings: 1 };
    assert_eq!(add(Request { stop_strings, ..request(&[1], 1) }), Err(error));
    let sampling = Sampling { top_p: f32::NAN, ..Sampling::default() };
    assert!(matches!(add(Request { sampling, ..request(&[1], 1) }), Err(AddError::Sampling(_))));
    assert_eq!(add(request(&[1], 1)), Ok(()));
    assert_eq!(add(request(&[1], 1)), Err(AddError::QueueFull { waiting: 1, waiting_max: 1 }));
}

#[test]
fn cancelled_requests_end_once() {
    let mut engine = engine(config());
    let first = engine.add(request(&[1; 40], 10), None).unwrap();
    let second = engine.add(request(&[1; 4], 3), None).unwrap();
    engine.step().unwrap();
    assert!(engine.cancel(first));
    assert!(!engine.cancel(first));
    let texts = finish(&mut engine);
    assert_eq!(texts[0], (vec![], FinishReason::Cancelled));
    assert_eq!(texts[1].1, FinishReason::Length);
    assert!(!engine.cancel(second));
}

#[test]
fn score_is_the_same_in_any_chunks() {
    let tokens: Vec<u32> = (0..57).map(|n| n * 7 % 61).collect();
    let run = |rows_max| {
        let mut executor = FakeExecutor::new(layout(4, &[None, Some(6)]), 100, rows_max, 40);
        score(&mut executor, &tokens, 3).unwrap()
    };
    let whole = run(57);
    assert_eq!(whole.logprobs.len(), 56);
    assert_eq!(whole.top.len(), 3);
    assert_eq!(whole, run(1));
    assert_eq!(whole, run(13));
}

/// Spells tokens as bytes: even ones are ASCII letters, odd ones halves of a two-byte character.
struct Bytes(Vec<u8>);

fn spell(token: u32) -> u8 {
    match token % 4 {
        1 => 0xc3,
        3 => 0xa9,
        _ => b'a' + (token / 2 % 4) as u8,
    }
}

impl TextDecoder for Bytes {
    fn push(&mut self, token: u32) -> Option<String> {
        self.0.push(spell(token));
        let incomplete = usize::from(self.0.last() == Some(&0xc3));
        let rest = self.0.split_off(self.0.len() - incomplete);
        let text = std::mem::replace(&mut self.0, rest);
        (!text.is_empty()).then(|| String::from_utf8_lossy(&text).into_owned())
    }

    fn flush(&mut self) -> Option<String> {
        let rest = std::mem::take(&mut self.0);
        (!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned())
    }
}

#[test]
fn deltas_join_to_the_text_before_the_stop_string() {
    let run = |stop_strings: Vec<String>| {
        let mut engine = engine(config());
        let request = Request { stop_strings, ..request(&[9, 2, 3], 60) };
        engine.add(request, Some(Box::new(Bytes(Vec::new())))).unwrap();
        let (mut deltas, mut end) = (String::new(), None);
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                match event {
                    Event::Token { text, .. } => deltas.push_str(&text),
                    Event::Finished { reason, generated_tokens, .. } => {
                        end = Some((reason, generated_tokens));
                    }
                }
            }
        }
        (deltas, end.unwrap())
    };
    let (whole, end) = run(Vec::new());
    assert_eq!(end, (FinishReason::Length, 60));
    for length in 1..6 {
        for start in (0..whole.len() - length).step_by(3) {
            let Some(stop) = whole.get(start..start + length) else { continue };
            let (text, (reason, generated)) = run(vec!["~~~".to_string(), stop.to_string()]);
            assert_eq!(text, whole[..whole.find(stop).unwrap()]);
            assert!(reason == FinishReason::Stop && generated <= 60);
        }
    }
}

#[test]
fn reported_logprobs_are_those_of_scoring() {
    let mut engine = engine(config());
    let sampling = Sampling { temperature: 2.0, repetition_penalty: 1.5, ..Sampling::default() };
    let prompt = vec![5, 6, 7];
    let asked = Request { sampling, logprobs: Some(4), ..request(&prompt, 30) };
    engine.add(asked, None).unwrap();
    let (mut tokens, mut reported) = (prompt, Vec::new());
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            if let Event::Token { token, logprobs, .. } = event {
                tokens.push(token);
                reported.push(logprobs.unwrap());
            }
        }
    }
    let mut executor = FakeExecutor::new(layout(4, &[None, Some(6)]), 100, 8, 40);
    let scored = score(&mut executor, &tokens, 0).unwrap();
    for (reported, scored) in reported.iter().zip(&scored.logprobs[2..]) {
        assert_eq!(reported.logprob, *scored as f32);
        assert_eq!(reported.top.len(), 4);
        assert!(
            reported.top.is_sorted_by(|a, b| a.1 >= b.1) && reported.top[0].1 >= reported.logprob
        );
    }
}

//! Prefix reuse: chats, shared beginnings, eviction.

use super::fake::{FakeExecutor, layout, naive_logits};
use crate::*;

fn engine(windows: &[Option<usize>], kv_blocks: usize, prefix_cache: bool) -> Engine {
    let executor = FakeExecutor::new(layout(4, windows), 400, 16, kv_blocks);
    let config = EngineConfig { prefix_cache, ..EngineConfig::default() };
    Engine::new(Box::new(executor), config).unwrap()
}

/// Runs one request: its tokens, and how many of its prompt's were cached.
fn run(engine: &mut Engine, prompt: &[u32], max_tokens: usize) -> (Vec<u32>, usize) {
    let request =
        Request { prompt: prompt.to_vec(), max_tokens: Some(max_tokens), ..Request::default() };
    engine.add(request, None).unwrap();
    let (mut tokens, mut cached) = (Vec::new(), 0);
    while !engine.is_idle() {
        for event in engine.step().unwrap() {
            match event {
                Event::Token { token, .. } => tokens.push(token),
                Event::Finished { cached_tokens, .. } => cached = cached_tokens,
            }
        }
        engine.validate();
    }
    (tokens, cached)
}

/// Each turn of a chat finds all that the turn before computed, the unfinished block included:
/// everything but the last token that was generated.
#[test]
fn a_chat_computes_only_what_is_new() {
    for windows in [&[None][..], &[Some(6)], &[None, Some(6), Some(3)]] {
        let mut engine = engine(windows, 300, true);
        let mut text: Vec<u32> = Vec::new();
        let mut rows = 0;
        for turn in 0..12 {
            let before = text.len();
            text.extend((0..3 + turn % 4).map(|n| n * 5 + turn));
            let (tokens, cached) = run(&mut engine, &text, 5 + turn as usize % 3);
            assert_eq!(cached, before.saturating_sub(1), "windows {windows:?}, turn {turn}");
            rows += text.len() - cached + tokens.len() - 1;
            assert_eq!(engine.stats().rows, rows as u64);
            for token in tokens {
                assert_eq!(
                    Some(token),
                    lathe_program::logits::argmax(&naive_logits(&text, windows))
                );
                text.push(token);
            }
        }
        let stats = engine.stats();
        assert!(stats.prefix_hit_rate() > 0.8, "{stats:?}");
    }
}

#[test]
fn requests_share_a_beginning_without_copies() {
    let mut engine = engine(&[None, Some(6)], 300, true);
    let system: Vec<u32> = (0..42).collect();
    let with = |user: u32| [&system[..], &[user; 5]].concat();
    assert_eq!(run(&mut engine, &with(1), 4).1, 0);
    // 42 tokens are 10 full blocks; the block where they part cannot be shared.
    assert_eq!(run(&mut engine, &with(2), 4).1, 40);
    for user in 3..8 {
        let prompt = with(user);
        engine.add(Request { prompt, max_tokens: Some(20), ..Request::default() }, None).unwrap();
    }
    let mut most = 0;
    while !engine.is_idle() {
        engine.step().unwrap();
        engine.validate();
        most = most.max(engine.stats().blocks_used);
    }
    // One copy of the full group's 10 blocks; for each of 5 texts 7 more and 3 of the window.
    assert!(most <= 10 + 5 * (7 + 3), "{most} pages");
}

#[test]
fn a_prompt_seen_before_computes_its_last_token_only() {
    let mut engine = engine(&[None, Some(6)], 300, true);
    for length in [1, 3, 4, 5, 8, 23, 24, 25] {
        let prompt: Vec<u32> = (0..length).map(|n| n + length).collect();
        let first = run(&mut engine, &prompt, 1);
        let again = run(&mut engine, &prompt, 1);
        assert_eq!(first.0, again.0);
        // A full last block is shared, so that it cannot be written again: all of it is computed.
        let expected = if length % 4 == 0 { length - 4 } else { length - 1 };
        assert_eq!(again.1, expected as usize, "length {length}");
    }
}

/// 41 tokens are 11 blocks and the pool has 8 pages: the first blocks are gone for certain, and
/// nobody misses them.
#[test]
fn a_hit_needs_only_the_blocks_inside_the_window() {
    let windows = [Some(6)];
    let mut engine = engine(&windows, 8, true);
    let text: Vec<u32> = (0..41).collect();
    run(&mut engine, &text, 1);
    let longer = [&text[..], &[5, 6]].concat();
    let (tokens, cached) = run(&mut engine, &longer, 1);
    assert_eq!(cached, 41);
    assert_eq!(
        tokens.first().copied(),
        lathe_program::logits::argmax(&naive_logits(&longer, &windows))
    );
    // A full group beside it needs them all.
    let windows = [None, Some(6)];
    let mut engine = super::prefix::engine(&windows, 17, true);
    run(&mut engine, &text, 1);
    run(&mut engine, &[60; 20], 1);
    assert!(run(&mut engine, &longer, 1).1 < 41);
}

#[test]
fn evicted_texts_are_forgotten_from_their_ends() {
    let mut engine = engine(&[None], 20, true);
    let old: Vec<u32> = (0..40).collect();
    run(&mut engine, &old, 1);
    assert_eq!(engine.stats().blocks_idle, 10);
    // 14 pages: the 10 free ones and the last 4 of the old text.
    run(&mut engine, &[60; 56], 1);
    assert_eq!(run(&mut engine, &old, 1).1, 24);
}

#[test]
fn switched_off_it_finds_nothing() {
    let mut engine = engine(&[None, Some(6)], 100, false);
    let first = run(&mut engine, &[1; 30], 3);
    assert_eq!(run(&mut engine, &[1; 30], 3), first);
    let stats = engine.stats();
    assert_eq!((stats.prefix_hit_tokens, stats.blocks_idle), (0, 0));
    assert_eq!(stats.prefix_hit_rate(), 0.0);
}

//! Sliding windows: memory bounded by the window.

use super::fake::{FakeExecutor, layout};
use crate::*;

/// 100,000 tokens with window 128 and nothing else: the pages held stay those of one window.
#[test]
fn a_long_generation_keeps_the_pages_of_its_window_constant() {
    let (block_tokens, window, tokens) = (16, 128, 100_000);
    let kv = layout(block_tokens, &[Some(window)]);
    // What one window can touch, and not a page more.
    let pages = (window - 1).div_ceil(block_tokens) + 1;
    let config = EngineConfig { sequences_max: 1, ..EngineConfig::default() };
    for prefix_cache in [true, false] {
        let executor = FakeExecutor::new(kv.clone(), tokens + 300, 64, pages).hasty();
        let mut engine =
            Engine::new(Box::new(executor), EngineConfig { prefix_cache, ..config.clone() })
                .unwrap();
        let prompt = (0..300).map(|n| n % 61).collect();
        engine
            .add(Request { prompt, max_tokens: Some(tokens), ..Request::default() }, None)
            .unwrap();
        let mut generated = 0;
        while !engine.is_idle() {
            let events = engine.step().unwrap();
            generated += events.iter().filter(|event| matches!(event, Event::Token { .. })).count();
            assert!(engine.stats().blocks_used <= pages);
        }
        assert_eq!(generated, tokens);
        engine.validate();
    }
}

/// A full and a windowed group of one pool: only the full one grows.
#[test]
fn only_full_groups_grow() {
    let executor = FakeExecutor::new(layout(4, &[None, Some(8)]), 401, 16, 110);
    let mut engine = Engine::new(Box::new(executor), EngineConfig::default()).unwrap();
    engine
        .add(Request { prompt: vec![1; 20], max_tokens: Some(380), ..Request::default() }, None)
        .unwrap();
    let mut length = 0;
    while !engine.is_idle() {
        length += engine.step().unwrap().len();
        engine.validate();
        let used = engine.stats().blocks_used;
        assert!(
            used <= (20 + length).div_ceil(4) + 8usize.div_ceil(4) + 1,
            "{used} pages at {length}"
        );
    }
}

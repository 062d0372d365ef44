//! The two forms of latent attention: which one a row gets depends on its request alone, and pages
//! of one are never taken for those of the other.

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::fake::{FakeExecutor, layout, naive_logits};
use crate::*;

/// Rows of a block that is expanded as a whole.
const UNIT: usize = 64;

fn engine(
    windows: &[Option<usize>],
    (rows_max, kv_blocks): (usize, usize),
    config: &EngineConfig,
) -> Engine {
    let executor = FakeExecutor::new(layout(16, windows), 600, rows_max, kv_blocks).latent();
    Engine::new(Box::new(executor), config.clone()).unwrap()
}

/// The text that the naive model makes of a prompt whose first whole blocks are expanded.
fn expected(prompt: &[u32], tokens: usize, windows: &[Option<usize>]) -> Vec<u32> {
    let mut text = prompt.to_vec();
    text[..prompt.len() / UNIT * UNIT].iter_mut().for_each(|token| *token |= 1 << 31);
    let next = |_| {
        text.push(lathe_program::logits::argmax(&naive_logits(&text, windows)).unwrap());
        *text.last().unwrap()
    };
    (0..tokens).map(next).collect()
}

#[test]
fn schedules_and_prefix_hits_do_not_change_the_form() {
    let windows = [None, Some(40)];
    let mut random = ChaCha8Rng::seed_from_u64(3);
    let system: Vec<u32> = (0..150).map(|n| n * 7 % 61).collect();
    let (mut hits, mut preemptions) = (0, 0);
    for _ in 0..12 {
        let rows_max = random.random_range(1..100);
        let config =
            EngineConfig { sequences_max: random.random_range(1..5), ..EngineConfig::default() };
        // The longest of them needs 26 and 4.
        let kv_blocks = random.random_range(31..70);
        let mut engine = engine(&windows, (rows_max, kv_blocks), &config);
        for _ in 0..3 {
            let mut asked = Vec::new();
            for _ in 0..4 {
                let mut prompt = system[..random.random_range(100..150)].to_vec();
                prompt.extend((0..random.random_range(1..200)).map(|n| n % 5));
                let max_tokens = random.random_range(1..60);
                let request = Request {
                    prompt: prompt.clone(),
                    max_tokens: Some(max_tokens),
                    ..Request::default()
                };
                asked.push((engine.add(request, None).unwrap(), prompt, max_tokens, Vec::new()));
            }
            while !engine.is_idle() {
                for event in engine.step().unwrap() {
                    if let Event::Token { request, token, .. } = event {
                        asked.iter_mut().find(|a| a.0 == request).unwrap().3.push(token);
                    }
                }
                engine.validate();
            }
            for (_, prompt, tokens, found) in asked {
                assert_eq!(found, expected(&prompt, tokens, &windows), "{config:?}");
            }
        }
        hits += engine.stats().prefix_hit_tokens;
        preemptions += engine.stats().preemptions;
    }
    assert!(hits > 1000 && preemptions > 0, "{hits} tokens hit, {preemptions} preemptions");
}

/// A chat's next turn finds all that was computed in the form that it wants: everything while it
/// completes no block, and the blocks that were already whole after that.
#[test]
fn a_chat_computes_again_only_what_becomes_a_whole_block() {
    let mut engine = engine(&[None], (64, 100), &EngineConfig::default());
    let mut run = |prompt: &[u32]| {
        let request =
            Request { prompt: prompt.to_vec(), max_tokens: Some(10), ..Request::default() };
        engine.add(request, None).unwrap();
        let (mut text, mut cached) = (prompt.to_vec(), 0);
        while !engine.is_idle() {
            for event in engine.step().unwrap() {
                match event {
                    Event::Token { token, .. } => text.push(token),
                    Event::Finished { cached_tokens, .. } => cached = cached_tokens,
                }
            }
        }
        (text, cached)
    };
    let (text, _) = run(&(0..70).map(|n| n % 61).collect::<Vec<u32>>());
    // 80 tokens, 79 of them computed; the next prompt's 100 still have one whole block.
    let next = [&text[..], &[5; 20]].concat();
    let (text, cached) = run(&next);
    assert_eq!(cached, 79);
    // 110 tokens and 30 more: a second whole block, so that what follows the first is made again.
    let next = [&text[..], &[6; 30]].concat();
    assert_eq!(run(&next).1, 64);
}

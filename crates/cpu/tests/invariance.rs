//! The same tokens give the same bits however they are cut into steps, batched and shared.

mod common;

use common::{Random, Sequence, VOCABULARY, executor, program, step};
use lathe_program::{Executor, KvFormat};

/// Logits of all of a sequence's tokens, run in chunks of sizes from `next`.
fn logits(
    executor: &mut dyn Executor,
    sequence: &mut Sequence,
    mut next: impl FnMut() -> usize,
) -> Vec<u32> {
    let mut all = Vec::new();
    while sequence.cached < sequence.tokens.len() {
        let rows = next().min(sequence.tokens.len() - sequence.cached);
        let step = step(&mut [(sequence, rows)]);
        all.extend(executor.run(&step).expect("it runs").logits.iter().map(|x| x.to_bits()));
    }
    all
}

#[test]
fn chunks_do_not_matter() {
    let program = program(3);
    for (exact, kv) in [
        (true, None),
        (false, None),
        (false, Some(KvFormat::BF16)),
        (false, Some(KvFormat::Int8)),
        (false, Some(KvFormat::F8E4M3)),
        (false, Some(KvFormat::Int4)),
    ] {
        let mut executor = executor(&program, 2, exact, kv);
        let alone = |executor: &mut dyn Executor| {
            let mut sequence = Sequence::new(&program, 700, 0, &mut Random(1));
            logits(executor, &mut sequence, || 1)
        };
        let expected = alone(&mut *executor);
        let mut random = Random(9);
        for _ in 0..3 {
            let mut sequence = Sequence::new(&program, 700, 100, &mut Random(1));
            let found = logits(&mut *executor, &mut sequence, || 1 + random.below(128));
            assert!(found == expected, "exact {exact}, {kv:?}");
        }
    }
}

#[test]
fn threads_do_not_matter() {
    let program = program(2);
    let run = |threads: usize| {
        let mut sequence = Sequence::new(&program, 1100, 0, &mut Random(2));
        let mut count = 0;
        let next = || {
            count += 1;
            if count < 9 { 128 } else { 1 }
        };
        logits(&mut *executor(&program, threads, false, None), &mut sequence, next)
    };
    let expected = run(1);
    assert!(run(2) == expected);
    assert!(run(3) == expected);
}

#[test]
fn neighbours_do_not_matter() {
    let program = program(2);
    let mut executor = executor(&program, 2, false, None);
    let lengths = [90, 33, 140, 7];
    let make = |i: usize| Sequence::new(&program, lengths[i], 60 * i as u32, &mut Random(i as u64));
    let alone: Vec<Vec<u32>> =
        (0..4).map(|i| logits(&mut *executor, &mut make(i), || 50)).collect();
    let mut random = Random(4);
    let mut sequences: Vec<Sequence> = (0..4).map(make).collect();
    let mut found: Vec<Vec<u32>> = vec![Vec::new(); 4];
    while sequences.iter().any(|s| s.cached < s.tokens.len()) {
        let mut parts = Vec::new();
        let mut who = Vec::new();
        for (i, sequence) in sequences.iter_mut().enumerate() {
            let left = sequence.tokens.len() - sequence.cached;
            let rows = random.below(30).min(left);
            if rows > 0 {
                who.push((i, rows));
                parts.push((sequence, rows));
            }
        }
        if parts.is_empty() {
            continue;
        }
        let step = step(&mut parts);
        let mut all = executor.run(&step).expect("it runs").logits;
        for (i, rows) in who {
            let (mine, rest) = all.split_at(rows * VOCABULARY);
            found[i].extend(mine.iter().map(|x| x.to_bits()));
            all = rest;
        }
    }
    assert!(found == alone);
}

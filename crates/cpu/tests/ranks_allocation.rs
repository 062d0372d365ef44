//! A rank's step allocates nothing once steps of its kind have run. That includes its messages to
//! the other ranks.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::sync::atomic::Ordering;
use std::sync::{Arc, Barrier};

use common::{Random, RandomWeights, Sequence, program, step};
use counting::ALLOCATIONS;
use lathe_cpu::{CpuBackend, CpuOptions};
use lathe_program::shard::{RankWeights, ShardOptions, shard};
use lathe_program::{Backend, ExecutorOptions, ThreadRank};

#[test]
fn steps_of_ranks_do_not_allocate() {
    let program = program(3);
    let ranks = shard(&program, &ShardOptions { alignment: 32, ..ShardOptions::new(2) });
    let ranks = ranks.expect("it divides");
    let source = RandomWeights(Arc::clone(&program));
    let options = ExecutorOptions {
        kv_blocks: 200,
        kv_format: None,
        rows_max: 100,
        threads: Some(1),
        exact: false,
    };
    let mut sequence = Sequence::new(&program, 600, 0, &mut Random(3));
    let mut steps = Vec::new();
    steps.extend((0..5).map(|_| step(&mut [(&mut sequence, 100)])));
    steps.extend((0..50).map(|_| step(&mut [(&mut sequence, 1)])));
    let (steps, barrier, options) = (&steps, &Barrier::new(2), &options);
    let counted: Vec<usize> = std::thread::scope(|scope| {
        let threads: Vec<_> = ThreadRank::group(2, 2)
            .into_iter()
            .zip(&ranks)
            .map(|(end, rank)| {
                let backend = CpuBackend::new(CpuOptions::default()).collective(Arc::new(end));
                let weights = RankWeights { source: &source, rank };
                let program = Arc::new(rank.program.clone());
                let mut executor = backend.prepare(program, &weights, options).expect("prepares");
                scope.spawn(move || {
                    let mut run = || {
                        for step in steps {
                            executor.run(step).expect("it runs");
                        }
                        barrier.wait();
                    };
                    // Two runs, because there are two sets of slots, which are used in turns.
                    run();
                    run();
                    let before = ALLOCATIONS.load(Ordering::Relaxed);
                    barrier.wait();
                    run();
                    let allocations = ALLOCATIONS.load(Ordering::Relaxed) - before;
                    barrier.wait();
                    allocations
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("it ends")).collect()
    });
    // The counter counts the allocations of both ranks.
    assert_eq!(counted, [0, 0]);
}

//! A step allocates nothing once steps of its kind have run.

mod common;
#[path = "common/counting.rs"]
mod counting;

use std::sync::atomic::Ordering;

use common::{Random, Sequence, executor, program, step};
use counting::ALLOCATIONS;

#[test]
fn steps_do_not_allocate() {
    let program = program(3);
    let mut executor = executor(&program, 2, false, None);
    let mut sequence = Sequence::new(&program, 1100, 0, &mut Random(3));
    let mut steps = Vec::new();
    for _ in 0..8 {
        steps.push(step(&mut [(&mut sequence, 100)]));
    }
    for _ in 0..200 {
        steps.push(step(&mut [(&mut sequence, 1)]));
    }
    for step in &steps {
        executor.run(step).expect("it runs");
    }
    let before = ALLOCATIONS.load(Ordering::Relaxed);
    for step in &steps {
        executor.run(step).expect("it runs");
    }
    assert_eq!(ALLOCATIONS.load(Ordering::Relaxed) - before, 0);
}

//! A step allocates nothing once steps of its kind have run.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use common::{Random, Sequence, executor, program, step};

struct Counting;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is the system allocator's.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

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

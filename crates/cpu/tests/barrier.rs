//! Every order of the threads' steps at the gang's barrier. No run is missed or run twice, no wake
//! is lost, and each side sees what the other wrote.

use std::sync::Arc;

use loom::cell::UnsafeCell;
use loom::thread;

#[allow(dead_code)]
#[path = "../src/barrier.rs"]
mod barrier;

/// In place of the crate's module of this name.
mod sync {
    pub(crate) use loom::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
    pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard};

    /// A wait that spins once.
    #[derive(Default)]
    pub(crate) struct Spins(());

    impl Spins {
        pub(crate) fn pause(&mut self, _crowded: bool) {
            loom::thread::yield_now();
        }

        pub(crate) fn are_many(&self) -> bool {
            false
        }

        pub(crate) fn are_over(&mut self) -> bool {
            true
        }
    }
}

use barrier::Barrier;

struct Shared {
    barrier: Barrier,
    /// Written by the caller, read by the workers.
    job: UnsafeCell<u32>,
    /// By worker: written by it, read by the caller.
    made: Vec<UnsafeCell<u32>>,
}

// SAFETY: `loom` finds any access that the barrier does not order.
unsafe impl Sync for Shared {}

/// `preemptions` bounds the switches of threads that no thread asked for.
fn model(workers: usize, runs: u32, preemptions: usize) {
    let mut builder = loom::model::Builder::new();
    builder.preemption_bound = Some(preemptions);
    builder.check(move || {
        let shared = Arc::new(Shared {
            barrier: Barrier::new(workers as u32, false),
            job: UnsafeCell::new(0),
            made: (0..workers).map(|_| UnsafeCell::new(0)).collect(),
        });
        let threads: Vec<_> =
            (0..workers).map(|worker| serve(Arc::clone(&shared), worker)).collect();
        for run in 1..=runs {
            // SAFETY: no worker runs.
            shared.job.with_mut(|job| unsafe { *job = 10 * run });
            shared.barrier.begin();
            shared.barrier.wait_for_all();
            for made in &shared.made {
                // SAFETY: all workers are done.
                made.with(|made| assert_eq!(unsafe { *made }, (1..=run).map(|it| 10 * it).sum()));
            }
        }
        shared.barrier.stop();
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    });
}

fn serve(shared: Arc<Shared>, worker: usize) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut seen = 0;
        while let Some(epoch) = shared.barrier.next(seen) {
            seen = epoch;
            // SAFETY: the caller leaves the job until all are done.
            let job = shared.job.with(|job| unsafe { *job });
            // SAFETY: a worker writes its own place.
            shared.made[worker].with_mut(|made| unsafe { *made += job });
            shared.barrier.done();
        }
    })
}

#[test]
fn one_worker_runs_each_run_once() {
    model(1, 2, 3);
}

#[test]
fn two_workers_run_each_run_once() {
    model(2, 1, 2);
}

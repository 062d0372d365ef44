//! `Barrier`: how the workers of a gang start and join.
//!
//! The caller changes the epoch, which begins a run. Each worker runs once for each change and then
//! says that it is done. The caller waits until all are. A worker spins on the epoch at first.
//! After a while it sleeps on a condition variable, so that an idle process costs nothing.
//!
//! `tests/barrier.rs` compiles this file against the types of `loom`, which tries every order of
//! the threads' steps.

use crate::sync::{AtomicBool, AtomicU32, Condvar, Mutex, MutexGuard, Ordering, Spins, fence};

/// A value on a cache line of its own.
#[repr(align(128))]
struct Line<T>(T);

/// Starts and joins a fixed number of workers beside the caller.
pub(crate) struct Barrier {
    /// Counts runs. A worker runs once for each change.
    epoch: Line<AtomicU32>,
    /// Workers that have not finished the current run.
    remaining: Line<AtomicU32>,
    /// Workers that wait on the condition variable or are about to.
    sleeping: AtomicU32,
    stop: AtomicBool,
    sleep: Mutex<()>,
    wake: Condvar,
    workers: u32,
    /// Whether there are more workers than cores. Waiting workers then yield their core instead of
    /// spinning.
    crowded: bool,
}

impl Barrier {
    /// For `workers` beside the caller.
    pub(crate) fn new(workers: u32, crowded: bool) -> Self {
        Self {
            epoch: Line(AtomicU32::new(0)),
            remaining: Line(AtomicU32::new(0)),
            sleeping: AtomicU32::new(0),
            stop: AtomicBool::new(false),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            workers,
            crowded,
        }
    }

    /// Begins a run. Workers see within it what the caller wrote before. All workers must be done
    /// with the run before.
    pub(crate) fn begin(&self) {
        self.remaining.0.store(self.workers, Ordering::Relaxed);
        self.epoch.0.fetch_add(1, Ordering::Release);
        // Either this side sees the sleeper, or the sleeper sees the new epoch: each writes, then
        // fences, then reads what the other wrote.
        fence(Ordering::SeqCst);
        if self.sleeping.load(Ordering::Relaxed) > 0 {
            drop(self.lock());
            self.wake.notify_all();
        }
    }

    /// Waits until all workers are done with the run. The caller then sees what they wrote in it.
    pub(crate) fn wait_for_all(&self) {
        let mut spins = Spins::default();
        while self.remaining.0.load(Ordering::Acquire) > 0 {
            spins.pause(self.crowded || spins.are_many());
        }
    }

    /// Waits for the run after `seen` and returns its epoch. `None` ends the worker.
    pub(crate) fn next(&self, seen: u32) -> Option<u32> {
        let epoch = self.wait(seen);
        (!self.stop.load(Ordering::Relaxed)).then_some(epoch)
    }

    /// Spins and then sleeps until the epoch differs from `seen`. Returns the new epoch.
    fn wait(&self, seen: u32) -> u32 {
        let mut spins = Spins::default();
        loop {
            let epoch = self.epoch.0.load(Ordering::Acquire);
            if epoch != seen {
                return epoch;
            }
            spins.pause(self.crowded);
            if spins.are_over() {
                break;
            }
        }
        let mut guard = self.lock();
        self.sleeping.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        let epoch = loop {
            let epoch = self.epoch.0.load(Ordering::Acquire);
            if epoch != seen {
                break epoch;
            }
            guard = self.wake.wait(guard).unwrap_or_else(|poison| poison.into_inner());
        };
        self.sleeping.fetch_sub(1, Ordering::Relaxed);
        drop(guard);
        epoch
    }

    /// A worker is done with the run.
    pub(crate) fn done(&self) {
        self.remaining.0.fetch_sub(1, Ordering::Release);
    }

    /// Ends all workers, which are done with every run.
    pub(crate) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
        // The release of the epoch publishes `stop`.
        self.epoch.0.fetch_add(1, Ordering::Release);
        drop(self.lock());
        self.wake.notify_all();
    }

    /// Workers that sleep on the condition variable.
    #[cfg(test)]
    pub(crate) fn sleeping(&self) -> u32 {
        // The lock is free only when the last of them waits for the condition.
        let _guard = self.lock();
        self.sleeping.load(Ordering::Relaxed)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        self.sleep.lock().unwrap_or_else(|poison| poison.into_inner())
    }
}

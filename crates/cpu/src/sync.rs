//! The types that [`crate::barrier`] waits with. The test of the barrier has a module of this name
//! with the types of `loom`.

use std::time::{Duration, Instant};

pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32, Ordering, fence};
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard};

/// How long a worker spins before it sleeps. It is longer than the serial gaps of a step, which
/// take some microseconds.
pub(crate) const SPIN: Duration = Duration::from_micros(150);
/// Spins of the caller before it yields its core.
const CALLER_SPINS: u32 = 20_000;

/// The turns of one wait.
#[derive(Default)]
pub(crate) struct Spins {
    count: u32,
    start: Option<Instant>,
}

impl Spins {
    /// Waits a moment. With `yields` the core goes to another thread.
    #[inline]
    pub(crate) fn pause(&mut self, yields: bool) {
        self.count = self.count.wrapping_add(1);
        if yields { std::thread::yield_now() } else { std::hint::spin_loop() }
    }

    /// Whether the caller of a run has waited so long that it should yield its core.
    #[inline]
    pub(crate) fn are_many(&self) -> bool {
        self.count > CALLER_SPINS
    }

    /// Whether a worker has waited so long that it should sleep.
    #[inline]
    pub(crate) fn are_over(&mut self) -> bool {
        // The clock is read in every 64th turn only: reading it takes longer than a turn.
        self.count.is_multiple_of(64)
            && self.start.get_or_insert_with(Instant::now).elapsed() > SPIN
    }
}

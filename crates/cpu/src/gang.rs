//! `Gang`: worker threads that start and join in a fraction of a microsecond.
//!
//! A decode step runs some hundred small parallel regions. So a region must not cost a lock, an
//! allocation or a system call. The caller is worker 0; the others wait at a `Barrier`. Work is
//! divided by index.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::barrier::Barrier;
use crate::cores::bind_to;
pub use crate::cores::{Cores, available_cores};

/// A closure and the function that calls it, without an allocation.
#[derive(Clone, Copy)]
struct Job {
    closure: *const (),
    call: unsafe fn(*const (), usize, usize),
}

struct Shared {
    barrier: Barrier,
    /// The caller writes it before a run begins. Workers read it in the run.
    job: std::cell::UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// Whether `panic` holds a panic. Runs need not take its lock to know.
    panicked: AtomicBool,
    workers: usize,
}

// SAFETY: `job` is written only while no worker runs (the caller holds `busy` and all are done) and
// is published by the barrier. Everything else is Sync by itself.
unsafe impl Sync for Shared {}
// SAFETY: the raw pointers in `job` are used only during `run`, which outlives their use.
unsafe impl Send for Shared {}

/// A fixed set of workers.
pub struct Gang {
    shared: Arc<Shared>,
    busy: AtomicBool,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Gang {
    /// A gang of `threads` workers (at least 1). The caller of [`Gang::run`] is one of them.
    ///
    /// If the gang fills the machine, each worker is bound to a core. Else the operating system
    /// places the workers, because other processes may need the same cores.
    pub fn new(threads: usize) -> Gang {
        Self::one_of(1, threads)
    }

    /// One of `gangs` gangs of `threads` workers each, which work at the same time. If together
    /// they have more workers than there are cores, waiting workers yield their core.
    pub fn one_of(gangs: usize, threads: usize) -> Gang {
        let workers = threads.max(1);
        let cores = available_cores();
        let shared = Arc::new(Shared {
            barrier: Barrier::new(workers as u32 - 1, workers * gangs.max(1) > cores.count),
            job: std::cell::UnsafeCell::new(None),
            panic: Mutex::new(None),
            panicked: AtomicBool::new(false),
            workers,
        });
        let fills_machine = gangs == 1 && workers == cores.count && cores.ids.len() >= workers;
        let threads = (1..workers)
            .map(|worker| {
                let shared = Arc::clone(&shared);
                let core = fills_machine.then(|| cores.ids[worker]);
                std::thread::Builder::new()
                    .name(format!("lathe-{worker}"))
                    .spawn(move || {
                        if let Some(core) = core {
                            bind_to(core);
                        }
                        serve(&shared, worker);
                    })
                    .expect("the operating system starts a thread")
            })
            .collect();
        Gang { shared, busy: AtomicBool::new(false), threads }
    }

    /// Workers, the caller included.
    pub fn workers(&self) -> usize {
        self.shared.workers
    }

    /// Calls `work(worker, workers)` once on each worker and returns when all have returned.
    ///
    /// If the gang is already running (a nested call, or another thread's), the call runs `work(0,
    /// 1)` on the calling thread alone.
    ///
    /// # Panics
    /// If a worker panics, with its panic, after all workers have finished.
    pub fn run<W: Fn(usize, usize) + Sync>(&self, work: W) {
        let alone = self.shared.workers == 1;
        if alone || self.busy.swap(true, Ordering::Acquire) {
            return work(0, 1);
        }
        let finish = Finish { gang: self };
        self.start(&work);
        work(0, self.shared.workers);
        drop(finish);
        if self.shared.panicked.swap(false, Ordering::Relaxed)
            && let Some(panic) = lock(&self.shared.panic).take()
        {
            resume_unwind(panic);
        }
    }

    fn start<W: Fn(usize, usize) + Sync>(&self, work: &W) {
        unsafe fn call<W: Fn(usize, usize)>(closure: *const (), worker: usize, workers: usize) {
            // SAFETY: `closure` is the `&W` of the `run` that waits for this call.
            unsafe { (*closure.cast::<W>())(worker, workers) }
        }
        let shared = &*self.shared;
        // SAFETY: `busy` is held and all workers are done with the run before.
        unsafe {
            *shared.job.get() = Some(Job { closure: (&raw const *work).cast(), call: call::<W> })
        };
        shared.barrier.begin();
    }
}

/// Waits for the workers and frees the gang, even if the caller's own share panics.
struct Finish<'a> {
    gang: &'a Gang,
}

impl Drop for Finish<'_> {
    fn drop(&mut self) {
        let shared = &*self.gang.shared;
        shared.barrier.wait_for_all();
        if std::thread::panicking() {
            // The caller is panicking itself. A worker's panic must not reach the next run.
            shared.panicked.store(false, Ordering::Relaxed);
        }
        self.gang.busy.store(false, Ordering::Release);
    }
}

impl Drop for Gang {
    fn drop(&mut self) {
        self.shared.barrier.stop();
        for thread in self.threads.drain(..) {
            // A worker catches the panics of its work, so joining cannot fail.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Gang {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gang({})", self.shared.workers)
    }
}

/// The loop of a worker thread.
fn serve(shared: &Shared, worker: usize) {
    let mut seen = 0;
    while let Some(epoch) = shared.barrier.next(seen) {
        seen = epoch;
        // SAFETY: the caller wrote the job before the run began, and leaves it until all are done.
        let job = unsafe { *shared.job.get() };
        if let Some(job) = job {
            // SAFETY: the closure lives until all workers are done.
            let run = || unsafe { (job.call)(job.closure, worker, shared.workers) };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
                *lock(&shared.panic) = Some(panic);
                shared.panicked.store(true, Ordering::Relaxed);
            }
        }
        shared.barrier.done();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Part `index` of `0..total`, which is cut into `parts` nearly equal parts.
pub fn share(total: usize, index: usize, parts: usize) -> std::ops::Range<usize> {
    total * index / parts..total * (index + 1) / parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::SPIN;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_worker_runs_once_a_run() {
        let gang = Gang::new(3);
        let counts: [AtomicUsize; 3] = Default::default();
        for run in 1..=500 {
            gang.run(|worker, workers| {
                assert_eq!(workers, 3);
                counts[worker].fetch_add(1, Ordering::Relaxed);
            });
            assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == run));
        }
    }

    #[test]
    fn sleeping_workers_wake() {
        let gang = Gang::new(2);
        let count = AtomicUsize::new(0);
        for _ in 0..5 {
            std::thread::sleep(SPIN * 4);
            gang.run(|_, _| {
                count.fetch_add(1, Ordering::Relaxed);
            });
        }
        assert_eq!(count.into_inner(), 10);
    }

    #[test]
    fn idle_workers_sleep() {
        // Some gangs have more workers than cores. These yield the core, and must sleep all the
        // same.
        for workers in [2, 5, 40] {
            let gang = Gang::new(workers);
            for _ in 0..3 {
                gang.run(|_, _| ());
                // There is no time limit. If a worker never sleeps, the test hangs.
                while gang.shared.barrier.sleeping() < workers as u32 - 1 {
                    std::thread::yield_now();
                }
                assert!(gang.threads.iter().all(|thread| !thread.is_finished()));
            }
        }
    }

    #[test]
    fn a_nested_run_is_alone() {
        let gang = Gang::new(2);
        let total = AtomicUsize::new(0);
        gang.run(|_, _| {
            gang.run(|worker, workers| {
                assert_eq!((worker, workers), (0, 1));
                total.fetch_add(1, Ordering::Relaxed);
            })
        });
        assert_eq!(total.into_inner(), 2);
    }

    #[test]
    fn a_panic_of_any_worker_reaches_the_caller() {
        let gang = Gang::new(2);
        for culprit in 0..2 {
            let caught = catch_unwind(AssertUnwindSafe(|| {
                gang.run(|worker, _| assert_ne!(worker, culprit));
            }));
            assert!(caught.is_err());
            gang.run(|_, _| ());
        }
    }

    #[test]
    fn shares_cover_everything_once() {
        for total in 0..20 {
            for parts in 1..6 {
                let joined: Vec<usize> = (0..parts).flat_map(|i| share(total, i, parts)).collect();
                assert_eq!(joined, (0..total).collect::<Vec<_>>());
            }
        }
    }
}

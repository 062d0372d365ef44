//! The ranks beside the first, each on a thread that lasts as long as the executor: a decode step
//! takes less time than starting threads does.
//!
//! A step is put on a board, the board's number of steps goes up, and every rank runs it once. A
//! rank that has nothing to do looks at the number for a while, then sleeps until it is woken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::backend::Rank;
use crate::backend::BackendError;
use crate::step::Step;

/// How long a rank looks for the next step before it sleeps: longer than a sampler takes.
const LOOK: Duration = Duration::from_micros(300);

#[derive(Default)]
struct Board {
    step: RwLock<Step>,
    /// Steps that were put on the board.
    steps: AtomicU64,
    stop: AtomicBool,
}

/// What a rank has done so far.
#[derive(Default)]
struct Progress {
    steps: AtomicU64,
    error: Mutex<Option<BackendError>>,
}

struct Member {
    progress: Arc<Progress>,
    thread: Option<JoinHandle<()>>,
}

/// Ranks on threads of their own.
pub(super) struct Crew {
    board: Arc<Board>,
    members: Vec<Member>,
}

impl Crew {
    /// Starts a thread for each of `ranks`.
    pub(super) fn new(ranks: Vec<Rank>) -> Result<Self, BackendError> {
        let mut crew = Self { board: Arc::default(), members: Vec::new() };
        for (index, rank) in ranks.into_iter().enumerate() {
            let (board, progress) = (Arc::clone(&crew.board), Arc::<Progress>::default());
            let mine = Arc::clone(&progress);
            let thread = std::thread::Builder::new()
                .name(format!("lathe-rank-{}", index + 1))
                .spawn(move || serve(rank, &board, &mine))
                .map_err(|error| BackendError::Device(format!("a rank's thread: {error}")))?;
            crew.members.push(Member { progress, thread: Some(thread) });
        }
        Ok(crew)
    }

    /// Has every rank run `step`; [`Crew::finish`] must follow before the next.
    pub(super) fn start(&mut self, step: &Step) {
        if self.members.is_empty() {
            return;
        }
        self.board.step.write().unwrap_or_else(PoisonError::into_inner).clone_from(step);
        self.announce();
    }

    fn announce(&self) {
        self.board.steps.fetch_add(1, Ordering::Release);
        for thread in self.members.iter().filter_map(|member| member.thread.as_ref()) {
            thread.thread().unpark();
        }
    }

    /// Waits until every rank has run the step; the first error that is a rank's own, else any.
    pub(super) fn finish(&mut self) -> Option<BackendError> {
        let expected = self.board.steps.load(Ordering::Relaxed);
        let mut found = None;
        for member in &self.members {
            while member.progress.steps.load(Ordering::Acquire) != expected {
                std::thread::yield_now();
            }
            let mut error =
                member.progress.error.lock().unwrap_or_else(PoisonError::into_inner).take();
            if matches!(found, None | Some(BackendError::Collective(_))) && error.is_some() {
                found = error.take();
            }
        }
        found
    }
}

impl Drop for Crew {
    fn drop(&mut self) {
        self.board.stop.store(true, Ordering::Release);
        self.announce();
        for thread in self.members.iter_mut().filter_map(|member| member.thread.take()) {
            // A rank catches the panics of its steps, so joining cannot fail.
            let _ = thread.join();
        }
    }
}

/// The life of a rank.
fn serve(mut rank: Rank, board: &Board, progress: &Progress) {
    let mut seen = 0;
    loop {
        seen = next_step(board, seen);
        if board.stop.load(Ordering::Acquire) {
            return;
        }
        let step = board.step.read().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = rank.run(&step) {
            *progress.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        drop(step);
        progress.steps.store(seen, Ordering::Release);
    }
}

/// Waits until the board's number differs from `seen`; the new number.
fn next_step(board: &Board, seen: u64) -> u64 {
    let start = Instant::now();
    loop {
        let steps = board.steps.load(Ordering::Acquire);
        if steps != seen {
            return steps;
        }
        if start.elapsed() < LOOK {
            std::thread::yield_now();
        } else {
            // Waking leaves a token, so a step announced since the look ends this at once.
            std::thread::park();
        }
    }
}

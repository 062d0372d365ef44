//! The ranks other than the first. Each has a thread that lasts as long as the executor, because a
//! decode step takes less time than starting threads.
//!
//! A step is put on a board, and the board's task number increases. Every rank then runs the step
//! once. An idle rank polls the number for a while and then sleeps until it is woken.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::backend::Rank;
use crate::backend::BackendError;
use crate::step::{Choice, Report, SlotMove, Step, TokenSource};

/// The time that a rank polls for the next task before it sleeps. It is longer than sampling takes.
const LOOK: Duration = Duration::from_micros(300);

/// The next task of the ranks.
#[derive(Default)]
struct Task {
    step: Step,
    /// If not empty, these moves are the task, and not the step.
    moves: Vec<SlotMove>,
}

#[derive(Default)]
struct Board {
    task: RwLock<Task>,
    /// The number of tasks so far.
    tasks: AtomicU64,
    stop: AtomicBool,
}

/// The progress of a rank.
#[derive(Default)]
struct Progress {
    tasks: AtomicU64,
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

    /// Starts `step` on every rank. `chosen` has the tokens of its chosen rows. [`Crew::finish`]
    /// must follow before the next task.
    pub(super) fn start(&mut self, step: &Step, chosen: &[Option<u32>]) {
        if self.members.is_empty() {
            return;
        }
        let mut task = self.board.task.write().unwrap_or_else(PoisonError::into_inner);
        task.moves.clear();
        copy_without_choosing(&mut task.step, step, chosen);
        drop(task);
        self.announce();
    }

    /// Starts moves of slots on every rank. [`Crew::finish`] must follow before the next task.
    pub(super) fn start_moves(&mut self, moves: &[SlotMove]) {
        if self.members.is_empty() || moves.is_empty() {
            return;
        }
        let mut task = self.board.task.write().unwrap_or_else(PoisonError::into_inner);
        task.moves.clear();
        task.moves.extend_from_slice(moves);
        drop(task);
        self.announce();
    }

    fn announce(&self) {
        self.board.tasks.fetch_add(1, Ordering::Release);
        for thread in self.members.iter().filter_map(|member| member.thread.as_ref()) {
            thread.thread().unpark();
        }
    }

    /// Waits until every rank has finished its task. Returns the first error that is a rank's own,
    /// or else any error.
    pub(super) fn finish(&mut self) -> Option<BackendError> {
        let expected = self.board.tasks.load(Ordering::Relaxed);
        let mut found = None;
        for member in &self.members {
            while member.progress.tasks.load(Ordering::Acquire) != expected {
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

/// The main loop of a rank.
fn serve(mut rank: Rank, board: &Board, progress: &Progress) {
    let mut seen = 0;
    loop {
        seen = next_task(board, seen);
        if board.stop.load(Ordering::Acquire) {
            return;
        }
        let task = board.task.read().unwrap_or_else(PoisonError::into_inner);
        let done = match task.moves.is_empty() {
            true => rank.run(&task.step),
            false => rank.move_slots(&task.moves),
        };
        if let Err(error) = done {
            *progress.error.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
        }
        drop(task);
        progress.tasks.store(seen, Ordering::Release);
    }
}

/// Waits until the board's number differs from `seen`. Returns the new number.
fn next_task(board: &Board, seen: u64) -> u64 {
    let start = Instant::now();
    loop {
        let tasks = board.tasks.load(Ordering::Acquire);
        if tasks != seen {
            return tasks;
        }
        if start.elapsed() < LOOK {
            std::thread::yield_now();
        } else {
            // Unparking leaves a token. So a task that was announced after the last look ends this
            // at once.
            std::thread::park();
        }
    }
}

/// Copies a step for ranks whose choices nobody reads. They make the logits that the first rank
/// chooses from, and get its choices as given tokens. The memory of `to` is reused.
fn copy_without_choosing(to: &mut Step, step: &Step, chosen: &[Option<u32>]) {
    to.tokens.clear();
    to.tokens.extend(step.tokens.iter().map(|source| match *source {
        TokenSource::Chosen(choice) => {
            TokenSource::Given(chosen.get(choice as usize).copied().flatten().unwrap_or(0))
        }
        given => given,
    }));
    to.positions.clone_from(&step.positions);
    to.sequences.clone_from(&step.sequences);
    to.tables.clone_from(&step.tables);
    to.inputs.clone_from(&step.inputs);
    let silent = |choice: &Choice| {
        let report = Report::default();
        Choice { report, ..Choice::logits_of(choice.row) }
    };
    to.choices.clear();
    to.choices.extend(step.choices.iter().map(silent));
}

//! Ctrl-C stops the current answer. If there is none, it ends the program.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Error;

const IDLE: u8 = 0;
const WORKING: u8 = 1;
const STOPPING: u8 = 2;

/// The effect of a second Ctrl-C before the first one has stopped the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Insist {
    /// It ends the program, for `run`.
    Ends,
    /// It has no effect, so that `chat` survives while it answers.
    Ignored,
}

/// The state that the signal's handler and the generating loop share.
#[derive(Debug, Clone)]
pub(crate) struct Interrupts(Arc<AtomicU8>);

impl Interrupts {
    /// Installs the handler. Call it once in a process.
    pub(crate) fn install(insist: Insist) -> Result<Self, Error> {
        let state = Arc::new(AtomicU8::new(IDLE));
        let shared = Arc::clone(&state);
        ctrlc::set_handler(move || {
            let swap = |from, to| {
                shared.compare_exchange(from, to, Ordering::SeqCst, Ordering::SeqCst).is_ok()
            };
            if !swap(WORKING, STOPPING)
                && (insist == Insist::Ends || shared.load(Ordering::SeqCst) == IDLE)
            {
                std::process::exit(130);
            }
        })?;
        Ok(Self(state))
    }

    /// Until the guard is dropped, Ctrl-C requests a stop.
    pub(crate) fn begin(&self) -> Working {
        self.0.store(WORKING, Ordering::SeqCst);
        Working(Arc::clone(&self.0))
    }
}

/// While this lives, Ctrl-C does not end the program.
#[derive(Debug)]
pub(crate) struct Working(Arc<AtomicU8>);

impl Working {
    /// Whether Ctrl-C came.
    pub(crate) fn stopped(&self) -> bool {
        self.0.load(Ordering::SeqCst) == STOPPING
    }
}

impl Drop for Working {
    fn drop(&mut self) {
        self.0.store(IDLE, Ordering::SeqCst);
    }
}

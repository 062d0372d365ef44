//! The progress of `lathe quantize`.

use std::time::{Duration, Instant};

use lathe_quant::job;

/// Prints the progress and the remaining time to stderr.
pub(super) struct Meter {
    start: Instant,
    told: Instant,
    /// The work that an earlier run had done.
    from: Option<usize>,
}

impl Meter {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Meter { start: now, told: now, from: None }
    }

    pub(super) fn tell(&mut self, now: job::Progress) {
        let job::Progress { done, total } = now;
        let from = *self.from.get_or_insert(done);
        if self.told.elapsed() < Duration::from_secs(5) && done < total {
            return;
        }
        self.told = Instant::now();
        let share = done as f64 / total.max(1) as f64;
        let spent = self.start.elapsed().as_secs_f64();
        let left = match done - from {
            0 => String::new(),
            ours => format!(", about {:.0} s left", spent * (total - done) as f64 / ours as f64),
        };
        say!("{:.0} %, {spent:.0} s{left}", share * 100.0);
    }
}

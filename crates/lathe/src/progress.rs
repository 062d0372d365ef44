//! Progress of downloads, on stderr: a bar on a terminal, a line now and then elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// How progress is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reporter {
    /// A bar that moves.
    Bar,
    /// Plain lines.
    Lines,
    /// Nothing.
    Silent,
}

impl Reporter {
    /// A bar if stderr is a terminal, lines if it is a file or a pipe.
    pub fn for_stderr() -> Self {
        if std::io::stderr().is_terminal() { Self::Bar } else { Self::Lines }
    }

    /// Says something.
    pub fn line(&self, text: &str) {
        if *self != Self::Silent {
            eprintln!("{text}");
        }
    }

    /// Starts to show the progress of `name`, of which `have` bytes are there.
    pub fn start(&self, name: &str, bytes: Option<u64>, have: u64) -> Progress {
        let total = bytes.map_or("unknown size".to_owned(), |bytes| HumanBytes(bytes).to_string());
        let resumed =
            if have > 0 { format!(", resuming at {}", HumanBytes(have)) } else { String::new() };
        let bar = (*self == Self::Bar).then(|| {
            let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template).expect("a valid template");
            let bar = ProgressBar::new(bytes.unwrap_or(0)).with_style(style.progress_chars("=> "));
            bar.set_message(name.to_owned());
            // The rate shall be this run's, not count what an earlier one fetched.
            bar.set_position(have);
            bar.reset_eta();
            bar
        });
        if *self == Self::Lines {
            eprintln!("downloading {name} ({total}{resumed})");
        }
        let lines = *self == Self::Lines;
        Progress { name: name.to_owned(), bytes, bar, lines, tenths: Cell::new(0) }
    }
}

/// The progress of one file.
#[derive(Debug)]
pub struct Progress {
    name: String,
    bytes: Option<u64>,
    bar: Option<ProgressBar>,
    lines: bool,
    tenths: Cell<u64>,
}

impl Progress {
    /// So many bytes are there now.
    pub fn set(&self, have: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(have);
        }
        let Some(bytes) = self.bytes.filter(|bytes| self.lines && *bytes >= 10 << 20) else {
            return;
        };
        let tenths = have * 10 / bytes;
        if tenths > self.tenths.get() && tenths < 10 {
            eprintln!("{}: {}0 %", self.name, tenths);
        }
        self.tenths.set(tenths);
    }

    /// All is there.
    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.bar.is_some() || self.lines {
            eprintln!("downloaded {}", self.name);
        }
    }

    /// It will not be finished.
    pub fn abandon(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

//! Download progress on stderr: a bar on a terminal, and occasional lines elsewhere.

use std::cell::Cell;
use std::io::IsTerminal;

use indicatif::{HumanBytes, ProgressBar, ProgressStyle};
use lathe_session::{Progress, Reporter};

/// How stderr shows progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Terminal {
    /// A bar that moves.
    Bar,
    /// Plain lines.
    Lines,
}

impl Terminal {
    /// A bar if stderr is a terminal, lines if it is a file or a pipe.
    pub(crate) fn for_stderr() -> Self {
        if std::io::stderr().is_terminal() { Self::Bar } else { Self::Lines }
    }
}

impl Reporter for Terminal {
    fn line(&self, text: &str) {
        say!("{text}");
    }

    fn start(&self, name: &str, bytes: Option<u64>, have: u64) -> Box<dyn Progress> {
        let total = bytes.map_or("unknown size".to_owned(), |bytes| HumanBytes(bytes).to_string());
        let resumed =
            if have > 0 { format!(", resuming at {}", HumanBytes(have)) } else { String::new() };
        let bar = (*self == Self::Bar).then(|| {
            let template = "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} {eta}";
            let style = ProgressStyle::with_template(template).expect("a valid template");
            let bar = ProgressBar::new(bytes.unwrap_or(0)).with_style(style.progress_chars("=> "));
            bar.set_message(name.to_owned());
            // The rate is that of this run. Bytes of an earlier run do not count.
            bar.set_position(have);
            bar.reset_eta();
            bar
        });
        if *self == Self::Lines {
            say!("downloading {name} ({total}{resumed})");
        }
        let lines = *self == Self::Lines;
        Box::new(Shown { name: name.to_owned(), bytes, bar, lines, tenths: Cell::new(0) })
    }
}

/// The progress of one file.
#[derive(Debug)]
struct Shown {
    name: String,
    bytes: Option<u64>,
    bar: Option<ProgressBar>,
    lines: bool,
    tenths: Cell<u64>,
}

impl Progress for Shown {
    fn set(&self, have: u64) {
        if let Some(bar) = &self.bar {
            bar.set_position(have);
        }
        let Some(bytes) = self.bytes.filter(|bytes| self.lines && *bytes >= 10 << 20) else {
            return;
        };
        let tenths = have * 10 / bytes;
        if tenths > self.tenths.get() && tenths < 10 {
            say!("{}: {}0 %", self.name, tenths);
        }
        self.tenths.set(tenths);
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        if self.bar.is_some() || self.lines {
            say!("downloaded {}", self.name);
        }
    }

    fn abandon(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

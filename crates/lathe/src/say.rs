//! `say!`: a line for people, on stderr.

use std::fmt::Arguments;
use std::io::{self, Write};

/// Writes a line to stderr. Unlike `eprintln!` it does not panic where nobody reads it: what a
/// command does is not lost because its remarks are.
macro_rules! say {
    ($($text:tt)*) => { $crate::say::line(format_args!($($text)*)) };
}

/// See [`say!`].
pub(crate) fn line(text: Arguments<'_>) {
    part(format_args!("{text}\n"));
}

/// The same without an end of line.
pub(crate) fn part(text: Arguments<'_>) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_fmt(text).and_then(|()| stderr.flush());
}

//! Output and exit codes: JSON on stdout, and one line with the reason on stderr.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Error;
use lathe_session::{CatalogueError, SessionError};
use serde::Serialize;

/// The caller's mistake: wrong usage or bad input. Exit code 2.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct InputError(pub String);

/// The user stopped the command with Ctrl-C. Exit code 130, as for a process that the signal ended.
#[derive(Debug, thiserror::Error)]
#[error("interrupted")]
pub(crate) struct Interrupted;

/// An error for bad input.
pub(crate) fn bad_input(message: impl Display) -> Error {
    InputError(message.to_string()).into()
}

/// Marks errors as bad input.
pub(crate) trait InputContext<T> {
    /// As an input error with the error's own text.
    fn bad_input(self) -> Result<T, Error>;
    /// As an input error that begins with `what`.
    fn bad_input_in(self, what: impl Display) -> Result<T, Error>;
}

impl<T, E: Into<Error>> InputContext<T> for Result<T, E> {
    fn bad_input(self) -> Result<T, Error> {
        self.map_err(|error| bad_input(one_line(&error.into())))
    }

    fn bad_input_in(self, what: impl Display) -> Result<T, Error> {
        self.map_err(|error| bad_input(format!("{what}: {}", one_line(&error.into()))))
    }
}

/// The library's error with the command line's flags: the flag that is wrong, or one that helps.
/// `None` if the library's own text is enough.
fn in_flags(error: &SessionError) -> Option<String> {
    Some(match error {
        SessionError::Format(_) => format!("--format: {error}"),
        SessionError::NoDevice(_) => format!("--device cuda: {error}"),
        SessionError::Ranks { ranks, by_expert, reason } => {
            let experts = if *by_expert { " --expert-parallel" } else { "" };
            format!("--tensor-parallel {ranks}{experts}: {reason}")
        }
        SessionError::NoTokenizer { .. } => format!("{error}; give token ids instead"),
        SessionError::NoChatTemplate { .. } => format!("{error}; try lathe run --raw"),
        SessionError::AdapterLost { .. } => format!("{error}, expected --adapter none"),
        SessionError::AdapterOfDummy(_) => format!("--{error}"),
        _ => return None,
    })
}

/// The error and its causes on one line.
pub(crate) fn one_line(error: &Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let flags = cause.downcast_ref::<SessionError>().and_then(in_flags);
        let text = flags.unwrap_or_else(|| cause.to_string());
        let text = text.split_whitespace().collect::<Vec<_>>().join(" ");
        // Many errors contain the text of their cause.
        if !parts.last().is_some_and(|last| last.contains(&text)) {
            parts.push(text);
        }
    }
    parts.join(": ")
}

/// The exit code for `error`.
pub(crate) fn exit_code(error: &Error) -> u8 {
    if is_broken_pipe(error) {
        // The reader of stdout is gone (`lathe run ... | head`), so nobody can be told.
        return 0;
    }
    if error.is::<Interrupted>() {
        return 130;
    }
    let input = error.is::<InputError>()
        || error.downcast_ref::<CatalogueError>().is_some_and(CatalogueError::is_input)
        || error.downcast_ref::<SessionError>().is_some_and(SessionError::is_input);
    if input { 2 } else { 1 }
}

/// Whether the error is that stdout has no reader any more.
pub(crate) fn is_broken_pipe(error: &Error) -> bool {
    error.chain().any(|cause| {
        cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
    })
}

/// Says why the command failed: a line on stderr, and with `json` the one object on stdout.
pub(crate) fn fail(error: &Error, json: bool) {
    let text = one_line(error);
    say!("error: {text}");
    if json {
        // The exit code says the same where nobody reads stdout.
        let _ = print_json(&serde_json::json!({ "error": text }));
    }
}

/// Writes the command's one JSON object.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let mut text = serde_json::to_string(value)?;
    text.push('\n');
    print(&text)
}

/// Writes to stdout and flushes.
pub(crate) fn print(text: &str) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// A number for people: `1.23 G`.
pub(crate) fn human_count(count: f64) -> String {
    let mut value = count;
    let mut unit = "";
    for next in ["k", "M", "G", "T", "P"] {
        if value < 1000.0 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if unit.is_empty() { format!("{value:.0}") } else { format!("{value:.2} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn codes() {
        assert_eq!(exit_code(&bad_input("x")), 2);
        assert_eq!(exit_code(&bad_input("x").context("y")), 2);
        assert_eq!(exit_code(&anyhow::anyhow!("x")), 1);
        assert_eq!(exit_code(&Interrupted.into()), 130);
        assert_eq!(exit_code(&io::Error::from(io::ErrorKind::BrokenPipe).into()), 0);
        let refused = CatalogueError::Refused { what: "a".into(), status: 404, hint: "b".into() };
        assert_eq!(exit_code(&SessionError::from(refused).into()), 2);
        assert_eq!(exit_code(&SessionError::Context { needed: 2, limit: 1 }.into()), 2);
    }

    #[test]
    fn one_line_without_repeats() {
        let error = Err::<(), _>(anyhow::anyhow!("inner\n  text")).context("outer");
        assert_eq!(one_line(&error.expect_err("an error")), "outer: inner text");
        let error = Err::<(), _>(anyhow::anyhow!("inner")).context("outer: inner");
        assert_eq!(one_line(&error.expect_err("an error")), "outer: inner");
    }

    #[test]
    fn for_people() {
        assert_eq!(human_count(1.5e9), "1.50 G");
    }
}

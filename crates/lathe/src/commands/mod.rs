//! One file a command.

mod pull;

use anyhow::Error;

use crate::arguments::{Arguments, Command};
use crate::catalogue::{self, Environment, Located};
use crate::progress::Reporter;

/// Runs the command that the words ask for.
pub fn dispatch(arguments: &Arguments) -> Result<(), Error> {
    let global = &arguments.global;
    match &arguments.command {
        Command::Pull(command) => pull::run(global, command),
        _ => Err(crate::output::bad_input("this command is not available in this version")),
    }
}

/// Finds, or fetches, what the word MODEL names, and says what its user should know.
pub fn locate(model: &str) -> Result<Located, Error> {
    let reporter = Reporter::for_stderr();
    let located = catalogue::resolve(model, &Environment::from_process(), &reporter)?;
    if let Some(notice) = located.notice {
        reporter.line(&format!("note: {notice}"));
    }
    Ok(located)
}

//! The `lathe` command: from words to a command, from its outcome to an exit code.
//!
//! The way in: [`arguments`] is the command line as data, [`commands`] has one file a command,
//! and [`find`] opens what the word MODEL names. All else is the library's, `lathe_session`.
#![forbid(unsafe_code)]
// They panic when the stream is closed or its disk is full. `output` has what does not.
#![deny(clippy::print_stdout, clippy::print_stderr)]

#[macro_use]
mod say;

mod arguments;
mod commands;
mod explanation;
mod find;
mod interrupt;
mod output;
mod plot;
mod progress;
mod usage;

use std::process::ExitCode;
use std::time::Instant;

use usage::Parsed;

fn main() -> ExitCode {
    let started = Instant::now();
    let mut json = std::env::args_os().any(|word| word == "--json");
    let outcome = match usage::parse(std::env::args_os()) {
        Parsed::Command(arguments) => {
            json = arguments.global.json;
            commands::dispatch(&arguments, started)
        }
        Parsed::Text(text) => output::print(&text),
        Parsed::Wrong(line) => Err(output::bad_input(line)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = output::exit_code(&error);
            if code != 0 {
                output::fail(&error, json);
            }
            ExitCode::from(code)
        }
    }
}

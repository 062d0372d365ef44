//! The `lathe` command: parses words to a command, and turns its result into an exit code.
//!
//! Start here: [`arguments`] is the command line as data, [`commands`] has one file for each
//! command, and [`find`] opens the model that the word MODEL names. Everything else is in the
//! library, `lathe_session`.
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
mod staging;
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

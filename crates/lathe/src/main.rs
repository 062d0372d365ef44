//! The `lathe` command: from words to a command, from its outcome to an exit code.
//!
//! The way in: [`arguments`] is the command line as data, [`commands`] has one file a command,
//! [`catalogue`] turns the word MODEL into files, and [`session`] turns files into an engine.
#![forbid(unsafe_code)]

mod arguments;
mod catalogue;
mod commands;
mod conversation;
mod experts;
mod explanation;
mod generate;
mod interrupt;
mod measure;
mod memory;
mod output;
mod parallel;
mod plot;
mod progress;
mod prompt;
mod roofs;
mod sampling;
mod session;
mod shape;
mod startup;
mod steps;
mod usage;

use std::process::ExitCode;
use std::time::Instant;

use usage::Parsed;

fn main() -> ExitCode {
    let started = Instant::now();
    let outcome = match usage::parse(std::env::args_os()) {
        Parsed::Command(arguments) => commands::dispatch(&arguments, started),
        Parsed::Text(text) => output::print(&text),
        Parsed::Wrong(line) => Err(output::bad_input(line)),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = output::exit_code(&error);
            if code != 0 {
                eprintln!("error: {}", output::one_line(&error));
            }
            ExitCode::from(code)
        }
    }
}

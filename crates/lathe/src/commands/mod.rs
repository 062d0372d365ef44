//! One file for each command.

mod bench;
mod chat;
mod convert;
mod eval;
mod inspect;
mod inspect_parallel;
mod pull;
mod quantize;
mod run;
mod score;

use std::time::Instant;

use anyhow::{Context, Error};

use crate::arguments::{Arguments, Command};
use crate::output::bad_input;

/// Runs the command in `arguments`. The process began at `started`.
pub(crate) fn dispatch(arguments: &Arguments, started: Instant) -> Result<(), Error> {
    let global = &arguments.global;
    if global.kv_format.is_some()
        && matches!(arguments.command, Command::Convert(_) | Command::Pull(_))
    {
        return Err(bad_input("--kv-format: this command runs no model and has no KV cache"));
    }
    if global.adapter.is_some() && matches!(arguments.command, Command::Pull(_)) {
        return Err(bad_input("--adapter: this command opens no model"));
    }
    if let Some(threads) = global.threads {
        // This pool packs and quantizes weights. The backend limits its own workers.
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads.get());
        pool.build_global().context("--threads: the threads cannot be started")?;
    }
    match &arguments.command {
        Command::Run(command) => run::run(global, command, started),
        Command::Chat(command) => chat::run(global, command),
        Command::Score(command) => score::run(global, command),
        Command::Eval(command) => eval::run(global, command),
        Command::Inspect(command) => inspect::run(global, command),
        Command::Bench(command) => bench::run(global, command),
        Command::Convert(command) => convert::run(global, command),
        Command::Quantize(command) => quantize::run(global, command),
        Command::Pull(command) => pull::run(global, command),
    }
}

//! The rules of the workspace that a machine can check, and other chores of its developers.
#![forbid(unsafe_code)]

mod cuda_toolkit;
mod dependencies;
mod instruction_sets;
mod neon;
mod source;
mod tidy;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(about, version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Checks crate edges, `unsafe`, lengths, and leftovers.
    Tidy {
        /// Shrinks the list of exceptions to what is still needed; adds nothing.
        #[arg(long)]
        update: bool,
    },
    /// Checks bans, sources and licences against deny.toml, and finds unused dependencies
    Dependencies,
    /// Brings the pinned CUDA compiler from Python wheels and prints its CUDA_HOME
    CudaToolkit,
    /// Runs the integration tests with weaker instruction sets than this machine's
    InstructionSets,
    /// Builds the CPU backend's tests for 64-bit Arm and runs the kernels' under qemu-user
    Neon {
        /// Says what is missing on this machine and succeeds, where something is
        #[arg(long)]
        if_possible: bool,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let root = workspace_root();
    let outcome = match arguments.command {
        Command::Tidy { update } => tidy::run(&root, update),
        Command::Dependencies => dependencies::run(&root),
        Command::CudaToolkit => cuda_toolkit::run(&root),
        Command::InstructionSets => instruction_sets::run(&root),
        Command::Neon { if_possible } => neon::run(&root, if_possible),
    };
    match outcome {
        Ok(problems) if problems.is_empty() => ExitCode::SUCCESS,
        Ok(problems) => {
            problems.iter().for_each(|problem| eprintln!("{problem}"));
            eprintln!("{} problems", problems.len());
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The folder of the workspace: xtask lies directly in it.
fn workspace_root() -> PathBuf {
    let mut path = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    path.pop();
    path
}

/// `cargo metadata` as JSON, with `arguments`.
fn metadata(root: &std::path::Path, arguments: &[&str]) -> anyhow::Result<serde_json::Value> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let mut command = std::process::Command::new(cargo);
    command.current_dir(root).args(["metadata", "--format-version", "1"]).args(arguments);
    let output = command.output()?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "cargo metadata failed: {complaint}");
    Ok(serde_json::from_slice(&output.stdout)?)
}

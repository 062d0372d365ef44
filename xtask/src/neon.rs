//! `cargo xtask neon`: the CPU backend's kernels on 64-bit Arm, under qemu-user.
//!
//! On Debian: `rustup target add aarch64-unknown-linux-gnu` and the packages
//! `gcc-aarch64-linux-gnu` and `qemu-user`. The emulated processor is one with the dot product, so
//! that the kernels with it and those without are tested; then one without, which must not meet an
//! instruction that it lacks.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

const TARGET: &str = "aarch64-unknown-linux-gnu";
const LINKER: &str = "aarch64-linux-gnu-gcc";
const EMULATOR: &str = "qemu-aarch64";
/// Where Debian's cross compiler has the C library.
const SYSROOT: &str = "/usr/aarch64-linux-gnu";

/// What a processor (as qemu names them) is to run: filters of the test harness.
const RUNS: [(&str, &[&str]); 2] = [
    ("max", &["linear::", "lanes::", "isa::", "cores::", "gang::", "cache::", "attend::"]),
    ("cortex-a72", &["machine::", "lanes::", "linear::tests::extreme", "linear::tests::bias"]),
];
/// Tests that take emulation minutes. What they would find, others do: every kernel's bits are the
/// portable ones', for one row and for many, and those the host compares with the oracle.
const SKIPPED: [&str; 3] = [
    "linear::tests::kernels_agree_with_the_oracle",
    "linear::tests::rows_of_both_forms",
    "linear::tests::weights_stay_as_small",
];

pub(crate) fn run(root: &Path, if_possible: bool) -> anyhow::Result<Vec<String>> {
    let missing = missing()?;
    if !missing.is_empty() {
        if if_possible {
            eprintln!("neon: skipped, this machine lacks {}", missing.join(", "));
            return Ok(Vec::new());
        }
        return Ok(missing.into_iter().map(|what| format!("neon: missing {what}")).collect());
    }
    for (processor, filters) in RUNS {
        eprintln!("neon: on {processor}");
        test(root, processor, filters)?;
    }
    Ok(Vec::new())
}

/// What is not on this machine, and where it comes from.
fn missing() -> anyhow::Result<Vec<String>> {
    let output = Command::new("rustc").args(["--print", "sysroot"]).output().context("rustc")?;
    let sysroot = PathBuf::from(String::from_utf8(output.stdout)?.trim());
    let mut missing = Vec::new();
    if !sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir() {
        missing.push(format!("the standard library (rustup target add {TARGET})"));
    }
    for (program, package) in [(LINKER, "gcc-aarch64-linux-gnu"), (EMULATOR, "qemu-user")] {
        if Command::new(program).arg("--version").output().is_err() {
            missing.push(format!("{program} (Debian package {package})"));
        }
    }
    if !Path::new(SYSROOT).is_dir() {
        missing.push(format!("{SYSROOT} (Debian package libc6-dev-arm64-cross)"));
    }
    Ok(missing)
}

/// Runs the tests of the library that `filters` choose.
fn test(root: &Path, processor: &str, filters: &[&str]) -> anyhow::Result<()> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(root)
        .args(["test", "--quiet", "--package", "lathe-cpu", "--lib", "--target", TARGET])
        // The kernels inline at any level; this one builds in half the time of the host's.
        .args(["--config", "profile.dev.package.lathe-cpu.opt-level=1"])
        .arg("--")
        .args(filters)
        .args(SKIPPED.iter().flat_map(|test| ["--skip", *test]))
        .env("CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER", LINKER)
        .env(
            "CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER",
            format!("{EMULATOR} -L {SYSROOT} -cpu {processor}"),
        )
        .status()?;
    ensure!(status.success(), "neon: the tests of lathe-cpu on {processor} failed");
    Ok(())
}

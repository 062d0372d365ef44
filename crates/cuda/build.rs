//! Compiles each kernel file to a fatbin and embeds it. A file is compiled again only when it, a
//! header beside it or the compiler's path changes.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Spills that are accepted: kernel and reason. Any other spill fails the build.
const SPILLS_ACCEPTED: &[(&str, &str)] = &[];

/// Folders of kernel files, each `.cu` a module of its own.
const FOLDERS: &[&str] = &["kernels/plain", "kernels/fast"];

/// Where the headers are.
const HEADERS: &str = "kernels";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=PATH");
    if std::env::var_os("CARGO_FEATURE_DEVICE").is_none() {
        return;
    }
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let nvcc = find_nvcc().unwrap_or_else(|| {
        panic!(
            "nvcc not found: put it on PATH, set CUDA_HOME, or run `cargo xtask cuda-toolkit` and \
             set CUDA_HOME to the folder that it prints"
        )
    });
    let mut table = String::from("&[\n");
    println!("cargo:rerun-if-changed={HEADERS}");
    let headers = files(Path::new(HEADERS), "cuh");
    for folder in FOLDERS {
        for source in files(Path::new(folder), "cu") {
            let name = source.file_stem().expect("a file name").to_string_lossy().into_owned();
            let fatbin = out.join(format!("{name}.fatbin"));
            let stamp = out.join(format!("{name}.stamp"));
            let wanted = stamp_of(&nvcc, &source, &headers);
            let fresh = fatbin.exists()
                && std::fs::read_to_string(&stamp).is_ok_and(|found| found == wanted);
            if !fresh {
                compile(&nvcc, &source, &fatbin);
                std::fs::write(&stamp, &wanted).expect("OUT_DIR can be written");
            }
            table.push_str(&format!("    ({name:?}, include_bytes!({fatbin:?})),\n"));
        }
    }
    table.push(']');
    std::fs::write(out.join("modules.rs"), table).expect("OUT_DIR can be written");
}

/// `CUDA_HOME` first, so that a pinned toolkit wins over the system's.
fn find_nvcc() -> Option<PathBuf> {
    let home = std::env::var_os("CUDA_HOME").map(|home| PathBuf::from(home).join("bin/nvcc"));
    let path = std::env::var_os("PATH").unwrap_or_default();
    let on_path = std::env::split_paths(&path).map(|folder| folder.join("nvcc"));
    home.into_iter().chain(on_path).find(|nvcc| nvcc.is_file())
}

/// The files of a folder whose names end with `extension`.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder:?}: {e}"));
    let files = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut files: Vec<PathBuf> =
        files.filter(|file| file.extension().is_some_and(|it| it == extension)).collect();
    files.sort();
    files
}

/// What a fatbin was made from.
fn stamp_of(nvcc: &Path, source: &Path, headers: &[PathBuf]) -> String {
    let mut stamp = format!("{nvcc:?}\n");
    for file in std::iter::once(source).chain(headers.iter().map(PathBuf::as_path)) {
        println!("cargo:rerun-if-changed={}", file.display());
        stamp += &std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{file:?}: {e}"));
    }
    stamp
}

fn compile(nvcc: &Path, source: &Path, fatbin: &Path) {
    let output = Command::new(nvcc)
        .args(["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "--fatbin"])
        .args(["-I", HEADERS, "-Xptxas", "-v", "-o"])
        .arg(fatbin)
        .arg(source)
        .output()
        .unwrap_or_else(|error| panic!("{nvcc:?}: {error}"));
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{nvcc:?} {source:?} failed:\n{log}");
    check_spills(source, &log);
}

/// ptxas names a kernel ("Function properties for NAME"), then its spills on the next line.
fn check_spills(source: &Path, log: &str) {
    let mut kernel = "";
    for line in log.lines() {
        if let Some((_, name)) = line.split_once("Function properties for ") {
            kernel = name.trim();
        }
        let spills = line.contains("bytes spill stores") && !line.contains(" 0 bytes spill stores");
        let accepted = SPILLS_ACCEPTED.iter().any(|(name, _)| kernel.contains(name));
        assert!(!spills || accepted, "{source:?}: {kernel} spills registers: {}", line.trim());
    }
}

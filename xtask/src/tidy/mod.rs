//! `cargo xtask tidy`: what the design forbids, as checks.

mod circles;
mod edges;
mod ratchet;
mod sources;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// ARCHITECTURE.md stays short enough to be read.
const ARCHITECTURE_LINES_MAX: usize = 250;

/// All problems, as lines to print. With `update`, the list of exceptions is shrunk first.
pub(crate) fn run(root: &Path, update: bool) -> anyhow::Result<Vec<String>> {
    let metadata = crate::metadata(root, &["--no-deps", "--offline"])?;
    let mut problems = edges::check(&metadata);
    problems.extend(check_manifests(root, &metadata)?);
    problems.extend(check_architecture(root));

    let mut found = sources::Findings::default();
    let mut crates: BTreeMap<String, circles::Crate> = BTreeMap::new();
    for path in crate::source::rust_files(root)? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().replace('\\', "/");
        let syntax = sources::check(&name, &text, &mut found)?;
        if let Some((source, file)) = in_crate(&name) {
            crates.entry(source.to_owned()).or_default().add(module_path(file), &name, &syntax);
        }
    }
    for path in crate::source::cuda_files(root)? {
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let name = path.strip_prefix(root).unwrap_or(&path).display();
        let long = |line: &str| line.chars().count() > sources::COLUMNS;
        for (number, _) in (1..).zip(text.lines()).filter(|(_, line)| long(line)) {
            problems.push(format!("{name}:{number}: more than {} characters", sources::COLUMNS));
        }
    }
    let mut chains = Vec::new();
    for (source, tree) in &crates {
        let kinds = [("files", tree.file_circles()), ("folders", tree.folder_circles())];
        for (kind, circles) in kinds {
            let name = format!("{source}::{kind} in circles");
            found.lengths.insert(name.clone(), circles.iter().map(|circle| circle.size).sum());
            let texts = circles.into_iter().map(|circle| circle.chain).collect::<Vec<_>>();
            chains.push((name, texts.join("\n")));
        }
    }
    problems.extend(found.problems);
    let lengths = ratchet::check(root, &found.lengths, update)?;
    // What closes a circle is told beside its number.
    chains.retain(|(name, _)| lengths.iter().any(|problem| problem.starts_with(name)));
    problems.extend(lengths);
    problems.extend(chains.into_iter().map(|(name, chain)| format!("{name}:\n{chain}")));
    Ok(problems)
}

/// The source folder of the crate that the file is part of, and its path there. Tests, examples and
/// build scripts are crates of their own.
fn in_crate(name: &str) -> Option<(&str, &str)> {
    let at = name.find("/src/")?;
    Some((&name[..at + 4], &name[at + 5..]))
}

/// The module of a file in a source folder.
fn module_path(file: &str) -> Vec<String> {
    let path = file.strip_suffix(".rs").unwrap_or(file);
    let path = path.strip_suffix("/mod").unwrap_or(path);
    match path {
        "lib" | "main" => Vec::new(),
        _ => path.split('/').map(str::to_owned).collect(),
    }
}

/// Every crate takes part in the workspace's lints, so that `missing_docs` holds everywhere.
fn check_manifests(root: &Path, metadata: &serde_json::Value) -> anyhow::Result<Vec<String>> {
    let mut problems = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let path = PathBuf::from(package["manifest_path"].as_str().unwrap_or_default());
        let manifest = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let lints = manifest.split("[lints]").nth(1).unwrap_or_default();
        if !lints.trim_start().starts_with("workspace = true") {
            let name = path.strip_prefix(root).unwrap_or(&path).display();
            problems.push(format!("{name}: lacks `[lints] workspace = true`"));
        }
        if package["license"].as_str() != Some("Apache-2.0") {
            problems.push(format!("{}: its licence is not Apache-2.0", path.display()));
        }
    }
    Ok(problems)
}

fn check_architecture(root: &Path) -> Option<String> {
    let Ok(text) = fs::read_to_string(root.join("ARCHITECTURE.md")) else {
        return Some("ARCHITECTURE.md: is not there".into());
    };
    let lines = text.lines().count();
    let long = lines > ARCHITECTURE_LINES_MAX;
    long.then(|| format!("ARCHITECTURE.md: {lines} lines, at most {ARCHITECTURE_LINES_MAX}"))
}

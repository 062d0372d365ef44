//! The project's Rust files, and what several checks ask of them.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;

/// All Rust files below `root`, in the order of their names.
pub(crate) fn rust_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    files_that_end(root, &[".rs"])
}

/// All CUDA sources and headers, likewise.
pub(crate) fn cuda_files(root: &Path) -> anyhow::Result<Vec<PathBuf>> {
    files_that_end(root, &[".cu", ".cuh"])
}

/// All files below `root` with one of `endings`, in the order of their names. Build outputs
/// (`target*`) and hidden folders are not part of it.
fn files_that_end(root: &Path, endings: &[&str]) -> anyhow::Result<Vec<PathBuf>> {
    let (mut files, mut folders) = (Vec::new(), vec![root.to_path_buf()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                if !name.starts_with('.') && !name.starts_with("target") {
                    folders.push(path);
                }
            } else if endings.iter().any(|ending| name.ends_with(ending)) {
                files.push(path);
            }
        }
    }
    files.sort();
    Ok(files)
}

/// Whether an item is there in tests alone.
pub(crate) fn is_test(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| match &attribute.meta {
        syn::Meta::List(list) if list.path.is_ident("cfg") => {
            list.tokens.to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == "test")
        }
        syn::Meta::Path(path) => path.is_ident("test"),
        _ => false,
    })
}

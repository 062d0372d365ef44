//! The command line's contract with real models: golden values, batches, and broken files.

mod batch;
mod golden;
mod malformed;
#[path = "../support/mod.rs"]
mod support;

use std::path::PathBuf;

/// The folder beside the project, or `None` (said aloud) where it is absent.
fn shared(test: &str) -> Option<PathBuf> {
    lathe_test_support::shared(test, "")
}

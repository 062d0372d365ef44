//! Tests of the control plane with a fake executor.

mod fake;
mod simple;
mod windows;

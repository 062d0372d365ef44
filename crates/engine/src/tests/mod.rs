//! Tests of the control plane with a fake executor.

mod fake;
mod fuzz;
mod simple;
mod windows;

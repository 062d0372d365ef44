//! Tests of the control plane with a fake executor.

pub mod fake;
mod fuzz;
mod prefix;
mod simple;
mod windows;

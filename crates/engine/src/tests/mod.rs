//! Tests of the control plane with a fake executor.

mod expanded;
pub mod fake;
mod fuzz;
mod prefix;
mod simple;
mod windows;

//! Tests of the control plane with a fake executor.

mod expanded;
pub(crate) mod fake;
mod fuzz;
mod prefix;
mod simple;
mod windows;

//! The rules of the workspace that a machine can check.

fn main() {}

//! The Lathe binary.

fn main() {}

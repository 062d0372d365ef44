//! The CPU backend: kernels for ops, chosen at run time for the instructions of the machine.
//!
//! [`gang`] runs work on spinning threads, [`isa`] chooses instructions, [`pack`] lays weights out,
//! [`linear`] multiplies by them, [`machine`] measures the roofs of the roofline. This crate knows
//! nothing of model families, requests or files.

pub mod gang;
pub mod isa;
pub mod linear;
pub mod machine;
pub mod pack;

pub use isa::Isa;

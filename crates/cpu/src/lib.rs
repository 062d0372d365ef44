//! The CPU backend: packed weights, kernels for each instruction set, the gang of workers that
//! runs them, and the executor of programs.
//!
//! [`CpuBackend`] is the way in. It loads the weights and lays them out (`weights`, [`pack`]),
//! fuses ops to stages (`plan`), and makes an executor that runs steps on a [`gang`] of spinning
//! threads. [`linear`] has the products of packed weights, and `attend` the attention over the
//! paged `cache`. [`isa`] chooses instructions, and [`machine`] measures what the machine can do.
//! This crate knows nothing of model families, requests or files.

mod attend;
mod backend;
mod barrier;
mod cache;
mod cores;
mod elementwise;
mod executor;
mod experts;
pub mod gang;
pub mod isa;
mod lanes;
mod latent;
pub mod linear;
pub mod machine;
mod memory;
pub mod pack;
mod plan;
mod profile;
mod ranks;
mod rows;
mod stage;
mod sync;
mod transform;
mod weights;

pub use backend::{CpuBackend, CpuOptions};
pub use isa::Isa;

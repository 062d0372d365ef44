//! The CUDA backend: programs on one NVIDIA Hopper GPU.
//!
//! Everything is behind the feature `device`, which needs nvcc to build and nothing to start: the
//! driver is loaded when a device is opened, and what is absent is said by name. The way in is
//! `CudaBackend`; `executor.rs` runs a step, `launch.rs` maps ops to kernels, `device.rs` is the
//! only file that calls the driver.
#![deny(unsafe_code)]
#![cfg(feature = "device")]

mod backend;
mod cache;
#[allow(unsafe_code)] // Calls of the driver.
mod device;
mod executor;
mod fast;
mod gemm;
mod launch;
mod packed;
#[allow(unsafe_code)] // Vouches for the layout of the kernels' arguments.
mod parameters;
mod step_data;
mod units;
mod weights;

pub use backend::CudaBackend;
pub use device::{Device, DeviceError};

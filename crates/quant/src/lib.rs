//! Quantization: techniques, what they need to know of a model's inputs, recipes, and the job that
//! turns a model into a smaller one.
//!
//! The way in: [`recipe::Recipe`] says what is to be done, [`calibrate`] runs the model's
//! layers and keeps [`Statistics`], [`job::Job`] makes quantized weights. A technique is one
//! file under [`technique`], with one signature and one row in its registry. This crate knows no
//! backend: it comes in as a trait object.
#![forbid(unsafe_code)]

pub mod budget;
pub mod calibrate;
mod correction;
mod error;
pub mod explain;
mod fold;
pub mod inputs;
pub mod job;
mod matrix;
mod parameters;
pub mod readers;
pub mod recipe;
pub mod rotate;
mod rotated;
mod section;
mod statistics;
pub mod targets;
pub mod technique;

pub use correction::Correction;
pub use error::QuantError;
pub use matrix::{Group, Matrix, MatrixReport, Outcome, Quantized, Scales};
pub use parameters::{Kind, Parameter, Parameters};
pub use statistics::{Asymmetry, Statistics};

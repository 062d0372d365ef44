//! Quantization: techniques, the statistics of a model's inputs that they need, recipes, and the
//! job that makes a model smaller.
//!
//! Start here: a [`recipe::Recipe`] says what to do, [`calibrate`] runs the model's layers and
//! keeps [`Statistics`], and [`job::Job`] makes the quantized weights. A technique is one file
//! under [`technique`], with one signature and one row in the registry. This crate names no
//! backend; it takes one as a trait object.
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

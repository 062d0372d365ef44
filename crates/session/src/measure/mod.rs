//! Measurements of a model and of this machine: shapes and bytes, roofs, timed runs, timed steps,
//! and the load of experts.

pub mod experts;
pub mod roofs;
pub mod shape;
pub mod steps;
pub mod timing;

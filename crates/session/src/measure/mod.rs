//! What a model costs and what this machine does: shapes and bytes, roofs, timed runs, timed steps,
//! and where tokens go among experts.

pub mod experts;
pub mod roofs;
pub mod shape;
pub mod steps;
pub mod timing;

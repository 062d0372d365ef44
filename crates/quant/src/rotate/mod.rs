//! Rotations that are folded into weights before anything is rounded.

mod apply;
pub mod orthogonal;
pub mod turns;

pub(crate) use apply::turned;

//! Mixture of experts: choosing experts for each row, and running each expert on its rows.

mod group;
mod route;

pub use group::{ExpertsStage, GroupScratch};
pub use route::{Choice, RouteStage};

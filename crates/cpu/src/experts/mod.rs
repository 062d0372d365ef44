//! Mixture of experts: choosing experts for each row, and running each expert on its rows.

mod group;
mod route;

pub(crate) use group::{ExpertsStage, GroupScratch};
pub(crate) use route::{ChosenExperts, RouteStage};

//! Mixture of experts: chooses experts for each row and runs each expert on its rows.

mod group;
mod route;

pub(crate) use group::{ExpertsStage, GroupScratch};
pub(crate) use route::{ChosenExperts, RouteStage};

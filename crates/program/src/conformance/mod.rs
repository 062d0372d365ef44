//! The conformance suite for every backend, as data. Small seeded programs and steps are compared
//! with the reference. Batch invariance is compared with the backend itself.

mod cases;
mod choices;
mod compare;
mod invariance;
pub mod models;
mod random;
mod schedule;
mod trees;
mod weights;

pub use cases::{Case, cases};
pub use choices::choices;
pub use compare::{Failure, Settings, Size, Summary, Tolerance, check, check_case, check_case_of};
pub use invariance::batch_invariance;
pub use random::Random;
pub use schedule::{Chunk, Schedule};
pub use trees::trees;
pub use weights::SeededWeights;

//! What every backend must do, as data: small seeded programs and steps.

pub mod models;

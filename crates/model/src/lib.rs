//! Open-weight decoders as data: what a model is, where its weights are, how it becomes a
//! program, and how its text becomes tokens.
//!
//! The way in: [`families`] turns a `config.json` or GGUF metadata into a [`DecoderSpec`],
//! [`lower::lower`] turns that into a [`lathe_program::Program`]. This crate knows nothing of
//! requests or of HTTP.
#![forbid(unsafe_code)]

pub mod adapter;
pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod eagle;
pub mod export;
pub mod families;
mod generation;
mod inputs;
pub mod lower;
mod model;
pub mod names;
pub mod spec;
pub mod tokenizer;
pub mod weights;

pub use generation::GenerationDefaults;
pub use model::{FileLayout, Model, ModelError, OpenOptions, read_spec};
pub use spec::{DecoderSpec, SpecError};

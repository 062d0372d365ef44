//! Models: what a checkpoint is, how it becomes a program, and how its text becomes tokens.
#![forbid(unsafe_code)]

pub mod tokenizer;

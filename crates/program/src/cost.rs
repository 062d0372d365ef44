//! Cost counter.

//! See `lathe_fuzz::config`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lathe_fuzz::config(data));

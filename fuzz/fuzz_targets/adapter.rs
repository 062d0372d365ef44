//! See `lathe_fuzz::adapter`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| lathe_fuzz::adapter(data));

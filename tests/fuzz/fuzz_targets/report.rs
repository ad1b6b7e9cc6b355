#![no_main]
//! See `portcullis_fuzz::report`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::report(bytes));

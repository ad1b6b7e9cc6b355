#![no_main]
//! See `portcullis_fuzz::usage_line`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::usage_line(bytes));

#![no_main]
//! See `portcullis_fuzz::key`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::key(bytes));

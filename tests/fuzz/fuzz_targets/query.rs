#![no_main]
//! See `portcullis_fuzz::query`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::query(bytes));

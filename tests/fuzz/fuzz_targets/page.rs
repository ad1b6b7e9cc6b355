#![no_main]
//! See `portcullis_fuzz::page`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::page(bytes));

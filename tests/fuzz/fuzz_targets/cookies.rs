#![no_main]
//! See `portcullis_fuzz::cookies`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::cookies(bytes));

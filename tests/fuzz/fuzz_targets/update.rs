#![no_main]
//! See `portcullis_fuzz::update`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::update(bytes));

#![no_main]
//! See `portcullis_fuzz::import_line`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::import_line(bytes));

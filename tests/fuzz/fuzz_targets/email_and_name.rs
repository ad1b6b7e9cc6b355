#![no_main]
//! See `portcullis_fuzz::email_and_name`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::email_and_name(bytes));

#![no_main]
//! See `portcullis_fuzz::plugin_configuration`.

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| portcullis_fuzz::plugin_configuration(bytes));

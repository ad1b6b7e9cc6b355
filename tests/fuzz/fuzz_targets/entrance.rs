#![no_main]
//! Every target: the entrance with the name of the program.

use portcullis_fuzz::ENTRANCES;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    ENTRANCES.iter().filter(|(name, _)| *name == env!("CARGO_BIN_NAME")).for_each(|(_, entrance)| entrance(bytes));
});

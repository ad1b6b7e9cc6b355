//! The parts that run inside Envoy, run as WebAssembly in Node: the same results on 32 bits as on 64.

#![cfg(all(target_arch = "wasm32", target_os = "unknown"))]

use contract::decision::{Facts, Presented, decide};
use contract::hash::KeyHash;
use contract::id::{KeyId, OwnerId};
use contract::key::{FormError, KeyKind, check};
use contract::outcome::Outcome;
use contract::record::{Flags, Record};
use wasm_bindgen_test::wasm_bindgen_test;

#[wasm_bindgen_test]
fn a_key_hashes_to_its_sha_256() {
    let hash = KeyHash::of(b"abc");
    assert_eq!(hash.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    assert_eq!(hash.bucket(), 0xba78);
}

#[wasm_bindgen_test]
fn the_checksum_of_a_key_is_judged() {
    let good = "sk_live_abcdefABCDEF0123456789abcdefgh4Loqg4";
    assert_eq!(check(good), Ok(KeyKind::Live));
    assert_eq!(check(&good.replace("ABC", "ABD")), Err(FormError::Checksum));
}

#[wasm_bindgen_test]
fn times_beyond_32_bits_decide_as_they_should() {
    let mut record = Record::plain(KeyId([1; 16]), OwnerId([2; 16]));
    record.expires_at_s = Some(5_000_000_000);
    assert_eq!(decide(Presented::Key(&record), &Facts::at(4_999_999_999)), Outcome::Allowed);
    assert_eq!(decide(Presented::Key(&record), &Facts::at(5_000_000_000)), Outcome::Expired);
    record.flags = Flags::REVOKED;
    assert_eq!(decide(Presented::Key(&record), &Facts::at(0)), Outcome::Revoked);
}

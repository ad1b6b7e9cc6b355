//! A pepper for keys that were made elsewhere. Such a key may be weak, and whoever reads the database could guess it by its
//! SHA-256. With a pepper, a secret that both sides have and the database has not, what is stored of an imported key is the
//! HMAC-SHA-256 (RFC 2104, FIPS 180-4) of that hash, which nobody can guess at without the pepper.
//!
//! Keys that were made here are too random to be guessed and are stored as they are. So a key is looked for by its plain
//! hash first and by the other one after that: see [`hashes`].

extern crate alloc;

use core::fmt;
use core::iter;

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::hash::KeyHash;

/// Bytes of a pepper.
pub const PEPPER_BYTES: usize = 32;

/// The secret, ready to hash with. `Debug` prints nothing of it.
#[derive(Clone)]
pub struct Pepper(Hmac<Sha256>);

/// Why a text is no pepper. Has nothing of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pepper has 64 hexadecimal digits, such as `openssl rand -hex 32` prints")]
pub struct NoPepper;

impl Pepper {
    /// Reads a pepper from its text: 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`NoPepper`].
    pub fn parse(text: &str) -> Result<Self, NoPepper> {
        let mut bytes = [0; PEPPER_BYTES];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| NoPepper)?;
        Hmac::new_from_slice(&bytes).map(Self).map_err(|_| NoPepper)
    }

    /// What is stored of an imported key, from its SHA-256.
    #[must_use]
    pub fn hash(&self, plain: &KeyHash) -> KeyHash {
        let mut mac = self.0.clone();
        mac.update(&plain.0);
        KeyHash(mac.finalize().into_bytes().into())
    }
}

impl fmt::Debug for Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Pepper(…)")
    }
}

/// Under which hashes a key may be stored, from its SHA-256: as it is, then with the pepper, if there is one. The second is
/// computed only if it is asked for.
pub fn hashes(plain: KeyHash, pepper: Option<&Pepper>) -> impl Iterator<Item = KeyHash> {
    iter::once(plain).chain(pepper.into_iter().map(move |pepper| pepper.hash(&plain)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::vec::Vec;

    const TEXT: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    #[test]
    fn the_peppered_hash_is_the_hmac_of_the_plain_one() {
        // printf key-of-the-old-gateway-1 | openssl sha256 -binary | openssl sha256 -mac hmac -macopt hexkey:0001…1f
        let hash = Pepper::parse(TEXT).unwrap().hash(&KeyHash::of(b"key-of-the-old-gateway-1"));
        assert_eq!(format!("{hash}"), "3a4fce8f4e868d07a93200d13323ca3218a2b8f7cb40d0897fbb92c72b3580ad");
    }

    #[test]
    fn a_key_is_looked_for_as_it_is_and_then_with_the_pepper() {
        let (plain, pepper) = (KeyHash::of(b"a"), Pepper::parse(TEXT).unwrap());
        assert_eq!(hashes(plain, None).collect::<Vec<_>>(), [plain]);
        assert_eq!(hashes(plain, Some(&pepper)).collect::<Vec<_>>(), [plain, pepper.hash(&plain)]);
    }

    #[test]
    fn what_is_no_pepper_is_refused_and_nothing_of_one_is_printed() {
        for text in ["", "00", &TEXT[1..], &format!("{TEXT}0"), &TEXT.replace('0', "g")] {
            assert_eq!(Pepper::parse(text).err(), Some(NoPepper));
        }
        assert_eq!(format!("{:?}", Pepper::parse(TEXT).unwrap()), "Pepper(…)");
    }
}

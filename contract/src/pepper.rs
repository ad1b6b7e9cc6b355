//! The pepper: a secret under which hashes of imported keys are stored.
//!
//! An imported key may be weak, so a reader of the database could guess it by its SHA-256. With a pepper, which filters and
//! control planes have and the database does not, the database has the HMAC-SHA-256 (RFC 2104, FIPS 180-4) of that hash.
//! Without the pepper, a guess cannot be checked against it.
//!
//! Generated keys are too random to be guessed and are stored under their plain hash. A look-up therefore tries the plain
//! hash first, then the other one: see [`hashes`].

use std::{fmt, iter};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

use crate::hash::KeyHash;

/// Bytes of a pepper.
pub const PEPPER_BYTES: usize = 32;

/// A pepper, ready to hash with. `Debug` prints nothing of it.
#[derive(Clone)]
pub struct Pepper(Hmac<Sha256>);

/// The text is not a pepper. The error has nothing of the text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a pepper has 64 hexadecimal digits, such as `openssl rand -hex 32` prints")]
pub struct PepperError;

impl Pepper {
    /// Parses 64 hexadecimal digits.
    ///
    /// # Errors
    /// [`PepperError`].
    pub fn parse(text: &str) -> Result<Self, PepperError> {
        let mut bytes = [0; PEPPER_BYTES];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| PepperError)?;
        Hmac::new_from_slice(&bytes).map(Self).map_err(|_| PepperError)
    }

    /// The hash under which an imported key is stored, from its SHA-256.
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

/// The hashes under which a key may be stored, from its SHA-256: the plain one, then the one with the pepper, if there is
/// one. The second is computed only if the iterator gets there.
pub fn hashes(plain: KeyHash, pepper: Option<&Pepper>) -> impl Iterator<Item = KeyHash> {
    iter::once(plain).chain(pepper.into_iter().map(move |pepper| pepper.hash(&plain)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";

    #[test]
    fn the_peppered_hash_is_the_hmac_of_the_plain_one() {
        // printf key-of-the-old-gateway-1 | openssl sha256 -binary | openssl sha256 -mac hmac -macopt hexkey:0001…1f
        let hash = Pepper::parse(TEXT).unwrap().hash(&KeyHash::of(b"key-of-the-old-gateway-1"));
        assert_eq!(format!("{hash}"), "3a4fce8f4e868d07a93200d13323ca3218a2b8f7cb40d0897fbb92c72b3580ad");
    }

    #[test]
    fn a_key_is_looked_up_by_its_plain_hash_and_then_with_the_pepper() {
        let (plain, pepper) = (KeyHash::of(b"a"), Pepper::parse(TEXT).unwrap());
        assert_eq!(hashes(plain, None).collect::<Vec<_>>(), [plain]);
        assert_eq!(hashes(plain, Some(&pepper)).collect::<Vec<_>>(), [plain, pepper.hash(&plain)]);
    }

    #[test]
    fn a_text_that_is_not_a_pepper_is_refused_and_debug_prints_no_pepper() {
        for text in ["", "00", &TEXT[1..], &format!("{TEXT}0"), &TEXT.replace('0', "g")] {
            assert_eq!(Pepper::parse(text).err(), Some(PepperError));
        }
        assert_eq!(format!("{:?}", Pepper::parse(TEXT).unwrap()), "Pepper(…)");
    }
}

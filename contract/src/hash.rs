//! The hash of a key, by which the store finds its record.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::id::byte_name;

/// Buckets of the store. The first 16 bits of a hash are the number of its bucket.
pub const BUCKETS: u32 = 65_536;

byte_name! {
    /// The SHA-256 of a key. As text: 64 lower-case hexadecimal digits.
    KeyHash, 32
}

impl KeyHash {
    /// Hashes a key as the client sent it. Its bytes need not be text.
    #[must_use]
    pub fn of(presented: &[u8]) -> Self {
        Self(Sha256::digest(presented).into())
    }

    /// Which of the [`BUCKETS`] has this key's record.
    #[must_use]
    pub const fn bucket(&self) -> u16 {
        let [high, low, ..] = self.0;
        u16::from_be_bytes([high, low])
    }
}

impl fmt::Display for KeyHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl FromStr for KeyHash {
    type Err = hex::FromHexError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes)?;
        Ok(Self(bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_plain_sha_256() {
        // FIPS 180-2, appendix B.1.
        let hash = KeyHash::of(b"abc");
        assert_eq!(hash.to_string(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(hash.bucket(), 0xba78);
    }
}

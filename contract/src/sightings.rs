//! Unknown keys, and policies that routes name, as filters report them.

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError, SIGHTINGS};
use crate::hash::KeyHash;

/// Most unknown keys in one message.
pub const UNKNOWN_KEYS: usize = 1_000;

/// Most policies in one message.
pub const POLICIES: usize = 100;

/// What one VM of an Envoy has seen since its last message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sightings {
    /// SHA-256 of each key that the store does not have, without a pepper, under policies with
    /// [`Policy::capture_unknown`](crate::policy::Policy::capture_unknown). At most [`UNKNOWN_KEYS`].
    pub unknown_keys: Vec<KeyHash>,
    /// Names of policies that routes of Envoy named. At most [`POLICIES`].
    pub policies: Vec<String>,
}

impl Sightings {
    /// Encodes the message.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        codec::encode(SIGHTINGS, self)
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(SIGHTINGS, bytes)
    }
}

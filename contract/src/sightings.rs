//! Hashes of keys that the store does not have, which filters capture under policies with
//! [`Policy::capture_unknown`](crate::policy::Policy::capture_unknown). Administrators who move from another system see which
//! of its keys are still in use.

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError, UNKNOWN};
use crate::hash::KeyHash;

/// Most hashes in one message.
pub const HASHES: usize = 1_000;

/// Keys that one VM has captured since its last message.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnknownKeys {
    /// SHA-256 of each key, without a pepper. At most [`HASHES`].
    pub hashes: Vec<KeyHash>,
}

impl UnknownKeys {
    /// Encodes the message.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        codec::encode(UNKNOWN, self)
    }

    /// Decodes a message.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(UNKNOWN, bytes)
    }
}

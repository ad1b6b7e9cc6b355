//! The envelope of every message between filter and control plane: a magic number, a checksum, and a body in postcard.
//!
//! ```text
//! magic (4 bytes) │ CRC-32 of the body (4 bytes, little-endian) │ body (postcard)
//! ```
//!
//! The checksum detects damage and truncation. Authentication is the transport's task.
//!
//! A reader ignores bytes after the fields that it knows, in a body as in the byte strings inside it. A later version may
//! therefore append fields. `docs/src/reference/sync.md`, "Growth", has the rules.

use std::ops::Deref;

use serde::{Deserialize, Serialize};

/// The first four bytes of a message: its kind, and in the last byte the version of its layout. A reader refuses all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Magic(pub [u8; 4]);

/// An [`Update`](crate::update::Update) of the key store.
pub const UPDATE: Magic = Magic(*b"PKS1");
/// A batch of usage [`Report`](crate::usage::Report)s.
pub const USAGE: Magic = Magic(*b"PKU1");
/// The [`Ack`](crate::usage::Ack) of usage reports.
pub const ACK: Magic = Magic(*b"PKA1");

/// The [`Sightings`](crate::sightings::Sightings) of an Envoy.
pub const SIGHTINGS: Magic = Magic(*b"PKN1");

/// Why bytes were refused. No part of a refused message may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than the envelope.
    #[error("the message is cut short")]
    Short,
    /// Another kind of message, or a version of its layout that this program does not know.
    #[error("the message does not start with the expected magic number")]
    Magic,
    /// Damaged in transit.
    #[error("the message does not match its checksum")]
    Checksum,
    /// The checksum matches, but the body is not of the kind that the magic number names.
    #[error("the message is malformed")]
    Malformed,
}

/// Puts an encoded body into its envelope.
#[must_use]
pub fn envelope(magic: Magic, body: &[u8]) -> Vec<u8> {
    [&magic.0[..], &crc32fast::hash(body).to_le_bytes(), body].concat()
}

/// Encodes a message.
///
/// # Errors
/// [`DecodeError::Malformed`] if postcard cannot encode the value. It can encode every message of this crate.
pub fn encode<T: Serialize + ?Sized>(magic: Magic, body: &T) -> Result<Vec<u8>, DecodeError> {
    append(body, Vec::new()).map(|body| envelope(magic, &body))
}

/// Checks the envelope and decodes the body, which may borrow from `bytes`.
///
/// # Errors
/// Each variant of [`DecodeError`].
pub fn decode<'a, T: Deserialize<'a>>(magic: Magic, bytes: &'a [u8]) -> Result<T, DecodeError> {
    let (found, rest) = bytes.split_first_chunk().ok_or(DecodeError::Short)?;
    let (checksum, body) = rest.split_first_chunk().ok_or(DecodeError::Short)?;
    if *found != magic.0 {
        return Err(DecodeError::Magic);
    }
    if *checksum != crc32fast::hash(body).to_le_bytes() {
        return Err(DecodeError::Checksum);
    }
    decode_prefix(body).map(|(body, _newer)| body)
}

/// Decodes the value at the start of `bytes`, and returns the bytes after it.
pub(crate) fn decode_prefix<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<(T, &'a [u8]), DecodeError> {
    postcard::take_from_bytes(bytes).map_err(|_| DecodeError::Malformed)
}

/// Appends an encoded value, without an envelope.
pub(crate) fn append<T: Serialize + ?Sized>(value: &T, to: Vec<u8>) -> Result<Vec<u8>, DecodeError> {
    postcard::to_extend(value, to).map_err(|_| DecodeError::Malformed)
}

/// A byte string that postcard copies as a whole and decodes without a copy. serde's own implementation for slices writes
/// byte by byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes<'a>(pub &'a [u8]);

impl Deref for Bytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.0
    }
}

impl Serialize for Bytes<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Bytes<'a> {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        <&'de [u8]>::deserialize(deserializer).map(Self)
    }
}

/// Encodes an array of bytes as a byte string, which postcard decodes faster than an array.
pub mod byte_array {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Encodes the array.
    ///
    /// # Errors
    /// Those of the serializer.
    pub fn serialize<S: Serializer, const N: usize>(bytes: &[u8; N], to: S) -> Result<S::Ok, S::Error> {
        to.serialize_bytes(bytes)
    }

    /// Decodes the array.
    ///
    /// # Errors
    /// Those of the deserializer, and a byte string of another length.
    pub fn deserialize<'de, D: Deserializer<'de>, const N: usize>(from: D) -> Result<[u8; N], D::Error> {
        let bytes = <&'de [u8]>::deserialize(from)?;
        bytes.try_into().map_err(|_| D::Error::custom("the byte string has another length"))
    }
}

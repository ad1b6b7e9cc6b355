//! The seal around everything that travels between filter and control plane: a mark of the kind, a checksum, the body.
//!
//! ```text
//! mark (4 bytes) │ CRC-32 of the body (4 bytes, little-endian) │ body (postcard)
//! ```
//!
//! The checksum notices damage and truncation; who speaks is the transport's business. Inside a body, whatever may grow
//! stands as a byte string of its own, so that an older reader steps over what it does not know.

extern crate alloc;

use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

/// A kind of message, by its first four bytes. The last of them is the version of the layout as a whole: a reader refuses
/// the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mark(pub [u8; 4]);

/// A page of the store.
pub const PAGE: Mark = Mark(*b"PKP1");
/// Usage reports.
pub const USAGE: Mark = Mark(*b"PKU1");
/// The acknowledgement of usage reports.
pub const ACK: Mark = Mark(*b"PKA1");

const SEAL_BYTES: usize = 8;

/// Why bytes were refused. Nothing of a refused message may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Shorter than its seal.
    #[error("the message is cut short")]
    Short,
    /// Another kind, or a layout that this version does not know.
    #[error("the message does not start with the mark that was expected")]
    Mark,
    /// Damaged on its way.
    #[error("the message does not match its checksum")]
    Checksum,
    /// Sealed well, but not what the mark promises.
    #[error("the message is malformed")]
    Malformed,
}

/// Seals a body.
///
/// # Errors
/// [`DecodeError::Malformed`] if the value cannot be written; the messages of this crate always can.
pub fn seal<T: Serialize>(mark: Mark, body: &T) -> Result<Vec<u8>, DecodeError> {
    let mut out = Vec::from(mark.0);
    out.extend_from_slice(&[0; 4]);
    let mut out = postcard::to_extend(body, out).map_err(|_| DecodeError::Malformed)?;
    let (seal, body) = out.split_at_mut_checked(SEAL_BYTES).ok_or(DecodeError::Malformed)?;
    let checksum = crc32fast::hash(body).to_le_bytes();
    for (to, from) in seal.iter_mut().skip(4).zip(checksum) {
        *to = from;
    }
    Ok(out)
}

/// Opens a sealed message; what it borrows, it borrows from `bytes`.
///
/// # Errors
/// Each variant of [`DecodeError`].
pub fn open<'a, T: Deserialize<'a>>(mark: Mark, bytes: &'a [u8]) -> Result<T, DecodeError> {
    open_part(mark, bytes).map(|(value, _newer)| value)
}

/// The same, with what follows in the body.
pub(crate) fn open_part<'a, T: Deserialize<'a>>(mark: Mark, bytes: &'a [u8]) -> Result<(T, &'a [u8]), DecodeError> {
    let (seal, body) = bytes.split_at_checked(SEAL_BYTES).ok_or(DecodeError::Short)?;
    let (found, checksum) = seal.split_at_checked(4).ok_or(DecodeError::Short)?;
    if found != mark.0 {
        return Err(DecodeError::Mark);
    }
    if checksum != crc32fast::hash(body).to_le_bytes() {
        return Err(DecodeError::Checksum);
    }
    part_of(body)
}

/// Reads the fields that this version knows and leaves the rest to newer ones.
pub(crate) fn part<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, DecodeError> {
    part_of(bytes).map(|(value, _newer)| value)
}

/// The same, with what follows.
pub(crate) fn part_of<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<(T, &'a [u8]), DecodeError> {
    postcard::take_from_bytes(bytes).map_err(|_| DecodeError::Malformed)
}

/// Writes something that may grow, to stand as a byte string of its own.
pub(crate) fn grown<T: Serialize>(value: &T) -> Result<Vec<u8>, DecodeError> {
    postcard::to_allocvec(value).map_err(|_| DecodeError::Malformed)
}

/// A byte string that is written in one piece and read without copying.
pub(crate) struct Bytes<'a>(pub(crate) &'a [u8]);

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

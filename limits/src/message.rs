//! The messages: an Envoy's [`Call`] for allowances, and the control plane's [`Answer`].
//!
//! Everything an Envoy says of a pool is a sum that only grows within a *session*, which starts when the Envoy first uses
//! the pool, and starts anew when it was cut off for too long. So each message replaces all earlier ones: a call may be lost,
//! repeated, or come late, and several workers may ask for one pool at the same time.

use contract::codec::{self, DecodeError, Magic};
use contract::id::ReporterId;
use serde::{Deserialize, Serialize};

use crate::pool::PoolId;

/// The first bytes of a [`Call`].
pub const CALL: Magic = Magic(*b"PKC1");

/// The first bytes of an [`Answer`].
pub const ANSWER: Magic = Magic(*b"PKG1");

/// Most pools in a call, and most pools that an answer recalls.
pub const POOLS: usize = 500;

/// What one worker of an Envoy asks for, and the usage that it tells.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The Envoy process.
    pub reporter: ReporterId,
    /// The Envoy ends: what it holds of any pool is free.
    pub is_last: bool,
    /// At most [`POOLS`], each pool once.
    pub asks: Vec<Ask>,
}

/// What an Envoy says of one pool, and wants from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The pool.
    pub pool: PoolId,
    /// The session, in milliseconds of Unix time or more. A greater one replaces a lesser.
    pub session: u64,
    /// Tokens that the Envoy knows it was granted.
    pub granted: u64,
    /// Tokens that it has spent, also beyond what it was granted: alone, or while the control plane did not answer.
    pub spent: u64,
    /// Tokens that it handed back unspent.
    pub returned: u64,
    /// Rate limits: by how many nanoseconds the theoretical arrival time of the Envoy's own requests is ahead of now.
    pub ahead_ns: u64,
    /// Rate limits: the interval between two requests by which that was computed. 0 for other pools.
    pub interval_ns: u64,
    /// Tokens for the requests that wait now.
    pub need: u64,
    /// Tokens for the cheapest waiting request. With fewer, none is admitted.
    pub least: u64,
    /// Tokens that the Envoy would like to hold beyond that.
    pub want: u64,
}

/// The response to a [`Call`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// How many Envoys are live.
    pub live: u32,
    /// The Envoy is the only live one, for this many milliseconds from when it sent its call: it may decide by itself. 0 if
    /// it is not.
    pub alone_ms: u32,
    /// One for each [`Ask`], in their order.
    pub grants: Vec<Grant>,
    /// Pools whose allowance the Envoy must hand back. At most [`POOLS`].
    pub recalls: Vec<PoolId>,
}

/// What an Envoy is granted of one pool, and the state of the pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Grant {
    /// The session of the Envoy that the control plane knows.
    pub session: u64,
    /// All that the Envoy was granted in this session.
    pub granted: u64,
    /// What of its use the control plane knows: see [`Ask::spent`] of a rate limit, or the reports.
    pub spent: u64,
    /// What it holds of that, as the control plane knows: neither spent nor handed back.
    pub held: u64,
    /// What can still be granted to any Envoy now.
    pub left: u64,
    /// Tokens that other Envoys hold. `u64::MAX`: their usage is not known, since another Envoy may still decide by itself.
    pub others: u64,
    /// In how many milliseconds one more token can be granted if no Envoy hands any back. 0 if one can be granted now,
    /// `u32::MAX` if none comes by itself.
    pub empty_ms: u32,
    /// For how many milliseconds that is certain. It is short while other Envoys hold tokens: they may hand some back, or be
    /// silent for so long that what they hold is free.
    pub known_ms: u32,
    /// Rate limits: by how many nanoseconds the theoretical arrival time of the pool is ahead of now.
    pub ahead_ns: u64,
}

impl Ask {
    /// Reports nothing, and asks for nothing.
    #[must_use]
    pub const fn new(pool: PoolId, session: u64) -> Self {
        Self {
            pool,
            session,
            granted: 0,
            spent: 0,
            returned: 0,
            ahead_ns: 0,
            interval_ns: 0,
            need: 0,
            least: 0,
            want: 0,
        }
    }
}

impl Call {
    /// Encodes the call.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        codec::encode(CALL, self)
    }

    /// Decodes a call.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(CALL, bytes)
    }
}

impl Answer {
    /// Encodes the answer.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn write(&self) -> Result<Vec<u8>, DecodeError> {
        codec::encode(ANSWER, self)
    }

    /// Decodes an answer.
    ///
    /// # Errors
    /// Each variant of [`DecodeError`].
    pub fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode(ANSWER, bytes)
    }
}

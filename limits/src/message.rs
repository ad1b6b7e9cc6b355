//! The messages: an Envoy's [`Call`] for allowances, and the control plane's [`Answer`].
//!
//! What an Envoy was granted, has spent and has handed back of a pool are sums that only grow within a *session*. A session
//! begins when the Envoy first uses the pool. A new one begins after [`FORGOTTEN_MS`](crate::FORGOTTEN_MS) without use, or
//! after the Envoy was cut off for [`VOID_AFTER_MS`](crate::VOID_AFTER_MS). So each message replaces all earlier ones: a call
//! may be lost, repeated or late, and several workers may ask for one pool at the same time.

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

/// The call of one worker of an Envoy: its usage, and the tokens that it asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The Envoy process.
    pub reporter: ReporterId,
    /// This is the last call of the Envoy: it is no longer live, and no request waits for tokens that it still holds.
    pub is_last: bool,
    /// At most [`POOLS`], each pool once.
    pub asks: Vec<Ask>,
}

/// The state of one pool at an Envoy, and the tokens that the Envoy asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The pool.
    pub pool: PoolId,
    /// The session, in milliseconds of Unix time or more. A greater one replaces a lesser.
    pub session: u64,
    /// Tokens that the Envoy knows it was granted.
    pub granted: u64,
    /// Tokens that it has spent: more than it was granted, if it decided by itself or the control plane did not answer.
    pub spent: u64,
    /// Tokens that it handed back unspent.
    pub returned: u64,
    /// Rate limits: by how many nanoseconds the theoretical arrival time of the Envoy's own requests is ahead of now.
    pub ahead_ns: u64,
    /// Rate limits: the interval between two requests with which `ahead_ns` was computed. 0 for other pools.
    pub interval_ns: u64,
    /// Tokens for the requests that wait now.
    pub need: u64,
    /// Tokens for the cheapest waiting request. With fewer, none is admitted.
    pub least: u64,
    /// Tokens that the Envoy would like to hold beyond `need`.
    pub want: u64,
}

/// The response to a [`Call`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// How many Envoys are live.
    pub live: u32,
    /// For how many milliseconds after it sent the call the Envoy may decide by itself, because no other Envoy is live. 0 if it
    /// may not.
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
    /// Tokens that the control plane has booked as spent in this session: those of a rate limit from [`Ask::spent`], others
    /// from the usage reports.
    pub spent: u64,
    /// Tokens that the Envoy holds according to the control plane: granted, and neither spent nor handed back.
    pub held: u64,
    /// What can still be granted to any Envoy now.
    pub left: u64,
    /// Tokens that other Envoys hold and can hand back: those of silent Envoys are not counted. `u64::MAX`: unknown, because
    /// another Envoy may still decide by itself.
    pub others: u64,
    /// In how many milliseconds one more token can be granted if no Envoy hands any back. 0 if one can be granted now,
    /// `u32::MAX` if none comes by itself.
    pub empty_ms: u32,
    /// For how many milliseconds the Envoy may rely on `left`, `others` and `empty_ms`; `u32::MAX`: until `empty_ms` have
    /// passed. The time is short while other Envoys hold tokens, because these may come back to the pool.
    pub known_ms: u32,
    /// Rate limits: by how many nanoseconds the theoretical arrival time of the pool is ahead of now.
    pub ahead_ns: u64,
    /// Rate limits: the interval between two requests with which `ahead_ns` was computed. 0 for other pools. An Envoy decides by
    /// itself only if it has the same.
    pub interval_ns: u64,
    /// How many Envoys have used the pool lately, this one included.
    pub users: u32,
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

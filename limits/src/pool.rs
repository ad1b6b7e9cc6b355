//! Pools: what all Envoys together may spend.

use contract::id::{KeyId, OwnerId};
use contract::rate::{Rate, tag};
use contract::record::{Per, RateLimit, Record};
use serde::{Deserialize, Serialize};

/// The kind of limit that a pool belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Kind {
    /// A rate limit. Its tokens are requests, and come back with time.
    Rate,
    /// A quota. Its tokens are requests of the present window.
    Quota,
    /// The credits of a user.
    Credits,
}

impl Kind {
    /// The number of the kind in the database and in the names of cells.
    #[must_use]
    pub const fn code(self) -> u8 {
        match self {
            Self::Rate => 0,
            Self::Quota => 1,
            Self::Credits => 2,
        }
    }

    /// The kind with this number.
    #[must_use]
    pub const fn from_code(code: u8) -> Option<Self> {
        match code {
            0 => Some(Self::Rate),
            1 => Some(Self::Quota),
            2 => Some(Self::Credits),
            _ => None,
        }
    }
}

/// One pool.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PoolId {
    /// The kind of limit.
    pub kind: Kind,
    /// The key or the user.
    pub subject: Subject,
    /// Tells the pools of one kind and subject apart. A rate limit: the [`tag`] of its name, or
    /// [`owner_tag`]. A quota of an owner: the number of the plan. 0 for others.
    pub tag: u64,
}

impl PoolId {
    /// The pool of a shared rate limit, which is the key's own or that of its plan.
    #[must_use]
    pub fn of_limit(limit: &RateLimit, record: &Record) -> Self {
        let (subject, tag) = match limit.per {
            Per::Key => (record.key_id.into(), tag(&limit.name)),
            Per::Owner => (record.owner_id.into(), owner_tag(&limit.name, record.plan)),
        };
        Self { kind: Kind::Rate, subject, tag }
    }

    /// The pool of the key's quota.
    #[must_use]
    pub fn of_quota(per: Per, record: &Record) -> Self {
        let (subject, tag) = match per {
            Per::Key => (record.key_id.into(), 0),
            Per::Owner => (record.owner_id.into(), record.plan.unwrap_or_default().into()),
        };
        Self { kind: Kind::Quota, subject, tag }
    }

    /// The pool of the owner's credits.
    #[must_use]
    pub fn of_credits(owner: OwnerId) -> Self {
        Self { kind: Kind::Credits, subject: owner.into(), tag: 0 }
    }
}

/// The tag of a limit that is shared by all keys of an owner with this plan.
#[must_use]
pub fn owner_tag(name: &str, plan: Option<u32>) -> u64 {
    tag(&format!("{}/{name}", plan.unwrap_or_default()))
}

/// The key or the user that a pool belongs to, by the bytes of its id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Subject(#[serde(with = "contract::codec::byte_array")] pub [u8; 16]);

impl From<KeyId> for Subject {
    fn from(id: KeyId) -> Self {
        Self(id.0)
    }
}

impl From<OwnerId> for Subject {
    fn from(id: OwnerId) -> Self {
        Self(id.0)
    }
}

/// What a pool allows at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terms {
    /// A rate limit.
    Rate(Rate),
    /// A quota or a balance.
    Stock {
        /// Tokens that are not used, according to the usage reports so far. Negative if more was used than there was.
        left: i64,
        /// In how many milliseconds more tokens come by themselves; `None` if none do.
        renews_in_ms: Option<u64>,
    },
}

/// A theoretical arrival time after the interval has changed: the tokens that are used stay used.
#[must_use]
pub(crate) fn rescale(arrival_ns: u64, from_ns: u64, to_ns: u64, now_ns: u64) -> u64 {
    let used_ns = u128::from(arrival_ns.saturating_sub(now_ns));
    let scaled = used_ns.saturating_mul(to_ns.into()).checked_div(from_ns.into());
    now_ns.saturating_add(scaled.and_then(|ns| u64::try_from(ns).ok()).unwrap_or_default())
}

#[cfg(test)]
mod tests;

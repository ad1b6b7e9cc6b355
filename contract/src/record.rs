//! What a filter knows of one key: a [`Record`], found by the hash of the key, and its binary form.
//!
//! The binary form grows at its end: a reader takes the fields it knows and leaves the rest. A field that *restricts* a key
//! must not be overlooked by a filter that is older than the field, so a record says in [`Record::requires`] what its
//! reader has to understand; a reader that does not refuses the key with [`Outcome::Unsupported`](crate::outcome::Outcome).

extern crate alloc;

use alloc::string::String;
use alloc::vec::Vec;

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError};
use crate::id::{KeyId, OwnerId};
use crate::network::Network;

/// What this version of the decision understands of what a record may require.
pub const UNDERSTOOD: Requires = Requires(Requires::PLAN.0 | Requires::NETWORKS.0 | Requires::BUDGETS.0);

/// Things that a reader has to understand before it may admit a key, one bit each. The fields of the first version need no
/// bit; those of [`Further`] that restrict a key do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Requires(pub u32);

impl Requires {
    /// [`Further::plan`]: limits that stand elsewhere.
    pub const PLAN: Self = Self(1);
    /// [`Further::networks`].
    pub const NETWORKS: Self = Self(1 << 1);
    /// [`Further::quota`] and [`Further::credits`].
    pub const BUDGETS: Self = Self(1 << 2);

    /// Whether a reader that understands `self` may judge a record that requires `needed`.
    #[must_use]
    pub const fn covers(self, needed: Self) -> bool {
        needed.0 & !self.0 == 0
    }
}

/// One secret of one key, as a filter sees it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What a reader has to understand of this record.
    pub requires: Requires,
    /// The key. Limits and usage belong to it.
    pub key_id: KeyId,
    /// Whom the key belongs to.
    pub owner_id: OwnerId,
    /// Which of the key's secrets this is: 1 for the first, counted up by each rotation.
    pub generation: u32,
    /// What has been switched on or off.
    pub flags: Flags,
    /// The first second (Unix time) at which the secret no longer works.
    pub expires_at_s: Option<u64>,
    /// Credits that a request costs unless its route says otherwise.
    pub cost: u32,
    /// The key's own rate limits. Empty: the filter's default applies.
    pub rate_limits: Vec<RateLimit>,
    /// Scopes granted to the key itself.
    pub scopes: Vec<String>,
    /// Roles, by number: named sets of scopes that the store holds beside the records, see
    /// [`Definition`](crate::definition::Definition).
    pub roles: Vec<u32>,
    /// The address list that a client must be on, by number. `None`: any address. Lists by number were never written, so
    /// that no address is on one; see [`Further::networks`].
    pub address_list: Option<u32>,
    /// What later versions added.
    #[serde(default, skip_serializing_if = "Further::is_empty")]
    pub further: Further,
}

/// The fields that the first version of a record did not have. A record without any of them is written as the first
/// version wrote it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Further {
    /// The plan, by number: limits and scopes that the store holds beside the records.
    pub plan: Option<u32>,
    /// Networks that a client's address must be in. Empty: any address.
    pub networks: Vec<Network>,
    /// The key's quota, if it has one.
    pub quota: Option<Budget>,
    /// The credits of the key's owner, if they are metered.
    pub credits: Option<Budget>,
    /// Limits of [`Record::rate_limits`] that each Envoy judges alone, one bit each, the first limit's the lowest. The
    /// others are shared by all Envoys.
    pub alone: u32,
}

impl Further {
    /// Nothing that the first version did not have.
    const NOTHING: Self = Self { plan: None, networks: Vec::new(), quota: None, credits: None, alone: 0 };

    fn is_empty(&self) -> bool {
        *self == Self::NOTHING
    }
}

/// A stock of requests or credits that all Envoys draw from by leases, as a filter needs to know it. What an Envoy has
/// been leased comes with the answers to its usage reports: see [`crate::budget`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// What an Envoy may spend before it has been leased anything in this turn.
    pub starter: u32,
    /// Counted up whenever the stock is filled anew, from 1.
    pub turn: u32,
    /// The second (Unix time) at which a stock that is marked as used up is filled anew by itself.
    pub resets_at_s: Option<u64>,
}

/// One rate limit: `requests` in each `window_s`, of which `burst` may come at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Tells the limits of one key apart, in replies too.
    pub name: String,
    /// How many requests the window allows.
    pub requests: u32,
    /// The window, in seconds.
    pub window_s: u32,
    /// How many requests may come at once after a pause.
    pub burst: u32,
}

/// Switches of a record, one bit each. In JSON: the number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Flags(pub u32);

impl Flags {
    /// Revoked for good. The record stays for a while so that its owner is told so.
    pub const REVOKED: Self = Self(1);
    /// Switched off by its owner, to be switched on again.
    pub const DISABLED: Self = Self(1 << 1);
    /// The quota of the running window is used up.
    pub const QUOTA_EXCEEDED: Self = Self(1 << 2);
    /// The balance of credits is used up.
    pub const CREDITS_EXHAUSTED: Self = Self(1 << 3);

    /// Whether all of `other`'s switches are on.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Both sets of switches, where `on` says so.
    #[must_use]
    pub const fn with(self, other: Self, on: bool) -> Self {
        if on { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
    }
}

impl Record {
    /// A record that grants what a plain new key grants.
    #[must_use]
    pub const fn plain(key_id: KeyId, owner_id: OwnerId) -> Self {
        Self {
            requires: Requires(0),
            key_id,
            owner_id,
            generation: 1,
            flags: Flags(0),
            expires_at_s: None,
            cost: 1,
            rate_limits: Vec::new(),
            scopes: Vec::new(),
            roles: Vec::new(),
            address_list: None,
            further: Further::NOTHING,
        }
    }

    /// The binary form, as pages carry it and buckets keep it.
    ///
    /// # Errors
    /// Never for a record that fits in memory; the codec's signature has the error.
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        let Self { requires, key_id, owner_id, generation, flags, expires_at_s, cost, .. } = self;
        let Self { rate_limits, scopes, roles, address_list, further, .. } = self;
        let who = (requires, key_id, owner_id, generation, flags, expires_at_s, cost);
        let first = codec::grown(&(who, (rate_limits, scopes, roles, address_list)))?;
        if further.is_empty() {
            return Ok(first);
        }
        postcard::to_extend(further, first).map_err(|_| DecodeError::Malformed)
    }

    /// Reads the binary form. Bytes after the known fields belong to a newer version and are left alone.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`] if the known fields do not stand there.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        type Who = (Requires, KeyId, OwnerId, u32, Flags, Option<u64>, u32);
        type May = (Vec<RateLimit>, Vec<String>, Vec<u32>, Option<u32>);
        let ((who, may), rest): ((Who, May), _) = codec::part_of(bytes)?;
        let (requires, key_id, owner_id, generation, flags, expires_at_s, cost) = who;
        let (rate_limits, scopes, roles, address_list) = may;
        let further = if rest.is_empty() { Further::default() } else { codec::part(rest)? };
        Ok(Self {
            requires,
            key_id,
            owner_id,
            generation,
            flags,
            expires_at_s,
            cost,
            rate_limits,
            scopes,
            roles,
            address_list,
            further,
        })
    }
}

//! What a filter knows of one secret of a key: a [`Record`], found by the hash of the secret.
//!
//! Later versions may append fields, see [`crate::codec`]. A filter must not overlook a field that restricts a key. A record
//! therefore says in [`Record::requires`] what its reader must understand; a reader that does not refuses the key with
//! [`Outcome::Unsupported`](crate::outcome::Outcome).

use serde::{Deserialize, Serialize};

use crate::codec::{self, DecodeError};
use crate::id::{KeyId, OwnerId};
use crate::key::KeyKind;
use crate::network::Network;

/// The restrictions that this version understands.
pub const UNDERSTOOD: Requires = Requires(Requires::PLAN.0 | Requires::NETWORKS.0 | Requires::BUDGETS.0);

/// Restrictions that a reader must understand before it may admit a key, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Requires(pub u32);

impl Requires {
    /// [`Record::plan`]: limits that are not part of the record.
    pub const PLAN: Self = Self(1);
    /// [`Record::networks`].
    pub const NETWORKS: Self = Self(1 << 1);
    /// [`Record::quota`] and [`Record::credits`].
    pub const BUDGETS: Self = Self(1 << 2);

    /// Whether a reader that understands `self` may decide on a record that requires `needed`.
    #[must_use]
    pub const fn covers(self, needed: Self) -> bool {
        needed.0 & !self.0 == 0
    }
}

/// One secret of one key, as a filter knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// What a reader must understand of this record.
    pub requires: Requires,
    /// The key, which has the limits and the usage.
    pub key_id: KeyId,
    /// The owner of the key.
    pub owner_id: OwnerId,
    /// The number of the secret: 1 for the first, one more with each rotation.
    pub generation: u32,
    /// Whether the key is for production or for tests.
    pub kind: KeyKind,
    /// Conditions in which the key is refused.
    pub flags: Flags,
    /// The first second (Unix time) at which the secret does not work any longer.
    pub expires_at_s: Option<u64>,
    /// Credits that a request costs unless its route says otherwise.
    pub cost: u32,
    /// The key's own rate limits. Empty: those of its plan, else the default of the filter.
    pub rate_limits: Vec<RateLimit>,
    /// The key's own scopes.
    pub scopes: Vec<String>,
    /// Numbers of its roles, see [`Definition`](crate::definition::Definition).
    pub roles: Vec<u32>,
    /// The number of its plan, see [`Definition`](crate::definition::Definition).
    pub plan: Option<u32>,
    /// Networks that the client's address must be in. Empty: any address.
    pub networks: Vec<Network>,
    /// The key's quota.
    pub quota: Option<Budget>,
    /// The owner's credits, if they are metered.
    pub credits: Option<Budget>,
    /// Attributes of the key and its owner. No check uses them.
    pub attributes: Vec<Attribute>,
}

/// An attribute of a key or its owner. The filter passes it upstream in a header if its configuration names it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attribute {
    /// `key.external_id`, `owner.external_id`, `key.metadata.NAME` or `owner.metadata.NAME`.
    pub name: String,
    /// The value of the header. `%` and all characters other than visible ASCII and spaces are percent-encoded (RFC 3986,
    /// section 2.1).
    pub value: String,
}

/// A quota or a balance of credits, as a filter needs to know it. What is left of it is known to the control plane.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Budget {
    /// Counted up whenever tokens are added other than by time: a quota that is raised or reset, a top-up, a refill. A filter
    /// that knows the budget to be exhausted asks again then.
    pub fill: u32,
    /// The second (Unix time) at which an exhausted budget is filled by itself.
    pub resets_at_s: Option<u64>,
    /// Whose it is.
    pub per: Per,
}

/// Who shares a limit or a quota.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Per {
    /// Each key has its own.
    #[default]
    Key,
    /// All keys of an owner that have the plan together have one.
    Owner,
}

/// A rate limit: `requests` in each `window_s`, of which `burst` may come at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RateLimit {
    /// Unique among the limits of a key. Replies show it.
    pub name: String,
    /// Requests that the window allows.
    pub requests: u32,
    /// The window, in seconds.
    pub window_s: u32,
    /// Requests that may come at once after a pause.
    pub burst: u32,
    /// Whether the limit applies to all Envoys together. Otherwise each Envoy enforces all of it by itself.
    pub shared: bool,
    /// Whose it is. Only a plan has limits for an owner.
    #[serde(default)]
    pub per: Per,
}

/// Conditions of a key, one bit each. In JSON: the number.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Flags(pub u32);

impl Flags {
    /// Revoked for good. Filters keep the record for a while, so that clients get `revoked` and not `unknown`.
    pub const REVOKED: Self = Self(1);
    /// Switched off until its owner or an administrator switches it on again.
    pub const DISABLED: Self = Self(1 << 1);
    /// The quota of the current window is used up.
    pub const QUOTA_EXCEEDED: Self = Self(1 << 2);
    /// The balance of credits is used up.
    pub const CREDITS_EXHAUSTED: Self = Self(1 << 3);

    /// Whether all flags of `other` are set.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Sets the flags of `other` if `on`, else clears them.
    #[must_use]
    pub const fn with(self, other: Self, on: bool) -> Self {
        if on { Self(self.0 | other.0) } else { Self(self.0 & !other.0) }
    }
}

impl Record {
    /// The record of a new key without restrictions.
    #[must_use]
    pub const fn plain(key_id: KeyId, owner_id: OwnerId) -> Self {
        Self {
            requires: Requires(0),
            key_id,
            owner_id,
            generation: 1,
            kind: KeyKind::Live,
            flags: Flags(0),
            expires_at_s: None,
            cost: 1,
            rate_limits: Vec::new(),
            scopes: Vec::new(),
            roles: Vec::new(),
            plan: None,
            networks: Vec::new(),
            quota: None,
            credits: None,
            attributes: Vec::new(),
        }
    }

    /// The value of an attribute, if the key or its owner has it.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<&str> {
        self.attributes.iter().find(|attribute| attribute.name == name).map(|attribute| attribute.value.as_str())
    }

    /// The restrictions of the record, for [`Record::requires`].
    #[must_use]
    pub fn restrictions(&self) -> Requires {
        let restrictions = [
            (Requires::PLAN, self.plan.is_some()),
            (Requires::NETWORKS, !self.networks.is_empty()),
            (Requires::BUDGETS, self.quota.is_some() || self.credits.is_some()),
        ];
        Requires(restrictions.into_iter().filter(|(_, is_set)| *is_set).fold(0, |bits, (bit, _)| bits | bit.0))
    }

    /// The encoded form, as updates carry it and cells keep it.
    ///
    /// # Errors
    /// None in practice: see [`codec::encode`].
    pub fn to_bytes(&self) -> Result<Vec<u8>, DecodeError> {
        codec::append(self, Vec::new())
    }

    /// Decodes a record and ignores fields that a later version appended.
    ///
    /// # Errors
    /// [`DecodeError::Malformed`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        codec::decode_prefix(bytes).map(|(record, _newer)| record)
    }
}

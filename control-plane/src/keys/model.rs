//! Keys as the control plane knows them, apart from their secrets.

use contract::key::{KeyKind, Secret};
use contract::record::Record;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::effective::EffectivePermissions;
use super::permissions::Permissions;
use crate::domain::{Email, KeyName, Quota, Scopes, StoredLimit};

/// A key as people see it.
#[derive(Clone, Debug)]
pub struct Key {
    /// The id of the key.
    pub id: Uuid,
    /// The id of its owner.
    pub owner_id: Uuid,
    /// The owner's address.
    pub email: String,
    /// A name for people.
    pub name: String,
    /// The start of the secret, by which people recognise it; none for keys of a foreign form.
    pub prefix: Option<String>,
    /// Scopes granted to it.
    pub scopes: Vec<String>,
    /// Its own rate limits.
    pub rate_limits: Json<Vec<StoredLimit>>,
    /// The number of its current secret, from 1.
    pub generation: i32,
    /// Counted up with each change.
    pub version: i64,
    /// Whether it is disabled.
    pub disabled: bool,
    /// Whether an admin has done so: then only an admin switches it on again.
    pub disabled_by_admin: bool,
    /// When it was created.
    pub created_at: OffsetDateTime,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
    /// When it was revoked.
    pub revoked_at: Option<OffsetDateTime>,
    /// When it was last used, as far as filters reported.
    pub last_used_at: Option<OffsetDateTime>,
    /// Allowed requests of all its secrets.
    pub usage_count: i64,
}

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// Whom it is for; made a user if not one yet.
    pub email: Email,
    /// A name for people.
    pub name: KeyName,
    /// Live or test.
    pub kind: KeyKind,
    /// Scopes granted to it.
    pub scopes: Scopes,
    /// Its own rate limits.
    pub rate_limits: Vec<StoredLimit>,
    /// What else it may.
    pub permissions: Permissions,
    /// When it ends.
    pub expires_at: Option<OffsetDateTime>,
    /// How many live keys its owner may have with it; as many as they like if none.
    pub at_most: Option<i64>,
    /// How many keys and rotations its owner may make in 24 hours with it; as many as they like if none.
    pub per_day: Option<u32>,
}

/// Live keys that a user may make for themselves, so that no key of a user can fill the memory of every Envoy. Admins
/// make as many as they like.
pub const LIVE_KEYS: i64 = 100;

impl NewKey {
    /// A live key that grants nothing in particular and does not end.
    #[must_use]
    pub fn plain(email: Email, name: KeyName) -> Self {
        let (scopes, rate_limits, permissions) = (Scopes::default(), Vec::new(), Permissions::default());
        let kind = KeyKind::Live;
        Self { email, name, kind, scopes, rate_limits, permissions, expires_at: None, at_most: None, per_day: None }
    }
}

/// What authentication needs of a key.
#[derive(Clone, Debug)]
pub struct StoredKey {
    /// What a filter would know of it.
    pub record: Record,
    /// The owner's address.
    pub email: String,
    /// What is the key's own.
    pub own: OwnTerms,
}

/// What a key has of its own rather than by its plan or its owner.
#[derive(Clone, Debug, Default)]
pub struct OwnTerms {
    /// Its plan, by number.
    pub plan: Option<i32>,
    /// Its quota.
    pub quota: Option<Quota>,
}

/// The user's side of the primary key.
#[derive(Clone, Debug, Default)]
pub struct PrimaryStatus {
    /// Credits.
    pub balance: i64,
    /// The primary key, unless it was revoked.
    pub key: Option<Key>,
}

/// A key that was made.
#[derive(Debug)]
pub struct CreatedKey {
    /// The key.
    pub key: Key,
    /// Its secret, which cannot be read later.
    pub secret: Secret,
    /// What it may, if no query is needed to know it.
    pub effective: Option<EffectivePermissions>,
}

//! Keys as the control plane knows them, apart from their secrets.

use contract::key::{KeyKind, Secret};
use contract::record::{RateLimit, Record};
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::effective::EffectivePermissions;
use super::permissions::Permissions;
use crate::domain::{Attributes, Email, KeyName, Quota, Scopes};

/// A key, without its secret.
#[derive(Clone, Debug)]
pub struct Key {
    pub id: Uuid,
    pub owner_id: Uuid,
    pub email: String,
    pub name: String,
    /// The start of the secret, by which people recognise it; none for imported keys of another format.
    pub prefix: Option<String>,
    /// `live` or `test`.
    pub kind: String,
    pub attributes: Option<Json<Attributes>>,
    pub scopes: Vec<String>,
    pub rate_limits: Json<Vec<RateLimit>>,
    /// The number of its current secret, from 1.
    pub generation: i32,
    /// Incremented by each change.
    pub version: i64,
    pub disabled: bool,
    /// Whether an admin disabled it. Then only an admin can enable it.
    pub disabled_by_admin: bool,
    pub created_at: OffsetDateTime,
    pub expires_at: Option<OffsetDateTime>,
    pub revoked_at: Option<OffsetDateTime>,
    /// When it was last used, as far as filters reported.
    pub last_used_at: Option<OffsetDateTime>,
    /// Allowed requests of all its secrets.
    pub usage_count: i64,
}

/// A key to be created.
#[derive(Clone, Debug)]
pub struct NewKey {
    /// The owner, who is created if there is no such user.
    pub email: Email,
    pub name: KeyName,
    /// Live or test.
    pub kind: KeyKind,
    pub scopes: Scopes,
    pub rate_limits: Vec<RateLimit>,
    pub permissions: Permissions,
    pub expires_at: Option<OffsetDateTime>,
    /// Most live keys of its owner, this one included; `None`: unlimited.
    pub at_most: Option<i64>,
    /// Most keys and rotations of its owner in 24 hours; `None`: unlimited.
    pub per_day: Option<u32>,
}

/// Most live keys that users may create for themselves, so that no user fills the memory of every Envoy. Admins are not limited.
pub const LIVE_KEYS: i64 = 100;

impl NewKey {
    /// A live key without scopes, limits and expiry.
    pub fn plain(email: Email, name: KeyName) -> Self {
        let (scopes, rate_limits, permissions) = (Scopes::default(), Vec::new(), Permissions::default());
        let kind = KeyKind::Live;
        Self { email, name, kind, scopes, rate_limits, permissions, expires_at: None, at_most: None, per_day: None }
    }
}

/// A key as authentication needs it.
#[derive(Clone, Debug)]
pub struct StoredKey {
    /// The record as filters know it.
    pub record: Record,
    pub email: String,
    /// What is its own and not of its plan or its owner.
    pub own: OwnTerms,
}

/// Settings of a key itself, apart from those of its plan and its owner.
#[derive(Clone, Debug, Default)]
pub struct OwnTerms {
    /// The number of its plan.
    pub plan: Option<i32>,
    pub quota: Option<Quota>,
}

/// A created key.
#[derive(Debug)]
pub struct CreatedKey {
    pub key: Key,
    /// The secret, which cannot be read later.
    pub secret: Secret,
    /// Its permissions, if they are known without a query.
    pub effective: Option<EffectivePermissions>,
}

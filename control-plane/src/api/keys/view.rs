//! Keys as clients read them.

use contract::key::Secret;
use serde::{Deserialize, Serialize, Serializer};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::record::kind;
use crate::domain::{Attributes, KindBody, Metadata, RateLimitBody, Timestamp};
use crate::keys::effective::EffectivePermissions;
use crate::keys::model::Key;

/// Whether a key is valid, and if not, why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum KeyState {
    /// It is valid.
    Active,
    /// It is disabled and can be enabled.
    Disabled,
    /// It has expired.
    Expired,
    /// It was revoked, which cannot be undone.
    Revoked,
}

impl KeyState {
    /// Its name.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Disabled => "disabled",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }

    fn new(key: &Key, now: OffsetDateTime) -> Self {
        if key.revoked_at.is_some() {
            Self::Revoked
        } else if key.expires_at.is_some_and(|end| now >= end) {
            Self::Expired
        } else if key.disabled {
            Self::Disabled
        } else {
            Self::Active
        }
    }
}

/// A key, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct KeyView {
    /// The id of the key.
    id: Uuid,
    /// The id of its owner.
    owner_id: Uuid,
    /// The owner's email address.
    #[schema(example = "user@example.com")]
    email: String,
    /// A name for people.
    #[schema(example = "Production Key")]
    name: String,
    /// The start of the secret, by which people recognise it; null for keys of a foreign form.
    #[schema(required, example = "sk_abc123")]
    prefix: Option<String>,
    /// Whether it is for production or for tests.
    kind: KindBody,
    /// Its id in another system.
    #[schema(required, example = "key_42")]
    external_id: Option<String>,
    /// Metadata that the filter can pass upstream.
    #[schema(value_type = BTreeMap<String, serde_json::Value>, example = json!({"project": "search"}))]
    metadata: Metadata,
    /// Scopes granted to it.
    scopes: Vec<String>,
    /// Its own rate limits; without any, those of its plan, else of its owner's plan, else the filter's.
    rate_limits: Vec<RateLimitBody>,
    /// The number of its current secret, from 1.
    generation: i32,
    /// Whether it is valid, and if not, why.
    state: KeyState,
    /// Whether an admin disabled it. Then only an admin enables it.
    disabled_by_admin: bool,
    /// When it was created.
    created_at: Timestamp,
    /// When it expires; null: never.
    #[schema(required)]
    expires_at: Option<Timestamp>,
    /// When it was revoked.
    #[schema(required)]
    revoked_at: Option<Timestamp>,
    /// When it was last used, as far as filters reported.
    #[schema(required)]
    last_used_at: Option<Timestamp>,
    /// Requests that were allowed with it.
    usage_count: i64,
    /// Its permissions.
    #[serde(flatten)]
    effective: EffectivePermissions,
}

impl KeyView {
    pub(super) fn new(key: Key, effective: EffectivePermissions, now: OffsetDateTime) -> Self {
        let Attributes { external_id, metadata } =
            key.attributes.clone().map(|attributes| attributes.0).unwrap_or_default();
        Self {
            state: KeyState::new(&key, now),
            disabled_by_admin: key.disabled_by_admin,
            effective,
            id: key.id,
            owner_id: key.owner_id,
            email: key.email,
            name: key.name,
            prefix: key.prefix,
            kind: kind(&key.kind).into(),
            external_id,
            metadata,
            scopes: key.scopes,
            rate_limits: key.rate_limits.iter().map(RateLimitBody::of).collect(),
            generation: key.generation,
            created_at: key.created_at.into(),
            expires_at: key.expires_at.map(Into::into),
            revoked_at: key.revoked_at.map(Into::into),
            last_used_at: key.last_used_at.map(Into::into),
            usage_count: key.usage_count,
        }
    }
}

/// A new key.
#[derive(Debug, Serialize, ToSchema)]
pub struct CreateReply {
    /// The whole key. No later response contains it.
    #[serde(serialize_with = "reveal")]
    #[schema(value_type = String)]
    pub(super) secret: Secret,
    /// The key as later responses show it.
    #[serde(flatten)]
    pub(super) view: KeyView,
}

/// Writes a key into the one reply that hands it to its owner.
pub(in crate::api) fn reveal<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(secret.reveal())
}

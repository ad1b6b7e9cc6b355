//! Creates keys. A secret is generated here and shown once, in the response. The database stores its hash and its prefix.

use contract::key::{KeyKind, Secret};
use serde_json::json;
use sqlx::PgConnection;
use sqlx::types::Json;
use time::OffsetDateTime;
use uuid::Uuid;

use super::daily_limit::{self, Act};
use super::effective::EffectivePermissions;
use super::model::{CreatedKey, Key, NewKey};
use super::permissions::ResolvedPermissions;
use super::purge::forget_ended;
use super::revoke::{lock_to_revoke, revoke};
use crate::audit::{Actor, AuditEvent};
use crate::change::{Change, Writer};
use crate::domain::{Attributes, AttributesPatch, Email, KeyName, Scopes, Timestamp};
use crate::error::ApiError;
use crate::quota::{Whose, apply_quotas};
use crate::users::lock::lock_or_create_user;

/// Creates a key. 409 if the owner has too many live keys, 429 if the owner created too many, 400 for an unknown role or plan.
pub async fn create(change: &mut Change, new: NewKey) -> Result<CreatedKey, ApiError> {
    let secret = generate(new.kind)?;
    let (user, _) = lock_or_create_user(change, &new.email).await?;
    count_against_daily_limit(change, user.id, &new).await?;
    let permissions = new.permissions.resolve(change).await?;
    let id = Uuid::now_v7();
    // The key comes last: it takes the lock that orders the changes of all keys.
    change.record(AuditEvent::on_key("key.create", id, audit_detail(&new))).await?;
    let row = insert(change, id, user.id, &new, &permissions, &secret).await?;
    let effective = row.is_plain(&permissions).then(|| EffectivePermissions::plain(new.scopes.as_slice(), row.cost));
    let key = Key {
        id,
        owner_id: user.id,
        email: new.email.as_str().into(),
        name: new.name.as_str().into(),
        prefix: secret.display_prefix(),
        kind: new.kind.name().into(),
        attributes: attributes_of(&new),
        scopes: new.scopes.as_slice().into(),
        rate_limits: Json(new.rate_limits),
        generation: row.generation,
        version: row.version,
        disabled: false,
        disabled_by_admin: false,
        created_at: row.created_at,
        expires_at: new.expires_at,
        revoked_at: None,
        last_used_at: None,
        usage_count: 0,
    };
    Ok(CreatedKey { key, secret, effective })
}

fn attributes_of(new: &NewKey) -> Option<Json<Attributes>> {
    let AttributesPatch { external_id, metadata } = new.permissions.attributes.clone();
    let attributes = Attributes { external_id: external_id.value().cloned(), metadata: metadata.unwrap_or_default() };
    (attributes != Attributes::default()).then_some(Json(attributes))
}

fn audit_detail(new: &NewKey) -> serde_json::Value {
    let mut detail = json!({
        "email": new.email.as_str(), "name": new.name.as_str(), "kind": new.kind.name(), "scopes": new.scopes.as_slice(),
        "expires_at": new.expires_at.map(Timestamp::from),
    });
    if let serde_json::Value::Object(permissions) = new.permissions.audit_detail() {
        permissions.into_iter().for_each(|(field, value)| detail[field] = value);
    }
    detail
}

/// Creates the primary key of a user, and revokes the one before it. `may_revoke` decides by the scopes of that key.
pub async fn replace_primary(
    change: &mut Change,
    new: &NewKey,
    may_revoke: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<Secret, ApiError> {
    let secret = generate(new.kind)?;
    let (user, _) = lock_or_create_user(change, &new.email).await?;
    count_against_daily_limit(change, user.id, new).await?;
    let permissions = new.permissions.resolve(change).await?;
    if let Some(id) = user.primary_key_id
        && let Some(old) = lock_to_revoke(change, id, may_revoke).await?
    {
        revoke(change, &old).await?;
    }
    let id = Uuid::now_v7();
    insert(change, id, user.id, new, &permissions, &secret).await?;
    sqlx::query!("update user_preferences set primary_key_id = $2 where id = $1", user.id, id)
        .execute(&mut **change)
        .await?;
    change.record(AuditEvent::on_key("key.create", id, audit_detail(new))).await?;
    Ok(secret)
}

/// Stores a key that the operator configured. A key that is stored already stays as it is. Returns whether the key is new.
pub async fn insert_given(
    writer: &Writer,
    secret: &Secret,
    name: &KeyName,
    scopes: &Scopes,
    email: &Email,
) -> Result<bool, ApiError> {
    let work = async |change: &mut Change| {
        let (user, _) = lock_or_create_user(change, email).await?;
        let hash = secret.hash();
        let there = sqlx::query_scalar!(
            r#"select exists (select from api_keys where hash = $1) as "there!""#,
            hash.0.as_slice()
        )
        .fetch_one(&mut **change)
        .await?;
        if !there {
            let new = NewKey { scopes: scopes.clone(), ..NewKey::plain(email.clone(), name.clone()) };
            let id = Uuid::now_v7();
            insert(change, id, user.id, &new, &ResolvedPermissions::default(), secret).await?;
            change.record(AuditEvent::on_key("key.create", id, audit_detail(&new))).await?;
        }
        Ok(!there)
    };
    writer.change(&Actor::system(), work).await
}

/// Refuses a key beyond the number that its owner, whose row is locked, may create in a day.
async fn count_against_daily_limit(
    connection: &mut PgConnection,
    owner_id: Uuid,
    new: &NewKey,
) -> Result<(), ApiError> {
    match new.per_day {
        Some(per_day) => daily_limit::take(connection, owner_id, Act::Create, per_day).await,
        None => Ok(()),
    }
}

struct InsertedRow {
    generation: i32,
    version: i64,
    created_at: OffsetDateTime,
    cost: i32,
    owner_plan_number: Option<i32>,
}

impl InsertedRow {
    /// Whether no role, plan or quota applies to the key.
    fn is_plain(&self, permissions: &ResolvedPermissions) -> bool {
        permissions.is_empty() && self.owner_plan_number.is_none()
    }
}

async fn insert(
    connection: &mut PgConnection,
    id: Uuid,
    owner_id: Uuid,
    new: &NewKey,
    permissions: &ResolvedPermissions,
    secret: &Secret,
) -> Result<InsertedRow, ApiError> {
    check_live_keys(connection, owner_id, new).await?;
    let inserted = sqlx::query_as!(
        InsertedRow,
        "insert into api_keys (id, owner_id, name, hash, prefix, scopes, rate_limits, expires_at, role_numbers, plan_number,
            networks, quota, cost, kind, attributes)
        values ($1, $2, $3, $4, $5, $6, $7, $8, coalesce($9::integer[], '{}'), $10, coalesce($11::text[], '{}'), $12,
            coalesce($13::integer, 1), $14, $15)
        returning generation, version, created_at, cost, owner_plan_number",
        id,
        owner_id,
        new.name.as_str(),
        &secret.hash().0[..],
        secret.display_prefix(),
        new.scopes.as_slice(),
        Json(permissions.rate_limits.as_ref().unwrap_or(&new.rate_limits)) as _,
        new.expires_at,
        permissions.roles.as_deref(),
        permissions.plan.value().copied(),
        permissions.networks.as_deref(),
        permissions.quota.value().map(Json) as _,
        permissions.cost,
        new.kind.name(),
        permissions.attributes.column()
    )
    .fetch_one(&mut *connection)
    .await;
    let mut inserted =
        inserted.map_err(|error| match error.as_database_error().and_then(|error| error.constraint()) {
            Some("api_keys_hash_key") => ApiError::Conflict("this key exists already".into()),
            _ => error.into(),
        })?;
    // From here to the commit, this transaction holds the lock that orders all changes, so it executes no needless statement.
    if !inserted.is_plain(permissions) {
        apply_quotas(connection, Whose::Keys(&[id])).await?;
        // The quota that applies is a change of its own.
        inserted.version =
            sqlx::query_scalar!("select version from api_keys where id = $1", id).fetch_one(&mut *connection).await?;
    }
    // Keys expire without a call. When their owner creates the next one, filters forget the oldest.
    if new.per_day.is_some() {
        forget_ended(connection, owner_id).await?;
    }
    Ok(inserted)
}

/// Refuses a key beyond the number of live keys that its owner may have.
async fn check_live_keys(connection: &mut PgConnection, owner_id: Uuid, new: &NewKey) -> Result<(), ApiError> {
    let Some(most) = new.at_most else { return Ok(()) };
    let live = sqlx::query_scalar!(
        r#"select count(*) as "live!" from api_keys
        where owner_id = $1 and revoked_at is null and (expires_at is null or expires_at > now())"#,
        owner_id
    )
    .fetch_one(connection)
    .await?;
    if live >= most {
        let detail = format!("This user has {most} live keys. Revoke one that is not needed, or ask an admin.");
        return Err(ApiError::Conflict(detail));
    }
    Ok(())
}

/// Generates a secret.
pub fn generate(kind: KeyKind) -> Result<Secret, ApiError> {
    Secret::generate(kind, &mut getrandom::SysRng)
        .map_err(|error| ApiError::Internal(format!("the operating system gives no random bytes: {error}")))
}

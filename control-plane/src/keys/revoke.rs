//! Revokes keys: one, the primary one of a user, or all of a user's. Rows of revoked keys stay; filters forget them later,
//! see [`super::purge`].

use serde::Serialize;
use serde_json::json;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use super::lock::{LockedKey, lock_key, lock_store};
use super::purge::forget_ended;
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::domain::{ADMIN, Email, SYNC};
use crate::error::ApiError;
use crate::users::lock::{find_user, lock_user};

/// Revokes a key. A trigger gives the row the next revision, and the commit of the change wakes the feed, which reads the record
/// with its new flag into the mirror, from where the held polls of filters are answered. For a key that is revoked already,
/// nothing changes. 409 for the last admin key.
pub async fn revoke(change: &mut Change, key: &LockedKey) -> Result<(), ApiError> {
    if key.revoked_at.is_some() {
        return Ok(());
    }
    set_caller_address(change, &key.scopes).await?;
    sqlx::query!("update api_keys set revoked_at = now() where id = $1 and revoked_at is null", key.id)
        .execute(&mut **change)
        .await?;
    forget_ended(change, key.owner_id).await?;
    change.record(AuditEvent::on_key("key.revoke", key.id, json!({}))).await?;
    Ok(())
}

/// Revokes the primary key of a user, if `may_revoke` allows it by its scopes. Returns whether there was one that was not revoked.
pub async fn revoke_primary(
    change: &mut Change,
    email: &Email,
    may_revoke: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<bool, ApiError> {
    let Some(user) = find_user(change, email).await? else { return Ok(false) };
    let Some(id) = lock_user(change, user).await?.primary_key_id else { return Ok(false) };
    let Some(key) = lock_to_revoke(change, id, may_revoke).await? else { return Ok(false) };
    revoke(change, &key).await?;
    Ok(true)
}

/// Locks a key, unless it is revoked. The scopes of a key never change, so they are checked before: a caller that may not
/// revoke the key, or finds it revoked, does not take the lock that orders all changes.
pub(super) async fn lock_to_revoke(
    change: &mut Change,
    id: Uuid,
    may_revoke: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<Option<LockedKey>, ApiError> {
    let scopes = sqlx::query_scalar!("select scopes from api_keys where id = $1 and revoked_at is null", id)
        .fetch_optional(&mut **change)
        .await?;
    let Some(scopes) = scopes else { return Ok(None) };
    may_revoke(&scopes)?;
    Ok(lock_key(change, id).await?.filter(|key| key.revoked_at.is_none()))
}

/// The result of revoking the keys of a user.
#[derive(Debug, Serialize, ToSchema)]
pub struct RevokeKeysReply {
    /// Keys that were revoked now.
    #[schema(minimum = 0)]
    pub revoked: i64,
    /// Keys with the scope admin or sync, which only an admin's key revokes.
    #[schema(minimum = 0)]
    skipped: i64,
}

/// Revokes all keys of a user; those with the scope `admin` or `sync` only if `privileged`. 404 if there is no such user, 409
/// for the last admin key.
pub async fn revoke_all(change: &mut Change, owner_id: Uuid, privileged: bool) -> Result<RevokeKeysReply, ApiError> {
    // While the row of the user is locked, no key is created for the user.
    let owner = lock_user(change, owner_id).await?;
    lock_store(change).await?;
    let keys = sqlx::query!(
        r#"select id, scopes && $2 as "opens!" from api_keys where owner_id = $1 and revoked_at is null"#,
        owner.id,
        &[ADMIN.to_owned(), SYNC.to_owned()]
    )
    .fetch_all(&mut **change)
    .await?;
    let (skipped, ended): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.opens && !privileged);
    let ended: Vec<Uuid> = ended.into_iter().map(|key| key.id).collect();
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let all = RevokeKeysReply { revoked: count(ended.len()), skipped: count(skipped.len()) };
    // A statement that changes no row would wake every filter.
    if !ended.is_empty() {
        set_caller_address(change, &[ADMIN.to_owned()]).await?;
        sqlx::query!("update api_keys set revoked_at = now() where id = any($1)", &ended)
            .execute(&mut **change)
            .await?;
        forget_ended(change, owner.id).await?;
        change.record_each("key.revoke", &ended, &json!({"all_of": owner.email})).await?;
    }
    let detail = json!({"revoked": all.revoked, "skipped": all.skipped});
    change.record(AuditEvent::on("user.revoke_keys", &owner.email, detail)).await?;
    Ok(all)
}

/// Sets the address of the caller for the trigger that keeps the last admin key, if a key with these scopes is one. The
/// trigger refuses a change after which no admin key could be used from there.
pub async fn set_caller_address(change: &mut Change, scopes: &[String]) -> Result<(), sqlx::Error> {
    if scopes.iter().any(|scope| scope == ADMIN) {
        let address = change.actor().address.clone().unwrap_or_default();
        let connection: &mut PgConnection = change;
        sqlx::query!("select set_config('portcullis.address', $1, true)", address).fetch_one(connection).await?;
    }
    Ok(())
}

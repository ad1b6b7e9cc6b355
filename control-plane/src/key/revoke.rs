//! The end of keys: one, the primary one of a user, or all of a user's are revoked for good; long after, filters forget
//! them and the secrets that ended. Rows stay.

use serde_json::json;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::domain::{ADMIN, Email, SYNC};
use super::forget::forget_ended;
use super::store::{Held, lock_store};
use crate::audit::{self, Actor, Deed};
use crate::error::ApiError;

/// Revokes a key that is held. One that was revoked before keeps its time.
///
/// # Errors
/// Those of the database.
pub async fn revoke(connection: &mut PgConnection, actor: &Actor, key: &Held) -> Result<(), ApiError> {
    revoke_row(connection, actor, key.id, |_| Ok(())).await.map(|_| ())
}

/// Revokes the user's primary key. Says whether there was one that was not revoked. `may` judges by its scopes whether it
/// may.
///
/// # Errors
/// Those of `may` and of the database.
pub async fn revoke_primary(
    connection: &mut PgConnection,
    actor: &Actor,
    email: &Email,
    may: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<bool, ApiError> {
    let primary = sqlx::query_scalar!(
        "select primary_key_id from user_preferences where email = $1 for no key update",
        email.as_str()
    )
    .fetch_optional(&mut *connection)
    .await?
    .flatten();
    let Some(id) = primary else { return Ok(false) };
    Ok(revoke_row(connection, actor, id, may).await? == Some(true))
}

/// What became of a user's keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RevokedAll {
    /// Keys that were revoked now.
    pub revoked: i64,
    /// Keys that open the control plane and were left alone.
    pub kept: i64,
}

/// Revokes all keys of a user; those that open the control plane only if `privileged`. None if there is no such user.
///
/// # Errors
/// Those of the database.
pub async fn revoke_all(
    connection: &mut PgConnection,
    actor: &Actor,
    email: &Email,
    privileged: bool,
) -> Result<Option<RevokedAll>, ApiError> {
    // With the user's row held no key is made for them meanwhile.
    let owner =
        sqlx::query_scalar!("select id from user_preferences where email = $1 for no key update", email.as_str())
            .fetch_optional(&mut *connection)
            .await?;
    let Some(owner) = owner else { return Ok(None) };
    lock_store(connection).await?;
    let keys = sqlx::query!(
        r#"select id, scopes && $2 as "opens!" from api_keys where owner_id = $1 and revoked_at is null"#,
        owner,
        &[ADMIN.to_owned(), SYNC.to_owned()]
    )
    .fetch_all(&mut *connection)
    .await?;
    let (kept, ended): (Vec<_>, Vec<_>) = keys.into_iter().partition(|key| key.opens && !privileged);
    let ended: Vec<Uuid> = ended.into_iter().map(|key| key.id).collect();
    let count = |number: usize| i64::try_from(number).unwrap_or(i64::MAX);
    let all = RevokedAll { revoked: count(ended.len()), kept: count(kept.len()) };
    // A statement that changes nothing would wake every filter all the same.
    if !ended.is_empty() {
        name_address(connection, actor, &[ADMIN.to_owned()]).await?;
        sqlx::query!("update api_keys set revoked_at = now() where id = any($1)", &ended)
            .execute(&mut *connection)
            .await?;
        forget_ended(connection, owner).await?;
        audit::note_each(connection, actor, "key.revoke", &ended, &json!({"all_of": email.as_str()})).await?;
    }
    let detail = json!({"revoked": all.revoked, "kept": all.kept});
    audit::note(connection, actor, Deed::to("user.revoke_keys", email.as_str(), detail)).await?;
    Ok(Some(all))
}

/// Tells the rule about the last admin key where the caller is, if a key with these scopes is one: see section 7 of
/// `migrations/0001_schema.sql`.
///
/// # Errors
/// Those of the database.
pub async fn name_address(connection: &mut PgConnection, actor: &Actor, scopes: &[String]) -> Result<(), sqlx::Error> {
    if scopes.iter().any(|scope| scope == ADMIN) {
        let address = actor.address.as_deref().unwrap_or_default();
        sqlx::query!("select set_config('portcullis.address', $1, true)", address).fetch_one(connection).await?;
    }
    Ok(())
}

/// Says whether there is such a key, and whether it was revoked now. One that was revoked before is left alone: a statement
/// that changes nothing would wake every filter all the same.
pub(super) async fn revoke_row(
    connection: &mut PgConnection,
    actor: &Actor,
    id: Uuid,
    may: impl Fn(&[String]) -> Result<(), ApiError>,
) -> Result<Option<bool>, ApiError> {
    let key = sqlx::query!(
        r#"select owner_id, scopes, revoked_at is not null as "revoked!" from api_keys where id = $1"#,
        id
    )
    .fetch_optional(&mut *connection)
    .await?;
    let Some(key) = key else { return Ok(None) };
    if key.revoked {
        return Ok(Some(false));
    }
    may(&key.scopes)?;
    name_address(connection, actor, &key.scopes).await?;
    let revoked = sqlx::query!("update api_keys set revoked_at = now() where id = $1 and revoked_at is null", id)
        .execute(&mut *connection)
        .await?
        .rows_affected()
        > 0;
    if revoked {
        forget_ended(connection, key.owner_id).await?;
        audit::note(connection, actor, Deed::to_key("key.revoke", id, json!({}))).await?;
    }
    Ok(Some(revoked))
}

/// Lets filters forget keys that were revoked or expired, and secrets that ended, longer ago than `days`. Says how many.
///
/// # Errors
/// Those of the database.
pub async fn withdraw(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    // A statement that changes nothing would wake every filter all the same.
    let any = sqlx::query!(
        r#"select exists (
                select from api_keys where not withdrawn and least(revoked_at, expires_at) < now() - make_interval(days => $1)
            ) as "keys!",
            exists (
                select from retired_secrets where not withdrawn and ends_at < now() - make_interval(days => $1)
            ) as "secrets!""#,
        days
    )
    .fetch_one(pool)
    .await?;
    let mut withdrawn = 0;
    if any.keys {
        // The condition stands twice: a key that gets a later end while this statement waits for its row stays.
        withdrawn += sqlx::query!(
            "update api_keys set withdrawn = true
            where id in (
                select id from api_keys
                where not withdrawn and least(revoked_at, expires_at) < now() - make_interval(days => $1) limit 10000
            )
            and not withdrawn and least(revoked_at, expires_at) < now() - make_interval(days => $1)",
            days
        )
        .execute(pool)
        .await?
        .rows_affected();
    }
    if any.secrets {
        withdrawn += sqlx::query!(
            "update retired_secrets set withdrawn = true
            where hash in (
                select hash from retired_secrets
                where not withdrawn and ends_at < now() - make_interval(days => $1) limit 10000
            )",
            days
        )
        .execute(pool)
        .await?
        .rows_affected();
    }
    Ok(withdrawn)
}

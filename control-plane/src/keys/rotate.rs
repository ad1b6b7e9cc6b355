//! Rotation: a key gets a new secret and keeps everything else. The old secret works until its end. At most
//! [`ALIVE`] old secrets of a key work at the same time.

use contract::key::Secret;
use serde::Serialize;
use serde_json::json;
use sqlx::PgPool;
use time::Duration;
use utoipa::ToSchema;
use uuid::Uuid;

use super::create::generate;
use super::lock::LockedKey;
use super::purge::forget_ended;
use crate::audit::AuditEvent;
use crate::change::Change;
use crate::domain::record::kind;
use crate::domain::{Timestamp, round_up_to_second};
use crate::error::ApiError;

/// Longest time that an old secret goes on working.
pub const GRACE_S: i64 = 30 * 86_400;

/// Old secrets of one key that work at the same time. Each is a record in the memory of every Envoy.
pub const ALIVE: i64 = 8;

/// Parses how long the old secret goes on working, in seconds.
pub fn parse_grace(seconds: i64) -> Result<Duration, ApiError> {
    if !(0..=GRACE_S).contains(&seconds) {
        let detail = format!("must be a number from 0 to {GRACE_S}, which is thirty days");
        return Err(ApiError::invalid("grace_seconds", detail));
    }
    Ok(Duration::seconds(seconds))
}

/// Gives a locked key a new secret. The old one ends after `grace`, on a whole second, or at once if `grace` is zero. 409 for
/// a revoked or expired key, and for one with too many old secrets.
pub async fn rotate(change: &mut Change, key: &LockedKey, grace: Duration) -> Result<Secret, ApiError> {
    if key.revoked_at.is_some() {
        return Err(ApiError::Conflict("This key is revoked and cannot be rotated.".into()));
    }
    let state = sqlx::query!(
        r#"select clock_timestamp() as "now!",
            (select count(*) from retired_secrets where key_id = $1 and ends_at > clock_timestamp()) as "alive!""#,
        key.id
    )
    .fetch_one(&mut **change)
    .await?;
    if key.expires_at.is_some_and(|end| state.now >= end) {
        return Err(ApiError::Conflict(
            "This key has expired and cannot be rotated. Set a later expires_at first.".into(),
        ));
    }
    if state.alive >= ALIVE && !grace.is_zero() {
        let detail = format!(
            "This key already has {ALIVE} active old secrets. Revoke one first, or rotate without grace_seconds."
        );
        return Err(ApiError::Conflict(detail));
    }
    let secret = generate(kind(&key.kind))?;
    let ends_at = if grace.is_zero() { state.now } else { round_up_to_second(state.now + grace) };
    sqlx::query!(
        "insert into retired_secrets (hash, key_id, generation, prefix, ends_at)
        select hash, id, generation, prefix, $2 from api_keys where id = $1",
        key.id,
        ends_at
    )
    .execute(&mut **change)
    .await?;
    sqlx::query!(
        "update api_keys set hash = $2, prefix = $3, generation = generation + 1 where id = $1",
        key.id,
        &secret.hash().0[..],
        secret.display_prefix()
    )
    .execute(&mut **change)
    .await?;
    forget_ended(change, key.owner_id).await?;
    let detail = json!({"retired": key.generation, "grace_seconds": grace.whole_seconds()});
    change.record(AuditEvent::on_key("key.rotate", key.id, detail)).await?;
    Ok(secret)
}

/// Ends an old secret now. Returns whether there is such a secret. One that has ended keeps its end. 409 for the present
/// secret.
pub async fn revoke_secret(change: &mut Change, key: &LockedKey, generation: i32) -> Result<bool, ApiError> {
    if generation == key.generation {
        let detail = "This is the current secret of the key. Rotate, disable or revoke the key instead.";
        return Err(ApiError::Conflict(detail.into()));
    }
    let alive = sqlx::query_scalar!(
        r#"select ends_at > clock_timestamp() as "alive!" from retired_secrets
        where key_id = $1 and generation = $2 and not withdrawn"#,
        key.id,
        generation
    )
    .fetch_optional(&mut **change)
    .await?;
    if alive == Some(true) {
        sqlx::query!(
            "update retired_secrets set ends_at = clock_timestamp() where key_id = $1 and generation = $2",
            key.id,
            generation
        )
        .execute(&mut **change)
        .await?;
        let detail = json!({"generation": generation});
        change.record(AuditEvent::on_key("secret.revoke", key.id, detail)).await?;
    }
    Ok(alive.is_some())
}

/// One secret of a key.
#[derive(Debug, Serialize, ToSchema)]
pub struct SecretView {
    /// Which one, from 1.
    generation: i32,
    /// The start of the secret, by which people recognise it; null for keys of a foreign form.
    #[schema(required, example = "sk_abc123")]
    prefix: Option<String>,
    /// Whether it is the present one.
    current: bool,
    /// When it stops working; null for the present one, which works as long as the key.
    #[schema(required)]
    ends_at: Option<Timestamp>,
    /// Requests that were allowed with it.
    usage_count: i64,
    /// When it was last used, as far as filters reported.
    #[schema(required)]
    last_used_at: Option<Timestamp>,
}

/// Reads the secrets of a key that are not withdrawn, the newest first.
pub async fn secrets(pool: &PgPool, key_id: Uuid) -> Result<Vec<SecretView>, ApiError> {
    let secrets = sqlx::query_as!(
        SecretView,
        r#"select s.generation as "generation!", s.prefix, s.ends_at is null as "current!", s.ends_at as "ends_at: Timestamp",
            coalesce(u.requests, 0) as "usage_count!", u.last_used_at as "last_used_at?: Timestamp"
        from (
            select id as key_id, generation, prefix, null::timestamptz as ends_at from api_keys where id = $1
            union all
            select key_id, generation, prefix, ends_at from retired_secrets where key_id = $1 and not withdrawn
        ) s
        left join key_usage u on u.key_id = s.key_id and u.generation = s.generation
        order by s.generation desc"#,
        key_id
    )
    .fetch_all(pool)
    .await?;
    Ok(secrets)
}

//! Clean-up of ended keys and secrets: filters forget them ("withdrawn"), and later their rows are deleted.

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use crate::change::transact;

/// Most ended keys of one owner that filters know, and most ended secrets of rotated keys. Beyond, those that ended first are
/// withdrawn at once, so that no owner fills the memory of every Envoy.
pub const REMEMBERED: i64 = 20;

/// Most keys whose rows are deleted in one transaction.
const BATCH: i64 = 1_000;

/// Withdraws the ended keys of an owner, and the ended old secrets, beyond the newest [`REMEMBERED`] of each. If there are no
/// more, nothing is written and no filter is woken.
pub(super) async fn forget_ended(connection: &mut PgConnection, owner_id: Uuid) -> Result<(), sqlx::Error> {
    let keys = sqlx::query_scalar!(
        "select id from api_keys where owner_id = $1 and not withdrawn and least(revoked_at, expires_at) <= now()
        order by least(revoked_at, expires_at) desc, id desc offset $2",
        owner_id,
        REMEMBERED
    )
    .fetch_all(&mut *connection)
    .await?;
    if !keys.is_empty() {
        // A key that was given a later end meanwhile stays.
        sqlx::query!(
            "update api_keys set withdrawn = true where id = any($1) and least(revoked_at, expires_at) <= now()",
            &keys
        )
        .execute(&mut *connection)
        .await?;
    }
    let secrets = sqlx::query_scalar!(
        "select hash from retired_secrets where owner_id = $1 and not withdrawn and ends_at <= clock_timestamp()
        order by ends_at desc, hash offset $2",
        owner_id,
        REMEMBERED
    )
    .fetch_all(&mut *connection)
    .await?;
    if !secrets.is_empty() {
        sqlx::query!("update retired_secrets set withdrawn = true where hash = any($1)", &secrets)
            .execute(connection)
            .await?;
    }
    Ok(())
}

/// Withdraws keys and old secrets that ended more than `days` ago, a batch of them. Returns how many.
pub async fn forget_old(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    // A statement that changes nothing would wake every filter, too.
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
    let mut forgotten = 0;
    if any.keys {
        // The condition is repeated for a key that gets a later end while this statement waits for its row.
        forgotten += sqlx::query!(
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
        forgotten += sqlx::query!(
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
    Ok(forgotten)
}

/// Deletes the rows of withdrawn keys that ended more than `days` ago, with their secrets, a batch of them. A key stays as long as
/// there is usage of it by the hour or by the day, so that sums of usage stay exact. Returns how many.
pub async fn delete_ended(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    transact(pool, async |connection| delete_in(connection, days).await).await
}

async fn delete_in(connection: &mut PgConnection, days: i32) -> Result<u64, sqlx::Error> {
    let keys = sqlx::query_scalar!(
        "select id from api_keys k
        where withdrawn and least(revoked_at, expires_at) < now() - make_interval(days => $1)
            and not exists (select from usage_hourly u where u.key_id = k.id)
            and not exists (select from usage_daily u where u.key_id = k.id)
            and not exists (select from usage_reporters r where r.sync_key_id = k.id)
            and not exists (select from filters f where f.sync_key_id = k.id)
        order by id limit $2 for update skip locked",
        days,
        BATCH
    )
    .fetch_all(&mut *connection)
    .await?;
    if keys.is_empty() {
        return Ok(0);
    }
    sqlx::query!("set local portcullis.purge = 'on'").execute(&mut *connection).await?;
    sqlx::query!("update user_preferences set primary_key_id = null where primary_key_id = any($1)", &keys)
        .execute(&mut *connection)
        .await?;
    sqlx::query!("delete from idempotent_replies where caller_key_id = any($1)", &keys)
        .execute(&mut *connection)
        .await?;
    sqlx::query!("delete from key_usage where key_id = any($1)", &keys).execute(&mut *connection).await?;
    sqlx::query!("delete from quota_use where subject = any($1) and plan_number = 0", &keys)
        .execute(&mut *connection)
        .await?;
    sqlx::query!("delete from retired_secrets where key_id = any($1)", &keys).execute(&mut *connection).await?;
    let gone = sqlx::query!("delete from api_keys where id = any($1)", &keys).execute(connection).await?;
    Ok(gone.rows_affected())
}

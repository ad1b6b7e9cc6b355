//! Keys that filters do not know and that clients use under a policy that captures them. Administrators who move from another
//! system see which of its keys are still in use, and can import them by hash.

use contract::hash::KeyHash;
use contract::pepper::Pepper;
use contract::sightings::UNKNOWN_KEYS;
use serde::Serialize;
use sqlx::{PgConnection, PgPool};
use utoipa::ToSchema;

use crate::audit::AuditEvent;
use crate::change::Change;
use crate::domain::Timestamp;
use crate::error::ApiError;

/// Most unknown keys in the database. When it is full, [`store`] drops new keys and still updates `last_seen_at` of the others.
pub const MOST: i64 = 100_000;

/// Days after which a key that was not seen again is forgotten.
const DAYS: i32 = 30;

/// A key that clients use and that Portcullis does not have.
#[derive(Debug, Serialize, ToSchema)]
pub struct UnknownKeyView {
    /// Its SHA-256, as the import takes it.
    #[schema(example = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08")]
    hash: String,
    /// When it was first seen.
    first_seen_at: Timestamp,
    /// When it was last seen, to the hour.
    last_seen_at: Timestamp,
}

impl UnknownKeyView {
    /// The position of this entry, from which the next page starts.
    pub fn hash(&self) -> &str {
        &self.hash
    }
}

/// Stores the keys that a filter has captured.
///
/// # Errors
/// 400 for more than [`UNKNOWN_KEYS`].
pub async fn store(pool: &PgPool, pepper: Option<&Pepper>, mut captured: Vec<KeyHash>) -> Result<(), ApiError> {
    if captured.len() > UNKNOWN_KEYS {
        return Err(ApiError::invalid("unknown_keys", format!("must have at most {UNKNOWN_KEYS} entries")));
    }
    // Sorted, so that concurrent calls lock rows in one order and cannot deadlock.
    captured.sort_unstable();
    captured.dedup();
    let stored = captured.iter().map(|hash| pepper.map_or(*hash, |pepper| pepper.hash(hash)));
    let stored: Vec<Vec<u8>> = stored.map(|hash| hash.0.to_vec()).collect();
    let hashes: Vec<Vec<u8>> = captured.iter().map(|hash| hash.0.to_vec()).collect();
    sqlx::query!(
        "insert into unknown_keys (hash)
        select new.hash from unnest($1::bytea[], $3::bytea[]) with ordinality as new (hash, stored, place)
        where not exists (select from api_keys k where k.hash in (new.hash, new.stored))
            and not exists (select from retired_secrets r where r.hash in (new.hash, new.stored))
            and (
                (select count(*) from unknown_keys) + new.place <= $2
                or exists (select from unknown_keys u where u.hash = new.hash)
            )
        order by new.place
        on conflict (hash) do update set last_seen_at = now()",
        &hashes,
        MOST,
        &stored
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Reads unknown keys in the order of their hashes: those after the hash of an entry, or the first.
pub async fn list(pool: &PgPool, after: Option<&str>, limit: i64) -> Result<Vec<UnknownKeyView>, ApiError> {
    let after = after.map(|hash| hex::decode(hash.trim_start_matches("sha256:")).unwrap_or_default());
    let keys = sqlx::query_as!(
        UnknownKeyView,
        r#"select 'sha256:' || encode(hash, 'hex') as "hash!", first_seen_at as "first_seen_at: Timestamp",
            last_seen_at as "last_seen_at: Timestamp"
        from unknown_keys where hash > $1 order by hash limit $2"#,
        after.unwrap_or_default(),
        limit
    );
    Ok(keys.fetch_all(pool).await?)
}

/// Forgets all. Returns how many there were.
pub async fn forget_all(change: &mut Change) -> Result<u64, ApiError> {
    let forgotten =
        sqlx::query!("delete from unknown_keys where hash in (select hash from unknown_keys order by hash for update)")
            .execute(&mut **change)
            .await?
            .rows_affected();
    if forgotten > 0 {
        let detail = serde_json::json!({"forgotten": forgotten});
        change.record(AuditEvent { action: "unknown_keys.forget", key_id: None, target: None, detail }).await?;
    }
    Ok(forgotten)
}

/// Forgets keys that are imported now.
pub async fn forget(connection: &mut PgConnection, imported: &[KeyHash]) -> Result<(), sqlx::Error> {
    let hashes: Vec<Vec<u8>> = imported.iter().map(|hash| hash.0.to_vec()).collect();
    sqlx::query!(
        "delete from unknown_keys
        where hash in (select hash from unknown_keys where hash = any($1) order by hash for update)",
        &hashes
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Forgets keys that were not seen for `DAYS` days.
pub async fn forget_old(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let done = sqlx::query!(
        "delete from unknown_keys where hash in (
            select hash from unknown_keys where last_seen_at < now() - make_interval(days => $1) order by hash for update
        )",
        DAYS
    );
    Ok(done.execute(pool).await?.rows_affected())
}

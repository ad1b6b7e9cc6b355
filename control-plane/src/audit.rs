//! The audit trail: who changed what. An entry commits in the transaction of its change. It contains no secret.

use serde::Serialize;
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::domain::Timestamp;

/// Most rows that are deleted in one statement.
const DELETED_TOGETHER: i64 = 1_000;

/// Who changes something.
#[derive(Clone, Debug, Default)]
pub struct Actor {
    /// The key that called; none for the command line and for background jobs.
    pub key_id: Option<Uuid>,
    pub email: Option<String>,
    pub address: Option<String>,
    pub request_id: Option<String>,
}

impl Actor {
    /// The command line, or the control plane itself.
    pub fn system() -> Self {
        Self::default()
    }
}

/// A change. The names of actions are stable.
#[derive(Clone, Debug)]
pub struct AuditEvent<'a> {
    /// Such as `key.create`.
    pub action: &'static str,
    pub key_id: Option<Uuid>,
    /// If no key was changed: the address of a user, the name of a role or plan.
    pub target: Option<&'a str>,
    /// What was set, how many keys were changed.
    pub detail: Value,
}

impl<'a> AuditEvent<'a> {
    /// A change of a key.
    pub const fn on_key(action: &'static str, key_id: Uuid, detail: Value) -> Self {
        Self { action, key_id: Some(key_id), target: None, detail }
    }

    /// A change of anything else.
    pub const fn on(action: &'static str, target: &'a str, detail: Value) -> Self {
        Self { action, key_id: None, target: Some(target), detail }
    }
}

pub async fn record(connection: &mut PgConnection, actor: &Actor, event: AuditEvent<'_>) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into audit (actor_key_id, actor_email, address, request_id, action, key_id, target, detail)
        values ($1, $2, $3, $4, $5, $6, $7, $8)",
        actor.key_id,
        actor.email,
        actor.address,
        actor.request_id,
        event.action,
        event.key_id,
        event.target,
        event.detail
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Records the same event for each of several keys.
pub async fn record_each(
    connection: &mut PgConnection,
    actor: &Actor,
    action: &'static str,
    keys: &[Uuid],
    detail: &Value,
) -> Result<(), sqlx::Error> {
    sqlx::query!(
        "insert into audit (actor_key_id, actor_email, address, request_id, action, key_id, detail)
        select $1, $2, $3, $4, $5, key_id, $7 from unnest($6::uuid[]) as done (key_id)",
        actor.key_id,
        actor.email,
        actor.address,
        actor.request_id,
        action,
        keys,
        detail
    )
    .execute(connection)
    .await?;
    Ok(())
}

/// Who did what.
#[derive(Debug, Serialize, ToSchema)]
pub struct AuditEntry {
    /// Ascending with time.
    pub id: i64,
    /// When.
    pub at: Timestamp,
    /// The key that called; null for the command line, and for an administrator if the caller is none.
    #[schema(required)]
    pub actor_key_id: Option<Uuid>,
    /// Its owner's email address; `an administrator` if that is one and the caller is none.
    #[schema(required, example = "admin@example.com")]
    pub actor_email: Option<String>,
    /// Where the call came from; null for an administrator if the caller is none.
    #[schema(required, example = "192.0.2.7")]
    pub address: Option<String>,
    /// The id of the request, as in the log; null for an administrator if the caller is none.
    #[schema(required)]
    pub request_id: Option<String>,
    /// The action.
    #[schema(example = "key.rotate")]
    pub action: String,
    /// To which key, if it was one.
    #[schema(required)]
    pub key_id: Option<Uuid>,
    /// To what else: a user's address, the name of a role or plan.
    #[schema(required)]
    pub target: Option<String>,
    /// Details, such as each changed field.
    #[schema(value_type = Object)]
    pub detail: Value,
}

/// Conditions on rows. `None` matches all.
#[derive(Clone, Debug, Default)]
pub struct AuditFilter<'a> {
    pub key_id: Option<Uuid>,
    pub actor_key_id: Option<Uuid>,
    pub action: Option<&'a str>,
    pub target: Option<&'a str>,
    pub from: Option<OffsetDateTime>,
    pub to: Option<OffsetDateTime>,
    /// Only changes of this user or of the user's keys.
    pub owner: Option<(Uuid, &'a str)>,
}

/// Reads rows before `before`, the newest first, at most `limit`.
pub async fn trail(
    pool: &PgPool,
    filter: &AuditFilter<'_>,
    before: Option<i64>,
    limit: i64,
) -> Result<Vec<AuditEntry>, sqlx::Error> {
    let (owner_id, owner_email) = filter.owner.unzip();
    sqlx::query_as!(
        AuditEntry,
        "select id, at, actor_key_id, actor_email, address, request_id, action, key_id, target, detail
        from audit
        where id < $1 and ($2::uuid is null or key_id = $2) and ($3::uuid is null or actor_key_id = $3)
            and ($4::text is null or action = $4) and ($5::text is null or target = $5)
            and ($6::timestamptz is null or at >= $6) and ($7::timestamptz is null or at < $7)
            and ($8::uuid is null or target = $9 or key_id in (select id from api_keys where owner_id = $8))
            and ($8::uuid is null or $3::uuid is null or actor_email = $9)
        order by id desc limit $10",
        before.unwrap_or(i64::MAX),
        filter.key_id,
        filter.actor_key_id,
        filter.action,
        filter.target,
        filter.from,
        filter.to,
        owner_id,
        owner_email,
        limit
    )
    .fetch_all(pool)
    .await
}

/// Deletes rows older than `days`, a batch of them. Returns how many.
pub async fn delete_old(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    let gone = sqlx::query!(
        "delete from audit where id = any(array(
            select id from audit where at < now() - make_interval(days => $1) order by at limit $2
        ))",
        days,
        DELETED_TOGETHER
    );
    Ok(gone.execute(pool).await?.rows_affected())
}

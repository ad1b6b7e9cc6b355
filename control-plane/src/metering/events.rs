//! Usage events for other systems: numbered increments of usage, which never change.
//!
//! One writer at a time numbers events without gaps in commit order. A reader that continues after the last number it has read
//! gets every count exactly once.

use sqlx::{PgConnection, PgPool};
use time::OffsetDateTime;
use tracing::info;
use uuid::Uuid;

use crate::change::transact;
use crate::job_lock::JobLock;

/// Most rows of usage in one statement.
const TOGETHER: i64 = 50_000;

/// Usage of one key, hour and outcome since the previous event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Event {
    /// Its place in the stream, from 1.
    pub seq: i64,
    /// Names the event for good.
    pub id: Uuid,
    /// Whose requests.
    pub key_id: Uuid,
    /// Whom the key belonged to when the event was written.
    pub owner_id: Uuid,
    /// The start of the hour in which they came.
    pub hour: OffsetDateTime,
    /// The code of what came of them.
    pub outcome: i16,
    /// How many.
    pub requests: i64,
    /// Credits that they cost together.
    pub cost: i64,
    /// When the event was written.
    pub created_at: OffsetDateTime,
}

/// Writes events for all usage that has none, in statements of bounded size. Returns how many.
pub async fn export_all(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let mut all = 0;
    loop {
        match export(pool).await? {
            0 => return Ok(all),
            written => all += written,
        }
    }
}

/// Writes events for up to 50,000 rows of usage. Returns how many; none if all usage has events or another writer runs.
///
/// Rows that a report is changing are left for the next call, so that neither waits for the other.
pub async fn export(pool: &PgPool) -> Result<u64, sqlx::Error> {
    let written = transact(pool, async |connection| write(connection).await).await?;
    if written > 0 {
        metrics::counter!("portcullis_usage_events_total").increment(written);
    }
    Ok(written)
}

async fn write(connection: &mut PgConnection) -> Result<u64, sqlx::Error> {
    if !JobLock::UsageEvents.try_take(connection).await? {
        return Ok(0);
    }
    let written = sqlx::query!(
        "with counted as materialized (
            select key_id, hour, outcome, generation, requests, cost, requests - exported_requests as more,
                cost - exported_cost as more_cost
            from usage_hourly where unexported
            order by hour limit $1 for update skip locked
        ),
        marked as (
            update usage_hourly u set exported_requests = c.requests, exported_cost = c.cost
            from counted c
            where u.key_id = c.key_id and u.hour = c.hour and u.outcome = c.outcome and u.generation = c.generation
        )
        insert into usage_events (seq, key_id, owner_id, hour, outcome, requests, cost)
        select
            (select coalesce(max(seq), 0) from usage_events)
                + row_number() over (order by c.hour, c.key_id, c.outcome),
            c.key_id, k.owner_id, c.hour, c.outcome, saturate(sum(c.more)), saturate(sum(c.more_cost))
        from counted c join api_keys k on k.id = c.key_id
        group by c.key_id, k.owner_id, c.hour, c.outcome",
        TOGETHER
    )
    .execute(&mut *connection)
    .await?
    .rows_affected();
    Ok(written)
}

/// Deletes events older than `days`, but not the newest, whose number the next event continues. Returns how many.
pub async fn forget(pool: &PgPool, days: i32) -> Result<u64, sqlx::Error> {
    let mut all = 0;
    loop {
        // The oldest first, so that what is left has no gaps.
        let gone = sqlx::query!(
            "delete from usage_events where seq in (
                select seq from usage_events
                where created_at < now() - make_interval(days => $1) and seq < (select max(seq) from usage_events)
                order by seq limit 10000
            )",
            days
        )
        .execute(pool)
        .await?
        .rows_affected();
        if gone == 0 {
            if all > 0 {
                info!(events = all, "deleted usage events past their retention");
            }
            return Ok(all);
        }
        all += gone;
    }
}

/// The numbers of the oldest and the newest event; none if there is no event.
pub async fn bounds(pool: &PgPool) -> Result<Option<(i64, i64)>, sqlx::Error> {
    let row = sqlx::query!("select min(seq) as oldest, max(seq) as newest from usage_events").fetch_one(pool).await?;
    Ok(row.oldest.zip(row.newest))
}

/// Reads the events after a number, in order, at most `limit`.
pub async fn after(pool: &PgPool, seq: i64, limit: i64) -> Result<Vec<Event>, sqlx::Error> {
    sqlx::query_as!(
        Event,
        "select seq, id, key_id, owner_id, hour, outcome, requests, cost, created_at
        from usage_events where seq > $1 order by seq limit $2",
        seq,
        limit
    )
    .fetch_all(pool)
    .await
}
